"""One rank of the tests of what goes wrong: each scenario is a function, run on every rank; prints what it saw."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from state_worker import Job, build, finish, start_distributed, train_step

from dattrain.engine.ema import averaged, new_average, update_average
from dattrain.engine.evaluate import AllRanks
from dattrain.errors import UserError
from dattrain.runtime import collectives
from dattrain.state import partition
from dattrain.state.format import checkpoint, rank_file
from dattrain.state.format.manifest import read_manifest, rank_file_name
from dattrain.state.background import StagingCopy
from dattrain.state.checkpointer import Checkpointer
from dattrain.state.partition import MOMENTS, LocalState, read
from dattrain.state.format.retention import Policy

META = {"step": 1, "samples_seen": 12}


def told(call: Any) -> str:
    """The message of the UserError that ``call`` raises."""
    try:
        call()
    except UserError as e:
        return str(e)
    raise AssertionError("nothing was raised")


def damaged_on_one_rank(run: Path) -> None:
    """Rank 1 alone reads the damaged block; both pass over, both end with the older state."""
    job = Job(str(run), "", stage=3)
    engine = build(job)
    keeper = Checkpointer(run)
    for step in (1, 2):
        train_step(engine, job, step - 1)
        keeper.save(engine, None, {"step": step, "samples_seen": step * 12}, background=False)
    if dist.get_rank() == 0:
        folder = keeper.root / checkpoint.folder_name(2)
        manifest = read_manifest(folder)
        path = folder / rank_file_name(1)
        with rank_file.Reader(path, manifest.files[path.name]) as reader:
            at = reader.pieces()[("exp_avg", "out.weight")][0][1]
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    dist.barrier()
    # Rank 1 reads its shard for itself under the stage that saved it, and for both under another.
    for stage in (2, 3):
        again = build(dataclasses.replace(job, stage=stage))
        meta = keeper.resume(again, None)
        assert meta is not None and meta["step"] == 1
        assert (
            keeper.skipped[0][0] == "step_00000002"
            and "rank_00001.safetensors: bytes 0-" in keeper.skipped[0][1]
        )
    assert keeper.resumed_from == keeper.root / checkpoint.folder_name(1)
    assert LocalState(again).scalars()["global_steps"] == 1
    # Nor does it take the place of what is saved before the run passes it again, and then it is replaced.
    keeper.policy = Policy(keep_last=1)
    keeper.save(again, None, {"step": 1, "samples_seen": 12}, background=False)
    assert (keeper.root / checkpoint.folder_name(1)).is_dir()
    keeper.policy = Policy()
    train_step(again, job, 1)
    keeper.save(again, None, {"step": 2, "samples_seen": 24}, background=False)
    checkpoint.verify(keeper.root / checkpoint.folder_name(2))


def one_rank_cannot_load(run: Path) -> None:
    """What fails on rank 1, for itself or for what it reads for both, ends the load on both ranks, in time and in its words."""
    saved = Job(str(run), "", stage=2)
    keeper = Checkpointer(run)
    keeper.save(build(saved), None, META, background=False)
    for stage in (2, 3):
        engine = build(dataclasses.replace(saved, stage=stage))
        for owner, name in ((partition, "write"), (rank_file, "read_block")):
            real = getattr(owner, name)
            if dist.get_rank() == 1:
                setattr(owner, name, mock.Mock(side_effect=RuntimeError("out of memory")))
            try:
                keeper.resume(engine, None)
                raise AssertionError("it loaded")
            except (UserError, RuntimeError) as e:
                words = "out of memory" if dist.get_rank() == 1 else "rank 1: RuntimeError: out of memory"
                assert str(e) == words
            setattr(owner, name, real)
        assert keeper.resume(engine, None) == META


def tensors_of_rank_0(run: Path) -> None:
    """Rank 0 alone reads; the others get every tensor to the bit, and what stops it on the way."""
    held = {"a": torch.randn(3, 5).T, "n": torch.tensor(3), "none": torch.empty(0, 2), "flags": torch.ones(9) > 0}
    held["half"] = torch.arange(7, dtype=torch.bfloat16)

    def read(broken: bool) -> Any:
        assert dist.get_rank() == 0
        yield from held.items()
        if broken:
            raise UserError("the disk is gone")

    got = dict(collectives.tensors_from_first(lambda: read(False)))
    told_by_rank_0 = collectives.broadcast(held)
    assert list(got) == list(told_by_rank_0)
    assert all(got[n].dtype == t.dtype and torch.equal(got[n], t) for n, t in told_by_rank_0.items())
    assert told(lambda: list(collectives.tensors_from_first(lambda: read(True)))) == "the disk is gone"


def waits_for_rank_0(run: Path) -> None:
    """Rank 0 alone works, for longer than a collective waits; the others get what it found, and what stops it, and beat meanwhile."""
    waited: list[int] = []
    pause = 2.5

    def work(value: Any) -> Any:
        assert dist.get_rank() == 0
        time.sleep(pause)
        if isinstance(value, Exception):
            raise value
        return value

    ranks = AllRanks(lambda: waited.append(1))
    group = dist.distributed_c10d._get_default_group()
    before = group._get_backend(torch.device("cpu")).options._timeout
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    keys = store.num_keys()
    dist.barrier()
    assert ranks.on_first(lambda: work({"ap": 0.5})) == {"ap": 0.5}
    assert (len(waited) > 5) == bool(dist.get_rank())
    assert told(lambda: ranks.on_first(lambda: work(UserError("no object")))) == "no object"
    pause = 0.0
    # What cannot be sent stops all too, and leaves nobody waiting.
    failed = False
    try:
        ranks.on_first(lambda: work(lambda: 1))
    except Exception as e:
        failed = "pickle" in str(e)
    assert failed
    assert ranks.gather_to_first(dist.get_rank()) == ([0, 1] if dist.get_rank() == 0 else None)
    dist.distributed_c10d._set_pg_timeout(before, group)
    dist.barrier()
    assert store.num_keys() == keys, "nothing is left in the store"


def all_damaged(run: Path) -> None:
    """A clear error on every rank, and nothing is touched."""
    job = Job(str(run), "", stage=2)
    engine = build(job)
    keeper = Checkpointer(run)
    assert keeper.resume(engine, None) is None
    keeper.save(engine, None, META, background=False)
    path = keeper.root / checkpoint.folder_name(1) / rank_file_name(0)
    if dist.get_rank() == 0:
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    message = told(lambda: keeper.resume(engine, None))
    assert (
        "holds no complete checkpoint: step_00000001 (rank_00000.safetensors" in message
        and "Nothing was changed" in message
    )
    assert path.exists()


def another_model(run: Path) -> None:
    """Shapes and names that do not fit are listed; the engine keeps its weights."""
    engine = build(Job(str(run), "", width=8))
    keeper = Checkpointer(run)
    keeper.save(engine, None, META, background=False)
    wider = build(Job(str(run), "", width=16, stage=3))
    before = [m.detach().clone() for m in LocalState(wider).masters]
    message = told(lambda: keeper.resume(wider, None))
    assert "depthwise.bias has shape (8,) in the checkpoint and (16,) in the model" in message
    assert "init.from" in message and "more" in message
    assert all(torch.equal(a, b) for a, b in zip(before, LocalState(wider).masters))
    frozen = build(Job(str(run), "", frozen=True))
    keeper.save(frozen, None, {"step": 2, "samples_seen": 24}, background=False)
    assert "was frozen" in told(lambda: keeper.resume(engine, None))


def copied_beside_the_pass(run: Path) -> None:
    """A copy that is late: ``save`` does not wait for it, the optimizer's step does, and what is saved is from before it."""
    issue, wait = StagingCopy._issue, StagingCopy.wait
    for stage in (0, 1, 2, 3):
        job = Job(str(run / str(stage)), "", stage=stage)
        engine = build(job)
        train_step(engine, job, 0)
        ema = new_average(LocalState(engine).masters)
        before = _state(engine)
        reached = threading.Event()
        keeper = Checkpointer(Path(job.run))
        with (
            mock.patch.object(StagingCopy, "_issue", lambda copy: reached.wait(60) and issue(copy)),
            mock.patch.object(StagingCopy, "wait", lambda copy: reached.set() or wait(copy)),
        ):
            keeper.save(engine, ema, META, background=True)
            assert not reached.is_set()
            train_step(engine, job, 1)
            reached.set()
            keeper.wait()
        assert not all(map(torch.equal, before, _state(engine)))
        again = build(job)
        keeper.resume(again, new_average(LocalState(again).masters))
        assert all(map(torch.equal, before, _state(again)))


def _state(engine: Any) -> list[torch.Tensor]:
    local = LocalState(engine)
    held = []
    for fragment in local.fragments:
        for state in ("param", *MOMENTS):
            tensor = local.tensor(fragment, state)
            if tensor is not None:
                held.append(read(tensor, fragment.offset, fragment.numel).clone())
    return held


def ema_on_and_off(run: Path) -> None:
    """A checkpoint without averages starts them at the weights; one with them serves a run without."""
    job = Job(str(run), "", stage=2)
    engine = build(job)
    keeper = Checkpointer(run)
    train_step(engine, job, 0)
    keeper.save(engine, None, META, background=False)
    again = build(job)
    ema = new_average(LocalState(again).masters)
    keeper.resume(again, ema)
    masters = LocalState(again).masters
    assert all(torch.equal(a, m) for a, m in zip(ema, masters))
    train_step(again, job, 1)
    update_average(ema, LocalState(again).masters, 0.5)
    keeper.save(again, ema, {"step": 2, "samples_seen": 24}, background=False)
    assert keeper.resume(engine, None)["step"] == 2  # type: ignore[index]


def ema_against_unsharded(run: Path) -> None:
    """Averages under every stage equal those of whole fp32 tensors, and ``averaged`` computes with them and puts back."""
    from state_worker import GLOBAL_BATCH, batch

    results = []
    for stage in (0, 1, 2, 3):
        job = Job(str(run / str(stage)), "", stage=stage)
        engine = build(job)
        keeper = Checkpointer(Path(job.run))
        ema = new_average(LocalState(engine).masters)
        reference = None
        for step in range(3):
            keeper.save(engine, ema, {"step": step, "samples_seen": 0}, background=False)
            from dattrain.state import gather

            whole = gather.load_tensors(keeper.root / checkpoint.folder_name(step), "param")
            averages = gather.load_tensors(keeper.root / checkpoint.folder_name(step), "ema")
            if reference is None:
                reference = {n: t.clone() for n, t in whole.items()}
            else:
                for name, tensor in whole.items():
                    if tensor.is_floating_point():
                        reference[name].lerp_(tensor, 1 - 0.9)
                    else:
                        reference[name] = tensor
            assert all(torch.equal(reference[n], averages[n]) for n in reference), stage
            dist.barrier()
            train_step(engine, job, step)
            update_average(ema, LocalState(engine).masters, 0.9)
        engine.eval()
        images, _ = batch(0, GLOBAL_BATCH)
        with torch.no_grad():
            before = engine(images)
            masters = [m.detach().clone() for m in LocalState(engine).masters]
            held = [e.clone() for e in ema]
            with averaged(engine, ema):
                inside = engine(images)
            after = engine(images)
        assert torch.equal(before, after) and not torch.equal(before, inside)
        assert all(torch.equal(a, b) for a, b in zip(masters, LocalState(engine).masters))
        assert all(torch.equal(a, b) for a, b in zip(held, ema))
        results.append(inside)
    assert all(torch.allclose(results[0], r, atol=1e-5) for r in results)


def one_rank_cannot_write(run: Path) -> None:
    """Rank 1's disk is full: both ranks are told, with the reason, and the checkpoint before is the newest."""
    job = Job(str(run), "", stage=2)
    engine = build(job)
    keeper = Checkpointer(run, patience=30)
    keeper.save(engine, None, META, background=False)
    if dist.get_rank() == 1:
        import errno

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        real, rank_file.os.write = os.write, full  # type: ignore[assignment]
    keeper.save(engine, None, {"step": 2, "samples_seen": 24})
    message = told(keeper.wait)
    if dist.get_rank() == 1:
        os.write = real
    assert "step 2 could not be written" in message and "No space left on device" in message, message
    assert ("the last complete checkpoint is step_00000001" in message) == (dist.get_rank() == 0), message
    dist.barrier()
    if dist.get_rank() == 0:
        assert sorted(p.name for p in keeper.root.iterdir() if not p.name.startswith(".new")) == [
            "step_00000001"
        ]


def the_next_step_hears_of_it(run: Path) -> None:
    """A background failure is raised by the next ``wait``, once, and the next save works again."""
    import time

    job = Job(str(run), "", stage=0)
    engine = build(job)
    keeper = Checkpointer(run, patience=5)
    real = rank_file.write

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    rank_file.write = fail  # type: ignore[assignment]
    keeper.save(engine, None, META)
    while not keeper.failed:
        time.sleep(0.01)
    left = "; there is no complete checkpoint yet" if dist.get_rank() == 0 else ""
    assert told(keeper.wait).endswith(f"Input/output error{left}")
    keeper.wait()
    rank_file.write = real
    dist.barrier()
    keeper.save(engine, None, META, background=False)
    assert checkpoint.find(keeper.root).folder is not None


def a_blocking_save_after_a_failure(run: Path) -> None:
    """Rank 1's failure in background is told on both ranks by a blocking save, which would else leave rank 0 waiting."""
    job = Job(str(run), "", stage=2)
    engine = build(job)
    keeper = Checkpointer(run, patience=30)
    real = rank_file.write
    if dist.get_rank() == 1:

        def fail(*_: object, **__: object) -> None:
            raise OSError(5, "Input/output error")

        rank_file.write = fail  # type: ignore[assignment]
    keeper.save(engine, None, META)
    message = told(lambda: keeper.save(engine, None, {"step": 2, "samples_seen": 24}, background=False))
    assert "step 1 could not be written" in message and "Input/output error" in message
    rank_file.write = real
    keeper.save(engine, None, {"step": 2, "samples_seen": 24}, background=False)
    assert [e.step for e in checkpoint.list_all(keeper.root)] == [2]


def a_silent_rank(run: Path) -> None:
    """Rank 1 never writes: rank 0 gives the save up after its patience, and nothing is published."""
    job = Job(str(run), "", stage=2)
    engine = build(job)
    keeper = Checkpointer(run, patience=0.3)
    if dist.get_rank() == 0:
        keeper.save(engine, None, META)
        assert "rank_00001.safetensors was not written within 0 s" in told(keeper._task.wait)
        assert list(keeper.root.iterdir()) == []
    dist.barrier()


def rollback(run: Path) -> None:
    """Back to the last save, waiting for the one in flight, with counters and loss scale."""
    job = Job(str(run), "", stage=2, precision="fp16")
    engine = build(job)
    keeper = Checkpointer(run)
    train_step(engine, job, 0)
    keeper.save(engine, None, META)
    saved = LocalState(engine).scalars()
    masters = [m.detach().clone() for m in LocalState(engine).masters]
    for step in (1, 2, 3):
        train_step(engine, job, step)
    assert LocalState(engine).scalars() != saved
    keeper.wait()
    assert keeper.resume(engine, None) == META
    assert LocalState(engine).scalars() == saved
    assert all(torch.equal(a, b) for a, b in zip(masters, LocalState(engine).masters))


def main() -> None:
    """Run the scenarios named, one after another."""
    start_distributed()
    code = 0
    try:
        for name in sys.argv[2:]:
            globals()[name](Path(sys.argv[1]) / name)
            dist.barrier()
            print(f"{name}: passed", flush=True)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finish(code)


if __name__ == "__main__":
    main()
