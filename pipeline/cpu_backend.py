"""Run unmodified megatron-core on CPU and gloo, and with an exact Adam where neither Transformer Engine nor Apex is.

megatron-core 0.16 to 0.19 asks `torch.cuda` for the current device, for streams, events, memory and random state, and
creates tensors with `device="cuda"`.  Everything it asks for has a CPU answer: this module gives it.  It is the only
place in the project that patches anything, and on a machine with a GPU it patches nothing but the Adam.

`install()` must run before anything else imports megatron.  Processes started with *spawn* do not inherit it.
"""

import contextlib
import importlib.util
import logging
import queue
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def uses_cpu(device: str) -> bool:
    """Whether a run with `run.device` takes the CPU: asked for, or there is no GPU."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


@cache
def install(*, cpu: bool) -> None:
    """Make megatron-core usable in this process; later calls with the same argument do nothing.

    Args:
        cpu: run on the CPU, also on a machine that has a GPU.
    """
    if cpu:
        _stub_cuda()
        _stub_triton_only_module()
        _CudaIsCpu().__enter__()
        _patch_megatron_for_cpu()
    _use_torch_fused_adam()


class _CudaIsCpu(TorchFunctionMode):
    """Rewrites every request for a CUDA device, and answers type names as megatron's assertions expect them."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        # float64 is for exactness tests: upcasts to float32 leave it alone, type checks take it for float32.
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.", 1).replace("Double", "Float")
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class _Inert:
    """Stands for a CUDA stream or event: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inert)

    __hash__ = object.__hash__

    def _done(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _done

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _answer(value: Any) -> Callable:
    # One function object per name: torch._dynamo refuses one function under two names.
    return lambda *args, **kwargs: value


def _stub_cuda() -> None:
    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _answer(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _answer(0))
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _answer(_Inert()))
    cuda.is_available = _answer(False)
    cuda.current_device = _answer(_CPU)
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _Inert
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # megatron compiles many small functions; the CPU compiler takes half a minute for the first step.
    torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)  # type: ignore[assignment]


def _stub_triton_only_module() -> None:
    """megatron-core >= 0.19 imports triton in one MoE module that a CPU run never enters."""
    if importlib.util.find_spec("triton") is None:
        module = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        module.__getattr__ = lambda name: None  # type: ignore[method-assign]
        sys.modules[module.__name__] = module


def _patch_megatron_for_cpu() -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 without Transformer Engine: NameError in every router
        moe_utils.te_general_gemm = None
    dispatcher.maybe_move_tensor_to_cpu = _split_sizes
    # megatron-core starts a queue server for saves in the background: 3 to 7 s, and it outlives a killed rank, whose
    # sockets a forked one keeps open, so that the other ranks wait for it.  A save that is waited for needs none.
    writer._get_write_results_queue = cache(queue.Queue)


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """all_to_all_single wants lists or arrays of sizes; megatron converts them only if they come from a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _use_torch_fused_adam() -> None:
    """Without Transformer Engine and Apex, give the distributed optimizer an Adam that it can resume (see `adam`)."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    from pipeline.adam import FusedAdam

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
