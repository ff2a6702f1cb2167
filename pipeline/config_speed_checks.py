"""Rules of `config_checks` about keys that change speed and memory and no result.  No torch here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config_layers import layer_formats
from pipeline.config_violation import Obstacle, Violation, obstructed, value_of

if TYPE_CHECKING:
    from moe.config import MoEConfig
    from pipeline.config import Config


def _cuda_graph(config: "Config") -> Iterator[Violation]:
    """A graph repeats the same work whatever the data are."""
    if not config.run.cuda_graph:
        return
    parallel, recompute = config.parallel, config.training.recompute
    obstacles = {
        "run.device": Obstacle(config.run.device == "cpu", "cuda"),
        "parallel.pp": Obstacle(parallel.pp > 1, "1"),
        "parallel.cp": Obstacle(parallel.cp > 1, "1"),
        "parallel.overlap_param_gather": Obstacle(parallel.overlap_param_gather, "false"),
        "model.dropout": Obstacle(config.model.dropout > 0, "0"),
        "training.recompute": Obstacle(recompute in ("selective", "full"), "up_projection"),
        "data.attention": Obstacle(config.data.attention == "document", "full"),
        "data.mask_eod_loss": Obstacle(config.data.mask_eod_loss, "false"),
    }
    yield from obstructed(config, "run.cuda_graph=true", "false", obstacles)
    if config.model.moe is not None:
        yield from _cuda_graph_with_experts(config, config.model.moe)


def _cuda_graph_with_experts(config: "Config", moe: "MoEConfig") -> Iterator[Violation]:
    """Token counts must not reach the host: experts of one rank, dropless, in grouped or block-sparse products."""
    warmup = config.model.qsparse.quantization_warmup
    obstacles = {
        "parallel.ep": Obstacle(config.parallel.ep > 1, "1"),
        "parallel.etp": Obstacle((config.parallel.etp or 1) > 1, "1"),
        "parallel.tp": Obstacle(config.parallel.tp > 1, "1"),
        "run.backend": Obstacle(config.run.backend == "local", "te"),
        "run.kernels": Obstacle(config.run.kernels == "reference", "auto"),
        "training.precision": Obstacle(config.training.precision != "bf16", "bf16"),
        "model.moe.capacity_factor": Obstacle(moe.capacity_factor is not None, "null"),
        "model.moe.dispatcher": Obstacle(moe.dispatcher != "alltoall", "alltoall"),
        "model.moe.execution": Obstacle(moe.execution == "sequential", "grouped"),
        "model.qsparse.quantization_warmup.start": Obstacle(warmup.start > 0, "0"),
        "model.qsparse.quantization_warmup.steps": Obstacle(warmup.steps > 0, "0"),
    }
    why = "does not work with model.moe and"
    yield from obstructed(config, "run.cuda_graph=true", "false", obstacles, why=why)
    formats = layer_formats(config.model, config.parallel).items()
    experts = [(path, layout) for path, layout in formats if ".experts.local_experts." in path]
    ups, downs = ({layout for path, layout in experts if name in path} for name in ("linear_fc1", "linear_fc2"))
    in_bf16 = all(layout.is_plain for _, layout in experts)
    width_key = "model.ffn_hidden_size" if moe.ffn_hidden_size is None else "model.moe.ffn_hidden_size"
    width = moe.ffn_hidden_size or config.model.ffn_hidden_size
    multiple = 16 if config.model.qsparse.gradients == "e4m3" else 64
    if width % multiple and not in_bf16:
        message = f"run.cuda_graph=true does not work with model.moe and {width_key}={width}: grouped products take "
        yield Violation(
            (width_key, "run.cuda_graph"), f"{message}multiples of {multiple}; change it or set run.cuda_graph=false"
        )
    are_codes = all("full" not in (layout.weights, layout.activations) for _, layout in experts)
    if not in_bf16 and (len(ups) > 1 or len(downs) > 1 or not are_codes):
        keys = ("model.qsparse.weights", "model.qsparse.activations", "model.qsparse.rules")
        message = "run.cuda_graph=true does not work with model.moe unless all experts have one format, ternary "
        message += "weights and int8 activations, or are plain bf16: change model.qsparse or set run.cuda_graph=false"
        yield Violation((*keys, "run.cuda_graph"), message)


def _kept_weights(config: "Config") -> Iterator[Violation]:
    """A copy that no backward pass reads."""
    if not config.run.keep_bf16_weights:
        return
    key = "run.keep_bf16_weights"
    obstacles = {
        "run.device": Obstacle(config.run.device == "cpu", "cuda"),
        "run.kernels": Obstacle(config.run.kernels == "reference", "auto"),
        "training.precision": Obstacle(config.training.precision != "bf16", "bf16"),
    }
    yield from obstructed(config, f"{key}=true", "false", obstacles, why="has no effect with")
    formats = layer_formats(config.model, config.parallel).values()
    if not any(layout.weights == "ternary" and layout.gradients == "full" for layout in formats):
        keys = ("model.qsparse.weights", "model.qsparse.gradients")
        message = f"{key}=true has no effect: no layer has {keys[0]}=ternary and {keys[1]}=full; set {key}=false"
        yield Violation((key, *keys), message)


def _offload(config: "Config") -> Iterator[Violation]:
    """megatron-core offloads the layers of one stage through Transformer Engine, and nothing that is recomputed."""
    key, layers = "training.offload_layers", config.training.offload_layers
    if layers == 0:
        return
    if layers >= config.model.num_layers:
        message = f"{key}={layers}: the last of model.num_layers={config.model.num_layers} stays on the GPU; set {key}"
        yield Violation((key, "model.num_layers"), f"{message}={config.model.num_layers - 1} or less")
    obstacles = {
        "run.device": Obstacle(config.run.device == "cpu", "cuda"),
        "run.backend": Obstacle(config.run.backend == "local", "te"),
        "run.cuda_graph": Obstacle(config.run.cuda_graph, "false"),
        "parallel.pp": Obstacle(config.parallel.pp > 1, "1"),
        "training.recompute": Obstacle(config.training.recompute != "none", "none"),
    }
    yield from obstructed(config, f"{key}={layers}", "0", obstacles)


def _parameter_gathers(config: "Config") -> Iterator[Violation]:
    """Keys about a gather that only the distributed optimizer has."""
    needed = "parallel.distributed_optimizer"
    for key in ("parallel.overlap_param_gather", "parallel.ternary_param_gather"):
        if value_of(config, key) and not value_of(config, needed):
            yield Violation((key, needed), f"{key}=true needs {needed}=true: without it there is nothing to gather")


def _ternary_gather(config: "Config") -> Iterator[Violation]:
    """Codes are made of what the optimizer has just updated, of layers that compute with nothing else."""
    parallel, key = config.parallel, "parallel.ternary_param_gather"
    if not parallel.ternary_param_gather:
        return
    if parallel.overlap_param_gather:
        other = "parallel.overlap_param_gather"
        message = f"{key}=true does not work with {other}=true: codes are gathered before the forward pass"
        yield Violation((key, other), f"{message}; set one of them false")
    if all(layout.weights != "ternary" for layout in layer_formats(config.model, parallel).values()):
        needed = "model.qsparse.weights"
        message = f"{key}=true needs {needed}=ternary or a rule that sets it: no layer has ternary weights"
        yield Violation((key, needed), message)


SPEED_RULES = (_cuda_graph, _kept_weights, _offload, _parameter_gathers, _ternary_gather)
