"""One rank of ``dattrain bench checkpoint``: ``python -m dattrain.bench.checkpoint_ranks JOB.json``.

Builds a real ZeRO engine of the size asked for, without training it, and times saves beside bare writes of as many bytes, or
loads of what was saved. Rank 0 leaves the seconds of every round (the slowest rank's) in the job's ``out``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dattrain.engine import zero
from dattrain.runtime import environment
from dattrain.state import load
from dattrain.state.background import image_of
from dattrain.state.checkpointer import Checkpointer
from dattrain.state.format import checkpoint, rank_file
from dattrain.state.format.manifest import rank_file_name, read_manifest
from dattrain.state.format.retention import Policy
from dattrain.state.partition import MOMENTS, LocalState

WIDTH = 1024
ROWS = 64
BUCKET = 1 << 24


@dataclasses.dataclass(frozen=True)
class Job:
    """What a group of ranks is to measure. ``folder`` is a run folder; ``parameters`` is a count."""

    mode: str
    folder: str
    out: str
    parameters: int
    stage: int
    rounds: int


def build(job: Job, device: torch.device) -> Any:
    """An engine over layers of ``WIDTH`` x ``WIDTH``, with moments that are not zero."""
    torch.manual_seed(0)
    layers = max(1, round(job.parameters / (WIDTH * (WIDTH + 1))))
    with torch.device(device):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's default buckets, gigabytes per rank, would be most of what an update needs here.
        "zero_optimization": {
            "stage": job.stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": 2 * BUCKET,
            "stage3_max_reuse_distance": 2 * BUCKET,
        },
    }
    # Moments drawn at random would move the weights far: next to no rate keeps them finite.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    engine = zero.initialize(model, optimizer, settings, device)
    local = LocalState(engine)
    local.create_moments(dict.fromkeys(local.parameters, 1))
    for fragment in local.fragments:
        for moment in MOMENTS:
            tensor = local.tensor(fragment, moment)
            assert tensor is not None
            tensor.reshape(-1).narrow(0, fragment.offset, fragment.numel).uniform_()
    return engine


def slowest(seconds: float) -> float:
    """The largest of all ranks' values."""
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, seconds)
    return max(values)


def timed(task: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall and CPU that ``task`` takes on the slowest rank, all starting together."""
    dist.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    task()
    return slowest(time.perf_counter() - begin), slowest(time.process_time() - cpu)


def bare_write(path: Path, image: memoryview, *, direct: bool, times: int = 1) -> None:
    """What dd does with oflag=direct conv=fsync, or without the first: the disk's own speed. Whole pages only.

    ``image`` is written ``times`` times, one behind the other.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    fd = os.open(path, flags, 0o644)
    try:
        size = len(image) // rank_file.PAGE * rank_file.PAGE
        for _ in range(times):
            position = 0
            while position < size:
                position += os.write(fd, image[position : min(position + rank_file.CHUNK, size)])
        os.fsync(fd)
    finally:
        os.close(fd)


def peak_reset() -> None:
    """Let the kernel count this process's peak memory from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def memory(key: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; 0 where there is no /proc."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0


def save_rounds(job: Job, engine: Any) -> dict[str, Any]:
    """Bare writes, blocking saves, background saves alone and beside an update, in turns; seconds per round."""
    # Removing old ones is not writing: it is done between the rounds.
    keeper = Checkpointer(Path(job.folder), Policy(1000))
    rank = dist.get_rank()
    before = memory("VmRSS")
    peak_reset()
    keeper.prepare(engine, None)
    keeper.save(engine, None, {"step": 0, "samples_seen": 0}, background=False)
    peak = memory("VmHWM")
    manifest = read_manifest(keeper.root / checkpoint.folder_name(0))
    size = manifest.files[rank_file_name(rank)].size
    scratch = Path(job.folder) / f"bare_{rank}"
    bare = keeper.buffer.take(size)
    result: dict[str, Any] = {
        "bytes": manifest.nbytes,
        "parameters": manifest.numel,
        # The buffer of bare writes, as large as a shard, is allocated after this is read.
        "peak_bytes": slowest(peak - before),
        "shard_bytes": slowest(size),
        "dd": [],
        "direct": [],
        "buffered": [],
        "blocking": [],
        "background": [],
        "stall": [],
        "update": [],
        "beside": [],
    }
    inputs = torch.randn(ROWS, WIDTH, device=engine.device)
    update(engine, inputs)  # the first allocates
    unbuffered = _takes_direct(scratch)
    step = 0
    for _ in range(job.rounds):
        for name, direct, alone in (("dd", True, True), ("direct", True, False), ("buffered", False, False)):
            times = dist.get_world_size() if alone else 1
            write = partial(bare_write, scratch, image_of(bare), direct=direct and unbuffered, times=times)
            result[name].append(timed(write if rank == 0 or not alone else _nothing))
            scratch.unlink(missing_ok=True)
        for name in ("blocking", "background", "beside"):
            step += 1
            save = partial(keeper.save, engine, None, {"step": step, "samples_seen": step})
            if name == "beside":
                update(engine, inputs)  # after the writes, caches and pages are cold for the first one
                result["update"].append(timed(partial(update, engine, inputs)))
                wait, cpu, took = _save_beside(keeper, save, partial(update, engine, inputs))
                result["stall"].append((slowest(wait), slowest(cpu)))
                result["beside"].append(took)
            else:
                result[name].append(
                    timed(partial(_save_alone, keeper, save, background=name == "background"))
                )
            _drop(keeper, step - 1)
    return result


def update(engine: Any, inputs: torch.Tensor) -> None:
    """Forward, backward and the optimizer's step."""
    engine.backward(engine(inputs).square().mean())
    engine.step()


def _save_alone(keeper: Checkpointer, save: Callable[..., float], *, background: bool) -> None:
    save(background=background)
    keeper.wait()


def _save_beside(
    keeper: Checkpointer, save: Callable[..., float], update: Callable[[], None]
) -> tuple[float, float, tuple[float, float]]:
    """A background save and an update beside it: (seconds that the loop waited, of CPU in it, of save and update by ``timed``).

    The waits are the call's own and that before the optimizer's step.
    """
    waits: list[tuple[float, float]] = []
    wait_for_staging = keeper.wait_for_staging

    def waited(call: Callable[[], object]) -> None:
        begin, cpu = time.perf_counter(), time.thread_time()
        call()
        waits.append((time.perf_counter() - begin, time.thread_time() - cpu))

    keeper.wait_for_staging = lambda: waited(wait_for_staging)  # type: ignore[method-assign]

    def both() -> None:
        waited(partial(save, background=True))
        update()

    took = timed(both)
    keeper.wait_for_staging = wait_for_staging  # type: ignore[method-assign]
    keeper.wait()
    return sum(w for w, _ in waits), sum(c for _, c in waits), took


def _nothing() -> None:
    """What the other ranks do while one writes alone."""


def _takes_direct(path: Path) -> bool:
    """Whether the file system lets writers around the page cache."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644))
    except OSError:
        return False
    return True


def _drop(keeper: Checkpointer, step: int) -> None:
    dist.barrier()
    folder = keeper.root / checkpoint.folder_name(step)
    if dist.get_rank() == 0 and folder.exists():
        checkpoint.remove(folder)
        os.sync()
    dist.barrier()


def load_rounds(job: Job, engine: Any) -> dict[str, Any]:
    """Loads with and without checksums in turns, from a cold page cache."""
    keeper = Checkpointer(Path(job.folder), Policy(1))
    found = checkpoint.find(keeper.root)
    assert found.folder is not None and found.manifest is not None
    result: dict[str, Any] = {"bytes": found.manifest.nbytes, "checked": [], "unchecked": [], "read": []}
    files = [found.folder / name for name in found.manifest.files]
    local = LocalState(engine)
    before = memory("VmRSS")
    peak_reset()
    load.load(local, found.folder, found.manifest)
    result["peak_bytes"] = slowest(memory("VmHWM") - before)
    peak_reset()
    local.refresh()
    result["refresh_bytes"] = slowest(memory("VmHWM") - before)
    for _ in range(job.rounds):
        for name in ("checked", "unchecked"):
            keeper.verify = name == "checked"
            _forget(files)
            result[name].append(timed(partial(keeper.resume, engine, None)))
        _forget(files)
        own = files[dist.get_rank() :: dist.get_world_size()]
        result["read"].append(timed(partial(bare_read, own)))
    result["state_bytes"] = slowest(sum(m.numel() for m in local.masters) * 4 * (1 + len(MOMENTS)))
    return result


def bare_read(paths: Sequence[Path]) -> None:
    """Read files once, as ``cat`` does."""
    block = bytearray(rank_file.CHUNK)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _forget(files: list[Path]) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def main() -> int:
    """Do the job on this rank."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    here = environment.resolve(os.environ)
    device = environment.pick_device(here)
    environment.connect(here, device)
    engine = build(job, device)
    result = {"save": save_rounds, "load": load_rounds}[job.mode](job, engine)
    if here.rank == 0:
        Path(job.out).write_text(json.dumps({**result, "device": str(device)}))
    dist.barrier()
    environment.disconnect()
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    environment.hard_exit(code)
