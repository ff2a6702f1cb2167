"""Dozens of starts in one launch, each test looks at a few: see `starts.py`."""

import fcntl
import json
import os
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.loader import WindowDataset, open_windows
from tests.resume.recipe import RunFiles, write_config
from tests.testing import torchrun

WARM_UPS = [f"model.qsparse.{name}_warmup.steps=8" for name in ("quantization", "sparsity")]
FP64 = ("training.precision=fp64", "optimizer.clip_grad=0")
DENSE = tuple(f"model.qsparse.{key}" for key in ("sparsity=0", "weights=full", "activations=full", "sub_norm=false"))
BF16 = ("training.precision=bf16",)
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
MOE = ("model.moe={num_experts: 4, top_k: 2}", "parallel.ep=2")
ZERO = ("parallel.distributed_optimizer=true",)
TP = ("parallel.tp=2", "parallel.sequence_parallel=true")
PP = ("parallel.pp=2",)
VPP = (*PP, "parallel.vpp=2")


@dataclass(frozen=True)
class Start:
    """What became of one start, rank by rank."""

    codes: list[Any]
    outputs: list[str]
    errors: list[str]


@dataclass(frozen=True)
class Starts:
    """All starts, and the folder of their runs."""

    root: Path
    results: dict[str, Start]

    def run(self, name: str) -> RunFiles:
        """The run of a start that succeeded."""
        start = self.results[name]
        assert set(start.codes) == {0}, start.errors
        return RunFiles(self.root / name)


class Launcher:
    """Collects starts, and runs them one after another."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self._folder, self.root = folder, folder / "runs"
        self._config = write_config(folder / "config.yaml", self.root, dataset)
        self._keys: list[str] = []
        self._starts: list[dict[str, Any]] = []
        self._ports = _free_ports()
        self.nproc = 1

    def add(
        self,
        name: str,
        *overrides: str,
        kill: tuple[str, int] | None = None,
        before: tuple[str | int, ...] = (),
        key: str = "",
    ) -> None:
        """A start of run `name` in `nproc` processes, known as `key`.

        With `kill`, of what a kill of that run at that step would have left; with `before`, see `starts.py`.
        """
        before = ("kill_after_checkpoint", *kill) if kill else before
        place = {"nproc": self.nproc, "port": next(self._ports)}
        self._starts.append({"name": name, **place, "overrides": overrides, "before": before})
        self._keys.append(key or name)

    def launch(self) -> dict[str, Start]:
        """What became of each start, by its key."""
        starts, results = self._folder / "starts.json", self._folder / "results.json"
        starts.write_text(json.dumps(self._starts))
        arguments = map(str, (self._config, self.root, starts, results))
        nproc = max(start["nproc"] for start in self._starts)
        torchrun("tests.resume.starts", *arguments, nproc=nproc, timeout=1200)
        ranks = [json.loads(results.with_name(f"{results.name}.{rank}").read_text()) for rank in range(nproc)]
        outcomes = ([rank for rank in found if rank is not None] for found in zip(*ranks, strict=True))
        return {
            key: Start(*([rank[name] for rank in found] for name in ("code", "output", "errors")))
            for key, found in zip(self._keys, outcomes, strict=True)
        }


@pytest.fixture(scope="session")
def starts(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Starts:
    folder = tmp_path_factory.mktemp("resume")
    launcher = Launcher(folder, dataset)
    skip = ("data.bad_shard=skip", f"data.path={_damaged(dataset, folder / 'skip-data', _corrupt_two_chunks)}")
    launcher.nproc = 4  # first, so that two of the processes end early
    launcher.add("dense-tp2-dp2", *DENSE, *ZERO, *TP)
    launcher.nproc = 1
    launcher.add("skip", *FP64, *skip)
    _one_process(launcher, folder)
    launcher.nproc = 2
    _two_processes(launcher, dataset, folder)
    launcher.add("skip-dp2", *FP64, *skip, kill=("skip", 2))
    launcher.add("skip-pp2", *FP64, *skip, *PP, "data.prefetch_threads=0", kill=("skip", 6))
    launcher.nproc = 1
    _one_process_again(launcher)
    with _owner_elsewhere(launcher.root, "owned"):
        return Starts(launcher.root, launcher.launch())


def _one_process(launcher: Launcher, folder: Path) -> None:
    launcher.add("plain", *FP64)
    launcher.add("dense", *DENSE, *ZERO)
    launcher.add("batch", *FP64, "training.global_batch_size=16", kill=("plain", 4))
    launcher.add("warm", *FP64, *WARM_UPS)
    launcher.add("warm-last-moment", *FP64, *WARM_UPS, kill=("warm", 8))
    mlflow = ("tracking.mlflow=true", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}", "checkpoint.interval=4")
    launcher.add("mlflow", *mlflow, key="mlflow-first")
    launcher.add("mlflow", *mlflow, kill=("mlflow", 4))
    launcher.add("retention", "checkpoint.interval=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    _litter(launcher.root / "retention" / "checkpoints")


def _litter(checkpoints: Path) -> None:
    """What a killed save, a copy in progress and a careful user leave."""
    for name in (".step-00000007.incomplete", "step-00000099", "step-00000050.bak"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "__0_0.distcp").write_bytes(b"half")
    (checkpoints / "step-00000050.bak" / "meta.json").write_text("{}")


def _two_processes(launcher: Launcher, dataset: Path, folder: Path) -> None:
    launcher.add("plain-dp2", *FP64, kill=("plain", 2))
    launcher.add("dense-dp2", *DENSE, *ZERO, kill=("dense", 2))
    launcher.add("gather", *BF16, *ZERO)
    launcher.add("overlapped-gather", *BF16, *ZERO, *OVERLAP)
    launcher.add("tp2", *FP64, *TP)
    launcher.add("tp2-pp2", *FP64, *PP, kill=("tp2", 4))
    launcher.add("tp2-pp2-tp2", *FP64, *TP, kill=("tp2-pp2", 6))
    launcher.add("vpp", *FP64, *VPP)
    launcher.add("plain-vpp", *FP64, *VPP, kill=("plain", 4))
    launcher.add("moe", *FP64, *MOE)
    launcher.add("moe-resumed", *FP64, *MOE, kill=("moe", 4))
    _mistakes(launcher, dataset, folder)
    launcher.add("huge-lr", *DENSE, "optimizer.lr=2e18")
    launcher.add("huge-init", "model.init_std=1e30", "checkpoint.interval=1")


def _mistakes(launcher: Launcher, dataset: Path, folder: Path) -> None:
    launcher.add("no-dataset", f"data.path={folder / 'nowhere'}")
    launcher.add("no-shard", f"data.path={_damaged(dataset, folder / 'no-shard', _remove)}")
    launcher.add("short-shard", f"data.path={_damaged(dataset, folder / 'short-shard', _truncate)}")
    launcher.add("bad-chunk", f"data.path={_damaged(dataset, folder / 'bad-chunk', _corrupt_for_rank_1)}")
    launcher.add("small-vocabulary", "model.vocab_size=100")
    launcher.add("tp2", *FP64, *TP, "model.hidden_size=128", key="other-model")
    launcher.add("tp2", *FP64, *TP, "data.seed=7", key="other-order")
    launcher.add("tp2", *FP64, *TP, *ZERO, key="other-optimizer")
    launcher.add("killed", *FP64, *TP, "data.seed=7", kill=("tp2", 4))
    launcher.add("no-checkpoint", f"checkpoint.load={dataset}")
    launcher.add("run-as-checkpoint", f"checkpoint.load={launcher.root / 'plain'}")
    launcher.add("too-few-processes", "parallel.tp=2", "parallel.pp=2")


def _one_process_again(launcher: Launcher) -> None:
    launcher.add("plain-dp2-plain", *FP64, kill=("plain-dp2", 6))
    launcher.add("dense-dp2-one", *DENSE, *ZERO, kill=("dense-dp2", 6))
    launcher.add("dense-tp2-dp2-one", *DENSE, *ZERO, kill=("dense-tp2-dp2", 4))
    launcher.add("vpp-plain", *FP64, kill=("vpp", 4))
    launcher.add("plain", *FP64, key="complete")
    launcher.add("last-moment", *FP64, kill=("plain", 8))
    launcher.add("moe-one", *FP64, *MOE, "parallel.ep=1", kill=("moe", 4))
    weights = RunFiles(launcher.root / "plain").checkpoint(8)
    launcher.add("from-weights", *BF16, *ZERO, f"checkpoint.load={weights}")
    launcher.add("gone", *FP64, before=("lose_checkpoints", "plain"))
    launcher.add("past-the-end", *FP64, "training.steps=4", "optimizer.warmup_steps=1", kill=("plain", 6))
    launcher.add("triton-on-cpu", "run.kernels=triton")
    launcher.add("half-copied", *FP64, "training.steps=10", before=("copy_in_part", "plain", 8))
    launcher.add("owned")


@contextmanager
def _owner_elsewhere(root: Path, name: str) -> Iterator[None]:
    """This process owns a run, as a start of it that still saves would."""
    path = root / ".locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("process 1 on elsewhere\n")
    with path.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _damaged(dataset: Path, copy: Path, damage: Any) -> Path:
    shutil.copytree(dataset, copy)
    damage(copy)
    return copy


def _remove(dataset: Path) -> None:
    (dataset / "train-00001.tar").unlink()


def _truncate(dataset: Path) -> None:
    os.truncate(dataset / "train-00001.tar", 4096)


def _corrupt_for_rank_1(dataset: Path) -> None:
    """Flip a token in a chunk that rank 1 of 2 reads in step 2 and nobody before or beside it."""
    data = open_windows(dataset, "train", seq_length=32, seed=0)
    chunk = data._orders[0, 0].locate(np.arange(16)).chunk.tolist()
    mine = [14, 15]  # second microbatch of rank 1 in step 2
    target = next(chunk[i] for i in mine if chunk[i] not in [c for j, c in enumerate(chunk) if j not in mine])
    _flip(dataset, data, target)


def _corrupt_two_chunks(dataset: Path) -> None:
    """Flip tokens in the chunks of the first sample and of one of step 6."""
    data = open_windows(dataset, "train", seq_length=32, seed=0)
    chunks = data._orders[0, 0].locate(np.arange(64)).chunk.tolist()
    for target in (chunks[0], next(chunk for chunk in chunks[40:48] if chunk not in chunks[:40])):
        _flip(dataset, data, target)


def _flip(dataset: Path, data: WindowDataset, chunk: int) -> None:
    extent = data._sources[0].reader.extent(chunk)
    with (dataset / extent.shard).open("r+b") as file:
        file.seek(extent.begin)
        byte = file.read(1)
        file.seek(extent.begin)
        file.write(bytes([byte[0] ^ 1]))


def _free_ports() -> Iterator[int]:
    """Different ports that nobody listens on, below those that the kernel gives to connections."""
    for port in random.sample(range(20_000, 32_000), 12_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                yield port
