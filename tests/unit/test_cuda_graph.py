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
    "model.moe={num_experts: 4}": "model.moe=set: set model.moe=null",
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
