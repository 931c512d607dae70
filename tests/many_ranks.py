"""A save or a resume by thousands of ranks in one process, one rank after another: the product's code, with counted calls.

``Checkpointer.resume`` runs for every rank with the exchanges of ``dattrain.runtime.collectives`` played from records. What a rank sends
never depends on what it receives, so three passes are enough: each rank up to the first gather (what it misses); if any misses
something, each rank with silence from the others (what it opens, reads and sends); and some ranks with everything. The
last pass must open and read what was counted in the others. A save has no exchange but for the token at the beginning; rank 0,
which waits for the others' files, comes last.
"""

from __future__ import annotations

import builtins
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dattrain.runtime import collectives
from dattrain.state import checkpointer
from dattrain.state.format import checkpoint, rank_file
from dattrain.state.format.manifest import Manifest, Parameter, rank_file_name
from dattrain.state.format.rank_file import Piece
from dattrain.state.format.retention import Policy
from dattrain.state.partition import Fragment

STATES = ("param", "exp_avg", "exp_avg_sq", "ema")
Value = Callable[[str, str, int, int], Tensor]
"""(state, name, first element, elements) to fp32 values."""


def zeros(state: str, name: str, start: int, numel: int) -> Tensor:
    """What costs no disk: shards are sparse files."""
    return torch.zeros(numel)


def _cut(shapes: Mapping[str, tuple[int, ...]], rank: int, world: int, stage: int) -> list[Fragment]:
    """As ZeRO cuts one optimizer group: the flattened group (1, 2), each parameter (3), or nothing (0: a share is saved)."""
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    found, offset, at = [], 0, 0
    total = -(-sum(sizes.values()) // world)
    for name, size in sizes.items():
        if stage == 3:
            part = -(-size // world)
            lo, hi = min(size, rank * part), min(size, (rank + 1) * part)
        else:
            lo, hi = max(0, rank * total - at), min(size, (rank + 1) * total - at)
        at += size
        if stage == 0:
            saved = (min(max(lo, 0), size), max(min(max(lo, 0), size), hi))
            found.append(Fragment(name, shapes[name], 0, size, 0, offset, saved))
            offset += size
        elif lo < hi:
            found.append(Fragment(name, shapes[name], lo, hi - lo, 0, offset, (0, hi - lo)))
            offset += hi - lo
    return found


class Local:
    """What ``LocalState`` would say of a rank, without an engine. Every state is one flat tensor."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], rank: int, world: int, stage: int) -> None:
        self.rank, self.world, self.stage = rank, world, stage
        self.fragments = _cut(shapes, rank, world, stage)
        self.parameters = {n: Parameter(s, True, 7) for n, s in shapes.items()}
        numel = sum(f.numel for f in self.fragments)
        self.flat = {state: torch.full((numel,), float("nan")) for state in STATES}
        self.masters = [self.flat["param"]]
        self.held = {"calls": torch.zeros((), dtype=torch.int64)}
        self.engine: Any = None

    @property
    def nbytes(self) -> int:
        """Of its state."""
        return sum(t.nbytes for t in self.flat.values())

    def tensor(self, fragment: Fragment, state: str, ema: list[Tensor] | None = None) -> Tensor:
        return self.flat[state]

    def buffers(self) -> dict[str, Tensor]:
        return self.held

    def create_moments(self, steps: Mapping[str, int]) -> None:
        assert set(steps.values()) == {7}

    def groups(self) -> list[dict[str, Any]]:
        """As of the optimizer."""
        return [{"lr": 1e-3, "weight_decay": 0.05}, {"lr": 1e-3, "weight_decay": 0.0}]

    def scalars(self) -> dict[str, Any]:
        return {"global_steps": 7}

    @property
    def optimizers(self) -> list[Any]:
        """None that could be hooked."""
        return []

    def begin_write(self) -> None:
        """Nothing is gathered."""

    def refresh(self) -> None:
        """Nothing is computed with them."""

    def set_scalars(self, scalars: Mapping[str, Any]) -> None:
        self.engine = dict(scalars)

    def check(self, value: Value) -> None:
        """Whether everything is as ``write`` was told."""
        for state in STATES:
            for f in self.fragments:
                got = self.flat[state][f.offset : f.offset + f.numel]
                assert torch.equal(got, value(state, f.name, f.start, f.numel)), (self.rank, state, f)
        assert int(self.held["calls"]) == 7 and self.engine == {"global_steps": 7}


def write(
    run: Path, shapes: Mapping[str, tuple[int, ...]], world: int, stage: int, value: Value = zeros
) -> Path:
    """A checkpoint of step 7 as ``world`` ranks under ``stage`` would have saved it; returns its folder."""
    root = run / "checkpoints"
    folder = checkpoint.temporary_folder(root, 7, "many")
    folder.mkdir(parents=True)
    files = {}
    for rank in range(world):
        cut = _cut(shapes, rank, world, stage)
        pieces = [
            Piece(s, f.name, f.start + f.saved[0], f.saved[1] - f.saved[0])
            for s in STATES
            for f in cut
            if f.saved[0] < f.saved[1]
        ]
        if rank == 0:
            pieces.append(Piece("buffer", "calls", 0, 1, "I64", ()))
        layout = rank_file.layout(pieces)
        image = np.zeros(layout.size, np.uint8)
        image[: len(layout.header)] = np.frombuffer(layout.header, np.uint8)
        used = len(layout.header)
        for piece, at in zip(layout.pieces, layout.offsets):
            if piece.state == "buffer":
                image[at : at + 8] = np.frombuffer((7).to_bytes(8, "little"), np.uint8)
                used = max(used, at + 8)
            elif value is not zeros:
                values = value(piece.state, piece.name, piece.start, piece.numel).numpy()
                image[at : at + piece.nbytes] = values.view(np.uint8)
                used = max(used, at + piece.nbytes)
        name = rank_file_name(rank)
        with open(folder / name, "wb") as file:
            file.write(image[:used].data)
            file.truncate(layout.size)
        files[name] = rank_file.Digest(layout.size, len(layout.header), rank_file.checksums(image.data))
    manifest = Manifest(
        step=7,
        samples_seen=70,
        world=world,
        stage=stage,
        precision="fp32",
        states=STATES,
        parameters={n: Parameter(s, True, 7) for n, s in shapes.items()},
        buffers=("calls",),
        files=files,
        engine={"global_steps": 7},
        meta={"step": 7, "samples_seen": 70},
    )
    return checkpoint.publish(folder, manifest)


@dataclass
class Count:
    """What one rank did: files opened to be read, files asked for their size, bytes and calls of reading, seconds of CPU.

    And beside ``names`` (of the files opened): files opened to be written, looked for, renamed and removed, calls of fsync,
    folders listed, bytes of files written.
    """

    opens: int = 0
    stats: int = 0
    nbytes: int = 0
    reads: int = 0
    cpu: float = 0.0
    names: list[str] = field(default_factory=list)
    writes: int = 0
    looked: int = 0
    renamed: int = 0
    removed: int = 0
    synced: int = 0
    listed: int = 0
    written: int = 0


@contextmanager
def counted() -> Iterator[Count]:
    """Counts every file that Python opens and every byte that it reads from one, on any thread."""
    count = Count()
    real_open, real_file, real_preadv, real_write = os.open, io.open, os.preadv, os.write
    begin = time.process_time()

    def saw(path: Any, *, new: bool) -> None:
        if new:
            count.writes += 1
        else:
            count.opens += 1
            count.names.append(Path(path).name)

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if not flags & os.O_DIRECTORY:
            saw(path, new=bool(flags & os.O_CREAT))
        return real_open(path, flags, *rest, **more)

    def opened_file(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        # By Python's own file objects whole files are read.
        file = real_file(path, mode, *rest, **more)
        if not isinstance(path, int):
            saw(path, new="r" not in mode)
        if "r" in mode:
            count.nbytes += os.fstat(file.fileno()).st_size
            count.reads += 1
        return file

    def read(fd: int, buffers: Any, offset: int, *rest: Any) -> int:
        got = real_preadv(fd, buffers, offset, *rest)
        count.nbytes += got
        count.reads += 1
        return got

    def written(fd: int, data: Any) -> int:
        done = real_write(fd, data)
        count.written += done
        return done

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            setattr(count, name, getattr(count, name) + 1)
            return real(*args, **more)

        return call

    calls = {
        "stats": ("lstat",),
        "looked": ("stat",),
        "renamed": ("rename", "replace"),
        "removed": ("unlink", "remove"),
        "synced": ("fsync",),
        "listed": ("listdir", "scandir"),
    }
    patches: dict[str, Any] = {"open": opened, "preadv": read, "write": written}
    patches |= {call: noting(name, getattr(os, call)) for name, group in calls.items() for call in group}
    with (
        mock.patch.multiple(os, **patches),
        mock.patch.object(io, "open", opened_file),
        mock.patch.object(builtins, "open", opened_file),
    ):
        yield count
    count.cpu = time.process_time() - begin


def save(
    run: Path, shapes: Mapping[str, tuple[int, ...]], world: int, stage: int, policy: Policy | None = None
) -> list[Count]:
    """``Checkpointer.save`` of step 8 by ``world`` ranks under ``stage``; what each did, pruning by ``policy`` included."""
    counts = [Count()] * world

    def on(rank: int) -> Any:
        return mock.patch.multiple(
            collectives,
            broadcast=lambda value, source=0: "many",
            all_gather=lambda value: [value] * world,
            rank_and_world=lambda: (rank, world),
        )

    with on(0):  # as it begins it removes what lies about
        first = checkpointer.Checkpointer(run, policy)
    for rank in (*range(1, world), 0):
        local = Local(shapes, rank, world, stage)
        with on(rank), mock.patch.object(checkpointer, "LocalState", lambda engine: engine):
            keeper = checkpointer.Checkpointer(run, policy) if rank else first
            with counted() as counts[rank]:
                keeper.save(local, [local.flat["ema"]], {"step": 8, "samples_seen": 80}, background=False)
    return counts


class _Stop(BaseException):
    """Ends a pass at a gather."""


class Group:
    """``world`` ranks that resume ``run`` under ``stage``."""

    def __init__(self, run: Path, shapes: Mapping[str, tuple[int, ...]], world: int, stage: int) -> None:
        self.run, self.shapes, self.world, self.stage = run, shapes, world, stage
        self._told: list[Any] = []  # by rank 0 to all
        self._gathered: list[Any] = [None] * world
        self.sent: dict[int, list[bytes | int]] = {}
        """By every rank: messages, or the lengths of those that are all zero."""

    def resume(self, only: Sequence[int] | None = None) -> tuple[list[Count], dict[int, Count], list[Local]]:
        """Counts of all ranks; of the ranks ``only`` (default: all) counts with what they receive, and their state then."""
        counts = [self._rank(rank, "ask")[0] for rank in range(self.world)]
        missing = any(any(value) for value, _ in self._gathered)
        for rank in range(self.world if missing else 1):  # rank 0 has something to tell in any case
            counts[rank] = self._rank(rank, "send")[0]
        done = {r: self._rank(r, "receive") for r in (range(self.world) if only is None else only)}
        for rank, (count, _) in done.items():
            assert sorted(count.names) == sorted(counts[rank].names) and count.nbytes == counts[rank].nbytes
        return counts, {r: count for r, (count, _) in done.items()}, [local for _, local in done.values()]

    def alone(self, rank: int) -> tuple[Count, Local]:
        """One rank whose load needs nobody else: what all of them did before there was anything to receive."""
        for each in {0, rank}:
            found = self._rank(each, "alone")
        return found

    def _rank(self, rank: int, mode: str) -> tuple[Count, Local]:
        local = Local(self.shapes, rank, self.world, self.stage)
        heard: dict[int, int] = {}
        if rank == 0:
            self._told = []
        if mode == "send":
            self.sent[rank] = []
        gathers = 0

        def broadcast(value: Any, source: int = 0) -> Any:
            assert source == 0, "some rank failed"
            if rank == 0:
                self._told.append(value)
                return value
            heard[-1] = heard.get(-1, -1) + 1
            return self._told[heard[-1]] if heard[-1] < len(self._told) else {}

        def all_gather(value: Any) -> list[Any]:
            nonlocal gathers
            gathers += 1
            if mode == "alone":
                return [value] * self.world
            if mode == "ask":
                self._gathered[rank] = value
            if mode == "ask" or (mode == "send" and gathers > 1):
                raise _Stop
            return self._gathered if gathers == 1 else [value] * self.world

        def broadcast_tensor(data: Tensor, source: int) -> None:
            held = data.numpy()
            if mode == "send" and source == rank:
                self.sent[rank].append(held.tobytes() if held.any() else len(held))
            elif mode == "send":
                held[:] = 0
            elif source != rank:
                heard[source] = heard.get(source, -1) + 1
                message = self.sent[source][heard[source]]
                held[:] = 0 if isinstance(message, int) else np.frombuffer(message, np.uint8)

        with (
            mock.patch.multiple(collectives, broadcast=broadcast, all_gather=all_gather),
            mock.patch.object(collectives, "broadcast_tensor", broadcast_tensor, create=True),
            mock.patch.object(collectives, "rank_and_world", lambda: (rank, self.world)),
            mock.patch.object(checkpointer, "LocalState", lambda engine: engine),
            counted() as count,
        ):
            try:
                meta = checkpointer.Checkpointer(self.run).resume(local, [local.flat["ema"]])
                assert meta == {"step": 7, "samples_seen": 70}
            except _Stop:
                pass
        return count, local
