"""As in tests/kernels: without a GPU, kernels run under Triton's interpreter, chosen before triton loads."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
