"""megatron-core's data parallelism and Adam around the model, connected to its pipeline schedules."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from pipeline.config import Config
from pipeline.model import DTYPES, Model
from pipeline.schedule import learning_rate, weight_decay


def wrap_data_parallel(model: Model, config: Config) -> list[DistributedDataParallel]:
    """The model's chunks inside megatron-core's data parallelism; gradients are reduced in fp32 (fp64 for fp64)."""
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.precision != "fp64",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=_leaves_gather(config),
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return [
        DistributedDataParallel(
            model.config, ddp, chunk, disable_bucketing=index > 0 and not parallel.overlap_grad_reduce
        )
        for index, chunk in enumerate(model.chunks)
    ]


def build_optimizer(model: Model, chunks: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """megatron-core's optimizer over the wrapped chunks, and the hooks through which its schedules call it."""
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=_clip_norm(config),
            bf16=config.training.precision == "bf16",
            params_dtype=DTYPES[config.training.precision],
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=_leaves_gather(config),
        ),
        chunks,
    )
    _connect_schedules(model.config, chunks, optimizer, config)
    return optimizer


def _leaves_gather(config: Config) -> bool:
    """Whether the optimizer leaves the parameters as they are on each rank, for others to gather."""
    return config.parallel.overlap_param_gather or config.parallel.ternary_param_gather


def _clip_norm(config: Config) -> float:
    """megatron-core measures the gradient norm only while it clips: without a clip, clip at a norm never reached."""
    if config.training.precision == "fp64":  # its clipping knows float32 gradients only
        return 0.0
    return config.optimizer.clip_grad or 1e30


def _connect_schedules(
    transformer: Any, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, config: Config
) -> None:
    def each(name: str) -> Any:
        methods = [getattr(chunk, name) for chunk in chunks]
        return methods if len(methods) > 1 else methods[0]

    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        transformer.no_sync_func = each("no_sync")
        if config.parallel.pp > 1:
            transformer.grad_sync_func = each("start_grad_sync")
    if config.parallel.overlap_param_gather and config.parallel.vpp > 1:
        transformer.param_sync_func = each("start_param_sync")


def set_step(optimizer: MegatronOptimizer, step: int, config: Config) -> tuple[float, float]:
    """Give all parameter groups the learning rate and weight decay of `step`; returns both."""
    lr = learning_rate(step, config.training.steps, config.optimizer)
    decay = weight_decay(step, config.training.steps, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = decay * group.get("wd_mult", 1.0)
    return lr, decay
