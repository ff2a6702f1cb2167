"""Starting ranks: the command line, the environment, and what a signal does, with real processes."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch import run_commands
from launch.cli import build_parser, main
from launch.local import Rendezvous, inside_torchrun, rank_environment, run_until_done, torchrun_command
from pipeline.config_loader import dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]


def test_torchrun_command():
    assert torchrun_command("pipeline.train", ["a.yaml", "x.y=1"], 4)[1:] == [
        "-m", "pipeline.torchrun", "--standalone", "--nproc-per-node=4",
        "--module", "pipeline.train", "a.yaml", "x.y=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rendezvous", "expected"),
    [
        (
            Rendezvous(2, "n1:29500", node_rank=1),
            ["--nnodes=2", "--node-rank=1", "--master-addr=n1", "--master-port=29500"],
        ),
        (
            Rendezvous(4, "10.0.0.1:5", job="a"),
            ["--nnodes=4", "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:5", "--rdzv-id=a"],
        ),
    ],
)
def test_torchrun_command_of_one_node_of_several(rendezvous, expected):
    command = torchrun_command("pipeline.train", ["a.yaml"], 8, rendezvous)
    assert command[3:] == [*expected, "--nproc-per-node=8", "--module", "pipeline.train", "a.yaml"]


@pytest.mark.parametrize(
    ("rendezvous", "message"),
    [
        (Rendezvous(2, "n1"), "--rdzv-endpoint n1: HOST:PORT of the first node is expected, e.g. n1:29500"),
        (Rendezvous(2, "n1:x"), "--rdzv-endpoint n1:x: HOST:PORT"),
        (Rendezvous(2, "n1:1", node_rank=2), "--node-rank 2 must be between 0 and --nnodes 2 - 1"),
    ],
)
def test_wrong_rendezvous(rendezvous, message):
    with pytest.raises(ValueError, match=message):
        rendezvous.options()


def test_rank_environment_keeps_what_the_user_set():
    environment = rank_environment(3, {"OMP_NUM_THREADS": "9", "CUDA_DEVICE_MAX_CONNECTIONS": "8", "HOME": "/h"})
    assert environment == {
        "OMP_NUM_THREADS": "3",
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "HOME": "/h",
    }


def test_inside_torchrun():
    assert inside_torchrun({"RANK": "0", "WORLD_SIZE": "2"})
    assert not inside_torchrun({"RANK": "0"})


@pytest.fixture
def started(monkeypatch):
    """What the commands would start, as (module, arguments, number of processes)."""
    calls = []

    def record(module, arguments, config, num_processes, rendezvous=None):
        calls.append((module, list(arguments), num_processes, *([rendezvous] if rendezvous else [])))
        return 7

    monkeypatch.setattr(run_commands, "run_local", record)
    monkeypatch.delenv("RANK", raising=False)
    return calls


def test_train_starts_the_configured_processes(started, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("parallel: {tp: 2, pp: 2}\n")
    assert main(["train", str(path), "parallel.dp=2", "run.seed=-0"]) == 7
    assert started == [("pipeline.train", [str(path), "parallel.dp=2", "run.seed=-0"], 8)]


def test_train_takes_overrides_before_and_after_options(started, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert main(["train", str(path), "run.seed=1", "--nproc", "2", "parallel.tp=2", "run.name=x"]) == 7
    assert started == [("pipeline.train", [str(path), "run.seed=1", "parallel.tp=2", "run.name=x"], 2)]


def test_launch_local_is_train(started, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert main(["launch", "local", str(path), "run.seed=1", "--nproc", "2", "parallel.tp=2"]) == 7
    assert started == [("pipeline.train", [str(path), "run.seed=1", "parallel.tp=2"], 2)]


def test_launch_torchrun_starts_one_node(started, tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("parallel: {tp: 2, dp: 2}\n")
    command = ["launch", "torchrun", str(path), "--rdzv-endpoint", "n1:29500"]
    assert main([*command, "--nnodes", "2", "--node-rank", "1"]) == 7
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.setenv("SLURM_NODEID", "3")
    assert main(command) == 7
    assert started == [
        ("pipeline.train", [str(path)], 2, Rendezvous(2, "n1:29500", 1)),
        ("pipeline.train", [str(path)], 1, Rendezvous(4, "n1:29500", 3)),
    ]


def test_generate_and_evaluate_take_the_layout_of_the_run(started, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, ["parallel.tp=2"])))
    run = str(tmp_path)
    assert main(["generate", run, "--prompt", "def f", "--tokens", "5", "--temperature", "0.5", "--greedy"]) == 7
    assert main(["evaluate", run, "--nproc", "4", "--tasks", "arc"]) == 7
    assert started == [
        ("pipeline.generate", [run, "--prompt", "def f", "--tokens", "5", "--temperature", "0.5", "--greedy"], 2),
        ("pipeline.evaluate", [run, "--tasks", "arc"], 4),
    ]


def test_inside_torchrun_train_becomes_the_rank(monkeypatch, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("")
    replaced = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "execv", lambda *arguments: replaced.append(arguments) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(["train", str(path), "run.seed=1"])
    assert replaced == [(sys.executable, [sys.executable, "-m", "pipeline.train", str(path), "run.seed=1"])]


@pytest.mark.parametrize(
    "command",
    ["train a", "generate a --prompt b", "evaluate a", "config show", "config check a", "config diff a",
     "config schema", "data prepare --output a", "data info a", "data verify a", "report a b", "mlflow",
     "track sync a", "doctor", "launch local a", "launch torchrun a", "launch slurm a", "status a", "logs a",
     "cancel a", "preflight"],
)  # fmt: skip
def test_every_command_sets_run(command):
    assert callable(build_parser().parse_args(command.split()).run)


@pytest.mark.parametrize(("script", "code"), [("pass", 0), ("raise SystemExit(3)", 3)])
def test_exit_code_is_passed_on(script, code):
    assert run_until_done([sys.executable, "-c", script], os.environ) == code


def test_death_by_signal_is_a_shell_exit_code():
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_until_done([sys.executable, "-c", script], os.environ) == 128 + signal.SIGKILL


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    run_until_done([sys.executable, "-c", "pass"], os.environ)
    assert signal.getsignal(signal.SIGTERM) is before


# A launcher like torchrun: starts a worker, dies of signals sent to itself, passes the worker's exit code on.
WORKER = """
import signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("ready", flush=True)
while not stop or {stubborn}:
    time.sleep(0.01)
print("saved", flush=True)
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {worker!r}]))"
WRAPPER = "import os, sys; from launch.local import run_until_done; sys.exit(run_until_done({command!r}, os.environ))"


def start_wrapper(*, stubborn: bool) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-c", LAUNCHER.format(worker=WORKER.format(stubborn=stubborn))]
    command = [sys.executable, "-c", WRAPPER.format(command=launcher)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_first_signal_lets_the_worker_save(number):
    process = start_wrapper(stubborn=False)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "saved\n")
    assert errors == "qsparse: asked the workers to save and stop; a second signal ends them\n"


def test_second_signal_ends_the_launcher():
    process = start_wrapper(stubborn=True)
    try:
        import psutil

        (launcher,) = psutil.Process(process.pid).children()
        (worker,) = launcher.children()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        worker.kill()
        process.communicate()


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("code", [0, 2])
def test_torchrun_itself_starts_ranks_and_passes_their_exit_code(tmp_path, code):
    (tmp_path / "rank.py").write_text(
        f"import os, sys; print(os.environ['WORLD_SIZE'], sys.argv[1:]); sys.exit({code})\n"
    )
    environment = rank_environment(1, {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    result = subprocess.run(
        torchrun_command("rank", ["a=b"], 1), env=environment, text=True, capture_output=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (code, "1 ['a=b']\n")


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake_of_the_configuration(tmp_path):
    command = [sys.executable, "-m", "launch", "train", str(ROOT / "configs/dense.yaml"), "run.device=cuda"]
    ended = subprocess.run([*command, f"run.root={tmp_path}"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 2
    assert "run.device=cuda: process 0 of this machine has no GPU, torch finds 0" in ended.stderr
    assert "Traceback" not in ended.stderr
