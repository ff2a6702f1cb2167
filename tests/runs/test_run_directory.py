import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.run_directory import RunDirectory
from tests.testing import ROOT


def test_create_makes_the_documented_tree(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("a: 1\n", {"python": "3.11", "command": ["qsparse", "train"]})
    found = {str(path.relative_to(directory.path)) for path in directory.path.rglob("*")}
    assert found == {"config.yaml", "environment.json", "checkpoints", "figures", "samples", "logs"}
    assert directory.config.read_text() == "a: 1\n"
    assert json.loads(directory.environment.read_text()) == {"python": "3.11", "command": ["qsparse", "train"]}
    assert directory.log(3) == directory.path / "logs" / "rank-00003.log"


def test_a_changed_config_keeps_the_earlier_ones(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for text in ("a: 1\n", "a: 1\n", "a: 2\n", "a: 3\n"):
        directory.create(text)
    assert {path.name: path.read_text() for path in tmp_path.glob("config*")} == {
        "config.yaml": "a: 3\n",
        "config.1.yaml": "a: 1\n",
        "config.2.yaml": "a: 2\n",
    }


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"run directory .*run is a file; choose another run.name"):
        RunDirectory(tmp_path / "run").create("a: 1\n")


def test_status_round_trip(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.read_status() is None
    directory.write_status("stopped", 120, "SIGTERM", checkpoint="checkpoints/step-120")
    status = directory.read_status()
    assert status is not None
    assert status.pop("time").endswith("+00:00")
    assert status == {"state": "stopped", "step": 120, "reason": "SIGTERM", "checkpoint": "checkpoints/step-120"}


def test_status_errors_name_state_and_file(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="run state 'done' is none of running, completed, stopped, failed"):
        directory.write_status("done", 1, "")  # type: ignore[arg-type]
    directory.status.write_text("{")
    with pytest.raises(ValueError, match=r"status.json is not JSON"):
        directory.read_status()


def test_status_is_whole_at_every_moment_of_a_kill(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline.run_directory import RunDirectory\n"
        "d = RunDirectory(Path(sys.argv[1])); step = 0\n"
        "while True:\n    step += 1; d.write_status('running', step, 'x' * 2000000)\n"
    )
    directory = RunDirectory(tmp_path)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
        directory.status.unlink(missing_ok=True)
        deadline = time.monotonic() + 20
        while not directory.status.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        reads = [directory.read_status() for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        reads.append(directory.read_status())
        assert all(status is not None and status["reason"] == "x" * 2_000_000 for status in reads)
