"""Renders the batch script of a job: a text that a user can read, edit, keep and submit by hand.

The template (`launch/templates/slurm.sbatch.j2`, or the user's own with `--template`) holds everything that happens on
the cluster; this module only decides the values in it.  `quote` is shell quoting, and a name that the template spells
wrongly is an error instead of an empty string.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from launch.allocation import Allocation
from launch.cluster import ClusterProfile

TEMPLATE = Path(__file__).parent / "templates" / "slurm.sbatch.j2"

BASIC_VARIABLES = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "SLURM_CONF", "TERM", "TMPDIR", "USER")
"""Variables that every job gets from the submitting shell."""

_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_GPU_ENVIRONMENT = {
    "NCCL_DEBUG": "WARN",
    # A collective that times out leaves the flight recorder of each rank beside the run.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # Errors of one rank end the process instead of leaving it in the next collective.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}


@dataclass(frozen=True)
class Job:
    """What the template sees as `job`.

    Attributes:
        name: job name.
        command: command line that rendered the script.
        script: where the script will be.
        runs: run directories, absolute; several make a job array.
        allocation: nodes and ranks.
        profile: the cluster.
        workdir: directory in which the job runs; relative paths of configurations start there.
        folder: where the batch script's output goes.
        forwarded: variables of the profile's `forward` that are set in the submitting shell.
        dependency: value of --dependency; empty: none.
        array_limit: tasks of an array that run at once; None: all.
    """

    name: str
    command: str
    script: Path
    runs: tuple[Path, ...]
    allocation: Allocation
    profile: ClusterProfile
    workdir: Path
    folder: Path
    forwarded: tuple[str, ...] = ()
    dependency: str = ""
    array_limit: int | None = None

    @property
    def directives(self) -> list[str]:
        """Options of sbatch, one per line."""
        profile, is_array = self.profile, len(self.runs) > 1
        limit = f"%{self.array_limit}" if self.array_limit else ""
        optional = {
            "account": profile.account,
            "partition": profile.partition,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "reservation": profile.reservation,
            "exclude": ",".join(profile.exclude),
            "dependency": self.dependency,
            "array": f"0-{len(self.runs) - 1}{limit}" if is_array else "",
            "cpus-per-task": profile.cpus_per_node,
            "mem": profile.memory_per_node,
        }
        return [
            f"--job-name={self.name}",
            f"--nodes={self.allocation.slurm_nodes}",
            # With a number of tasks per node SLURM takes a range of nodes for its lower end.
            *(["--ntasks-per-node=1"] if not self.allocation.is_elastic else []),
            *self._gpu_directives(),
            f"--time={profile.time}",
            *(f"--{key}={value}" for key, value in optional.items() if value),
            *(["--exclusive"] if profile.exclusive else []),
            "--requeue" if profile.requeue else "--no-requeue",
            f"--signal=B:USR2@{profile.signal_seconds}",
            "--open-mode=append",
            "--export=ALL",
            f"--chdir={self.workdir}",
            f"--output={self.folder}/slurm-{'%A_%a' if is_array else '%j'}.out",
            *profile.sbatch,
        ]

    @property
    def modules(self) -> tuple[str, ...]:
        """Environment modules to load."""
        return self.profile.modules

    @property
    def setup(self) -> tuple[str, ...]:
        """Shell lines of the profile."""
        return self.profile.setup

    @property
    def env(self) -> dict[str, str]:
        """Variables that the script sets."""
        gpu = _GPU_ENVIRONMENT if self.profile.gpus_per_node else {}
        return {**_ENVIRONMENT, **gpu, **self.profile.env}

    @property
    def basics(self) -> tuple[str, ...]:
        """Variables that every job gets."""
        return BASIC_VARIABLES

    @property
    def srun(self) -> list[str]:
        """Further options of srun."""
        profile, container = self.profile, self.profile.container
        # Since SLURM 22.05 a step does not inherit the job's --cpus-per-task.
        options = [f"--cpus-per-task={profile.cpus_per_node}"] if profile.cpus_per_node else []
        options += profile.srun
        if container and container.runtime == "pyxis":
            mounts = ",".join((*self._own_mounts(), *container.mounts))
            options += [f"--container-image={container.image}", f"--container-mounts={mounts}"]
            options += [f"--container-workdir={self.workdir}", *container.options]
        return options

    @property
    def prefix(self) -> list[str]:
        """Command in front of the ranks' own."""
        container = self.profile.container
        if container is None or container.runtime != "apptainer":
            return []
        binds = [f"--bind={mount}" for mount in (*self._own_mounts(), *container.mounts)]
        gpu = ["--nv"] if self.profile.gpus_per_node else []
        return ["apptainer", "exec", *gpu, f"--pwd={self.workdir}", *binds, *container.options, container.image]

    @property
    def python(self) -> str:
        """Interpreter on the nodes."""
        return self.profile.python or ("python" if self.profile.container else sys.executable)

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.allocation.ranks_per_node

    @property
    def max_restarts(self) -> int:
        """Failures without progress that are borne."""
        return self.profile.max_restarts

    @property
    def requeue(self) -> bool:
        """Whether the job may be requeued."""
        return self.profile.requeue

    @property
    def preflight(self) -> bool:
        """Whether the nodes are checked first."""
        return self.profile.preflight

    @property
    def exclude_more(self) -> str:
        """The profile's excluded nodes, behind a comma."""
        return "".join(f",{node}" for node in self.profile.exclude)

    def _gpu_directives(self) -> list[str]:
        profile = self.profile
        if not profile.gpus_per_node or profile.gpu_request == "none":
            return []
        kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
        if profile.gpu_request == "gres":
            return [f"--gres=gpu:{kind}{profile.gpus_per_node}"]
        return [f"--gpus-per-node={kind}{profile.gpus_per_node}"]

    def _own_mounts(self) -> list[str]:
        roots = {self.workdir, *(run.parent for run in self.runs)}
        outer = [path for path in roots if not any(other in path.parents for other in roots)]
        return [f"{path}:{path}" for path in sorted(outer)]


def render(job: Job, template: Path | None = None) -> str:
    """The batch script.

    Args:
        job: its values.
        template: a jinja2 template of the user's own; None: ours.

    Raises:
        ValueError: the template cannot be read, is no template, or uses a name that does not exist.
    """
    path = template or TEMPLATE
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = _quote
    try:
        text = environment.from_string(path.read_text(encoding="utf-8")).render(job=job)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--template {path}: cannot be read: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--template {path}:{error.lineno}: {error.message}") from None
    except jinja2.UndefinedError as error:
        names = ", ".join(name for name in dir(job) if not name.startswith("_"))
        raise ValueError(f"--template {path}: {error.message}; `job` has {names}") from None
    return text if text.startswith("#!") else f"#!/bin/bash\n{text}"


def submission_environment(profile: ClusterProfile, environ: Mapping[str, str]) -> dict[str, str]:
    """What sbatch sees, and with --export=ALL the job gets: the basic variables and the profile's `forward`.

    Filtering here, and not with a list in --export, keeps SLURM from logging in on the node to build an environment.
    """
    return {name: environ[name] for name in (*BASIC_VARIABLES, *profile.forward) if name in environ}


def forwarded(profile: ClusterProfile, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the profile's `forward` that are set."""
    return tuple(name for name in profile.forward if name in environ)


def _quote(value: object) -> str:
    return shlex.quote(str(value))


def describe_command(arguments: Sequence[str]) -> str:
    """The command line for people, on one line."""
    return shlex.join(["qsparse", *arguments]).replace("\n", " ")
