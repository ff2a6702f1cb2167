"""Activation and RMSNorm fused with quantization, forward and backward, against their unfused chains.

The unfused forward is the chain of torch operations (eager, or by torch.compile) followed by our sparsify kernel; the
unfused backward is torch's autograd of that chain.  The copy moves as many bytes as the fused kernel has to: inputs
read once, results written once.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from kernels import fused, fused_backward, reference, sparsify
from kernels.dispatch import Activation
from pipeline.bench.kernels.case import Case, Check, Contest, Options, Section, mismatch, relative_error
from pipeline.bench.kernels.drawing import of_floor, ratio_bars, ratio_table
from pipeline.bench.kernels.timing import Call, Rates
from qsparse_layers.norm import rms_norm

EPS = 1e-5
ELEMENTS = 2**26
FEATURES = (4096, 14336)
FEATURES_OF_A_NORM = (2048, 4096, 8192, 14336, 16384)
COMPILED = ("relu2_glu+norm D=4096", "swiglu+norm D=4096")
CHECKED_ROWS = 256

Chain = Callable[[Tensor, Tensor | None], Tensor]


class Form(NamedTuple):
    """What stands in front of the quantization."""

    activation: Activation | None
    norm: bool

    @property
    def halves(self) -> int:
        """Input columns per feature."""
        return 1 if self.activation in (None, "relu2") else 2


FORMS = {
    "norm": Form(None, True),
    "relu2": Form("relu2", False),
    "relu2_glu": Form("relu2_glu", False),
    "relu2_glu+norm": Form("relu2_glu", True),
    "swiglu": Form("swiglu", False),
    "swiglu+norm": Form("swiglu", True),
}


class FusedCase:
    """One form on normal values; half of the features are kept.

    Args:
        form: what is fused.
        tokens: T.
        features: D behind the activation.
        device: where.
        compiled: time torch.compile's chain, too.
    """

    def __init__(self, form: Form, tokens: int, features: int, device: str, *, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self._form, self._compiled = form, compiled
        self._kept = features // 2
        self._x = torch.randn(tokens, form.halves * features, device=device).bfloat16()
        self._grad = torch.randn(tokens, features, device=device).bfloat16()
        self._gain = (1 + 0.1 * torch.randn(features, device=device)).bfloat16() if form.norm else None
        self._rstd = self._sparsified(self._kept).rstd

    def _sparsified(self, kept: int | None, launch: dict[str, int] | None = None) -> fused.Sparsified:
        form = self._form
        return fused.sparsify(self._x, kept, activation=form.activation, gain=self._gain, eps=EPS, launch=launch)

    def _gradients(
        self, launch: fused_backward.NormLaunch | None = None, *, wide_gain: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        gain = self._gain.float() if wide_gain and self._gain is not None else self._gain
        return fused_backward.backward(
            self._grad, self._x, activation=self._form.activation, gain=gain, rstd=self._rstd, launch=launch
        )

    def _chain(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """The same as torch operations, up to the quantization."""
        if self._form.activation is not None:
            gate, up = (x, None) if self._form.halves == 1 else x.chunk(2, -1)
            swiglu = self._form.activation == "swiglu"
            value = torch.nn.functional.silu(gate) if swiglu else torch.relu(gate).pow(2)
            x = value if up is None else value * up
        return x if gain is None else rms_norm(x, gain, x.shape[-1], EPS)

    def checks(self) -> Iterator[Check]:
        """Codes against the chain (equal where no exp and no sum is involved), gradients against float64 autograd."""
        want_codes, want_scale = sparsify.sparsify(self._chain(self._x, self._gain), None)
        got = self._sparsified(None)
        exact = not self._form.norm and self._form.activation != "swiglu"
        yield Check("share of codes that differ", mismatch(got.codes, want_codes), 0.0 if exact else 1e-3)
        largest = (got.codes[:CHECKED_ROWS].int() - want_codes[:CHECKED_ROWS].int()).abs().max()
        yield Check("largest difference of codes", float(largest), 0.0 if exact else 1.0)
        yield Check("scales", relative_error(got.scale, want_scale), 0.0 if exact else 2**-8)
        dense = got.codes[:CHECKED_ROWS]
        want = reference.apply_mask(dense, reference.topk_mask(dense, self._kept))
        yield Check("selection", mismatch(self._sparsified(self._kept).codes[:CHECKED_ROWS], want), 0.0)
        yield from self._gradient_checks()

    def _gradient_checks(self) -> Iterator[Check]:
        dx, dgain = self._gradients(wide_gain=True)  # whose gradient is not rounded to bf16
        wide = self._x[:CHECKED_ROWS].double().requires_grad_()
        gain = None if self._gain is None else self._gain.double()
        (want,) = torch.autograd.grad(self._chain(wide, gain), wide, self._grad[:CHECKED_ROWS].double())
        yield Check("dx", relative_error(dx[:CHECKED_ROWS], want), 2**-7)
        if dgain is not None and self._rstd is not None:
            normed = self._chain(self._x, None).float() * self._rstd
            bound = 1e-3 if self._form.activation == "swiglu" else 1e-5  # another exp moves some roundings of the chain
            yield Check("dgain", relative_error(dgain, (self._grad.float() * normed).sum(0)), bound)

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """Forward and backward."""
        chains: dict[str, Chain] = {"torch eager": self._chain}
        if self._compiled:
            chains["torch.compile"] = torch.compile(self._chain, dynamic=False)
        tokens, features = self._grad.shape
        halves, norm = self._form.halves, self._form.norm
        yield Contest(
            "forward",
            {"fused": partial(self._sparsified, self._kept)},
            rivals={name: self._unfused(chain) for name, chain in chains.items()},
            baseline="torch eager",
            copy_bytes=tokens * (features * (2 * halves + 1) + 4 * (1 + norm)),
        )
        # The compiled backward is replayed, so it must not write into tensors saved by its forward.
        with torch._functorch.config.patch(donated_buffer=False):
            yield Contest(
                "backward",
                {"fused": self._gradients},
                rivals={name: self._autograd(chain) for name, chain in chains.items()},
                baseline="torch eager",
                copy_bytes=tokens * (features * (2 + 4 * halves) + 4 * norm),
            )

    def _unfused(self, chain: Chain) -> Call:
        def run() -> object:
            with torch.no_grad():
                return sparsify.sparsify(chain(self._x, self._gain), self._kept)

        return run

    def _autograd(self, chain: Chain) -> Call:
        x = self._x.detach().requires_grad_()
        gain = None if self._gain is None else self._gain.detach().requires_grad_()
        inputs = [x] if gain is None else [x, gain]
        results: list[Tensor] = []

        def run() -> object:
            if not results:
                results.append(chain(x, gain))
            return torch.autograd.grad(results[0], inputs, self._grad, retain_graph=True)

        return run

    def launches(self) -> Iterator[Contest]:
        """Warps and registers."""
        options = [{"num_warps": w, "maxnreg": r} for w in (1, 2, 4, 8, 16) for r in (64, 80, 96, 128)]
        yield Contest("forward", {str(one): partial(self._sparsified, self._kept, one) for one in options})
        if self._form.norm:
            warps = fused_backward.norm_launch(self._grad.shape[1]).num_warps
            launches = [
                fused_backward.NormLaunch(w, programs, registers)
                for w in {max(1, warps // 2), warps}
                for programs in {max(1, 16 // w), max(1, 24 // w), max(1, 32 // w)}
                for registers in (64, 80, 128)
                if w * 32 * registers * programs <= 65536
            ]
            yield Contest("backward", {str(tuple(one)): partial(self._gradients, one) for one in launches})


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    names = [("norm", features) for features in FEATURES_OF_A_NORM]
    names += [(form, features) for form in FORMS if form != "norm" for features in FEATURES]
    if options.quick:
        names = [("relu2_glu+norm", FEATURES[0])]
    return {
        f"{form} D={features}": partial(
            FusedCase,
            FORMS[form],
            ELEMENTS // features,
            features,
            options.device,
            compiled=f"{form} D={features}" in COMPILED and not options.quick,
        )
        for form, features in names
    }


SECTION = Section(
    "Activation and norm fused with quantization, 64 M activations (times a copy of the same bytes)",
    cases=_cases,
    draw=ratio_bars(of_floor, "time over copy of the same bytes"),
    table=ratio_table(of_floor, "x"),
)
