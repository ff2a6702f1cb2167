"""One SLURM cluster for all tests of this folder, and `qsparse` as its users call it."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.resume.recipe import RunFiles, write_config
from tests.slurm.cluster import COMMAND_POLL, Cluster, environment_of, parents_command, wait_until
from tests.testing import ROOT

PROFILE = """\
partition: main
time: "20"
gpus_per_node: 0
memory_per_node: null
signal_seconds: 90
forward: [PYTHONPATH, QSPARSE_TRACEBACK]
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    result = subprocess.run(["bash", str(ROOT / ".ci/install-slurm")], capture_output=True, text=True, check=False)
    if result.returncode:
        reason = f"NO SLURM TESTS: its packages cannot be had here: {result.stderr.strip()[-500:]}"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    found = Cluster(base, Path(result.stdout.strip()) if result.stdout.strip() else None, nodes=3)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_job_left(cluster: Cluster) -> Iterator[None]:
    """The job of a test that failed does not keep the nodes from the next one."""
    yield
    cluster.cancel_jobs()


class User:
    """Somebody in front of a login node: a folder with a recipe, a profile and runs."""

    def __init__(self, folder: Path, dataset: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.config = write_config(folder / "config.yaml", folder / "runs", dataset)
        self.config.write_text(self.config.read_text().replace("num_layers: 4", "num_layers: 2"))
        (folder / "profile.yaml").write_text(PROFILE)

    def qsparse(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.cluster.environment, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
        environment.pop("RANK", None)
        command = [sys.executable, "-m", "launch", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=240, check=False
        )

    def launch(self, name: str, *arguments: str, nodes: int = 2) -> str:
        """Submit; returns the job id."""
        options = ["--cluster", "profile.yaml", "--nodes", str(nodes)]
        result = self.qsparse("launch", "slurm", "config.yaml", f"run.name={name}", *options, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.split()[1].rstrip(":")

    def status(self, name: str) -> dict[str, str]:
        """The lines of `qsparse status`."""
        result = self.qsparse("status", name)
        assert result.returncode == 0, result.stderr
        return {line[:11].strip(): line[12:] for line in result.stdout.splitlines()}

    def run(self, name: str) -> RunFiles:
        return RunFiles(self.folder / "runs" / name)

    def decisions(self, name: str) -> list[str]:
        """What the batch script decided after each start."""
        files = sorted((self.folder / "runs" / name / "launch/attempts").glob("*/ended"))
        return [file.read_text().strip() for file in files]

    def log(self, name: str) -> str:
        """Everything that the job printed, for messages of failing tests."""
        files = sorted((self.folder / "runs" / name / "launch").glob("**/*.[ol]*[tg]"))
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files)

    def wait(self, name: str, job_id: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """Wait for an end of the job; returns SLURM's fields."""
        states = states or ("COMPLETED",)
        over = (*states, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        found = self.cluster.wait_for_state(job_id, *over, timeout=timeout)
        assert found["JobState"] in states, f"{found}\n{self.log(name)}"
        return found

    def starts(self, name: str) -> list[Path]:
        return sorted((self.folder / "runs" / name / "launch/attempts").glob("*"))

    def wait_for_start(self, name: str, job_id: str, count: int) -> None:
        """Wait for a start after the first `count`, or the end of the job."""
        over = ("COMPLETED", "FAILED")
        happened = lambda: len(self.starts(name)) > count or self.cluster.job(job_id)["JobState"] in over  # noqa: E731
        wait_until(happened, 240, lambda: self.log(name), COMMAND_POLL)

    def wait_until_training(self, name: str, start: int) -> None:
        """Wait until a start of a run has logged two steps, or the run is complete."""
        begin = self.folder / "runs" / name / f"launch/attempts/{start:03d}/begin"
        run = self.run(name)

        def trains() -> bool:
            if not begin.exists() or not (run.path / "metrics.jsonl").exists():
                return False
            since = begin.stat().st_mtime * 1000
            new = [record for record in run.records if record["time_ms"] > since]
            return len(new) > 1 or run.status["state"] == "completed"

        wait_until(trains, 240, lambda: self.log(name))

    def ranks(self, name: str) -> list[psutil.Process]:
        """The ranks of the last start of a run that live at this moment."""
        start = str(self.starts(name)[-1])
        return [
            process
            for process in psutil.process_iter()
            if (found := environment_of(process)).get("QSPARSE_ATTEMPT") == start
            and "RANK" in found
            and "pipeline.torchrun" in parents_command(process)  # not what ranks start
        ]

    @contextmanager
    def paused(self, name: str) -> Iterator[list[psutil.Process]]:
        """The ranks of a run, which stand still meanwhile, so that it is not over before something happens to it."""
        ranks = self.ranks(name)
        assert ranks, self.log(name)
        for rank in ranks:
            rank.suspend()
        yield ranks
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.resume()

    @staticmethod
    def is_asked_to_end(rank: psutil.Process) -> bool:
        """Whether SIGTERM waits for a rank that stands still, or somebody else let it go on."""
        status = Path(f"/proc/{rank.pid}/status").read_text(encoding="utf-8")
        pending = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:")))
        return any(mask >> (signal.SIGTERM - 1) & 1 for mask in pending) or "T (stopped)" not in status

    def kill_rank(self, name: str, number: signal.Signals = signal.SIGKILL) -> bool:
        """Send a signal to one rank of the last start of a run; False if there is none at this moment."""
        ranks = self.ranks(name)
        if ranks:
            random.choice(ranks).send_signal(number)
        return bool(ranks)

    def last_step(self, name: str) -> int:
        """Step of the last record, 0 before the first."""
        file = self.run(name).path / "metrics.jsonl"
        return max((record["step"] for record in self.run(name).records), default=0) if file.exists() else 0

    def wait_for_record(self, name: str, step: int, deadline: float) -> None:
        """Wait until a run has trained `step` steps, or for `deadline` (of `time.monotonic`)."""
        while self.last_step(name) < step and time.monotonic() < deadline:
            time.sleep(0.05)

    def wait_for_step(self, name: str, step: int, timeout: float = 240) -> None:
        wait_until(lambda: self.run(name).newest >= step, timeout, lambda: self.log(name))


@pytest.fixture(scope="session")
def user(cluster: Cluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> User:
    return User(tmp_path_factory.mktemp("user"), dataset, cluster)


KILLS = int(os.environ.get("QSPARSE_SLURM_KILLS", "2"))
STEPS = 80 + 40 * max(0, KILLS - 2)  # enough that each kill hits a run that still trains
LONG = (f"training.steps={STEPS}", "checkpoint.interval=4", "parallel.dp=2")


def assert_as_undisturbed(user: User, name: str, undisturbed: RunFiles) -> None:
    """A run of `LONG` is complete and has the very losses of the one that nobody disturbed."""
    assert user.run(name).losses == undisturbed.losses, user.log(name)
    assert user.run(name).val_losses == undisturbed.val_losses
    assert user.run(name).status["state"] == "completed"


@pytest.fixture(scope="session")
def undisturbed(user: User) -> RunFiles:
    """The run of `LONG` that nobody disturbs, on this machine without SLURM."""
    result = user.qsparse("launch", "local", "config.yaml", "run.name=undisturbed", *LONG)
    assert result.returncode == 0, result.stdout + result.stderr
    return user.run("undisturbed")
