"""What cannot run as a CUDA graph is refused before a process starts, with what to set instead."""

import pytest

from pipeline.config import Config
from pipeline.config_loader import ConfigError, load_config
from pipeline.errors import UserError
from pipeline.world import parallel_world

REFUSED = {
    "run.device=cpu": "run.device=cpu: set run.device=cuda",
    "parallel.pp=2": "parallel.pp=2: set parallel.pp=1",
    "parallel={overlap_param_gather: true, distributed_optimizer: true}": "parallel.overlap_param_gather=True: set "
    "parallel.overlap_param_gather=false",
    "model.dropout=0.1": "model.dropout=0.1: set model.dropout=0",
    "training.recompute=full": "training.recompute=full: set training.recompute=up_projection",
    "training.recompute=selective": "training.recompute=selective: set training.recompute=up_projection",
    "data.attention=document": "data.attention=document: set data.attention=full",
    "data.mask_eod_loss=true": "data.mask_eod_loss=True: set data.mask_eod_loss=false",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_does_not_work_with_a_graph(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["run.cuda_graph=true", override])
    (problem,) = error.value.problems
    assert problem.endswith(f": run.cuda_graph=true does not work with {REFUSED[override]} or run.cuda_graph=false")


BITNET = "model.qsparse={weights: ternary, activations: int8, sub_norm: true, sparsity: 0.5}"
MIXTURE = ("run.cuda_graph=true", "training.precision=bf16", "model.moe={num_experts: 4}")
WITH_EXPERTS = {
    "parallel.ep=2": "parallel.ep=2: set parallel.ep=1",
    "run.backend=local": "run.backend=local: set run.backend=te",
    "run.kernels=reference": "run.kernels=reference: set run.kernels=auto",
    "training.precision=fp32": "training.precision=fp32: set training.precision=bf16",
    "parallel={etp: 2, dp: 2}": "parallel.etp=2: set parallel.etp=1",
    "model.moe.capacity_factor=1.5": "model.moe.capacity_factor=1.5: set model.moe.capacity_factor=null",
    "model.moe.dispatcher=allgather": "model.moe.dispatcher=allgather: set model.moe.dispatcher=alltoall",
    "model.moe.execution=sequential": "model.moe.execution=sequential: set model.moe.execution=grouped",
    "model.qsparse.quantization_warmup.steps=9": "model.qsparse.quantization_warmup.steps=9: set "
    "model.qsparse.quantization_warmup.steps=0",
}


@pytest.mark.parametrize("override", WITH_EXPERTS)
def test_what_does_not_work_with_a_graph_and_experts(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [*MIXTURE, BITNET, override])
    expected = f": run.cuda_graph=true does not work with model.moe and {WITH_EXPERTS[override]}"
    assert any(problem.endswith(f"{expected} or run.cuda_graph=false") for problem in error.value.problems)


@pytest.mark.parametrize(
    "override", ["model.qsparse.weights=full", "model.qsparse.rules=[{match: '*.experts.*.3.linear_fc1', sparsity: 0}]"]
)
def test_experts_of_a_graph_have_one_ternary_format(override: str) -> None:
    with pytest.raises(ConfigError, match="unless all experts have one format, ternary weights and int8 activations"):
        load_config(None, [*MIXTURE, BITNET, override])


def test_experts_of_a_graph_fit_the_grouped_products() -> None:
    overrides = [*MIXTURE, BITNET, "model.moe.ffn_hidden_size=96"]
    with pytest.raises(ConfigError, match=r"model\.moe\.ffn_hidden_size=96: grouped products take multiples of 64"):
        load_config(None, overrides)
    assert load_config(None, [*overrides, "model.qsparse.gradients=e4m3"]).model.moe is not None


def test_ternary_experts_of_one_rank_do() -> None:
    assert load_config(None, [*MIXTURE, BITNET, "parallel.dp=2"]).run.cuda_graph


def test_experts_in_bf16_do_in_any_width() -> None:
    assert load_config(None, [*MIXTURE, "model.moe.ffn_hidden_size=72"]).run.cuda_graph
    rule = "model.qsparse.rules=[{match: '*.experts.*.3.linear_fc1', sub_norm: true, sparsity: 0.5}]"
    with pytest.raises(ConfigError, match="or are plain bf16: change model"):
        load_config(None, [*MIXTURE, rule])


def test_several_microbatches_and_recomputed_projections_do() -> None:
    overrides = ["training.global_batch_size=16", "training.micro_batch_size=4", "training.recompute=up_projection"]
    config = load_config(None, ["run.cuda_graph=true", "parallel.tp=2", "parallel.sequence_parallel=true", *overrides])
    assert config.run.cuda_graph


def test_a_machine_without_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with (
        pytest.raises(UserError, match=r"run\.device=auto found none: set run\.cuda_graph=false"),
        parallel_world(Config(run={"device": "auto", "cuda_graph": True})),
    ):
        pass
