"""A forked worker leaves alone what it inherits, and one that gives nothing is named."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
import weakref

import pytest
import torch
from torch._C import _error_if_any_worker_fails

from dattrain.config.schema import Config
from dattrain.data.classes import Classes
from dattrain.data.decode.cpu import CpuDecoder
from dattrain.data.factory import eval_loader, train_loader
from dattrain.data.fork import kept
from dattrain.data.worker_progress import ProgressTable, note
from dattrain.data.workers import Workers
from dattrain.errors import STALLED, UserError

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")


class Resource:
    """What may be finalised by the process alone that made it."""

    def __init__(self, marks):
        self.marks, self.maker, self.me = marks, os.getpid(), self  # a cycle: the collector's

    def __del__(self):
        if os.getpid() != self.maker:
            (self.marks / f"finalised in {os.getpid()}").touch()


def collect(_):
    for _ in range(3):
        for _ in range(5000):
            cycle = []
            cycle.append(cycle)
        gc.collect()
    return gc.isenabled()


def test_a_workers_collector_leaves_its_parents_objects_alone(tmp_path):
    gc.disable()
    try:
        Resource(tmp_path)
        # The trainer collects on its own; a worker's garbage is the worker's.
        with Workers(collect, count=4, workers=2, patience=60) as workers:
            assert list(workers) == [True] * 4
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert not list(tmp_path.iterdir())


def test_what_a_worker_drops_of_its_parents_does_not_die(tmp_path):
    resource = Resource(tmp_path)
    resource.me = None
    table = {"only": resource}
    del resource

    def drop(_):
        table.clear()

    with Workers(drop, count=4, workers=2, patience=60) as workers:
        assert list(workers) == [None] * 4
    assert not list(tmp_path.iterdir())
    weak = weakref.ref(table["only"])
    table.clear()
    assert weak() is None, "here it dies as ever"


def test_nothing_that_runs_at_exit_runs_in_a_worker(tmp_path):
    # Joined by threading._shutdown, which a worker that ends as a process of multiprocessing's would call.
    end = threading.Event()
    parent = os.getpid()

    def mark():
        if os.getpid() != parent:
            (tmp_path / "at exit").touch()

    threading._register_atexit(mark)
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with Workers(lambda number: number, count=2, workers=1, patience=60) as workers:
            assert list(workers) == [0, 1]
    finally:
        end.set()
        thread.join()
        threading._threading_atexits.pop()
    assert [p.exitcode for p in workers.processes] == [0]
    assert not list(tmp_path.iterdir())


def test_beside_a_dali_pipeline(photo):
    from io import BytesIO

    import numpy as np

    dali = pytest.importorskip("nvidia.dali")
    file = BytesIO()
    photo.resize((64, 64)).save(file, "JPEG")
    image = np.frombuffer(file.getvalue(), np.uint8)
    gc.disable()
    try:
        for _ in range(2):
            pipeline = dali.Pipeline(
                batch_size=2, num_threads=2, device_id=None, prefetch_queue_depth=2, exec_dynamic=True
            )
            with pipeline:
                encoded = dali.fn.external_source(source=lambda: [image, image], batch=True)
                pipeline.set_outputs(dali.fn.decoders.image(encoded))
            pipeline.build()
            pipeline.run()
            pipeline.me = (
                pipeline  # left to the collector, as a test or an evaluation before this may have left one
            )
        del pipeline, encoded
        with Workers(collect, count=4, workers=2, patience=60) as workers:
            assert list(workers) == [True] * 4
    finally:
        gc.enable()


def test_signals_and_wake_ups_of_the_parent_are_not_a_workers():
    def settings(_):
        handlers = [signal.getsignal(number) for number in numbers]
        return handlers, signal.set_wakeup_fd(-1), signal.pthread_sigmask(signal.SIG_BLOCK, ())

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.signal(number, lambda *_: None) for number in (*numbers[:-1],)}
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    signal.set_wakeup_fd(ours.fileno())
    try:
        with Workers(settings, count=1, workers=1, patience=60) as workers:
            ((handlers, wakeup, mask),) = list(workers)
        assert all(callable(signal.getsignal(number)) for number in numbers), (
            "and the parent's are as they were"
        )
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.set_wakeup_fd(-1)
        ours.close(), theirs.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert handlers == [signal.SIG_IGN] * 4 + [signal.SIG_DFL] * 2
    assert wakeup == -1 and not mask


def test_a_lock_that_a_thread_held_in_fsspec_does_not_reach_a_worker():
    from fsspec import asyn

    asyn.reset_lock()
    with (
        asyn.get_lock(),
        Workers(lambda _: asyn.get_loop().is_closed(), count=1, workers=1, patience=20) as them,
    ):
        assert list(them) == [False]
    asyn.reset_lock()


@pytest.fixture(params=[False, True], ids=["", "beside-another-loader"])
def torchs_handler(request):
    """SIGCHLD as it is where another DataLoader of this process has had workers: torch raises for any worker that is killed."""

    def raise_for_the_dead(*_):
        _error_if_any_worker_fails()

    before = signal.signal(signal.SIGCHLD, raise_for_the_dead if request.param else signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_stops_in_its_task_is_named_with_what_it_is_at(tmp_path, torchs_handler):
    def work(number):
        note(f"set/{number}.tar: sample 'x'")
        if number == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return number

    stacks = (tmp_path / "rank_0.log").open("w")
    faulthandler.enable(stacks)
    workers = Workers(work, count=None, workers=2, patience=0.5, unit="micro-batch")
    pids = [process.pid for process in workers.processes]
    assert next(workers) == 0
    with stacks, pytest.raises(UserError) as caught:
        try:
            next(workers)
        finally:
            faulthandler.enable(sys.__stderr__)
    message = str(caught.value)
    assert f"process {pids[1]} (worker 1, state T (stopped)) has been at micro-batch 1" in message
    assert "(set/1.tar: sample 'x')" in message and "train.health.stall_seconds" in message
    assert caught.value.exit_code == STALLED
    assert "in this rank's log" in message and "in work" in (tmp_path / "rank_0.log").read_text()
    assert not any(process.is_alive() for process in workers.processes)
    with pytest.raises(StopIteration):
        next(workers)


def test_a_worker_that_takes_no_task_is_named():
    workers = Workers(lambda number: number, count=None, workers=1, prefetch=1, patience=0.5)
    assert next(workers) == 0
    time.sleep(0.2)
    os.kill(workers.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(
        UserError, match=r"state T \(stopped\)\) was done with task \d+ .* has begun no other"
    ):
        for _ in range(10):
            next(workers)


def test_one_that_is_slow_is_waited_for_and_reported(caplog, monkeypatch):
    monkeypatch.setattr("dattrain.data.workers._REMIND_S", 0.2)
    with Workers(lambda number: time.sleep(1), count=1, workers=1) as workers:
        assert list(workers) == [None]
    assert "waited" in caplog.text and "has been at task 0" in caplog.text


@pytest.mark.parametrize(("kind", "reader"), [("train", "index"), ("train", "webdataset"), ("eval", "index")])
def test_the_loaders_end_within_the_watchdogs_patience(make_shards, monkeypatch, kind, reader):
    folder = make_shards()
    pipe = "pipe:cat " + " ".join(str(path) for path in sorted(folder.glob("*.tar")))
    train = str(folder) if reader == "index" else pipe
    config = Config.model_validate({
        "model": {"num_classes": 10},
        "data": {"train": train, "val": str(folder), "workers": 1, "lanes": 8, "window": 1, "reader": reader, "samples": 49},
        "train": {"global_batch": 4, "micro_batch": 2, "health": {"stall_seconds": 2.0}}, "eval": {"batch": 5},
    })  # fmt: skip
    decode = CpuDecoder.decode

    def stop(self, encoded):
        batch = decode(self, encoded)
        os.kill(os.getpid(), signal.SIGSTOP)
        return batch

    monkeypatch.setattr(CpuDecoder, "decode", stop)
    if kind == "train":
        loader = train_loader(config, rank=0, world=1, samples_seen=0, device=CPU, img_size=32)
    else:
        loader = eval_loader(config, Classes(10), rank=0, world=1, device=CPU, img_size=32)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"gives nothing: process \d+ .* at micro-batch 0 \(.*tar:"):
        next(iter(loader))
    assert time.monotonic() - begun >= 1.5, "not before its time"
    loader.close()


def test_the_end_of_a_long_path_is_kept(monkeypatch):
    progress = ProgressTable(2)
    monkeypatch.setattr("dattrain.data.worker_progress._own_row", (progress, 1))
    progress.begin(7)
    note("é" * 1000 + "/last.tar")
    row = progress.row(1)
    assert (row.number, row.busy) == (7, True) and row.where.endswith("é/last.tar") and len(row.where) < 300
    assert progress.row(0).where == "" and progress.row(0).number == -1


def test_workers_of_another_library_forked_beside_ours(tmp_path):
    """As ``dattrain bench data`` does: torch's own loader knows nothing of ``settle``."""
    gc.disable()
    try:
        Resource(tmp_path)
        with kept():
            loader = torch.utils.data.DataLoader(
                Collecting(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
            )
            batches = iter(loader)
        assert list(batches) == [0, 1]
    finally:
        gc.enable()
    assert not list(tmp_path.iterdir())


class Collecting(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, number):
        collect(number)
        return number
