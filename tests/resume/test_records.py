"""Which checkpoints stay, what a finished run says, and what MLflow shows of a resumed one."""

import json
import re
import sqlite3

from tests.resume.conftest import Starts


def test_retention_and_the_remains_of_killed_saves(starts: Starts) -> None:
    run = starts.run("retention")
    kept = ["step-00000003", "step-00000006", "step-00000007", "step-00000008"]
    assert run.visible == sorted([*kept, "step-00000050.bak", "step-00000099"])
    assert run.incomplete == []
    assert len(run.losses) == 8  # step-00000099 has no meta.json: it was not resumed


def test_a_checkpoint_lists_its_files(starts: Starts) -> None:
    folder = starts.run("plain").checkpoint(8)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["files"] == {
        path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != "meta.json"
    }
    assert meta["consumed_samples"] == 64


def test_a_finished_run_says_so_and_stays_as_it_is(starts: Starts) -> None:
    start, run = starts.results["complete"], starts.run("plain")
    assert start.codes == [0]
    assert start.outputs[0].startswith("run plain is complete: 8 steps are done, training.steps=8")
    assert start.outputs[0].count("\n") == 1
    assert len(run.val_losses) == 1  # not evaluated again
    assert not list(run.path.glob("config.*.yaml"))
    assert run.status["reason"] == "all 8 steps done"


def test_a_run_killed_in_its_last_moment_ends_without_a_second_evaluation_on_record(starts: Starts) -> None:
    run = starts.run("last-moment")
    assert (run.status["state"], run.status["step"]) == ("completed", 8)
    assert run.val_losses == starts.run("plain").val_losses
    assert len(run.losses) == 8


def test_an_evaluation_right_after_a_resume_quantizes_as_the_run_did(starts: Starts) -> None:
    outputs = [starts.results[name].outputs[0] for name in ("warm", "warm-last-moment")]
    losses = [re.findall(r"val loss +([0-9.]+)", output) for output in outputs]
    assert len(losses[0]) == 1 and losses[1] == losses[0]


def test_mlflow_goes_on_with_the_same_run(starts: Starts) -> None:
    run = starts.run("mlflow")
    assert starts.results["mlflow-first"].codes == [0]
    run_id = (run.path / "mlflow_run_id").read_text().strip()
    with sqlite3.connect(starts.root.parent / "mlflow.db") as database:
        assert database.execute("select run_uuid, status from runs").fetchall() == [(run_id, "FINISHED")]
        points = database.execute(
            "select step, value from metrics where key = 'train/loss' and run_uuid = ? order by step", (run_id,)
        ).fetchall()
    assert [step for step, _ in points] == list(range(1, 9))
    assert [value for _, value in points] == run.losses
