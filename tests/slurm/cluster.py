"""A real SLURM cluster of a few nodes on this machine, for one user: munged, slurmctld and one slurmd per node.

The daemons run as the user of the tests, with a key, ports and folders of their own, so root is not needed.  All nodes
share the machine's name and addresses; they differ in SLURM's name and port.  Credentials expire after the 5 s that
SLURM takes at least, because a requeued job must wait for that.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

COMMAND_POLL = 0.4
"""Seconds between SLURM's commands while something is waited for: ten a second would take much of a core."""
SEARCH = ("usr/sbin", "usr/bin", "sbin", "bin")
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
SlurmdTimeout=10
KillWait=8
MinJobAge=86400
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=2,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


class Cluster:
    """The daemons, and SLURM's commands in their environment.

    Args:
        base: folder of the cluster; its path must be short, since it holds a socket.
        root: where SLURM is unpacked; None: it is installed.
        nodes: number of nodes, named n1, n2 ...
    """

    def __init__(self, base: Path, root: Path | None, nodes: int) -> None:
        self.base, self.root = base, root
        self.nodes = [f"n{index + 1}" for index in range(nodes)]
        path = [str(root / folder) for folder in SEARCH] if root else ["/usr/sbin", "/sbin"]
        self.environment = {
            "PATH": os.pathsep.join([*path, os.environ["PATH"]]),
            "SLURM_CONF": str(base / "slurm.conf"),
        }
        if root:
            libraries = sorted({str(file.parent) for file in root.glob("usr/lib/**/*.so*")})
            self.environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)

    def start(self) -> None:
        for folder in (self.base, self.base / "munge", self.base / "state"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
        self._write_configuration()
        key = self.base / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": key, "socket": self.base / "munge/socket", "pid-file": self.base / "munged.pid"}
        files |= {"log-file": self.base / "munged.log", "seed-file": self.base / "munge.seed"}
        self.call("munged", "--force", *(f"--{name}={file}" for name, file in files.items()))
        wait_until(lambda: (self.base / "munge/socket").exists(), 10)
        self.call("slurmctld")
        wait_until(lambda: "UP" in self.try_call("scontrol", "ping"), 20, self._logs)
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self.idle_nodes() == self.nodes, 30, self._logs)

    def start_node(self, node: str) -> None:
        (self.base / f"spool.{node}").mkdir(exist_ok=True)
        stepd = ["-d", str(self.root / "usr/sbin/slurmstepd")] if self.root else []
        self.call("slurmd", "-N", node, *stepd)

    def kill_node(self, node: str) -> None:
        """What a power cut does to a node: slurmd, slurmstepd and everything they started are gone at once."""
        daemon = psutil.Process(int((self.base / f"slurmd.{node}.pid").read_text()))
        tasks = [process for process in psutil.process_iter() if environment_of(process).get("SLURMD_NODENAME") == node]
        keepers = {parent for task in tasks if (parent := task.parent()) and parent.name().startswith("slurmstepd")}
        for process in (daemon, *keepers, *tasks):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    @contextmanager
    def silent_controller(self) -> Iterator[None]:
        """slurmctld hears and does not answer meanwhile."""
        controller = psutil.Process(int((self.base / "slurmctld.pid").read_text()))
        controller.suspend()
        try:
            yield
        finally:
            controller.resume()

    def cancel_jobs(self) -> None:
        """End what runs or waits."""
        if not self.try_call("squeue", "--noheader").strip():
            return
        self.try_call("scancel", f"--user={getpass.getuser()}")
        with suppress(AssertionError):
            wait_until(lambda: not self.try_call("squeue", "--noheader").strip(), 15)

    def stop(self) -> None:
        self.cancel_jobs()
        for file in sorted(self.base.glob("*.pid"), key=lambda file: "slurmd" not in file.name):
            with suppress(ValueError, psutil.NoSuchProcess, ProcessLookupError):
                process = psutil.Process(int(file.read_text()))
                if process.name() in ("munged", "slurmctld", "slurmd"):
                    process.send_signal(signal.SIGTERM)
                    with suppress(psutil.TimeoutExpired):
                        process.wait(5)

    def call(self, *command: str) -> str:
        environment = {**os.environ, **self.environment}
        program = shutil.which(command[0], path=self.environment["PATH"]) or command[0]
        result = subprocess.run(
            [program, *command[1:]], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout

    def try_call(self, *command: str) -> str:
        try:
            return self.call(*command)
        except (AssertionError, subprocess.TimeoutExpired):
            return ""

    def idle_nodes(self) -> list[str]:
        return sorted(self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split())

    def hostnames(self, nodes: str) -> list[str]:
        """Names of nodes that SLURM abbreviates as `n[1-2]`."""
        return self.call("scontrol", "show", "hostnames", nodes).split()

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.try_call("scontrol", "show", "job", job_id, "-o")))

    def wait_for_state(self, job_id: str, *states: str, timeout: float = 90) -> dict[str, str]:
        is_reached = lambda: self.job(job_id).get("JobState") in states  # noqa: E731
        wait_until(is_reached, timeout, lambda: str(self.job(job_id)), COMMAND_POLL)
        return self.job(job_id)

    def _logs(self) -> str:
        return "\n".join(f"== {file}\n{file.read_text()[-2000:]}" for file in sorted(self.base.glob("*.log")))

    def _write_configuration(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ports = list(free_ports(len(self.nodes) + 1))
        text = CONF.format(base=self.base, host=host, port=ports[0], user=getpass.getuser())
        if self.root:
            plugins = next(self.root.glob("usr/lib/**/auth_munge.so")).parent
            text += f"PluginDir={plugins}\n"
        for node, port in zip(self.nodes, ports[1:], strict=True):
            text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000\n"
        text += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60\n"
        text += "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10\n"
        (self.base / "slurm.conf").write_text(text)
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def parents_command(process: psutil.Process) -> list[str]:
    try:
        parent = process.parent()
        return parent.cmdline() if parent else []
    except psutil.Error:
        return []


def free_ports(count: int) -> Iterator[int]:
    sockets = [socket.socket() for _ in range(count)]
    for found in sockets:
        found.bind(("127.0.0.1", 0))
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    yield from ports


def wait_until(
    condition: Callable[[], bool],
    timeout: float,
    describe: Callable[[], str] = lambda: "it did not happen",
    poll: float = 0.1,
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout} s: {describe()}"
        time.sleep(poll)
