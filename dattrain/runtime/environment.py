"""Who am I: rank, world, device and rendezvous, resolved once, for torchrun, our launcher, submitit, srun and plain python.

``resolve`` is pure (a mapping of environment variables in, an ``Env`` out); ``connect``, ``disconnect`` and ``process_group`` have the effects.
Not here: spawning local ranks (``spawn``), checking that the nodes can reach each other (``preflight``).
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from dattrain.errors import UserError
from dattrain.runtime import host_memory

if TYPE_CHECKING:
    import torch

Launcher = Literal["single", "torchrun", "local", "submitit-local", "slurm"]

FIRST_PORT, PORTS = 20000, 12000
"""Ports of jobs, below Linux' ephemeral range (32768 on), so that no client socket of the node can sit on one."""
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""torchrun's, of a rank."""
LAZY = "TORCH_GLOO_LAZY_INIT"
"""Two ranks connect when gloo first has something to send from one to the other. Else all connect with all as a group is made, for
which each asks rank 0's store for everybody's list of addresses: at 1,024 ranks a million requests and 8.8 GB, for every
group (docs/benchmarks/scale.md)."""
_FILES = 1 << 20
"""Open files at most: some containers allow a billion, and there are programs that close each number one by one."""
RENDEZVOUS_HINT = (
    "Where nodes do not reach each other by that name, set rendezvous_suffix in the cluster's profile, or MASTER_ADDR (and "
    "MASTER_PORT) in the environment of the ranks"
)


@dataclass(frozen=True)
class Env:
    """One process's place in the job."""

    rank: int
    local_rank: int
    """Index on this node."""
    world: int
    local_world: int
    """Processes on this node; 0 where the launcher does not say."""
    master_addr: str
    master_port: int
    """0 in a world of one."""
    launcher: Launcher
    host: str


def resolve(environ: Mapping[str, str], host: str | None = None) -> Env:
    """Read the launcher's variables.

    In this order: ``RANK``/``WORLD_SIZE``/``MASTER_ADDR`` (torchrun, ``dattrain train --nproc``), submitit's local
    executor, a Slurm step (srun, submitit), nothing. A batch script that runs python without srun is one process, however
    many tasks were allocated.

    The rendezvous of a Slurm step's ranks is ``MASTER_ADDR`` as given; else at the step's first node, by its name in Slurm, or where
    ``DATTRAIN_RENDEZVOUS_SUFFIX`` is set (a profile's ``rendezvous_suffix``) by its short name and that.

    Raises:
        UserError: variables that contradict each other, or are not numbers.
    """
    host = host or socket.gethostname()
    if "RANK" in environ and "WORLD_SIZE" in environ:
        world = _number(environ, "WORLD_SIZE")
        if world > 1 and "MASTER_ADDR" not in environ:
            raise UserError(
                f"WORLD_SIZE={world} without MASTER_ADDR: start ranks with --nproc, torchrun, srun or dattrain submit"
            )
        launcher: Launcher = "local" if environ.get("DATTRAIN_LAUNCHER") == "local" else "torchrun"
        env = Env(
            rank=_number(environ, "RANK"),
            local_rank=_number(environ, "LOCAL_RANK", 0),
            world=world,
            local_world=_number(environ, "LOCAL_WORLD_SIZE", 0),
            master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_number(environ, "MASTER_PORT", 29500 if world > 1 else 0),
            launcher=launcher,
            host=host,
        )
    elif environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_NTASKS" in environ:
        world = _number(environ, "SUBMITIT_LOCAL_NTASKS")
        job = environ.get("SUBMITIT_LOCAL_JOB_ID", "0")
        env = Env(
            rank=_number(environ, "SUBMITIT_LOCAL_GLOBALID"),
            local_rank=_number(environ, "SUBMITIT_LOCAL_LOCALID", 0),
            world=world,
            local_world=world,
            master_addr="127.0.0.1",
            master_port=port_of(f"submitit-{job}"),
            launcher="submitit-local",
            host=host,
        )
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        world = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or host
        job = "-".join(
            environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        )
        env = Env(
            rank=_number(environ, "SLURM_PROCID"),
            local_rank=_number(environ, "SLURM_LOCALID", 0),
            world=world,
            local_world=_tasks_on_node(environ),
            master_addr=_rendezvous(environ, nodes),
            master_port=_number(environ, "MASTER_PORT", port_of(job)),
            launcher="slurm",
            host=environ.get("SLURMD_NODENAME", host),
        )
    else:
        return Env(0, 0, 1, 1, "127.0.0.1", 0, "single", host)
    if env.world > 1 and env.master_port == 0:
        raise UserError(
            "MASTER_PORT=0 is no port for a rendezvous; torchrun: give --standalone, or a --master-port"
        )
    if not 0 <= env.rank < env.world:
        raise UserError(
            f"rank {env.rank} is not within a world of {env.world} ({env.launcher}): the variables are stale"
        )
    return env


def port_of(job: str) -> int:
    """A port that every process of ``job`` computes alike; other jobs on the node almost always get another."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: ``gpu[007-009,12],login1`` -> ``gpu007``."""
    # Up to the first comma outside of brackets, with the first number of each bracket.
    match = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist.strip())
    if not match:
        raise UserError(f"the node list {nodelist!r} (SLURM_STEP_NODELIST) names no host")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def _rendezvous(environ: Mapping[str, str], nodes: str) -> str:
    """Name or address at which the other ranks of a Slurm step reach rank 0."""
    given = environ.get("MASTER_ADDR")
    if not given:
        suffix = environ.get("DATTRAIN_RENDEZVOUS_SUFFIX", "")
        host = first_host(nodes)
        return host.partition(".")[0] + suffix if suffix else host
    if _number(environ, "SLURM_STEP_NUM_NODES", 1) > 1 and re.fullmatch(
        r"localhost.*|127\..*|::1|0\.0\.0\.0", given
    ):
        raise UserError(
            f"MASTER_ADDR={given} means another machine on each node of {nodes}; unset it, or name the node of rank 0"
        )
    return given


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """Own entry of ``SLURM_STEP_TASKS_PER_NODE`` (``2(x3),1``); 0 when unknown."""
    counts: list[int] = []
    for part in (environ.get("SLURM_STEP_TASKS_PER_NODE") or "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 0


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None or value == "":
        if default is None:
            raise UserError(f"{name} is not set, though the other variables of its launcher are")
        return default
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}={value!r} is not a number") from None


def pick_device(env: Env) -> torch.device:
    """This rank's device: its own when one is visible per task, else the ``local_rank``-th; the CPU without CUDA.

    Raises:
        UserError: more processes than devices on this node.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (
        count == 1
        and (env.local_world != 1 and env.local_rank > 0)
        and env.launcher in ("single", "local", "torchrun")
    ):
        # torchrun and our launcher never narrow visibility per rank, so here two ranks would share the device.
        raise UserError(
            f"{env.host}: local rank {env.local_rank}, but one device is visible; start one process"
        )
    index = 0 if count == 1 else env.local_rank
    if index >= count:
        raise UserError(
            f"{env.host}: local rank {env.local_rank}, but {count} devices are visible; start at most {count} per node"
        )
    return torch.device("cuda", index)


def device_called(name: str | torch.device) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        UserError: there is none of that name here; says what there is.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: there is none of that name; write cpu, cuda or cuda:1") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        here = (
            f"this machine has cuda:0 to cuda:{count - 1}" if count > 1 else "this machine has cuda:0 alone"
        )
        raise UserError(f"device={name}: {here if count else 'no CUDA device here; use cpu'}")
    return device


def configure(
    *, threads: int = 0, deterministic: bool = False, tf32: bool = False, env: Env | None = None
) -> None:
    """Settings of torch that hold for the process; before the device is touched. ``threads`` 0 leaves torch's choice.

    Without ``tf32`` fp32 convolutions are exact too, which torch alone computes in TF32. Where ``env`` says that other ranks
    may be on this node, Triton's cache goes to the node's own disk. Without CUDA the process keeps the memory that it frees.
    """
    import torch

    if not torch.cuda.is_available():
        host_memory.keep_freed()
    if env is not None and env.world > 1 and env.local_world != 1:
        _cache_on_the_node()
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    # By the older interface: torch.compile reads it, which raises once the newer one was used, by a caller perhaps.
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def _cache_on_the_node() -> None:
    """Put Triton's cache into the temporary folder, unless ``TRITON_CACHE_DIR`` says where it is.

    By default it is at home, often on a network, to which all ranks of all nodes would write the same kernels at once. It
    holds libraries that are loaded, so a folder that another user made is not taken.
    """
    if "TRITON_CACHE_DIR" in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"dattrain-triton-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            os.environ["TRITON_CACHE_DIR"] = str(folder)


def emulates_bf16(cpuinfo: str | None = None) -> bool:
    """Whether this CPU multiplies bf16 by way of fp32, several times slower than fp32 itself; False where nothing tells.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``; None reads it.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text()
        except OSError:
            return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return found is not None and not {"avx512_bf16", "amx_bf16", "bf16"} & set(found[1].split())


def device_name(device: torch.device) -> str:
    """What the vendor calls it; ``cpu``."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def raise_open_files() -> None:
    """Raise this process's soft limit of open files to the hard one; what is started from here inherits it.

    The usual soft limit is 1,024. Rank 0 has a socket for each rank in its store, and one for each in every group of gloo's that it
    gathers in; beside them are NCCL's, and the shards of the data.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # a kernel with a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def connect(env: Env, device: torch.device, timeout_s: float = 1800.0) -> None:
    """Join the process group: gloo on CPU; NCCL with gloo for CPU tensors on CUDA.

    Sets torchrun's variables, for libraries that look for ``RANK`` and friends, and raises the limit of open files. One
    process needs no network at all. For a process that ends as a rank; ``process_group`` for one that does something else after.

    Raises:
        UserError: the master cannot be reached, or its port is taken.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    raise_open_files()
    values = (
        env.rank, env.local_rank, env.world, env.local_world or 1, env.master_addr, env.master_port or 29500
    )  # fmt: skip
    os.environ.update(zip(VARIABLES, map(str, values)))
    os.environ.setdefault(LAZY, "1")
    limit = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    if env.world == 1:
        from torch._C._distributed_c10d import HashStore

        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=limit)
        return
    try:
        dist.init_process_group(
            backend,
            # Not tcp://: under torchrun the agent holds the port and the store, which this method knows.
            init_method="env://",
            rank=env.rank,
            world_size=env.world,
            timeout=limit,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{env.host}: rank {env.rank} of {env.world} cannot reach the others at {env.master_addr}:{env.master_port}: "
            f"{str(error).splitlines()[0]}. {RENDEZVOUS_HINT}"
        ) from error


def disconnect() -> None:
    """Leave the process group; safe to call twice."""
    import torch.distributed as dist

    if dist.is_initialized():
        # A rank that has failed will not answer; its launcher reports it.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def process_group(
    env: Env, device: torch.device, timeout_s: float = 1800.0, *, disconnect: Callable[[], None] = disconnect
) -> Iterator[None]:
    """``connect`` for a block, unless this process is in a group already.

    Afterwards the environment's variables are what they were before, or whatever is started later from here would take
    itself for a rank.

    After a failure a group of several is left alone: the others may be waiting in it, and leaving would wait for them.

    Raises:
        UserError: as ``connect``.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    before = {name: os.environ.get(name) for name in (*VARIABLES, LAZY)}
    try:
        connect(env, device, timeout_s)
        try:
            yield
        except BaseException:
            if env.world == 1:
                disconnect()
            raise
        disconnect()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def hard_exit(code: int) -> NoReturn:
    """End this process now, without Python's finalisation.

    A gloo thread that drops a Python tensor during finalisation aborts the process (seen with ZeRO-3), which would turn a
    finished training into a failed job. So worker processes flush and go.
    """
    import logging

    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
