"""Load a checkpoint into an engine of any world size and ZeRO stage, by the overlap of fragments.

Nothing is converted and nothing is gathered. A rank takes from its own file whatever that covers: on the ranks and the stage
that saved, everything, and nobody opens another's. What is still missing anywhere after that, each file's one reader sends to
all (``relay``), and each copies the overlap with its own fragments where it belongs. So a file is read by one rank, or by two.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dattrain.errors import Damaged, UserError
from dattrain.runtime import collectives
from dattrain.state import partition
from dattrain.state.dtypes import DTYPES
from dattrain.state.format.manifest import Manifest, Parameter, rank_file_name
from dattrain.state.format.prefetch import Span, prefetch
from dattrain.state.format.rank_file import Digest, Piece, Pieces, Reader
from dattrain.state.partition import MOMENTS, Fragment, LocalState
from dattrain.state.relay import relay


def check_fits(
    parameters: Mapping[str, Parameter], manifest: Manifest, buffers: Mapping[str, Tensor]
) -> None:
    """Whether a checkpoint is of this model.

    Raises:
        UserError: listing what is missing, unexpected, of another shape, or was frozen and now is not.
    """
    wrong = [f"{n} is not in the checkpoint" for n in parameters if n not in manifest.parameters]
    wrong += [f"{n} is not in the model" for n in manifest.parameters if n not in parameters]
    wrong += [f"buffer {n} is not in the checkpoint" for n in buffers if n not in manifest.buffers]
    for name in parameters.keys() & manifest.parameters.keys():
        ours, theirs = parameters[name], manifest.parameters[name]
        if ours.shape != theirs.shape:
            wrong.append(f"{name} has shape {theirs.shape} in the checkpoint and {ours.shape} in the model")
        elif ours.trainable and not theirs.trainable:
            wrong.append(f"{name} was frozen when the checkpoint was saved and is trained now")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"the checkpoint of step {manifest.step} is not of this model: {'; '.join(sorted(wrong)[:5])}{more}. "
            "To start from its weights alone, use init.from"
        )


class Wanted:
    """What this rank takes from a checkpoint, by numbers that are the same on every rank: those of (state, name).

    Made from what is to be filled: the tensors behind ``local.fragments`` (and ``ema``) for every state of ``states``.
    """

    def __init__(
        self, local: LocalState, manifest: Manifest, states: Sequence[str], ema: list[Tensor] | None
    ) -> None:
        self.numbers: dict[tuple[str, str], int] = {
            key: i for i, key in enumerate((s, n) for s in manifest.states for n in manifest.parameters)
        }
        self._targets: dict[int, list[_Target]] = {}
        for state in states:
            for fragment in local.fragments:
                tensor = local.tensor(fragment, state, ema)
                if tensor is not None:
                    target = _Target(state, fragment, tensor)
                    self._targets.setdefault(self.numbers[(state, fragment.name)], []).append(target)

    def in_one_file(self, pieces: Pieces) -> list[Span]:
        """Spans, tagged for ``put``, of every (state, name) whose targets one file covers exactly once, all of them."""
        spans: list[Span] = []
        for (state, name), found in pieces.items():
            targets = self._targets.get(self.numbers.get((state, name), -1), [])
            cuts = [(t, cut) for t in targets for piece in found if (cut := t.cut(*_run(piece[0])))]
            covered = all(exactly(t.start, t.end, [c for u, c in cuts if u is t]) for t in targets)
            if not covered or any(piece.dtype != "F32" for piece, _ in found):
                continue
            for target in targets:
                for piece, begin in found:
                    if cut := target.cut(*_run(piece)):
                        at = begin + 4 * (cut[0] - piece.start)
                        spans.append(Span(at, at + 4 * (cut[1] - cut[0]), (target, cut[0])))
        return spans

    def missing(self) -> np.ndarray:
        """Forget what is full; bool by number: whether something of it is not."""
        left = {n: [t for t in targets if not t.full] for n, targets in self._targets.items()}
        self._targets = {n: targets for n, targets in left.items() if targets}
        # The range of elements that is missing of each number: it alone decides for most pieces.
        self._low = np.full(len(self.numbers), np.iinfo(np.int64).max)
        self._high = np.zeros(len(self.numbers), np.int64)
        for number, targets in self._targets.items():
            self._low[number] = min(t.start for t in targets)
            self._high[number] = max(t.end for t in targets)
        return self._high > 0

    def cuts(self, rows: np.ndarray) -> list[Span]:
        """What is wanted of pieces that lie end to end: their spans there, tagged for ``put``, in order.

        ``rows`` is int64 ``(pieces, 3)``: number, first element, elements.
        """
        number, start, numel = rows.T
        near = np.nonzero((start < self._high[number]) & (start + numel > self._low[number]))[0]
        begins = 4 * (np.cumsum(numel) - numel)
        spans: list[Span] = []
        for i in near.tolist():
            first, begin = int(start[i]), int(begins[i])
            for target in self._targets[int(number[i])]:
                if cut := target.cut(first, first + int(numel[i])):
                    at = begin + 4 * (cut[0] - first)
                    spans.append(Span(at, at + 4 * (cut[1] - cut[0]), (target, cut[0])))
        return sorted(spans, key=lambda s: s.begin)

    @staticmethod
    def put(tag: tuple[_Target, int], at: int, data: memoryview) -> None:
        """Write ``data``, the bytes of a span from its byte ``at`` on, where its tag says."""
        target, first = tag
        target.put(first + at // 4, torch.frombuffer(data, dtype=torch.float32))

    def check(self) -> None:
        """Raises Damaged if a target did not get each of its elements exactly once."""
        for targets in self._targets.values():
            for target in targets:
                if not target.full:
                    raise Damaged(uncovered(target.state, target.name, math.prod(target.shape)))


class _Target:
    """A fragment's tensor of one state, and which of its elements were received."""

    def __init__(self, state: str, fragment: Fragment, tensor: Tensor) -> None:
        self.state, self.name, self.shape = state, fragment.name, fragment.shape
        self.start, self.end = fragment.start, fragment.start + fragment.numel
        self._tensor, self._offset = tensor, fragment.offset
        self._received: list[tuple[int, int]] = []  # runs of elements, neighbours joined

    def cut(self, start: int, end: int) -> tuple[int, int] | None:
        """The part of elements ``[start, end)`` that lies in here."""
        lo, hi = max(start, self.start), min(end, self.end)
        return (lo, hi) if lo < hi else None

    def put(self, first: int, values: Tensor) -> None:
        """Write fp32 ``values``, the elements from ``first`` on."""
        partition.write(self._tensor, self._offset + first - self.start, values)
        last = first + values.numel()
        if self._received and self._received[-1][1] == first:
            first = self._received.pop()[0]
        self._received.append((first, last))

    @property
    def full(self) -> bool:
        """Whether every element was received exactly once."""
        return exactly(self.start, self.end, self._received)


def _run(piece: Piece) -> tuple[int, int]:
    return piece.start, piece.start + piece.numel


def _within(spans: Sequence[Span], begin: int, end: int) -> Iterator[tuple[Span, int, int]]:
    """Those of ``spans``, ordered and disjoint, that reach into ``[begin, end)``, each with its part in there."""
    for span in itertools.islice(spans, bisect.bisect_right(spans, begin, key=lambda s: s.end), None):
        if span.begin >= end:
            return
        yield span, max(begin, span.begin), min(end, span.end)


def exactly(start: int, end: int, runs: Sequence[tuple[int, int]]) -> bool:
    """Whether ``runs`` cover ``[start, end)`` exactly once."""
    for lo, hi in sorted(runs):
        if lo != start:
            return False
        start = hi
    return start == end


def uncovered(state: str, name: str, numel: int) -> str:
    """What is said of a tensor whose pieces leave a gap or overlap."""
    return f"{state} of {name}: its fragments do not cover its {numel} elements exactly once"


@torch.no_grad()
def load(
    local: LocalState,
    folder: Path,
    manifest: Manifest,
    ema: list[Tensor] | None = None,
    *,
    verify: bool = True,
) -> None:
    """Fill every rank's masters, moments, averages, buffers and counters from the checkpoint in ``folder``.

    Collective; ends alike on every rank. ``local.refresh()`` (collective) must follow; after a failure the state is part old,
    part new, and must be loaded from elsewhere. A checkpoint without averages gives ``ema`` the weights.

    Raises:
        UserError: the checkpoint is of another model; nothing has been changed.
        Damaged: a file that some rank read is not as it was written.
    """
    files = [(folder / name, digest) for name, digest in manifest.files.items()]
    with_ema = ema is not None and "ema" in manifest.states
    states = [s for s in ("param", *MOMENTS, *(("ema",) if with_ema else ())) if s in manifest.states]
    wanted: Wanted
    buffers: dict[str, Tensor] = {}

    def from_own_file() -> bytes:
        nonlocal wanted
        check_fits(local.parameters, manifest, local.buffers())
        local.begin_write()
        local.create_moments({n: p.opt_step or 0 for n, p in manifest.parameters.items()})
        wanted = Wanted(local, manifest, states, ema)
        if local.rank == 0:
            buffers.update(read_buffers(files, tuple(local.buffers()), verify=verify))
        own = rank_file_name(local.rank)
        if own in manifest.files and _same_partition(local, manifest):
            file = (folder / own, manifest.files[own])
            with prefetch([file], wanted.in_one_file, verify=verify) as found:
                for _, parts in found:
                    for part in parts:
                        wanted.put(*part)
        return np.packbits(wanted.missing()).tobytes()

    missing = [np.frombuffer(m, np.uint8) for m in collectives.together(from_own_file)]
    anywhere = np.unpackbits(np.bitwise_or.reduce(missing), count=len(wanted.numbers)).astype(bool)
    failure: Exception | None = None
    if anywhere.any():
        for rows, chunks in relay(files, wanted.numbers, anywhere, verify=verify):
            spans: list[Span] | None = None
            for begin, data in chunks:
                # Whatever happens here, the other ranks count on this one to the last byte.
                try:
                    if failure is None:
                        spans = wanted.cuts(rows) if spans is None else spans
                        for span, lo, hi in _within(spans, begin, begin + len(data)):
                            wanted.put(span.tag, lo - span.begin, data[lo - begin : hi - begin])
                except Exception as e:
                    failure = e
    loaded = collectives.broadcast(buffers)

    def finish() -> None:
        if failure is not None:
            raise failure
        wanted.check()
        if ema is not None and not with_ema:
            for average, master in zip(ema, local.masters):
                average.copy_(master.detach())
        for name, buffer in local.buffers().items():
            value = loaded[name]
            if value.numel() != math.prod(buffer.shape):
                raise Damaged(f"buffer {name} has {value.numel()} elements, not {buffer.numel()}")
            buffer.copy_(value.reshape(buffer.shape))
        local.set_scalars(manifest.engine)

    collectives.together(finish)


def _same_partition(local: LocalState, manifest: Manifest) -> bool:
    """Whether this rank's own file is likely to hold what it wants. Stages 1 and 2 cut alike; 0 saves shares of what all have."""
    kinds = (0, 1, 1, 2)
    return (
        local.stage > 0
        and local.world == manifest.world
        and manifest.stage in range(4)
        and kinds[local.stage] == kinds[manifest.stage]
    )


def read_buffers(
    files: Sequence[tuple[Path, Digest]], names: Sequence[str], *, verify: bool
) -> dict[str, Tensor]:
    """Buffers by name, on the host. They are in the first file, which rank 0 wrote, or in a later one. Raises Damaged."""
    found: dict[str, Tensor] = {}
    for path, digest in files:
        missing = [n for n in names if n not in found]
        if not missing:
            break
        with Reader(path, digest, verify=verify) as reader:
            for name in missing:
                for piece, begin in reader.pieces().get(("buffer", name), ())[:1]:
                    data = reader.read(begin, piece.nbytes)
                    flat = torch.frombuffer(data, dtype=DTYPES[piece.dtype]) if data else torch.empty(0)
                    found[name] = flat.to(DTYPES[piece.dtype]).reshape(piece.shape or ())
    for name in names:
        if name not in found:
            raise Damaged(f"buffer {name} is there 0 times")
    return found
