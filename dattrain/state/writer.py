"""Writing one checkpoint: each rank's rank file as laid out in host memory, markers beside it, and rank 0's manifest.

``stage`` runs where the state is as it shall be saved, ``Writer.write`` on the thread of a save. There is no collective: rank 0
publishes when it has seen all markers. When to save, and what follows for the run, is in ``checkpointer``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dattrain.clock import Stopwatch
from dattrain.errors import UserError
from dattrain.files import Failed, doing, reason, write_atomically
from dattrain.state.background import Copy, HostBuffer, StagingCopy, image_of
from dattrain.state.dtypes import DTYPE_NAMES
from dattrain.state.format import checkpoint, rank_file
from dattrain.state.format.manifest import Manifest, rank_file_name
from dattrain.state.format.rank_file import Digest, Layout, Piece
from dattrain.state.partition import Fragment, LocalState

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Staged:
    """This rank's part of a checkpoint in host memory, complete once ``copy`` has run."""

    layout: Layout
    image: memoryview
    """The bytes of the rank file."""
    copy: StagingCopy


def lay_out(
    local: LocalState, states: tuple[str, ...]
) -> tuple[Layout, dict[str, tuple[Fragment | None, str]]]:
    """Where everything lies in this rank's file; and by piece key, the fragment (None for a buffer) and state that it holds."""
    pieces: list[Piece] = []
    source: dict[str, tuple[Fragment | None, str]] = {}
    # By state, so that whoever wants the weights alone reads the head of the file; then as they lie in memory.
    ordered = sorted(local.fragments, key=lambda f: (f.flat, f.offset))
    for state in states:
        for fragment in ordered:
            lo, hi = fragment.saved
            if lo < hi and (fragment.flat >= 0 or state == "param"):
                piece = Piece(state, fragment.name, fragment.start + lo, hi - lo)
                source[piece.key] = (fragment, state)
                pieces.append(piece)
    if local.rank == 0:
        for name, buffer in local.buffers().items():
            piece = Piece("buffer", name, 0, buffer.numel(), DTYPE_NAMES[buffer.dtype], tuple(buffer.shape))
            source[piece.key] = (None, "buffer")
            pieces.append(piece)
    return rank_file.layout(pieces), source


@torch.no_grad()
def stage(local: LocalState, states: tuple[str, ...], ema: list[Tensor] | None, buffer: HostBuffer) -> Staged:
    """Lay this rank's part out in ``buffer`` as in the file; the returned ``copy`` is what remains to be done."""
    layout, source = lay_out(local, states)
    host = buffer.take(layout.size)
    image = image_of(host)
    image[: len(layout.header)] = layout.header
    buffers = local.buffers()
    copies: list[Copy] = []
    for piece, at in zip(layout.pieces, layout.offsets):
        fragment, state = source[piece.key]
        if fragment is None:
            # The forward pass may change a buffer, so it cannot wait; buffers are small.
            value = buffers[piece.name].detach().reshape(-1)
            host[at : at + piece.nbytes].view(value.dtype).copy_(value, non_blocking=True)
            continue
        tensor = local.tensor(fragment, state, ema)
        first = fragment.offset + fragment.saved[0]
        last = copies[-1] if copies else None
        if tensor is None:
            host[at : at + piece.nbytes].zero_()
        elif last and last.source is tensor and last.first + last.numel == first and last.end == at:
            # What lies side by side in memory and in the file is one copy.
            copies[-1] = dataclasses.replace(last, numel=last.numel + piece.numel)
        else:
            copies.append(Copy(tensor, first, piece.numel, at))
    return Staged(layout, image, StagingCopy(host, copies))


class Writer:
    """Writes the checkpoints of a run, on this rank of ``world``.

    Args:
        root: the folder of the run's checkpoints.
        rank: of this process.
        world: how many write.
        patience: seconds that rank 0 waits for the other ranks' files before it gives a save up.
        confirm: raises if the run folder is not this run's any more; asked before anything is published.
    """

    def __init__(
        self, root: Path, rank: int, world: int, patience: float, confirm: Callable[[], None]
    ) -> None:
        self.root, self.rank, self.world, self.patience = root, rank, world, patience
        self._confirm = confirm

    def write(self, folder: Path, manifest: Manifest, staged: Staged) -> Path | None:
        """Write this rank's file into ``folder`` and, on rank 0, publish; returns the published folder there, else None.

        Raises:
            UserError: the file system failed, another rank did, or did not answer. This rank's file is removed.
        """
        path = folder / rank_file_name(self.rank)
        try:
            staged.copy.run()
            with doing(f"making the folder {folder.name}"):
                folder.mkdir(parents=True, exist_ok=True)
            with doing(f"writing {path.name}"):
                digest = rank_file.write(path, staged.image, len(staged.layout.header))
            if self.rank:
                write_atomically(folder / f"{path.name}.done", json.dumps(digest.to_json()))
                return None
            files = {path.name: digest}
            for rank in range(1, self.world):
                name = rank_file_name(rank)
                files[name] = self._wait_for(folder, name)
            for rank in range(1, self.world):
                (folder / f"{rank_file_name(rank)}.done").unlink()
            self._confirm()
            final = checkpoint.publish(folder, dataclasses.replace(manifest, files=files))
            log.info("saved %s (%.1f MB)", final.name, sum(f.size for f in files.values()) / 1e6)
            return final
        except BaseException as e:
            self._clean_up(folder, path, e)
            raise self._explained(manifest.step, e) from e

    def _wait_for(self, folder: Path, name: str) -> Digest:
        waited = Stopwatch()
        while waited.look() < self.patience:
            if (folder / f"{name}.done").exists():
                return Digest.from_json(json.loads((folder / f"{name}.done").read_text()))
            if (folder / f"{name}.failed").exists():
                raise UserError(json.loads((folder / f"{name}.failed").read_text()))
            time.sleep(_POLL_SECONDS)
        raise UserError(f"{name} was not written within {self.patience:.0f} s")

    def _clean_up(self, folder: Path, path: Path, error: BaseException) -> None:
        """Free the space first; then tell rank 0 why, if the disk lets us."""
        with contextlib.suppress(OSError):
            if self.rank == 0:
                shutil.rmtree(folder)
            else:
                path.unlink(missing_ok=True)
                write_atomically(folder / f"{path.name}.failed", json.dumps(f"rank {self.rank}: {error}"))

    def _explained(self, step: int, error: BaseException) -> BaseException:
        if isinstance(error, OSError):
            why = str(error) if isinstance(error, Failed) else reason(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                why += f" ({shutil.disk_usage(self.root).free / 1e9:.2f} GB free); make room or lower checkpoint.keep_last"
        elif isinstance(error, UserError):
            why = str(error)
        else:
            return error
        text = f"the checkpoint of step {step} could not be written to {self.root}: {why}"
        if self.rank:
            # Rank 0 says what is left. A full disk fails on all of them: a thousand that ask for the size of every file of every
            # checkpoint would be a million questions and more.
            return UserError(text)
        newest = checkpoint.find(self.root).folder
        left = (
            f"the last complete checkpoint is {newest.name}"
            if newest
            else "there is no complete checkpoint yet"
        )
        return UserError(f"{text}; {left}")
