"""From a configuration to queued runs: check, write the launch folders, render, ask SLURM, submit.

Nothing is written before everything that can be known beforehand is right, and what is written by a submission that
SLURM refuses does no harm: the next one replaces it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from launch import slurm
from launch.allocation import plan, warnings
from launch.cluster import ClusterProfile
from launch.records import JobRecord, LaunchFolder
from launch.slurm_script import Job, forwarded, render, submission_environment
from launch.sweep import variants
from pipeline.config import Config
from pipeline.config_loader import dump_config, load_config
from pipeline.run_directory import write_atomic
from pipeline.tracking_uri import resolve_uri


@dataclass(frozen=True)
class Submission:
    """Everything about a job before it is submitted."""

    job: Job
    text: str
    """The batch script."""
    configs: tuple[Config, ...]
    """One per run."""
    notes: tuple[str, ...]
    """What works but is probably not meant."""

    @property
    def folder(self) -> LaunchFolder:
        """Launch folder of the run, or of the sweep as a whole."""
        return LaunchFolder(self.job.folder.parent)


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        config: configuration file.
        overrides: `KEY=VALUE`.
        nodes: nodes wanted.
        min_nodes: nodes that suffice; None: all of them.
        sweeps: `KEY=VALUE,VALUE` each.
        template: template of the user's own.
        dependency: value of --dependency.
        array_limit: runs of a sweep at once.
        command: the command line, for the script's first line.
    """

    config: Path
    overrides: Sequence[str]
    nodes: int
    min_nodes: int | None = None
    sweeps: Sequence[str] = ()
    template: Path | None = None
    dependency: str = ""
    array_limit: int | None = None
    command: str = "qsparse launch slurm"


def prepare(request: Request, profile: ClusterProfile, environ: Mapping[str, str] = os.environ) -> Submission:
    """Check everything and render the script; writes nothing.

    Raises:
        ValueError: configuration, tracking URI, sweep or template are wrong, or the layout does not fit the nodes.
    """
    whole = load_config(request.config, request.overrides).run.name
    configs = []
    for variant in variants(request.sweeps):
        config = load_config(request.config, [*request.overrides, *variant.overrides])
        name = config.run.name + variant.suffix
        run, tracking = config.run.model_copy(update={"name": name}), config.tracking
        if variant.suffix and tracking.parent is None:
            tracking = tracking.model_copy(update={"parent": whole})
        if config.tracking.mlflow:
            resolve_uri(config, submission_environment(profile, environ))  # says what is wrong with it
        configs.append(config.model_copy(update={"run": run, "tracking": tracking}))
    first = configs[0]
    root = first.run.root.resolve()
    allocations = [plan(config, profile, request.nodes, request.min_nodes) for config in configs]
    folder = LaunchFolder(root / whole)
    job = Job(
        name=whole,
        command=request.command,
        script=folder.script,
        runs=tuple(root / config.run.name for config in configs),
        allocation=allocations[0],
        profile=profile,
        workdir=Path.cwd(),
        folder=folder.path,
        forwarded=forwarded(profile, environ),
        dependency=request.dependency,
        array_limit=request.array_limit,
    )
    notes = tuple(dict.fromkeys(note for config in configs for note in warnings(config, profile)))
    return Submission(job, render(job, request.template), tuple(configs), notes)


def submit(submission: Submission, environ: Mapping[str, str] = os.environ) -> str:
    """Write the launch folders and queue the job; returns its id.

    Raises:
        SlurmError: there is no SLURM, or it refuses the job.
    """
    slurm.require_commands()
    for run in submission.job.runs:
        _refuse_active(run)
    write_folders(submission)
    visible = submission_environment(submission.job.profile, environ)
    script = submission.job.script
    slurm.test_submission(script, [], visible)
    job_id = slurm.submit(script, [], visible)
    record = JobRecord(
        job_id=job_id,
        nodes=submission.job.allocation.nodes,
        ranks_per_node=submission.job.ranks_per_node,
        submitted=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    runs = submission.job.runs
    if len(runs) > 1:
        submission.folder.write_job(replace(record, runs=tuple(map(str, runs))))
    for index, run in enumerate(runs):
        task = f"{job_id}_{index}" if len(runs) > 1 else job_id
        LaunchFolder(run).write_job(replace(record, job_id=task))
    return job_id


def _refuse_active(run: Path) -> None:
    """A second job for a run would wait only to find it taken."""
    record = LaunchFolder(run).read_job()
    state = slurm.job_state(record.job_id) if record else None
    if record and state and state.state in slurm.ACTIVE:
        raise slurm.SlurmError(
            f"run {run} already has job {record.job_id} ({state.state}); `qsparse cancel {run}` first, or choose "
            "another run.name"
        )


def write_folders(submission: Submission) -> None:
    """Configurations and script, where the job will read them."""
    for run, config in zip(submission.job.runs, submission.configs, strict=True):
        folder = LaunchFolder(run)
        write_atomic(folder.config, dump_config(config))
        folder.reset()
    write_atomic(submission.job.script, submission.text)
