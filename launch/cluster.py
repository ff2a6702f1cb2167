"""Cluster profiles: what a SLURM cluster wants to be told, once per cluster instead of once per job.

A profile is a YAML file (`configs/clusters/*.yaml`), read like a configuration: YAML 1.2, unknown keys are errors with
the key that was probably meant, all errors at once.  Command-line options such as `--time` replace its keys, before
validation.  What a single job is (how many nodes, which sweep) is no part of it.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from pipeline import yaml12
from pipeline.config_loader import explain_value
from qsparse_layers.config import StrictModel

SlurmTime = Annotated[str, Field(pattern=r"^(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})$")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Option = Annotated[str, Field(pattern=r"^--[a-z][A-Za-z0-9-]*(=.+)?$")]

PROFILE_FOLDER = Path("configs/clusters")


def _seconds(time: SlurmTime) -> int:
    """minutes[:seconds], hours:minutes:seconds, or days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


class ClusterError(ValueError):
    """A profile that cannot be used; the message lists every reason with its place."""


class ContainerConfig(StrictModel):
    """The container in which the ranks run; the batch script itself runs outside of it."""

    runtime: Literal["pyxis", "apptainer"]
    """`pyxis`: srun --container-image (enroot); `apptainer`: apptainer exec, also for singularity-ce."""
    image: str = Field(min_length=1)
    """A .sqsh or .sif file, or an address that the runtime pulls from, e.g. nvcr.io#nvidia/pytorch:25.10-py3."""
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET[:FLAGS] each; the working directory and run.root are mounted in any case."""
    options: tuple[str, ...] = ()
    """Further options of srun (pyxis) or of `apptainer exec`."""


class ClusterProfile(StrictModel):
    """One cluster; every key has a default that suits a cluster without accounting."""

    account: str | None = None
    """Account that pays (--account)."""
    partition: str | None = None
    """Partition (--partition); several with commas."""
    qos: str | None = None
    """Quality of service (--qos)."""
    constraint: str | None = None
    """Node features (--constraint)."""
    reservation: str | None = None
    """Reservation (--reservation)."""
    exclude: tuple[str, ...] = ()
    """Nodes never to use (--exclude)."""
    time: SlurmTime = "04:00:00"
    """Time limit of one start; the job is requeued at its end and goes on.  D-HH:MM:SS, HH:MM:SS, or minutes."""
    max_nodes: PositiveInt | None = None
    """Largest number of nodes that a job can get; more are refused before queueing."""
    gpus_per_node: NonNegativeInt = 8
    """GPUs of a node, all of which are taken; 0: a cluster without GPUs."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node, --gres=gpu:, or not at all (whole nodes without gres)."""
    gpu_type: str | None = None
    """Type of GPU where a cluster has several, e.g. h100."""
    processes_per_node: PositiveInt | None = None
    """Ranks of a node; absent: one per GPU, or 1 without GPUs."""
    cpus_per_node: PositiveInt | None = None
    """CPUs of a node (--cpus-per-task, with one task per node); absent: what the cluster gives."""
    memory_per_node: str | None = Field("0", pattern=r"^\d+[KMGT]?$")
    """Memory of a node (--mem); "0": all of it."""
    exclusive: bool = True
    """Whole nodes only (--exclusive)."""
    sbatch: tuple[Option, ...] = ()
    """Further options of sbatch, e.g. --mail-type=FAIL."""
    srun: tuple[Option, ...] = ()
    """Further options of srun, e.g. --mpi=pmix."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    setup: tuple[str, ...] = ()
    """Shell lines of the batch script before the ranks start, e.g. `source .venv/bin/activate`."""
    env: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Variables for the ranks; they win over the launcher's defaults."""
    forward: tuple[EnvironmentName, ...] = (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    )
    """Variables taken from the submitting shell if they are set there; their values are not written to the script."""
    container: ContainerConfig | None = None
    """Container of the ranks; absent: none."""
    python: str | None = None
    """Interpreter on the nodes; absent: the one that submits, or `python` inside a container."""
    signal_seconds: PositiveInt = 300
    """How long before the time limit the ranks are asked to save; at least the time of a step and a checkpoint."""
    requeue: bool = True
    """Requeue after the time limit, a preemption or the loss of a node."""
    max_restarts: NonNegativeInt = 3
    """Restarts after failures with no new checkpoint between them; then the job fails."""
    preflight: bool = False
    """Check the nodes before each start (`qsparse preflight`)."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @model_validator(mode="after")
    def _time_to_train(self) -> Self:
        if (limit := _seconds(self.time)) <= self.signal_seconds:
            raise ValueError(
                f"time={self.time} is {limit} s and signal_seconds={self.signal_seconds}: ranks would be asked to "
                "save as soon as they start; raise time or lower signal_seconds"
            )
        return self

    @field_validator("setup", "modules", "exclude", mode="after")
    @classmethod
    def _no_line_breaks(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if "\n" in value or not value.strip():
                raise ValueError(f"each entry is one line and not empty, got {value!r}")
        return values


def load_profile(name: str | None, options: Mapping[str, Any]) -> ClusterProfile:
    """The profile of a file or of a name in configs/clusters, with command-line `options` on top.

    Args:
        name: a path, or the name of a file in `configs/clusters` without its ending; None: all defaults.
        options: keys of the profile; None as a value means that the option was not given.

    Raises:
        ClusterError: there is no such profile, or it has mistakes; all are listed.
    """
    data: dict[str, Any] = {}
    lines: dict[tuple[str, ...], str] = {}
    if name is not None:
        path = _find(name)
        data, lines = _read(path)
    for key, value in options.items():
        if value is not None:
            data[key] = value
            lines[(key,)] = f"option --{key.replace('_', '-')}"
    try:
        return ClusterProfile.model_validate(data)
    except ValidationError as error:
        problems = [_describe(item, lines, name or "profile") for item in error.errors()]
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        raise ClusterError(f"{count} in the cluster profile:\n" + "\n".join(f"  {p}" for p in problems)) from None


def profile_names() -> list[str]:
    """Names of the profiles in `configs/clusters` of the current directory."""
    return sorted(path.stem for path in PROFILE_FOLDER.glob("*.yaml"))


def _find(name: str) -> Path:
    candidates = (Path(name), PROFILE_FOLDER / f"{name}.yaml")
    for path in candidates:
        if path.is_file():
            return path
    known = f"; there are {', '.join(profile_names())}" if profile_names() else ""
    raise ClusterError(f"--cluster {name}: neither {candidates[0]} nor {candidates[1]} is a file{known}")


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    try:
        document = yaml12.load(path.read_text(encoding="utf-8"))
    except yaml12.YamlError as error:
        raise ClusterError("\n".join(f"{path}:{line}: {message}" for line, message in error.problems)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: cannot be read: {error}") from None
    if not isinstance(document.data, dict | None):
        raise ClusterError(f"{path}:1: expected keys, found {type(document.data).__name__}")
    return document.data or {}, {key: f"{path}:{line}" for key, line in document.lines.items()}


def _describe(error: ErrorDetails, lines: Mapping[tuple[str, ...], str], fallback: str) -> str:
    location = tuple(map(str, error["loc"]))
    place = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), fallback)
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        section = ContainerConfig if location[0] == "container" else ClusterProfile
        close = difflib.get_close_matches(location[-1], section.model_fields, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else f"; valid keys: {', '.join(section.model_fields)}"
        return f"{place}: {dotted}: unknown key{hint}"
    return f"{place}: {dotted}: {explain_value(error)}"
