"""Diagnosis against made-up installations, and the command line of the MLflow server."""

import re
import socket
import sys
from importlib import metadata
from pathlib import Path

import pytest

from launch.cli import main
from launch.doctor import find_problems, installed_version
from launch.mlflow_command import mlflow_command

GOOD = {name: "1.0" for name in ("torch", "pydantic", "numpy", "tokenizers", "webdataset", "mlflow", "psutil")} | {
    "megatron-core": "0.16.1"
}


def test_good_installation():
    owners = {"kernels": ["qsparse"], "pipeline": ["qsparse", "qsparse"], "yaml": ["PyYAML"]}
    assert find_problems(GOOD.get, owners, (3, 11, 0)) == []


@pytest.mark.parametrize(
    ("change", "owners", "python", "expected"),
    [
        ({}, {}, (3, 10, 9), "Python 3.10.9: 3.11 or newer is needed"),
        ({"psutil": None}, {}, (3, 12), "psutil is not installed: without it megatron-core hangs when it saves"),
        ({"torch": None}, {}, (3, 12), "torch is not installed: run `pip install -c constraints.txt -e .`"),
        ({"megatron-core": "0.15.3"}, {}, (3, 12), "megatron-core 0.15.3: >=0.16.1,<0.20 is needed"),
        (
            {"megatron-core": "0.20.0rc1", "triton": "3.6"},
            {},
            (3, 12),
            "megatron-core 0.20.0rc1: >=0.16.1,<0.20 is needed",
        ),
        ({"megatron-core": "0.19.2"}, {}, (3, 12), "triton is not installed: megatron-core 0.19.2 imports it"),
        (
            {},
            {"kernels": ["kernels", "qsparse"]},
            (3, 12),
            "the distribution 'kernels' has a top-level package 'kernels' as we do: run `pip uninstall kernels`",
        ),
    ],
)
def test_problem_is_named_with_its_cure(change, owners, python, expected):
    (problem,) = find_problems((GOOD | change).get, owners, python)
    assert problem.startswith(expected)


def test_versions_are_those_of_the_distributions():
    assert installed_version("pydantic") == metadata.version("pydantic")
    assert installed_version("no-such-distribution") is None


def test_mlflow_command_names_the_store_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(ValueError, match=re.escape("--root runs has no mlflow.db")):
        mlflow_command(Path("runs"), "127.0.0.1", 5000)
    Path("runs/mlflow.db").touch()
    assert mlflow_command(Path("runs"), "127.0.0.1", 5001) == [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", f"sqlite:///{tmp_path}/runs/mlflow.db",
        "--artifacts-destination", f"file://{tmp_path}/runs/mlartifacts",
        "--host", "127.0.0.1", "--port", "5001", "--workers", "1",
    ]  # fmt: skip


def test_a_port_where_nothing_can_listen(tmp_path, capsys):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for given, message in [(port, f"cannot listen on 127.0.0.1:{port}"), (99999, "--port 99999: 1 to 65535")]:
            assert main(["mlflow", "--root", str(tmp_path), "--port", str(given)]) == 2
            assert message in capsys.readouterr().err
