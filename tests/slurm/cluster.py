"""A real Slurm of emulated nodes on one Debian or Ubuntu machine, for tests: root, apt, no systemd, no containers.

Every node lives in namespaces of its own (network, host name, processes, mounts), so it has its own address, /proc and
/dev/shm, and killing its first process is a power cut. Nothing outside the cluster's folder is configured.

By hand::

    python tests/slurm/cluster.py start /tmp/slurm [--accounting]     # then: export SLURM_CONF=/tmp/slurm/slurm.conf
    python tests/slurm/cluster.py stop /tmp/slurm
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
}
OWNER = "dattrain-test-"
"""Alias of a bridge that belongs to the process of this id."""
ACCOUNTING_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}


class Unsupported(RuntimeError):
    """The machine cannot hold emulated nodes."""


def missing(accounting: bool = False) -> list[str]:
    """Packages that apt would have to install."""
    wanted = {**PACKAGES, **(ACCOUNTING_PACKAGES if accounting else {})}
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [package for program, package in wanted.items() if shutil.which(program, path=path) is None]


def unavailable(accounting: bool = False) -> str | None:
    """Why a cluster cannot be started here, or None."""
    if not sys.platform.startswith("linux"):
        return "Slurm's nodes are emulated with Linux namespaces, and this is not Linux"
    if os.geteuid() != 0:
        return "starting Slurm's nodes needs root (namespaces); this is not root"
    if missing(accounting) and shutil.which("apt-get") is None:
        return f"{', '.join(missing(accounting))} not installed, and there is no apt-get to install them"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    )
    if probe.returncode != 0:
        return f"this container does not allow namespaces: {probe.stderr.decode().strip()}"
    return None


def install(accounting: bool, log: Path) -> None:
    """apt-get what is missing, without letting any package start its daemon."""
    packages = missing(accounting)
    if not packages:
        return
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        with open(log, "ab") as out:
            if subprocess.call(command, env=environment, stdout=out, stderr=out) != 0:
                subprocess.call(["apt-get", "update", "-q"], stdout=out, stderr=out)
                subprocess.run(command, env=environment, stdout=out, stderr=out, check=True)
    finally:
        if ours:
            policy.unlink(missing_ok=True)


def sweep() -> None:
    """Remove bridges whose owner was killed before it could; everything else of its cluster died with it."""
    shown = subprocess.run(
        ["ip", "-j", "link", "show", "type", "bridge"], capture_output=True, text=True
    ).stdout
    for link in json.loads(shown or "[]"):
        owner = link.get("ifalias", "").removeprefix(OWNER)
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            subprocess.run(["ip", "link", "del", link["ifname"]], capture_output=True)


@dataclass
class Cluster:
    """One cluster in one folder. ``start`` is followed by ``stop`` under all circumstances; both can be repeated."""

    folder: Path
    nodes: int = 4
    cpus: int = 4
    memory_mb: int = 8000
    gpus: int = 2
    """Devices that a node claims; they are copies of /dev/null."""
    accounting: bool = False
    grace_s: int = 45
    """Seconds between the signal and the end of a preempted job."""
    kill_wait_s: int = 10
    die_with_parent: bool = False
    """Have the kernel end the daemons when the process that started them dies, however it dies."""
    processes: dict[str, list[str]] = field(default_factory=dict)
    """Name -> [pid, start time]; a pid alone may have gone to someone else since."""

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        tag = hashlib.sha256(str(self.folder).encode()).digest()
        self.tag = tag.hex()[:6]
        self.net = f"10.{128 + tag[0] % 64}.{tag[1]}"
        self.port = 22000 + 2 * (int.from_bytes(tag[2:4], "big") % 4000)
        self.bridge = f"dt{self.tag}"
        if len(str(self.folder)) > 80:
            raise ValueError(f"{self.folder}: too long for a unix socket below it")

    # ---- what tests use

    @property
    def conf(self) -> Path:
        """What SLURM_CONF has to name."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client of this cluster, and of no other job."""
        own = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        return {**kept, "SLURM_CONF": str(self.conf)}

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def node_names(self) -> list[str]:
        """n1, n2, ..."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def power_cut(self, node: str) -> None:
        """End everything on a node at once; the others find out by themselves."""
        self._end(node, signal.SIGKILL)

    def power_on(self, node: str) -> None:
        """Start a node again after a power cut."""
        self._start_node(node)
        self._wait(lambda: self._up(node), 60, f"{node} to come up")

    def start(self) -> Cluster:
        """Start what is not running; returns once all nodes are idle."""
        for name in ("run", "log", "state", "spool", "gpu"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # The database's own user has to get through.
        self.folder.chmod(0o755)
        install(self.accounting, self.folder / "log" / "apt.log")
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        self._load()
        self._write_configuration()
        self._start_munge()
        sweep()
        self._start_bridge()
        if self.accounting:
            self._start_accounting()
        if not self._alive("slurmctld"):
            self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
            self._wait(lambda: "is UP" in self.run("scontrol", "ping", check=False), 30, "slurmctld")
        for node in self.node_names():
            if not self._alive(node):
                self._start_node(node)
        self._wait(lambda: all(map(self._up, self.node_names())), 60, "the nodes to come up")
        return self

    def stop(self) -> None:
        """End every process that was started here, and the bridge; the folder stays, with its logs."""
        self._load()
        for node in self.node_names():
            self._end(node, signal.SIGKILL)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name, signal.SIGTERM)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    # ---- parts

    def _start_munge(self) -> None:
        key, socket = self.folder / "run" / "munge.key", self.folder / "run" / "munge.socket"
        if self._alive("munged"):
            return
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o600)
        socket.unlink(missing_ok=True)
        run = self.folder / "run"
        self._spawn(
            "munged",
            [
                "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}", "--num-threads=4",
                f"--pid-file={run / 'munged.pid'}", f"--seed-file={run / 'munge.seed'}",
                f"--log-file={self.folder / 'log' / 'munged.log'}",
            ],
        )  # fmt: skip
        self._wait(
            lambda: subprocess.run(["munge", "-S", str(socket), "-n"], capture_output=True).returncode == 0,
            10,
            "munged",
        )

    def _start_bridge(self) -> None:
        if subprocess.run(["ip", "link", "show", self.bridge], capture_output=True).returncode == 0:
            return
        commands = [
            ["link", "add", self.bridge, "type", "bridge"],
            ["addr", "add", f"{self.net}.1/24", "dev", self.bridge],
            ["link", "set", self.bridge, "up"],
        ]
        if self.die_with_parent:
            commands.append(["link", "set", self.bridge, "alias", f"{OWNER}{os.getpid()}"])
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True)
            if done.returncode != 0:
                raise Unsupported(
                    f"this machine has no network bridges: ip {' '.join(command)}: {done.stderr.strip()}"
                )

    def _start_node(self, node: str) -> None:
        number = self.node_names().index(node) + 1
        spool, hosts = self.folder / "spool" / node, self.folder / "hosts"
        spool.mkdir(parents=True, exist_ok=True)
        # The first process of the node: it waits for its cable, and reaps what Slurm's steps leave behind.
        script = f"""
            hostname {node}
            mount --bind '{hosts}' /etc/hosts
            mount -t tmpfs -o size=50% tmpfs /dev/shm
            until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
            ip link set lo up; ip addr add {self.net}.{10 + number}/24 dev eth0; ip link set eth0 up
            slurmd -D -f '{self.conf}' -N {node} &
            while kill -0 $! 2>/dev/null; do wait -n; done
        """
        pid = self._spawn(
            node,
            [
                "unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
                "bash", "-c", script,
            ],
        )  # fmt: skip
        own = os.readlink("/proc/self/ns/net")
        self._wait(lambda: os.readlink(f"/proc/{pid}/ns/net") != own, 10, f"the network of {node}")
        cable = f"{self.bridge}n{number}"
        subprocess.run(["ip", "link", "del", cable], capture_output=True)
        for command in (
            ["link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid)],
            ["link", "set", cable, "master", self.bridge, "up"],
        ):
            subprocess.run(["ip", *command], check=True, capture_output=True)

    def _start_accounting(self) -> None:
        db, run = self.folder / "db", self.folder / "run"
        socket = run / "db" / "my.sock"
        if not self._alive("mariadbd"):
            for path in (db, run / "db"):
                path.mkdir(exist_ok=True)
                shutil.chown(path, "mysql")
            if not (db / "mysql").is_dir():
                subprocess.run(
                    ["mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={db}", "--skip-test-db",
                     "--auth-root-authentication-method=socket"], check=True, capture_output=True,
                )  # fmt: skip
            self._spawn(
                "mariadbd",
                ["mariadbd", "--no-defaults", "--user=mysql", f"--datadir={db}", f"--socket={socket}", "--skip-networking",
                 f"--pid-file={run / 'db' / 'my.pid'}", f"--log-error={run / 'db' / 'error.log'}",
                 "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"],
            )  # fmt: skip
            sql = (
                "create database if not exists slurm_acct; create user if not exists slurm@localhost identified by 'slurm'; "
                "grant all on slurm_acct.* to slurm@localhost"
            )
            client = ["mariadb", "--no-defaults", "-S", str(socket), "-e"]
            self._wait(
                lambda: subprocess.run([*client, sql], capture_output=True).returncode == 0, 60, "mariadbd"
            )
        if not self._alive("slurmdbd"):
            # It looks for slurmdbd.conf beside SLURM_CONF, and for the database's socket in a variable.
            self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(socket))
            self._wait(lambda: bool(self._sacctmgr("-n", "list", "user")), 60, "slurmdbd")
            self._sacctmgr("-i", "add", "cluster", f"dt{self.tag}")

    def _sacctmgr(self, *arguments: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.run("sacctmgr", *arguments, check=False, timeout=5)
        return ""

    def _write_configuration(self) -> None:
        host = os.uname().nodename
        addresses = [(f"{self.net}.{10 + n}", node) for n, node in enumerate(self.node_names(), 1)]
        lines = ["127.0.0.1 localhost", f"{self.net}.1 {host}", *(f"{a} {node}" for a, node in addresses)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        # Named outright: finding out fails where /sys/fs/cgroup is not mounted, and wants systemd under cgroup v2.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "plugstack.conf").write_text("")
        (self.folder / "gres.conf").write_text(self._gres())
        self.conf.write_text(self._slurm_conf(host, addresses))
        if self.accounting:
            path = self.folder / "slurmdbd.conf"
            path.write_text(
                f"AuthType=auth/munge\nAuthInfo=socket={self.folder}/run/munge.socket\nDbdAddr={self.net}.1\nDbdHost={host}\n"
                f"DbdPort={self.port + 1}\nSlurmUser=root\nLogFile={self.folder}/log/slurmdbd.log\n"
                f"PidFile={self.folder}/run/slurmdbd.pid\nStorageType=accounting_storage/mysql\nStorageLoc=slurm_acct\n"
                "StorageHost=localhost\nStorageUser=slurm\nStoragePass=slurm\n"
            )
            path.chmod(0o600)

    def _gres(self) -> str:
        if not self.gpus:
            return ""
        for number in range(self.gpus):
            device = self.folder / "gpu" / f"fake{number}"
            if not device.exists():
                os.mknod(device, 0o20666, os.makedev(1, 3))
        devices = f"fake[0-{self.gpus - 1}]" if self.gpus > 1 else "fake0"
        return f"NodeName=n[1-{self.nodes}] Name=gpu Flags=nvidia_gpu_env File={self.folder}/gpu/{devices}\n"

    def _slurm_conf(self, host: str, addresses: Sequence[tuple[str, str]]) -> str:
        f = self.folder
        settings = {
            "ClusterName": f"dt{self.tag}",
            "SlurmctldHost": f"{host}({self.net}.1)",
            "SlurmctldPort": self.port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            # A requeued job waits until its old credential has expired, 120 s by default.
            "AuthInfo": f"socket={f}/run/munge.socket,cred_expire=8",
            "StateSaveLocation": f / "state",
            "SlurmdSpoolDir": f / "spool/%n",
            "SlurmctldPidFile": f / "run/slurmctld.pid",
            "SlurmdPidFile": f / "run/slurmd.%n.pid",
            "SlurmctldLogFile": f / "log/slurmctld.log",
            "SlurmdLogFile": f / "log/slurmd.%n.log",
            # No cgroups and no affinity: a bare container has neither.
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/linux" if self.accounting else "jobacct_gather/none",
            "MailProg": "/bin/true",
            "MpiDefault": "none",
            "SwitchType": "switch/none",
            "PropagateResourceLimits": "NONE",
            # Nodes claim more cores and memory than there are.
            "SlurmdParameters": "config_overrides",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "DefMemPerCPU": self.memory_mb // self.cpus // 2,
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2",
            "SlurmctldTimeout": 30,
            "SlurmdTimeout": 15,
            "KillWait": self.kill_wait_s,
            "MinJobAge": 3600,
            "ReturnToService": 2,
            "JobRequeue": 1,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            # A preempted job gets the signal that it asked for, and then GraceTime.
            "SlurmctldParameters": "preempt_send_user_signal",
        }
        if self.accounting:
            settings.update(
                AccountingStorageType="accounting_storage/slurmdbd",
                AccountingStorageHost=f"{self.net}.1",
                AccountingStoragePort=self.port + 1,
                AccountingStoragePass=f / "run/munge.socket",
            )
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines += ["GresTypes=gpu"] if self.gpus else []
        for address, node in addresses:
            lines.append(
                f"NodeName={node} NodeAddr={address} NodeHostname={node} Port=6818 CPUs={self.cpus} Boards=1 SocketsPerBoard=1 "
                f"CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory={self.memory_mb} State=UNKNOWN"
                + (f" Gres=gpu:{self.gpus}" if self.gpus else "")
            )
        shared = "Nodes=ALL MaxTime=24:00:00 DefaultTime=60 State=UP OverSubscribe=NO"
        lines += [
            f"PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace_s} {shared}",
            f"PartitionName=urgent PriorityTier=10 PreemptMode=OFF {shared}",
            f"PartitionName=spot PriorityTier=1 PreemptMode=CANCEL GraceTime={self.grace_s} {shared}",
            f"PartitionName=spot0 PriorityTier=1 PreemptMode=CANCEL GraceTime=0 {shared}",
            f"PartitionName=re0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 {shared}",
        ]
        return "\n".join(lines) + "\n"

    # ---- processes

    def _spawn(self, name: str, command: Sequence[str], **variables: str) -> int:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**self.environment, **variables},
                start_new_session=True, preexec_fn=_die_with_parent if self.die_with_parent else None,
            )  # fmt: skip
        self.processes[name] = [str(process.pid), _start_time(process.pid) or ""]
        self._save()
        return process.pid

    def _alive(self, name: str) -> bool:
        pid, start = self.processes.get(name, ["0", ""])
        return bool(start) and _start_time(int(pid)) == start

    def _end(self, name: str, signum: int) -> None:
        if self._alive(name):
            pid = int(self.processes[name][0])
            os.kill(pid, signum)
            deadline = time.monotonic() + 8
            while self._alive(name) and time.monotonic() < deadline:
                # Ours if this process started it; a zombie otherwise stays until its parent looks.
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                time.sleep(0.05)
            if self._alive(name):
                os.kill(pid, signal.SIGKILL)
        self.processes.pop(name, None)
        self._save()

    def _up(self, node: str) -> bool:
        state = self.run("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%T", check=False).strip()
        return bool(re.fullmatch(r"idle|mixed|allocated|completing", state))

    def _wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if done():
                return
            time.sleep(0.1)
        tails = [
            f"{p.name}: {p.read_text(errors='replace')[-500:]}" for p in (self.folder / "log").glob("*.*")
        ]
        raise RuntimeError(f"waited {seconds:.0f} s in vain for {what}\n" + "\n".join(tails))

    def _save(self) -> None:
        (self.folder / "processes.json").write_text(json.dumps(self.processes))

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.processes = json.loads((self.folder / "processes.json").read_text())


def _start_time(pid: int) -> str | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> int:
    """``start DIR`` or ``stop DIR``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument(
        "--accounting", action="store_true", help="with slurmdbd and MariaDB, so that sacct works"
    )
    args = parser.parse_args()
    cluster = Cluster(args.folder, nodes=args.nodes, accounting=args.accounting)
    if args.action == "stop":
        cluster.stop()
        return 0
    why = unavailable(args.accounting)
    if why is not None:
        print(why, file=sys.stderr)
        return 1
    try:
        cluster.start()
    except BaseException:
        cluster.stop()
        raise
    print(f"export SLURM_CONF={cluster.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
