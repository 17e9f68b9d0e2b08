"""A real SLURM cluster of several nodes on one machine, for tests.

Everything lives in one directory and talks over the loopback: nothing below /etc or /run is touched.
Each node has namespaces of its own (host name, processes, /etc/hosts), so that killing its first
process is a power loss. That needs root.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "unshare")

# Fault handling in seconds instead of minutes: cred_expire (a requeued job waits for it), SlurmdTimeout,
# KillWait, requeue_delay. preempt_send_user_signal gives a preempted batch script its --signal.
_CONFIG = """
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,requeue_delay=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
SlurmctldTimeout=10
ReturnToService=2
KillWait=8
MinJobAge=300
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""
_CPUS, _GPUS = 32, 8


class MiniSlurm:
    """A cluster; a context manager that ends every process that it started.

    Args:
        root: Directory of its own; must not exist yet.
        num_nodes: Nodes ``n1``, ``n2``, ..., with 32 pretended cores and 8 pretended GPUs each.
    """

    def __init__(self, root: Path, num_nodes: int) -> None:
        self.root = root.resolve()
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        # Tests run inside CI jobs too: variables of an outer SLURM would reach into this one.
        outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = outer | {"SLURM_CONF": str(self.root / "slurm.conf")}
        self._write_files()

    def _write_files(self) -> None:
        for name in ("state", "log", "gpu", *(f"spool/{node}" for node in self.nodes)):
            (self.root / name).mkdir(parents=True)
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = _free_ports(len(self.nodes) + 1)
        lines = (
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={_CPUS} RealMemory=4000 Gres=gpu:{_GPUS} State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        user = pwd.getpwuid(os.getuid()).pw_name
        text = _CONFIG.format(root=self.root, port=ports[0], user=user, nodes="\n".join(lines))
        (self.root / "slurm.conf").write_text(text)
        for number in range(_GPUS):  # a gres without File= is dropped
            (self.root / "gpu" / f"nvidia{number}").touch()
        gpus = f"NodeName=n[1-{len(self.nodes)}] Name=gpu File={self.root}/gpu/nvidia[0-{_GPUS - 1}]\n"
        (self.root / "gres.conf").write_text(gpus)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = "".join(f"127.0.0.1 {name}\n" for name in ("localhost", *self.nodes))
        (self.root / "hosts").write_text(hosts)

    def __enter__(self) -> MiniSlurm:
        try:
            self._start_munge()
            self.start_controller()
            for node in self.nodes:
                self.power_on(node)
            self.wait(lambda: self._states() == ["idle"] * len(self.nodes), 60, "idle nodes")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _start_munge(self) -> None:
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "log-file": "log/munged.log",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
        }
        options = [f"--{option}={self.root / name}" for option, name in files.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", *options])
        self.wait((self.root / "munge.socket").exists, 10, "munged")

    def start_controller(self) -> None:
        """Start slurmctld; after :meth:`kill_controller` it finds its jobs again."""
        self._spawn("slurmctld", ["slurmctld", "-D"])

    def kill_controller(self) -> None:
        """Kill slurmctld without warning."""
        self._kill("slurmctld")

    def power_on(self, node: str) -> None:
        """Start a node."""
        inside = (
            f"hostname {node} && mount --bind {self.root}/hosts /etc/hosts && slurmd -D -N {node} & wait $!"
        )
        # The shell is the node's process 1: it adopts orphans, and its end takes everything with it.
        own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self._spawn(node, [*own, "sh", "-c", inside])

    def power_off(self, node: str) -> None:
        """Cut a node's power: every process on it is gone at once."""
        self._kill(node)

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def _states(self) -> list[str]:
        for name, process in self._processes.items():
            if process.poll() is not None:
                output = (self.root / "log" / f"{name}.out").read_text()[-1000:]
                raise RuntimeError(f"{name} ended with {process.returncode}: {output}")
        return self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()

    def _stop(self) -> None:
        for node in self.nodes:
            if node in self._processes:
                self._kill(node)
        for name in list(self._processes):
            self._kill(name)

    def run(self, *command: str) -> str:
        """Run a SLURM command; returns what it says, the empty string when it fails."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    def submit(self, folder: Path, *arguments: str) -> str:
        """``sbatch`` in a folder; returns the job's number.

        Raises:
            RuntimeError: SLURM refused it.
        """
        result = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env=self.environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(result.stderr)
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job; empty while the controller is away."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", number)))

    def wait_for_state(self, number: str, *states: str, timeout_s: float = 60.0) -> str:
        """Wait until a job is in one of some states; returns it."""
        self.wait(
            lambda: self.job(number).get("JobState") in states, timeout_s, f"job {number} {'/'.join(states)}"
        )
        return self.job(number)["JobState"]

    def start_requeued(self, number: str, times: int) -> None:
        """Wait until a job was requeued so many times, and skip the time that SLURM lets it wait then."""
        self.wait(
            lambda: int(self.job(number).get("Restarts", 0)) >= times, 90, f"requeue {times} of job {number}"
        )
        time.sleep(1.1)  # within a second of its end slurmd refuses the job as revoked
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    @staticmethod
    def wait(condition: Callable[[], object], timeout_s: float, what: str) -> None:
        """Wait until a condition holds; TimeoutError names what did not happen."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s")
            time.sleep(0.1)


def why_unavailable() -> str | None:
    """Return what this machine lacks for a cluster, None when it lacks nothing."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} on the PATH (apt-get install slurm-wlm munge)"
    probe = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if os.getuid() or subprocess.run(probe, capture_output=True, check=False).returncode:
        return "needs root and namespaces: each node gets a host name and processes of its own"
    return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
