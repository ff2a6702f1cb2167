"""What real models hold: parameters, and the bytes that one more layer saves for its backward pass; run with torchrun.

Arguments: a JSON file of {name: config dictionary}, and a JSON file to write {name: {parameters, saved}} to.
`saved` is the difference between the model and one with a layer less, so that embedding and loss drop out.

Layers take the path of a GPU, with passes around the products that give and keep the same tensors as the kernels.
"""

import json
import os
import sys
import weakref
from pathlib import Path

from pipeline.cpu_backend import install

if __name__ == "__main__":  # Triton and megatron-core may be imported only after this
    os.environ["TRITON_INTERPRET"] = "1"
    install(cpu=True)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kernels.dispatch import Activation, Before, ReferenceKernels
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.model import Model, build_model
from pipeline.world import initialize_layout
from qsparse_layers import norm
from qsparse_layers.mlp import fuse_activations


class PlainFused:
    """Forward passes of `kernels.dispatch.Fused` in plain operators: faster here than Triton's interpreter."""

    def takes(self, features: int, block: int | None) -> bool:
        """See `Fused.takes`."""
        return True

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Fused.rms_norm`."""
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return (x * rstd * gain).to(x.dtype), rstd

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """See `Fused.activate`."""
        if activation == "relu2":
            return x.relu().square()
        gate, up = x.chunk(2, dim=-1)
        return gate.relu().square() * up

    def sparsify(
        self, x: Tensor, kept: int | None, block: int | None, before: Before
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Fused.sparsify`."""
        rstd = None
        x = self.activate(x, before.activation) if before.activation else x
        if before.gain is not None:
            x, rstd = self.rms_norm(x, before.gain, before.eps)
        return *ReferenceKernels().sparsify(x, kept, block), rstd


class PlainSharded:
    """Forward passes of `kernels.dispatch.Sharded` likewise, of this rank's features as if they were the row."""

    def takes(self, dtype: torch.dtype, features: int, block: int | None) -> bool:
        """See `Sharded.takes`."""
        return dtype == torch.bfloat16

    def row_sums(self, x: Tensor, before: Before) -> Tensor:
        """See `Sharded.row_sums`."""
        return torch.zeros(x[..., 0].numel(), 2)

    def normalize(self, x: Tensor, sums: Tensor, before: Before) -> tuple[Tensor, Tensor]:
        """See `Sharded.normalize`."""
        assert before.gain is not None
        return PlainFused().rms_norm(x, before.gain, before.eps)

    def local_codes(
        self, x: Tensor, sums: Tensor, kept: int | None, block: int | None, before: Before
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Sharded.local_codes`."""
        return PlainFused().sparsify(x, kept, block, before)

    def count_codes(
        self, x: Tensor, sums: Tensor, before: Before
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
        """See `Sharded.count_codes`."""
        return PlainFused().sparsify(x, None, None, before), torch.zeros(sums.shape[1], 16, dtype=torch.int16)

    def count_nearest(self, codes: Tensor, coarse: Tensor, kept: int) -> Tensor:
        """See `Sharded.count_nearest`."""
        return coarse[0, :, :8].contiguous()

    def keep_largest(self, codes: Tensor, coarse: Tensor, fine: Tensor, kept: int, rank: int) -> Tensor:
        """See `Sharded.keep_largest`."""
        return codes


class Kernels(ReferenceKernels):
    """The reference with one-pass forms, so that layers take the autograd functions of a GPU."""

    fused = PlainFused()  # type: ignore[assignment]
    sharded = PlainSharded()  # type: ignore[assignment]


def use(model: Model, kernels: Kernels, *, recompute: bool) -> None:
    """Give all layers `kernels`, as `build_model` does on a GPU."""
    for chunk in model.chunks:
        fuse_activations(chunk, recompute=recompute)
        for module in chunk.modules():
            if isinstance(module, norm.RMSNorm):
                module.fused = kernels.fused
            if hasattr(module, "kernels"):
                module.kernels = kernels


def saved_bytes(config: Config) -> tuple[int, int]:
    """Parameters of this rank and bytes of all distinct storages that a forward pass saves, weights aside."""
    initialize_layout(config)
    try:
        model = build_model(config, 256)
        use(model, Kernels(), recompute=config.training.recompute == "up_projection")
        model.schedule.weights_changed()  # from here on layers keep their codes, as in training
        engine = Engine(model.chunks, config)
        tokens = torch.arange(config.training.seq_length + 1).expand(config.training.micro_batch_size, -1) % 250
        arguments = engine.inputs.arguments(tokens, labels=True)
        model.chunks[0](**arguments)
        owned = {p.untyped_storage().data_ptr() for p in model.chunks[0].parameters()}
        caches = [layer.module.cache._operand for layer in model.layers]
        codes = [tensor for operand in caches if operand for tensor in (operand.values, operand.scale)]
        owned |= {tensor.untyped_storage().data_ptr() for tensor in codes if tensor is not None}
        saved: list[weakref.ref[Tensor]] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(weakref.ref(tensor))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.chunks[0](**arguments)
        assert loss.requires_grad  # and what its graph does not need is gone
        kept = [tensor.untyped_storage() for tensor in (ref() for ref in saved) if tensor is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
        parameters = sum(p.numel() for p in model.chunks[0].parameters())
        return parameters, sum(size for address, size in sizes.items() if address not in owned)
    finally:
        parallel_state.destroy_model_parallel()


def main(cases: dict[str, dict], output: Path) -> None:
    """Measure every case and write what rank 0 holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, values in cases.items():
        layers = values["model"]["num_layers"]
        less = {**values, "model": {**values["model"], "num_layers": layers - 1}}
        parameters, saved = saved_bytes(Config(**values))
        results[name] = {"parameters": parameters, "saved": saved - saved_bytes(Config(**less))[1]}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
