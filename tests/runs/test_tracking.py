import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cluster import load_profile
from launch.records import record_end
from launch.submission import Request, prepare
from launch.track_command import tell_end
from pipeline.config import Config
from pipeline.config_loader import dump_config
from pipeline.metrics import MetricsLog, metric_info, read_metrics, series
from pipeline.mlflow_points import clean_name, points_of
from pipeline.mlflow_run import RunDescription
from pipeline.run_directory import RunDirectory
from pipeline.system_metrics import SystemMetrics
from pipeline.track_sync import end_status, replay
from pipeline.tracking import NullTracker, flatten_config, make_tracker
from pipeline.tracking_uri import resolve_uri
from tests.runs.mlflow_tools import Incarnation, fetch_run, history, make_config, run_id, wait_until
from tests.testing import ROOT

pytest.importorskip("mlflow")
with_store = pytest.mark.usefixtures("store_exists")

CRASHING = """
import os, sys, time
from pathlib import Path
from tests.runs.mlflow_tools import Incarnation, make_config
how, root, resume_step, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run = Incarnation(make_config(root), resume_step=resume_step, in_process=False)
run.tracker.wait_ready()
for step in range(resume_step + 1, last + 1):
    run.record(step, {"train/loss": 10.0 - step, "train/tokens": step * 100.0})
    if step % 5 == 0:
        run.record(step, {"val/loss": 11.0 - step})
if how == "raise":
    with run.tracker:
        raise RuntimeError("loss is nan")
if how == "interrupt":
    with run.tracker:
        raise KeyboardInterrupt
if how == "exit":
    sys.exit(3)
if how == "sigkill":
    while run.tracker.undelivered:
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""


def store(root: Path) -> str:
    return f"sqlite:///{(root / 'mlflow.db').resolve()}"


def run_program(how: str, root: Path, resume_step: int = 0, last: int = 10) -> int:
    command = [sys.executable, "-c", CRASHING, how, str(root), str(resume_step), str(last)]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=120, cwd=ROOT).returncode


def test_a_run_arrives_whole(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "run": {"root": str(tmp_path), "name": "whole"},
            "model": {"qsparse": {"sparsity": 0.4, "rules": [{"match": "*.0.*", "sparsity": 0.0}]}},
        }
    )
    run = Incarnation(config, in_process=False)
    assert run.tracker.wait_ready(60)
    run.directory.sample(20).parent.mkdir(exist_ok=True)
    run.directory.sample(20).write_text("def f")
    checkpoint = run.directory.checkpoints / "step-00000020"
    checkpoint.mkdir()
    (checkpoint / "meta.json").write_text("{}")
    (checkpoint / "weights").write_bytes(bytes(1000))
    (run.directory.checkpoints / "step-00000010").mkdir()  # not complete
    for step in range(1, 21):
        layer = {"layer_sparsity/decoder.layers.0.mlp.linear_fc1": 0.5}
        run.record(step, {"train/loss": 1.0 / step, "train/tokens": 4096.0 * step, **layer})
    assert run.tracker.close() == 0
    assert run.tracker.close("FAILED") == 0

    assert history(store(tmp_path), run.directory, "train/loss") == [(s, 1.0 / s) for s in range(1, 21)]
    assert history(store(tmp_path), run.directory, "tokens/train_loss") == [(s * 4096, 1.0 / s) for s in range(1, 21)]
    assert len(history(store(tmp_path), run.directory, "layer_sparsity/decoder.layers.0.mlp.linear_fc1")) == 20
    found = fetch_run(store(tmp_path), run.directory)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "whole")
    assert found.data.params == flatten_config(config)
    assert found.data.params["model.qsparse.sparsity"] == "0.4"
    changed = {key.removeprefix("changed."): v for key, v in found.data.tags.items() if key.startswith("changed.")}
    assert set(changed) == {"run.root", "run.name", "model.qsparse.sparsity", "model.qsparse.rules"}
    assert '"match": "*.0.*"' in changed["model.qsparse.rules"]
    (artifacts,) = (tmp_path / "mlartifacts").glob("*/artifacts")
    assert (artifacts / "config.yaml").read_text() == run.directory.config.read_text()
    assert (artifacts / "samples" / "step-00000020.txt").read_text() == "def f"
    reference = {"step": 20, "path": str(checkpoint), "bytes": 1002}
    assert json.loads((artifacts / "checkpoints.json").read_text()) == [reference]


@with_store
def test_the_times_of_file_and_store_are_the_same(tmp_path: Path) -> None:
    import mlflow

    run = Incarnation(make_config(tmp_path))
    run.record(1, {"train/loss": 1.0})
    run.tracker.close()
    (point,) = mlflow.MlflowClient(store(tmp_path)).get_metric_history(run_id(run.directory), "train/loss")
    assert point.timestamp == read_metrics(run.directory.metrics)[0]["time_ms"]


@with_store
def test_nonfinite_values_are_counted_and_not_sent(tmp_path: Path) -> None:
    run = Incarnation(make_config(tmp_path))
    run.record(1, {"train/loss": 2.0, "train/grad_norm": 1.0})
    run.record(2, {"train/loss": math.nan, "train/grad_norm": math.inf})
    assert run.tracker.close("FAILED") == 0
    assert run.tracker.nonfinite == 2
    assert history(store(tmp_path), run.directory, "train/loss") == [(1, 2.0)]
    assert history(store(tmp_path), run.directory, "train/grad_norm") == [(1, 1.0)]
    assert history(store(tmp_path), run.directory, "tracking/nonfinite") == [(2, 2.0)]
    assert math.isnan(read_metrics(run.directory.metrics)[1]["train/loss"])


@with_store
def test_names_become_acceptable_to_mlflow(tmp_path: Path) -> None:
    run = Incarnation(make_config(tmp_path))
    names = {"throughput(tps)": "throughput_tps_", "mfu(%)": "mfu___", "a//b/../c": "a/b/c", "/x": "x", "é": "_"}
    run.record(1, {**dict.fromkeys(names, 3.0), "l" * 400: 3.0})
    assert run.tracker.close() == 0
    assert set(fetch_run(store(tmp_path), run.directory).data.metrics) == {*names.values(), "l" * 250}
    assert {name: clean_name(name) for name in names} == names


@with_store
@pytest.mark.parametrize(
    ("how", "code", "status"), [("raise", 1, "FAILED"), ("interrupt", -2, "KILLED"), ("exit", 3, "FAILED")]
)
def test_an_unfinished_process_does_not_look_finished(tmp_path: Path, how: str, code: int, status: str) -> None:
    assert run_program(how, tmp_path) in (code, 128 - code)
    directory = RunDirectory(tmp_path / "run")
    assert fetch_run(store(tmp_path), directory).info.status == status
    assert len(history(store(tmp_path), directory, "train/loss")) == 10


@with_store
def test_a_killed_run_is_continued_without_a_step_twice(tmp_path: Path) -> None:
    assert run_program("sigkill", tmp_path, last=12) == -signal.SIGKILL
    directory = RunDirectory(tmp_path / "run")
    first = run_id(directory)
    assert fetch_run(store(tmp_path), directory).info.status == "RUNNING"

    run = Incarnation(make_config(tmp_path, log_interval=5), resume_step=8)
    for step in range(9, 21):  # steps 9 to 12 are trained again, with other values
        run.record(step, {"train/loss": 100.0 + step})
        if step % 5 == 0:
            run.record(step, {"val/loss": 100.0 + step})
    assert run.tracker.close() == 0

    assert run_id(directory) == first
    expected = [(s, 10.0 - s) for s in range(1, 13)] + [(s, 100.0 + s) for s in range(13, 21)]
    assert history(store(tmp_path), directory, "train/loss") == expected
    assert history(store(tmp_path), directory, "val/loss") == [(5, 6.0), (10, 1.0), (15, 115.0), (20, 120.0)]
    assert series(read_metrics(directory.metrics), "train/loss")[0] == list(range(1, 21))
    found = fetch_run(store(tmp_path), directory)
    assert found.info.status == "FINISHED"
    assert found.data.params["tracking.log_interval"] == "10", "params cannot change in MLflow"
    assert found.data.tags["changed.tracking.log_interval"] == "5"
    (artifacts,) = (tmp_path / "mlartifacts").glob("*/artifacts")
    # A kill in the middle of an upload leaves MLflow's temporary file behind.
    names = sorted(file.name for file in artifacts.iterdir() if not file.name.startswith(".artifact.uploading"))
    assert names == ["checkpoints.json", "config.1.yaml", "config.yaml"]


@with_store
def test_what_an_earlier_start_could_not_deliver_is_delivered_by_the_next(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    directory = RunDirectory(tmp_path / "run")
    directory.create(dump_config(config))
    with MetricsLog(directory.metrics) as log:
        for step in range(1, 6):
            log.write({"train/loss": float(step)}, step)
    run = Incarnation(config, resume_step=4)
    run.record(5, {"train/loss": 50.0})
    assert run.tracker.close("KILLED", timeout_s=60) == 0
    assert history(store(tmp_path), directory, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert fetch_run(store(tmp_path), directory).info.status == "KILLED"


@with_store
def test_a_run_id_of_another_store_gives_a_run_in_this_one(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run = Incarnation(config)
    run.record(1, {"train/loss": 1.0})
    run.tracker.close()
    other = f"sqlite:///{tmp_path / 'other' / 'other.db'}"
    moved = Incarnation(config, resume_step=1, uri=other)
    moved.record(2, {"train/loss": 2.0})
    assert moved.tracker.close() == 0
    assert history(other, moved.directory, "train/loss") == [(1, 1.0), (2, 2.0)]


@with_store
def test_replay_fills_holes_and_sets_the_end_status(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run = Incarnation(config)
    for step in range(1, 11):
        metrics = {"train/loss": float(step), "val/loss": math.nan}
        time_ms = run.log.write(metrics, step)
        if step not in (3, 4, 10):
            run.tracker.log(metrics, step, time_ms=time_ms)
    run.tracker.close()
    run.directory.write_status("stopped", 10, "SIGTERM")
    assert [s for s, _ in history(store(tmp_path), run.directory, "train/loss")] == [1, 2, 5, 6, 7, 8, 9]

    assert replay(run.directory, environment={}) == 6, "three losses and three counts of a value that is not finite"
    assert history(store(tmp_path), run.directory, "train/loss") == [(s, float(s)) for s in range(1, 11)]
    assert fetch_run(store(tmp_path), run.directory).info.status == "KILLED"
    assert replay(run.directory, environment={}) == 0


@with_store
def test_replay_ends_a_run_that_was_killed_but_none_that_goes_on(tmp_path: Path) -> None:
    run = Incarnation(make_config(tmp_path))
    run.record(1, {"train/loss": 1.0})
    run.directory.write_status("running", 1, "started")
    wait_until(lambda: run.tracker.undelivered == 0, 60, "delivery")
    lock = tmp_path / ".locks" / "run"
    lock.parent.mkdir()
    program = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline() == b"\n"
    assert end_status(run.directory) is None
    replay(run.directory, environment={})
    assert fetch_run(store(tmp_path), run.directory).info.status == "RUNNING"
    owner.kill()
    owner.communicate()
    replay(run.directory, environment={})
    assert fetch_run(store(tmp_path), run.directory).info.status == "FAILED"
    run.tracker.close("FAILED")


@with_store
def test_replay_creates_a_run_that_mlflow_never_saw(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create(dump_config(make_config(tmp_path, experiment="later")))
    directory.write_status("completed", 2, "all steps done")
    with MetricsLog(directory.metrics) as log:
        log.write({"train/loss": 1.5}, 1)
        log.write({"train/loss": 1.25}, 2)
    assert replay(directory, environment={}) == 2
    found = fetch_run(store(tmp_path), directory)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"train/loss": 1.25})


def test_replay_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config.yaml"):
        replay(RunDirectory(tmp_path))
    directory = RunDirectory(tmp_path / "run")
    directory.create(dump_config(make_config(tmp_path, uri="http://127.0.0.1:9")))
    MetricsLog(directory.metrics).close()
    with pytest.raises(ConnectionError, match=r"MLflow at http://127.0.0.1:9: MlflowException"):
        replay(directory)


def test_a_dead_server_costs_the_metrics_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Incarnation(make_config(tmp_path), uri="http://user:secret@127.0.0.1:9")
    for step in range(1, 31):
        run.record(step, {"train/loss": float(step), "train/lr": 0.1})
    assert run.tracker.close(timeout_s=4) == 60
    assert len(read_metrics(run.directory.metrics)) == 30
    text = caplog.text
    assert "60 values" in text and f"qsparse track sync {run.directory.path}" in text
    assert text.count("training goes on") == 1, "once per outage"
    assert "secret" not in text
    assert "secret" not in run.tracker.location


def test_the_queue_is_bounded_and_says_what_it_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.mlflow_tracker.MAX_QUEUED_RECORDS", 4)
    run = Incarnation(make_config(tmp_path), uri="http://127.0.0.1:9")
    for step in range(1, 11):
        run.record(step, {"train/loss": 1.0, "train/lr": 1.0})
    assert run.tracker.close(timeout_s=2) == 20
    assert len(read_metrics(run.directory.metrics)) == 10


def test_where_metrics_go(tmp_path: Path) -> None:
    default = make_config(tmp_path)
    assert resolve_uri(default, {}) == store(tmp_path)
    assert resolve_uri(default, {"MLFLOW_TRACKING_URI": "http://host:5000"}) == "http://host:5000"
    chosen = make_config(tmp_path, uri="https://mlflow.example.org")
    assert resolve_uri(chosen, {"MLFLOW_TRACKING_URI": "http://host:5000"}) == "https://mlflow.example.org"
    relative = make_config(tmp_path, uri="sqlite:///some/mlflow.db")
    assert resolve_uri(relative, {}) == f"sqlite:///{Path.cwd() / 'some/mlflow.db'}"
    for wrong in ("mlruns", "file:./mlruns", "sqlite://", "htp://host"):
        with pytest.raises(ValueError, match=rf"tracking.uri='{wrong}' is no tracking store; use http://HOST:PORT or"):
            resolve_uri(make_config(tmp_path, uri=wrong), {})
    with pytest.raises(ValueError, match=r"tracking.uri='http://host' holds credentials; set MLFLOW_TRACKING_USERNAME"):
        resolve_uri(make_config(tmp_path, uri="http://user:secret@host"), {})
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI='mlruns' is no tracking store"):
        resolve_uri(default, {"MLFLOW_TRACKING_URI": "mlruns"})


def test_the_command_that_shows_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = {
        f"sqlite:///{tmp_path}/runs/mlflow.db": "qsparse mlflow --root runs",
        "sqlite:////else where/mlflow.db": "qsparse mlflow --root '/else where'",
        "sqlite:////srv/store.db": "mlflow ui --backend-store-uri sqlite:////srv/store.db",
        "http://host:5000": None,
    }
    assert {uri: RunDescription(uri, "e", "r", {}, {}).viewer for uri in commands} == commands


@with_store
def test_sync_as_a_command(tmp_path: Path) -> None:
    def sync(folder: Path) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "launch", "track", "sync", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        return result.returncode, result.stdout, result.stderr.strip().partition("\n")[0]

    directory = RunDirectory(tmp_path / "run")
    directory.create(dump_config(make_config(tmp_path)))
    with MetricsLog(directory.metrics) as log:
        log.write({"train/loss": 1.5, "train/lr": 0.5}, 1)
    assert sync(directory.path) == (0, f"{directory.path}: 2 values sent to MLflow\n", "")
    assert sync(directory.path) == (0, f"{directory.path}: MLflow has everything\n", "")
    assert history(store(tmp_path), directory, "train/loss") == [(1, 1.5)]
    missing = f"qsparse: {tmp_path} is not a run directory: it has no config.yaml"
    assert sync(tmp_path) == (2, "", missing)
    directory.create(dump_config(make_config(tmp_path, uri="http://127.0.0.1:9")))
    code, output, errors = sync(directory.path)
    assert (code, output) == (1, "")
    assert errors.startswith("qsparse: MLflow at http://127.0.0.1:9: MlflowException")


def test_only_rank_0_tracks_and_only_if_asked(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    off = Config.model_validate({"run": {"root": str(tmp_path)}, "tracking": {"mlflow": False}})
    for tracker in (make_tracker(make_config(tmp_path), directory, rank=1), make_tracker(off, directory)):
        assert isinstance(tracker, NullTracker)
        tracker.log({"train/loss": 1.0}, 1)
        assert (tracker.wait_ready(), tracker.close(), tracker.location) == (True, 0, "")
    assert list(tmp_path.iterdir()) == []


def test_points_of_a_record() -> None:
    points, nonfinite = points_of({"step": 7, "time_ms": 99, "a": 1.0, "b": math.inf})
    assert [tuple(point) for point in points] == [("a", 1.0, 99, 7), ("tracking/nonfinite", 1.0, 99, 7)]
    assert nonfinite == 1
    points, _ = points_of({"step": 7, "time_ms": 99, "val/loss": 2.0, "train/tokens": 700.0, "train/loss": math.nan})
    assert [(p.name, p.step, p.value) for p in points if p.name.startswith("tokens/")] == [
        ("tokens/val_loss", 700, 2.0)
    ]


@pytest.mark.parametrize(
    "module",
    [
        "run_directory",
        "metrics",
        "tracking",
        "mlflow_run",
        "mlflow_process",
        "system_metrics",
        "console",
        "figures",
        "compare.report",
        "compare.search",
    ],
)
def test_no_module_imports_torch_or_mlflow(module: str) -> None:
    program = f"import sys, pipeline.{module}; print(sorted({{'torch', 'mlflow', 'megatron'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_system_metrics_have_the_names_of_the_table_and_measure_this_machine(tmp_path: Path) -> None:
    system = SystemMetrics(tmp_path)
    spin_until = time.monotonic() + 0.5
    while time.monotonic() < spin_until:
        pass
    sample = system.sample()
    assert all(metric_info(name).name for name in sample)
    assert 20 / (os.cpu_count() or 1) < sample["system/cpu_utilization_percentage"] <= 100
    used, share = sample["system/system_memory_usage_megabytes"], sample["system/system_memory_usage_percentage"]
    assert 0 < used * 1e6 < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") and 0 < share < 100
    disk = shutil.disk_usage(tmp_path)
    assert abs(sample["system/disk_usage_percentage"] - 100 * disk.used / (disk.used + disk.free)) < 2
    assert sample["system/network_receive_megabytes"] >= 0


def test_the_runs_of_a_sweep_know_their_parent(tmp_path: Path) -> None:
    sweep = ["model.qsparse.sparsity=0.0,0.4"]
    recipe, overrides = ROOT / "configs" / "qsparse.yaml", [f"run.root={tmp_path}"]
    profile = load_profile("cpu", {})
    swept = prepare(Request(recipe, overrides, nodes=1, sweeps=sweep), profile, {})
    assert [config.tracking.parent for config in swept.configs] == ["qsparse", "qsparse"]
    assert [config.run.name for config in swept.configs] == ["qsparse-sparsity-0.0", "qsparse-sparsity-0.4"]
    named = [*overrides, "tracking.parent=mine"]
    assert prepare(Request(recipe, named, nodes=1, sweeps=sweep), profile, {}).configs[0].tracking.parent == "mine"
    assert prepare(Request(recipe, overrides, nodes=1), profile, {}).configs[0].tracking.parent is None


@with_store
def test_a_launcher_tells_mlflow_of_ranks_that_died_silently(tmp_path: Path) -> None:
    assert run_program("sigkill", tmp_path) == -signal.SIGKILL
    directory = RunDirectory(tmp_path / "run")
    directory.write_status("running", 10, "started")
    record_end(directory, 137, {})
    tell_end(directory)
    assert fetch_run(store(tmp_path), directory).info.status == "FAILED"
    tell_end(RunDirectory(tmp_path / "nothing"))
