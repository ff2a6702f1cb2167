"""The command line as a user meets it, in a process that cannot import torch.

Commands that only print share a process, because the start of one takes longer than all of them.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
import sys
for name in ("torch", "megatron", "mlflow", "triton", "transformer_engine"):
    sys.modules[name] = None
from launch.cli import main
"""
ONE = f"{WITHOUT_TORCH}\nsys.exit(main())"
MANY = f"""{WITHOUT_TORCH}
import io, json, traceback
from contextlib import redirect_stderr, redirect_stdout
found = []
for arguments in json.load(sys.stdin):
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    found.append((arguments, code, output.getvalue(), errors.getvalue()))
json.dump(found, sys.stdout)
"""


def python(folder: Path, program: str, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program in a directory, with little in its environment."""
    command = [sys.executable, "-c", program, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "120"}
    return subprocess.run(
        command, cwd=folder, env=environment, input=given, text=True, capture_output=True, timeout=120
    )


Results = dict[tuple[str, ...], subprocess.CompletedProcess[str]]


def run_all(folder: Path, commands: Sequence[Sequence[str]]) -> Results:
    """What `qsparse` says to each of several commands in one process that cannot import torch."""
    done = python(folder, MANY, given=json.dumps(commands))
    assert (done.returncode, done.stderr) == (0, "")
    return {tuple(found[0]): subprocess.CompletedProcess(*found) for found in json.loads(done.stdout)}


@pytest.fixture
def qsparse(tmp_path):
    """Run `qsparse` in an empty directory, with torch, megatron and MLflow unavailable."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return python(tmp_path, ONE, *arguments)

    return run


HELPS = [
    (
        ["--help"],
        ["train", "generate", "evaluate", "config", "data", "report", "compare", "mlflow", "track", "doctor"],
    ),
    (["train", "--help"], ["CONFIG", "KEY=VALUE", "--nproc", "examples:"]),
    (["generate", "--help"], ["RUN_DIR", "--prompt", "--tokens", "--temperature", "examples:"]),
    (["evaluate", "--help"], ["RUN_DIR", "KEY=VALUE", "examples:"]),
    (["config", "--help"], ["show", "check", "diff", "schema", "examples:"]),
    (["data", "--help"], ["prepare"]),
    (["data", "prepare", "--help"], ["--source", "--output"]),
    (["mlflow", "--help"], ["--root", "--port", "example:"]),
    (["report", "--help"], ["RUN_DIR", "example:"]),
    (["compare", "--help"], ["RUN", "--where", "--search", "--output", "examples:"]),
    (["track", "--help"], ["sync"]),
    (["launch", "--help"], ["local", "torchrun", "slurm", "examples:"]),
    (["launch", "slurm", "--help"], ["--nodes", "--cluster", "--sweep", "--dry-run", "--template", "--preflight"]),
    (["launch", "torchrun", "--help"], ["--nnodes", "--node-rank", "--rdzv-endpoint"]),
    (["status", "--help"], ["RUN", "preempted", "examples:"]),
    (["logs", "--help"], ["--follow"]),
    (["cancel", "--help"], ["--now"]),
    (["preflight", "--help"], ["--nproc", "--folder", "Exit code 5", "srun"]),
    (["track", "sync", "--help"], ["RUN_DIR", "examples:"]),
]


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> Results:
    return run_all(tmp_path_factory.mktemp("helps"), [arguments for arguments, _ in HELPS])


@pytest.mark.parametrize(("arguments", "expected"), HELPS)
def test_help(helps, arguments, expected):
    result = helps[tuple(arguments)]
    assert (result.returncode, result.stderr) == (0, "")
    assert [text for text in expected if text not in result.stdout] == []


MISTAKES = [
    ([], "the following arguments are required: COMMAND"),
    (["trian"], "invalid choice: 'trian'"),
    (["config", "show", "--bogus"], "unrecognized arguments: --bogus"),
    (["config", "show", "a", "b"], "qsparse: one file is expected, got 2: a, b"),
    (["config", "check", "run.name=x"], "qsparse: no file to check"),
    (["train", "x.yaml", "--bogus"], "qsparse: unrecognized option '--bogus'; see --help"),
    (
        ["train", "x.yaml", "y.yaml"],
        "one CONFIG and overrides of the form KEY=VALUE are expected, got also 'y.yaml'",
    ),
    (["train", "x.yaml"], "x.yaml: cannot be read: No such file or directory"),
    (["train", "good.yaml", "run.nam=x"], "override 'run.nam=x': run.nam: unknown key, did you mean 'run.name'?"),
    (["train", "good.yaml", "--nproc", "2", "parallel.tp=4"], "2 processes are not a multiple of parallel.tp=4"),
    (
        ["generate", "runs/x", "--prompt", "a"],
        "qsparse: runs/x is not the directory of a run: it has no config.yaml",
    ),
    (["evaluate", "runs/x"], "qsparse: runs/x is not the directory of a run: it has no config.yaml"),
    (
        ["launch", "slurm", "good.yaml", "--cluster", "none"],
        "neither none nor configs/clusters/none.yaml is a file",
    ),
    (["launch", "slurm", "good.yaml", "--time", "soon"], "option --time: time: string should match pattern"),
    (
        ["launch", "slurm", "good.yaml", "parallel.tp=8", "parallel.pp=2"],
        "1 node of 8 ranks: 8 processes are not a multiple of parallel.tp=8 * parallel.pp=2",
    ),
    (["train", "good.yaml", "tracking.uri=mlruns"], "tracking.uri='mlruns' is no tracking store; use http://HOST"),
    (
        ["launch", "slurm", "good.yaml", "parallel.tp=8", "tracking.uri=htp://a", "--dry-run"],
        "tracking.uri='htp://a' is no tracking store",
    ),
    (["launch", "slurm", "good.yaml", "--nodes", "0"], "1 <= min-nodes <= nodes is expected"),
    (["launch", "slurm", "good.yaml", "--sweep", "run.seed"], "KEY=VALUE,VALUE... is expected"),
    (["launch", "slurm", "good.yaml", "--bogus"], "unrecognized option '--bogus'"),
    (["launch", "torchrun", "good.yaml", "--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
    (["status", "nothing"], "there is no run 'nothing', neither here nor in runs"),
    (["logs", "nothing"], "there is no run 'nothing'"),
    (["cancel", "nothing"], "there is no run 'nothing'"),
    (["preflight", "--nproc", "0"], "--nproc 0: at least one rank per node is needed"),
    (["mlflow"], "qsparse: --root runs has no mlflow.db: no run has been logged there"),
    (["report", "runs/x"], "qsparse: runs/x is not a run directory: it has no metrics.jsonl"),
    (["compare", "a", "b"], "there is no run 'a': --root runs has no runs"),
    (["config", "diff", "bad.yaml"], "bad.yaml:2: model.num_layers: input should be greater than 0 (got 0)"),
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "good.yaml").write_text("parallel: {tp: 2}\n")
    (folder / "bad.yaml").write_text("model:\n  num_layers: 0\n")
    return run_all(folder, [arguments for arguments, _ in MISTAKES])


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_message_and_exit_code_2(mistakes, arguments, message):
    result = mistakes[tuple(arguments)]
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_config_check_reports_every_file(qsparse, tmp_path):
    (tmp_path / "good.yaml").write_text("parallel: {tp: 2, dp: 3}\n")
    (tmp_path / "bad.yaml").write_text("model:\n  num_layer: 0\n")
    result = qsparse("config", "check", "bad.yaml", "good.yaml", "training.global_batch_size=24")
    assert result.returncode == 2
    assert result.stdout == "good.yaml: OK (6 processes)\n"
    assert result.stderr == (
        "bad.yaml: 1 error in the configuration:\n"
        "  bad.yaml:2: model.num_layer: unknown key, did you mean 'model.num_layers'?\n"
    )


def test_config_check_of_all_recipes(qsparse):
    recipes = sorted(str(path) for path in (ROOT / "configs").glob("*.yaml"))
    result = qsparse("config", "check", *recipes)
    assert (result.returncode, result.stderr, result.stdout.count(": OK")) == (0, "", len(recipes))


def test_config_show_can_be_loaded_again(qsparse, tmp_path):
    shown = qsparse("config", "show", "model.num_layers=6", "run.name='1e5'").stdout
    (tmp_path / "shown.yaml").write_text(shown)
    assert "num_layers: 6" in shown
    assert qsparse("config", "show", "shown.yaml").stdout == shown


def test_config_diff(qsparse, tmp_path):
    (tmp_path / "a.yaml").write_text("parallel: {tp: 2}\n")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\nrun: {name: b}\n")
    assert qsparse("config", "diff", "a.yaml").stdout == "key\tdefaults\ta.yaml\nparallel.tp\t1\t2\n"
    assert qsparse("config", "diff", "b.yaml", "a.yaml").stdout == 'key\ta.yaml\tb.yaml\nrun.name\t"qsparse"\t"b"\n'
    assert qsparse("config", "diff", "a.yaml", "a.yaml").stdout == "no differences\n"


def test_config_schema(qsparse, tmp_path):
    printed = qsparse("config", "schema").stdout
    assert "defaults" in json.loads(printed)["properties"]
    qsparse("config", "schema", "--output", "schema.json")
    assert (tmp_path / "schema.json").read_text() == printed


def test_report_of_a_run(qsparse, tmp_path):
    (tmp_path / "a").mkdir()
    records = [{"step": step, "time_ms": 0, "train/loss": 2.0 / step, "train/lr": 0.1} for step in (1, 2)]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    one = qsparse("report", "a")
    assert (one.returncode, one.stderr) == (0, "")
    assert one.stdout.startswith("a/figures/loss.png\na/figures/schedule.png\n\n| run |")
    assert "| a | 2 | - | 1.0000 |" in one.stdout


def test_a_reader_that_leaves_is_no_error(tmp_path):
    command = f"{sys.executable} -m launch config show | head -n 1; exit ${{PIPESTATUS[0]}}"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("run:\n", "")
