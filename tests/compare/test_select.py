from pathlib import Path

import pytest

from pipeline.compare.select import select_runs
from tests.compare.writing import write_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for sparsity in (0.0, 0.4, 0.6):
        qsparse = {"qsparse": {"sparsity": sparsity}}
        tracking = {"parent": "sweep"}
        write_run(tmp_path, f"q-{sparsity}", steps=20, loss=4 + sparsity, model=qsparse, tracking=tracking)
    run = write_run(tmp_path, "dense", steps=20, state="failed")
    (run / "mlflow_run_id").write_text("0123456789abcdef\n")
    (tmp_path / "comparisons").mkdir()
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_words(root: Path) -> None:
    assert names(select_runs(["dense", str(root / "q-0.4"), "dense"], root)) == ["dense", "q-0.4"]
    assert names(select_runs(["q-*"], root)) == ["q-0.0", "q-0.4", "q-0.6"]
    assert names(select_runs(["sweep"], root)) == ["q-0.0", "q-0.4", "q-0.6"]
    assert names(select_runs(["01234567"], root)) == ["dense"]
    assert names(select_runs([], root)) == ["dense", "q-0.0", "q-0.4", "q-0.6"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("model.qsparse.sparsity=0.4", ["q-0.4"]),
        ("model.qsparse.sparsity>=0.40", ["q-0.4", "q-0.6"]),
        ("model.qsparse.sparsity!=0", ["q-0.4", "q-0.6"]),
        ("state=failed", ["dense"]),
        ("tracking.parent!=sweep", ["dense"]),
        ("val/loss < 9.7", ["dense", "q-0.0"]),
        ("model.qsparse.weights=full", ["dense", "q-0.0", "q-0.4", "q-0.6"]),
    ],
)
def test_conditions(root: Path, condition: str, expected: list[str]) -> None:
    assert names(select_runs([], root, [condition])) == expected


def test_mistakes_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no run 'q-0.5': did you mean 'q-0\.[046]'\?"):
        select_runs(["q-0.5"], root)
    with pytest.raises(ValueError, match=r"there is no run 'zzz': --root .* has dense, q-0.0, q-0.4, q-0.6"):
        select_runs(["zzz"], root)
    with pytest.raises(ValueError, match=r"there is no run 'a': --root .* has no runs"):
        select_runs(["a"], root / "comparisons")
    with pytest.raises(ValueError, match=r"--where sparsity: KEY=VALUE is expected"):
        select_runs([], root, ["sparsity"])
    with pytest.raises(
        ValueError, match=r"--where model.qsparse.sparsty: no run has it, did you mean 'model.qsparse.sp"
    ):
        select_runs([], root, ["model.qsparse.sparsty=0.4"])
    with pytest.raises(ValueError, match=r"--where state: 'failed' of .*dense is not a number to compare"):
        select_runs([], root, ["state<3"])
