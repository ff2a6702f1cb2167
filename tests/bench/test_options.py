"""Options of the benchmarks: what is out of range ends in one line that names the option; nothing is measured."""

import importlib
from pathlib import Path

import pytest
import torch

NUMBERS = [
    ("data", "--rounds=0", "argument --rounds: '0': a whole number of at least 1 is expected"),
    ("data", "--megatokens=-1", "argument --megatokens: '-1': a number above 0 is expected"),
    ("data_scale", "--gpus=x", "argument --gpus: 'x': a whole number of at least 1 is expected"),
    ("data_scale", "--tokens=nan", "argument --tokens: 'nan': a number above 0 is expected"),
    ("train", "--steps=0", "argument --steps: '0': a whole number of at least 1 is expected"),
    ("trajectories", "--steps=1.5", "argument --steps: '1.5': a whole number of at least 1 is expected"),
]


def refused(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"pipeline.bench.{name}").main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("name", "argument", "expected"), NUMBERS)
def test_numbers_out_of_range(name: str, argument: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(name, [argument], capsys)


@pytest.mark.parametrize("name", ["kernels.__main__", "moe", "train", "generate", "scaling", "trajectories"])
def test_nothing_to_draw(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(name, ["--draw", f"--output={tmp_path}"], capsys)
    assert f"{name.split('.')[0]}: error: --draw: no " in told
    assert f".csv in {tmp_path}; measure first, or name their folder with --output" in told


def test_unknown_curves(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused("trajectories", ["--data=x", "--curves", "exact", "exakt"], capsys)
    assert "--curves exakt: expected some of reference; " in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what is missed here")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train", "needs a CUDA GPU, found none (--device cpu --shapes tiny runs anywhere)"),
        ("generate", "needs a CUDA GPU, found none (--device cpu --shapes tiny runs anywhere)"),
        ("scaling", "--layouts: needs 2 CUDA GPUs, found none (--device cpu --shapes tiny runs anywhere)"),
        ("moe", "--gpus: needs a CUDA GPU, found none (--device cpu --layers tiny runs anywhere)"),
    ],
)
def test_missing_gpus(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(name, [], capsys)
