"""Which linear layers are sparse, which are ternary, and from which step on.  No torch here: a login node reads it.

The four switches are independent, so one code base trains the dense baseline (all off), BitNet b1.58
(`weights: ternary, activations: int8, sub_norm: true`), Q-Sparse (`sparsity: 0.4`) and both together.
Semantics and equations: docs/numerics.md.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cache
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

Pattern = Literal["topk", "block"]
WeightFormat = Literal["full", "ternary"]
ActivationFormat = Literal["full", "int8"]


class StrictModel(BaseModel):
    """Base of every config section: unknown keys are errors, values are checked, instances are immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1."""
        if any(isinstance(item, bool) for item in (value if isinstance(value, list | tuple) else [value])):
            types = _types(cls.model_fields[info.field_name or ""].annotation)
            if bool not in types and types & {int, float}:
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


def _types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_types, get_args(annotation)))


class Warmup(StrictModel):
    """A linear ramp from 0 to 1 over `steps` optimizer steps, beginning at `start`."""

    start: NonNegativeInt = 0
    """Optimizer step at which the ramp begins; before it the feature is off."""
    steps: NonNegativeInt = 0
    """Length of the ramp in optimizer steps; 0 switches the feature fully on at `start`."""

    def fraction(self, step: int) -> float:
        """Share of the full effect at optimizer step `step` (counted from 0), in [0, 1]."""
        if step < self.start:
            return 0.0
        return 1.0 if self.steps == 0 else min(1.0, (step - self.start) / self.steps)


class LinearFormat(StrictModel):
    """How one linear layer treats its input and its weight."""

    sparsity: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of input features set to zero per token (Q-Sparse, arXiv 2407.10969 eq. 1-3); 0 keeps all."""
    pattern: Pattern = "topk"
    """`topk`: exactly K = int((1 - sparsity) D) features per token; `block`: N of every `block_size`."""
    block_size: PositiveInt = 32
    """M of the N:M block pattern; exactly M - N zeros per block, N = int((1 - sparsity) M).  32 at sparsity
    0.5 is the paper's 16:32, 4 is the 2:4 of sparse tensor cores."""
    topk_scope: Literal["global", "shard"] = "global"
    """Row-parallel inputs are sharded over features.  `global` picks the K largest of the whole row (the same
    model under every TP size); `shard` picks K/TP per shard, which is a different model for every TP size."""
    weights: WeightFormat = "full"
    """`ternary`: BitNet b1.58 absmean weights {-1, 0, 1} times one scale; `full`: the master weights."""
    ternary_scale: Literal["part", "matrix"] = "part"
    """Fused matrices (q/k/v, gate/up): one absmean scale per `part`, as in unfused layers, or per `matrix`."""
    activations: ActivationFormat = "full"
    """`int8`: absmax codes with one scale per token; `full`: as they come."""
    gradients: Literal["full", "e4m3"] = "full"
    """Gradient of the output in the two backward products: `full` as it comes; `e4m3` rounded to 8-bit floats, with a
    scale per token: faster on GPUs with FP8, not the same under every TP size.  Needs ternary weights and int8
    activations."""
    sub_norm: bool = False
    """RMSNorm (SubLN) in front of the attention output and FFN down projections, as BitNet has it."""
    rescale: Literal["none", "l2"] = "none"
    """`l2`: divide the sparse row by its L2 norm (one sentence of the paper without an equation, absent from the
    official code).  Only with full-precision activations: a per-token factor cancels under absmax codes."""

    @property
    def is_dense(self) -> bool:
        """True if the layer is an ordinary linear layer (a SubLN in front may remain)."""
        return self.sparsity == 0.0 and self.weights == "full" and self.activations == "full" and self.rescale == "none"

    @property
    def is_plain(self) -> bool:
        """True if the layer is an ordinary linear layer with nothing in front."""
        return self.is_dense and not self.sub_norm

    @model_validator(mode="after")
    def _check(self) -> "LinearFormat":
        if self.rescale == "l2" and self.activations == "int8":
            raise ValueError("rescale=l2 cancels under activations=int8; use rescale=none")
        if self.gradients == "e4m3" and (self.weights != "ternary" or self.activations != "int8"):
            raise ValueError("gradients=e4m3 needs weights=ternary and activations=int8")
        if self.rescale == "l2" and self.sparsity == 0.0:
            raise ValueError("rescale=l2 needs sparsity > 0")
        if self.sparsity > 0.0 and self.pattern == "block":
            kept = kept_count(self.block_size, self.sparsity)
            if abs(kept / self.block_size - (1 - self.sparsity)) > 1e-4:
                raise ValueError(
                    f"pattern=block keeps N of block_size={self.block_size} features, and sparsity={self.sparsity} is "
                    f"not of the form 1 - N/{self.block_size}; nearest: {1 - kept / self.block_size:g}"
                )
        return self


class LayerRule(StrictModel):
    """Overrides for the linear layers whose path matches a glob; the first matching rule wins."""

    match: str
    """Glob over the module path with global layer numbers, e.g. `decoder.layers.0.*` or `*.linear_fc2`."""
    sparsity: float | None = Field(None, ge=0.0, lt=1.0)
    """See `model.qsparse.sparsity`; absent keys keep the model-wide value."""
    pattern: Pattern | None = None
    """See `model.qsparse.pattern`."""
    block_size: PositiveInt | None = None
    """See `model.qsparse.block_size`."""
    topk_scope: Literal["global", "shard"] | None = None
    """See `model.qsparse.topk_scope`."""
    weights: WeightFormat | None = None
    """See `model.qsparse.weights`."""
    ternary_scale: Literal["part", "matrix"] | None = None
    """See `model.qsparse.ternary_scale`."""
    activations: ActivationFormat | None = None
    """See `model.qsparse.activations`."""
    gradients: Literal["full", "e4m3"] | None = None
    """See `model.qsparse.gradients`."""
    sub_norm: bool | None = None
    """See `model.qsparse.sub_norm`."""
    rescale: Literal["none", "l2"] | None = None
    """See `model.qsparse.rescale`."""


class QSparseConfig(LinearFormat):
    """Model-wide linear-layer format, per-layer exceptions and warm-ups."""

    rules: tuple[LayerRule, ...] = ()
    """Ordered exceptions; the first rule whose glob matches a layer's path replaces the keys it names."""
    sparsity_warmup: Warmup = Warmup()
    """Ramp of the sparsity from 0 to its target."""
    quantization_warmup: Warmup = Warmup()
    """Ramp of lambda in x + lambda (q(x) - x) for weights and activations; 1 is full quantization."""

    @model_validator(mode="after")
    def _check_rules(self) -> "QSparseConfig":
        for i, rule in enumerate(self.rules):
            try:
                apply_rule(self, rule)
            except ValidationError as error:
                reasons = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
                raise ValueError(f"rules[{i}] (match={rule.match!r}): {reasons}") from None
        return self


@cache
def kept_count(num_features: int, sparsity: float) -> int:
    """K = int((1 - sparsity) * num_features), at least 1.

    Computed on the decimal that the user wrote, with 1e-6 of slack: 0.9 of 10 keeps 1, not int(0.9999999999999998),
    and 0.333333333 of 3 keeps 2.
    """
    return max(1, int((1 - Fraction(str(sparsity))) * num_features + Fraction(1, 10**6)))


def apply_rule(config: LinearFormat, rule: LayerRule | None) -> LinearFormat:
    """The format of one layer: the model-wide keys with those that `rule` names replaced."""
    values = {name: getattr(config, name) for name in LinearFormat.model_fields}
    if rule is not None:
        values |= rule.model_dump(exclude={"match"}, exclude_none=True)
    return LinearFormat(**values)


def matching_rule(rules: Sequence[LayerRule], path: str) -> int | None:
    """Index of the first rule whose glob matches `path`, None if none does."""
    return next((i for i, rule in enumerate(rules) if fnmatchcase(path, rule.match)), None)


def layer_format(config: QSparseConfig, path: str) -> LinearFormat:
    """The format of the layer at `path`, a path with global layer numbers."""
    index = matching_rule(config.rules, path)
    return apply_rule(config, None if index is None else config.rules[index])
