"""`qsparse plan`: layouts that can be used as they are, and messages about those that are impossible."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.config_loader import load_config
from tests.testing import ROOT

SMALL = str(ROOT / "configs/gpt_300m.yaml")
LARGE = str(ROOT / "configs/gpt_7b.yaml")


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict:
    assert main(["plan", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err


def test_layouts_are_ranked_and_their_overrides_load(capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, LARGE, "--gpus", "16")
    speeds = [item["tokens_per_second_per_gpu"] for item in answer["best"]]
    assert len(speeds) == 4 and speeds == sorted(speeds, reverse=True)
    for item in answer["best"]:
        assert load_config(Path(LARGE), item["overrides"]).check_world_size(16)
        assert sum(item["memory"].values()) <= 79 * 2**30
    for item in answer["too_large"]:
        assert sum(item["memory"].values()) > 79 * 2**30


def test_given_keys_are_held(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["parallel.tp=2", "training.recompute=full", "training.micro_batch_size=1"]
    for item in plan(capsys, LARGE, *given, "--gpus", "16")["best"]:
        config = load_config(Path(LARGE), [*given, *item["overrides"]])
        assert (config.parallel.tp, config.training.recompute, config.training.micro_batch_size) == (2, "full", 1)


def test_keys_inside_of_a_section_are_held(capsys: pytest.CaptureFixture[str]) -> None:
    for item in plan(capsys, LARGE, "parallel={tp: 2, dp: 4}", "--gpus", "16")["best"]:
        config = load_config(Path(LARGE), ["parallel.tp=2", "parallel.dp=4", *item["overrides"]])
        assert (config.parallel.tp, config.parallel.pp, config.parallel.dp) == (2, 2, 4)


def test_less_memory_asks_for_more_sharding(capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, LARGE, "--gpus", "1", code=1)
    assert answer["best"] == [] and answer["too_large"]
    assert main(["plan", LARGE, "--gpus", "1"]) == 1
    text = capsys.readouterr().out
    assert "fits." in text and "Adam moments 50.2" in text  # 8 bytes of 6.74 B parameters


def test_text_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert main(["plan", SMALL, "--gpus", "8", "--figure", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "model.vocab_size=32000 assumed" in text and "run.cuda_graph=true" in text
    assert "data: gradients, fp32" in text and "model.vocab_size=32000 " not in text.splitlines()[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SMALL, "--gpus", "0"], "--gpus 0: a positive number"),
        ([SMALL, "--gpus", "8", "--gpu", "tpu"], "--gpu tpu: there are rates for h100, h200"),
        ([SMALL], "name a CONFIG and --gpus N"),
        ([SMALL, "--gpus", "8", "parallel.tp=3"], "num_attention_heads=16 is not divisible by parallel.tp=3"),
        ([SMALL, "--gpus", "8", "training.precision=fp32"], "set training.precision=bf16"),
        ([SMALL, "--gpus", "8", "run.kernels=reference"], "set run.kernels=auto"),
        ([SMALL, "--gpus", "7"], "training.global_batch_size=256 does not divide"),
        ([SMALL, "--gpus", "8", "parallel.sequence_parallel=true", "parallel.tp=1"], "needs parallel.tp > 1"),
        ([SMALL, "--gpus", "8", "--top", "0"], "--top 0"),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in mistake(capsys, *arguments)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from launch.cli import main; main(['plan', 'configs/gpt_300m.yaml', '--gpus', '2']); "
        "sys.exit([name for name in ('torch', 'megatron', 'matplotlib') if name in sys.modules] or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_check_prints_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", "--check", "tests/plan/measured.csv"]) == 0
    assert "| 1.3b dense, graph | 35.6 |" in capsys.readouterr().out


def test_sizes_that_are_held_and_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for held in (["parallel.dp=16"], ["parallel.tp=4", "parallel.dp=4"]):
        assert "the sizes given need 16 of them or a multiple" in mistake(capsys, SMALL, "--gpus", "8", *held)


def test_a_file_that_is_no_table_of_measured_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no table of measured runs: it has no column config, gpu" in mistake(capsys, "--check", SMALL)
    assert "Is a directory" in mistake(capsys, "--check", str(ROOT))
