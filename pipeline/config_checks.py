"""Rules that tie keys of different sections together: does this model, batch and schedule fit this layout?

One small function per rule; each yields a `Violation` for every way in which a configuration breaks it.  All rules
always run and all violations are reported at once, instead of the usual validator that raises at the first one, so
that a wrong recipe is repaired in one go.  A violation names its keys, which lets the loader point to the lines or
overrides that set them.  No torch here: a login node runs these.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline.config_layers import check_layer_rules
from pipeline.config_speed_checks import SPEED_RULES
from pipeline.config_violation import Violation, value_of
from pipeline.data.phases import PhaseError, resolve_phases

if TYPE_CHECKING:
    from pipeline.config import Config

VIOLATION_TYPE = "combination"


def find_violations(config: "Config") -> list[Violation]:
    """All violations of all rules, in the order of the rules."""
    return [violation for rule in _rules() for violation in rule(config)]


def check_combinations(config: "Config") -> None:
    """Raise pydantic's ValidationError (a ValueError) that holds one entry per violation."""
    details = []
    for violation in find_violations(config):
        # The message goes through the context since pydantic reads braces in a template as placeholders.
        context = {"message": violation.message, "keys": violation.keys}
        error = PydanticCustomError(VIOLATION_TYPE, "{message}", context)
        details.append(InitErrorDetails(type=error, loc=tuple(violation.keys[0].split(".")), input=None))
    if details:
        raise ValidationError.from_exception_data("Config", details)


def _rules() -> tuple[Callable[["Config"], Iterator[Violation]], ...]:
    return (
        _attention_shape,
        _tensor_parallel_shape,
        _pipeline,
        _sequence,
        _context_parallel,
        _batch,
        _experts,
        _upcycling,
        _schedule,
        _warmups,
        _precision,
        _layer_rules,
        _data_phases,
        _document_attention,
        *SPEED_RULES,
    )


def _divides(config: "Config", key: str, divisor: str, why: str) -> Iterator[Violation]:
    """Yield a violation unless the value of `divisor` divides that of `key` (dotted keys)."""
    value, by = value_of(config, key), value_of(config, divisor)
    if value % by:
        yield Violation((key, divisor), f"{key}={value} is not divisible by {divisor}={by}: {why}")


def _attention_shape(config: "Config") -> Iterator[Violation]:
    model, heads = config.model, "model.num_attention_heads"
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        yield from _divides(config, "model.hidden_size", heads, "set model.head_dim to have heads of another width")
    elif model.head_size % 2:
        key = "model.hidden_size" if model.head_dim is None else "model.head_dim"
        message = f"{key}={value_of(config, key)} makes heads of {model.head_size} features"
        yield Violation((key,), f"{message}: rotary embeddings need an even number")
    if model.num_query_groups is not None:
        yield from _divides(config, heads, "model.num_query_groups", "each group serves the same number of heads")


def _tensor_parallel_shape(config: "Config") -> Iterator[Violation]:
    model, tp = config.model, "parallel.tp"
    yield from _divides(config, "model.num_attention_heads", tp, "tensor parallel ranks share the heads evenly")
    if model.num_query_groups is not None:
        yield from _divides(config, "model.num_query_groups", tp, "each rank holds whole key/value heads")
    yield from _divides(config, "model.ffn_hidden_size", tp, "tensor parallel ranks share the FFN evenly")
    if model.vocab_size is None:
        yield from _divides(config, "model.vocab_multiple", tp, "ranks share the padded embedding table evenly")
    elif (padded := model.padded_vocab_size(model.vocab_size)) % config.parallel.tp:
        given = f"model.vocab_size={model.vocab_size} padded to {padded} (model.vocab_multiple={model.vocab_multiple})"
        message = f"{given} is not divisible by parallel.tp={config.parallel.tp}: ranks share the table evenly"
        yield Violation(("model.vocab_multiple", "model.vocab_size", tp), message)


def _pipeline(config: "Config") -> Iterator[Violation]:
    layers, pp, vpp = config.model.num_layers, config.parallel.pp, config.parallel.vpp
    keys = ("parallel.pp", "parallel.vpp", "model.num_layers")
    if vpp > 1 and pp == 1:
        yield Violation(keys[1::-1], f"parallel.vpp={vpp} needs parallel.pp > 1: chunks interleave over pipeline ranks")
    if layers % (pp * vpp):
        message = f"model.num_layers={layers} is not divisible by parallel.pp={pp} * parallel.vpp={vpp} = {pp * vpp}"
        yield Violation(keys[::-1], f"{message}: every chunk has the same number of layers")


def _sequence(config: "Config") -> Iterator[Violation]:
    parallel, length = config.parallel, config.training.seq_length
    if not parallel.sequence_parallel:
        return
    key = "parallel.sequence_parallel"
    if parallel.tp == 1:
        yield Violation((key, "parallel.tp"), f"{key}=true needs parallel.tp > 1: it shards over the TP group")
    elif parallel.cp == 1:
        yield from _divides(config, "training.seq_length", "parallel.tp", "sequence parallel ranks share the tokens")
    elif length % (parallel.tp * parallel.cp):
        divisor = f"parallel.tp={parallel.tp} * parallel.cp={parallel.cp}"
        keys = ("training.seq_length", "parallel.tp", "parallel.cp")
        yield Violation(keys, f"training.seq_length={length} is not divisible by {divisor}: they share the tokens")


def _context_parallel(config: "Config") -> Iterator[Violation]:
    cp, device, length = config.parallel.cp, config.run.device, config.training.seq_length
    if cp == 1:
        return
    if device != "cuda":
        message = f"parallel.cp={cp} needs run.device=cuda, not {device}: the attention for it is Transformer Engine's"
        yield Violation(("parallel.cp", "run.device"), message)
    if length % (2 * cp):
        message = f"training.seq_length={length} is not divisible by 2 * parallel.cp={cp}: each rank takes two chunks"
        yield Violation(("training.seq_length", "parallel.cp"), message)


def _batch(config: "Config") -> Iterator[Violation]:
    """What `parallel.dp` = 1 cannot divide, no other size can, so an absent key is checked as 1."""
    training, parallel = config.training, config.parallel
    dp, batch, micro = parallel.dp or 1, training.global_batch_size, training.micro_batch_size
    keys = ("training.global_batch_size", "training.micro_batch_size", "parallel.dp")
    given = f"training.global_batch_size={batch}"
    divisor = f"training.micro_batch_size={micro} * parallel.dp={dp}"
    num_microbatches, rest = divmod(batch, micro * dp)
    if rest:
        yield Violation(keys, f"{given} is not divisible by {divisor} = {micro * dp}")
    elif parallel.vpp > 1 and num_microbatches % parallel.pp:
        made = f"{given} / ({divisor}) makes {num_microbatches} microbatches"
        message = f"{made}, but parallel.vpp={parallel.vpp} needs a multiple of parallel.pp={parallel.pp}"
        yield Violation((*keys, "parallel.vpp", "parallel.pp"), message)


def _experts(config: "Config") -> Iterator[Violation]:
    moe, parallel = config.model.moe, config.parallel
    if moe is None:
        if parallel.ep > 1:
            yield Violation(("parallel.ep",), f"parallel.ep={parallel.ep} needs model.moe: there are no experts")
        if parallel.etp is not None:
            yield Violation(("parallel.etp",), f"parallel.etp={parallel.etp} needs model.moe: there are no experts")
        return
    if moe.num_experts % parallel.ep:
        message = f"model.moe.num_experts={moe.num_experts} is not divisible by parallel.ep={parallel.ep}"
        yield Violation(("model.moe.num_experts", "parallel.ep"), message)
    if config.training.recompute == "up_projection":
        message = "training.recompute=up_projection does not reach the experts of model.moe: use full or none"
        yield Violation(("training.recompute", "model.moe"), message)
    etp = parallel.etp or parallel.tp
    width_key = "model.ffn_hidden_size" if moe.ffn_hidden_size is None else "model.moe.ffn_hidden_size"
    width = moe.ffn_hidden_size or config.model.ffn_hidden_size
    if width % etp:
        etp_key = "parallel.tp" if parallel.etp is None else "parallel.etp"
        message = f"{width_key}={width} is not divisible by {etp_key}={etp}: ranks share each expert evenly"
        yield Violation((width_key, etp_key), message)
    shared = moe.shared_ffn_hidden_size
    if shared is not None and shared % parallel.tp:
        key = "model.moe.shared_ffn_hidden_size"
        message = f"{key}={shared} is not divisible by parallel.tp={parallel.tp}: ranks share it evenly"
        yield Violation((key, "parallel.tp"), message)
    if moe.dispatcher == "flex" and config.run.device == "cpu":
        message = "model.moe.dispatcher=flex needs GPUs and the package deep_ep, not run.device=cpu; use alltoall"
        yield Violation(("model.moe.dispatcher", "run.device"), message)
    if moe.dispatcher == "flex" and parallel.ep * etp == 1:
        message = "model.moe.dispatcher=flex needs parallel.ep * parallel.etp > 1: there is nowhere to send tokens"
        yield Violation(("model.moe.dispatcher", "parallel.ep"), message)
    if moe.dispatcher == "alltoall" and etp > 1 and config.run.device == "cpu":
        message = f"model.moe.dispatcher=alltoall with parallel.etp={etp} needs GPUs: gloo gathers equal sizes only"
        yield Violation(("model.moe.dispatcher", "parallel.etp"), f"{message}; use allgather or parallel.etp=1")
    if moe.first_dense_layers >= config.model.num_layers:
        message = f"model.moe.first_dense_layers={moe.first_dense_layers} leaves no layer of model.num_layers="
        yield Violation(("model.moe.first_dense_layers",), f"{message}{config.model.num_layers} with experts")
    if parallel.tp > 1 and not parallel.sequence_parallel:
        key = "parallel.sequence_parallel"
        message = (
            f"{key}=false with parallel.tp={parallel.tp} and model.moe: each token must be routed once, set it true"
        )
        yield Violation((key, "parallel.tp", "model.moe"), message)
    if parallel.dp is not None and (ranks := parallel.tp * parallel.cp * parallel.dp) % (parallel.ep * etp):
        message = (
            f"parallel.ep={parallel.ep} * parallel.etp={etp} = {parallel.ep * etp} does not divide "
            f"parallel.tp={parallel.tp} * parallel.cp={parallel.cp} * parallel.dp={parallel.dp} = {ranks}"
        )
        yield Violation(("parallel.ep", "parallel.etp", "parallel.dp"), message)


def _upcycling(config: "Config") -> Iterator[Violation]:
    moe, model, key = config.model.moe, config.model, "checkpoint.upcycle"
    if not config.checkpoint.upcycle:
        return
    if config.checkpoint.load is None:
        yield Violation((key, "checkpoint.load"), f"{key}=true needs checkpoint.load: the dense model's checkpoint")
    if moe is None:
        yield Violation((key, "model.moe"), f"{key}=true needs model.moe: without experts nothing is copied")
        return
    if moe.ffn_hidden_size not in (None, model.ffn_hidden_size):
        width = "model.moe.ffn_hidden_size"
        message = f"{key}=true copies FFNs: {width}={moe.ffn_hidden_size} is not model.ffn_hidden_size="
        yield Violation((key, width), f"{message}{model.ffn_hidden_size}")
    if moe.shared_ffn_hidden_size is not None:
        width = "model.moe.shared_ffn_hidden_size"
        message = f"{key}=true with {width}={moe.shared_ffn_hidden_size}: a dense model has nothing for a shared expert"
        yield Violation((key, width), message)


def _schedule(config: "Config") -> Iterator[Violation]:
    optimizer, steps = config.optimizer, config.training.steps
    warmup, key, total = optimizer.warmup_steps, "optimizer.warmup_steps", f"training.steps={steps}"
    if warmup >= steps:
        yield Violation((key, "training.steps"), f"{key}={warmup} must be smaller than {total}")
    elif optimizer.schedule == "two_stage" and warmup >= optimizer.stage2_start * steps:
        message = f"{key}={warmup} must end before optimizer.stage2_start={optimizer.stage2_start:g} of {total}"
        yield Violation((key, "optimizer.stage2_start", "training.steps"), message)
    elif optimizer.schedule == "wsd" and warmup + optimizer.wsd_decay_share * steps > steps:
        message = f"{key}={warmup} and optimizer.wsd_decay_share={optimizer.wsd_decay_share:g} overlap in {total}"
        yield Violation((key, "optimizer.wsd_decay_share", "training.steps"), message)
    if optimizer.min_lr > optimizer.lr:
        message = f"optimizer.min_lr={optimizer.min_lr:g} is larger than optimizer.lr={optimizer.lr:g}"
        yield Violation(("optimizer.min_lr", "optimizer.lr"), message)


def _warmups(config: "Config") -> Iterator[Violation]:
    steps = config.training.steps
    for name in ("sparsity_warmup", "quantization_warmup"):
        ramp = getattr(config.model.qsparse, name)
        if (end := ramp.start + ramp.steps) > steps:
            key = f"model.qsparse.{name}"
            message = f"{key}.start={ramp.start} + {key}.steps={ramp.steps} = {end} is past training.steps={steps}"
            yield Violation((f"{key}.steps", f"{key}.start", "training.steps"), f"{message}: the ramp would not end")


def _precision(config: "Config") -> Iterator[Violation]:
    if config.training.precision == "fp64" and config.run.device == "cuda":
        message = "training.precision=fp64 needs run.device=cpu, not cuda: it serves exactness tests"
        yield Violation(("training.precision", "run.device"), message)


def _layer_rules(config: "Config") -> Iterator[Violation]:
    for keys, message in check_layer_rules(config.model, config.parallel):
        yield Violation(keys, message)


def _data_phases(config: "Config") -> Iterator[Violation]:
    """Every phase must fit the layout as the section `training` must, and begin where a step does."""
    try:
        phases = resolve_phases(config)
        phases.check_steps_from(0)
    except PhaseError as error:
        yield Violation(error.keys, str(error))
        return
    for number, given in enumerate(config.data.phases):
        changes = {"seq_length": given.seq_length, "global_batch_size": given.global_batch_size}
        kept = {name: value for name, value in changes.items() if value is not None}
        changed = config.model_copy(update={"training": config.training.model_copy(update=kept)})
        for rule in (_sequence, _context_parallel, _batch):
            for violation in rule(changed) if kept else ():
                yield Violation(
                    (f"data.phases.{number}", *violation.keys), f"data.phases.{number}: {violation.message}"
                )


def _document_attention(config: "Config") -> Iterator[Violation]:
    if config.data.attention == "document" and config.parallel.cp > 1:
        message = f"data.attention=document with parallel.cp={config.parallel.cp}: documents do not divide over ranks"
        yield Violation(("data.attention", "parallel.cp"), f"{message}; use data.attention=full or parallel.cp=1")
