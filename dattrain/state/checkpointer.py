"""What the trainer calls: save, poll, wait, resume, roll back. Ties engine state, folders and ranks together.

Ranks agree at the beginning of a run (one broadcast of a token) and at ``resume`` and ``wait``; a save itself has no
collective, on no thread: each rank writes its shard, leaves a marker beside it, and rank 0 publishes when it has seen all
markers. So a rank that dies in the middle of a save leaves the others waiting for nothing but it, and a dead rank 0 leaves
a folder that does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dattrain.clock import Stopwatch
from dattrain.errors import Damaged, UserError
from dattrain.runtime import collectives
from dattrain.runtime.files import Failed, doing, reason
from dattrain.runtime.owner import Owner, look
from dattrain.state import load
from dattrain.state.background import Copy, HostBuffer, OneInFlight, SideCopy, image_of
from dattrain.state.format import checkpoint, rank_file, retention
from dattrain.state.format.checkpoint import Found, Manifest
from dattrain.state.format.rank_file import Digest, Layout, Piece
from dattrain.state.format.retention import Policy
from dattrain.state.partition import MOMENTS, Fragment, LocalState

if TYPE_CHECKING:
    from dattrain.config.schema import Config

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Description:
    """What every manifest of this run says of the run."""

    config_sha256: str = ""
    precision: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Checkpointer:
    """Saves and restores one run. Made on all ranks together, after ``torch.distributed`` is up (or without it).

    Args:
        run: the run folder; checkpoints lie in its ``checkpoints``, on a file system that all ranks see.
        policy: what to keep.
        description: for the manifests.
        background: whether ``save`` returns before the state is copied and written.
        verify: whether loading checks checksums (sizes are always checked).
        patience: seconds that rank 0 waits for the other ranks' shards before it gives a save up.
        owner: on rank 0 of a training, its hold on the run folder: nothing is published or removed once that is lost, and then
            ``failed`` says so. Without one, what a killed process left is removed only if no other process has the folder.
    """

    def __init__(
        self,
        run: Path,
        policy: Policy | None = None,
        description: Description | None = None,
        *,
        background: bool = True,
        verify: bool = True,
        patience: float = 1800.0,
        owner: Owner | None = None,
    ) -> None:
        self.root = Path(run) / "checkpoints"
        self.policy = policy or Policy()
        self.description = description or Description()
        self.background, self.verify, self.patience = background, verify, patience
        self._owner = owner
        self.passed_over: tuple[tuple[str, str], ...] = ()
        """What the last ``resume`` passed over: (name, reason), newest first."""
        self._damaged: set[str] = (
            set()
        )  # of them, for retention: newer than what is saved now, they count for nothing
        self.resumed_from: Path | None = None
        self.rank, self.world = collectives.rank_and_world()
        self._task = OneInFlight("checkpoint")
        self.buffer = HostBuffer(pinned=torch.cuda.is_available())
        """Where the state lies while it is written: after a save, the bytes of this rank's shard."""
        self._copy: SideCopy | None = None
        self._hooked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._saves = 0
        token = ""
        if self.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            free = owner is not None or look(self.root.parent) is None
            for name in checkpoint.recover(self.root) if free else ():
                log.info("removed %s, left by a process that was killed", name)
            token = secrets.token_hex(4)
        self._token = collectives.broadcast(token)

    @classmethod
    def from_config(cls, run: Path, config: Config, owner: Owner | None = None) -> Checkpointer:
        """As the recipe says."""
        c = config.checkpoint
        policy = Policy(c.keep_last, c.keep_every_epochs, c.keep_best, c.metric)
        return cls(run, policy, describe(config), background=c.background, verify=c.verify, owner=owner)

    # Saving

    @property
    def saving(self) -> bool:
        """Whether this rank still has a save in flight."""
        return self._task.running

    @property
    def failed(self) -> bool:
        """Whether a background save has failed on this rank, or another process has taken the run folder: for the ranks to
        agree on before ``wait`` raises."""
        return self._task.failed or (self._owner is not None and self._owner.lost)

    def save(
        self,
        engine: Any,
        ema: list[Tensor] | None,
        meta: Mapping[str, Any],
        *,
        background: bool | None = None,
    ) -> float:
        """Save ``engine`` and ``ema`` between two updates; all ranks call it. Returns the seconds that the caller lost.

        ``meta`` is JSON and must hold the integers ``step`` and ``samples_seen``; ``epoch`` and ``metrics`` (a dict of
        numbers) serve retention; the rest is the trainer's and comes back from ``resume``. With ``background`` (default:
        as constructed) the call returns at once, and the state is copied to host memory while the next forward and backward
        run: the optimizer's next step waits for that by itself, anything else that changes weights, moments or averages
        must call ``settle`` first. Without, it is ``wait()`` too.

        Raises:
            UserError: the save before this one has failed, or (not in background) this one.
        """
        begin = time.perf_counter()
        background = self.background if background is None else background
        if background:
            self._task.wait()
        else:
            self.wait()  # on every rank or on none: the other ranks will be in the collective below
        local = LocalState(engine)
        states = ("param", *MOMENTS, *(() if ema is None else ("ema",)))
        manifest = self._manifest(local, states, meta)
        layout, image, copy = self._stage(local, states, ema)
        self._settle_before_steps(local)
        self._saves += 1
        folder = checkpoint.aside(self.root, manifest.step, f"{self._token}-{self._saves}")
        self._task.start(lambda: self._write(folder, manifest, layout, image, copy))
        self._copy = copy
        if not background:
            self.wait()
        return time.perf_counter() - begin

    def settle(self) -> None:
        """Return when weights, moments and averages may be changed: the last save has them in host memory. Not collective."""
        if self._copy is not None:
            self._copy.fence()
            self._copy = None

    def _settle_before_steps(self, local: LocalState) -> None:
        for optimizer in local.optimizers:
            if optimizer not in self._hooked:
                optimizer.register_step_pre_hook(lambda *_: self.settle())
                self._hooked.add(optimizer)

    def poll(self) -> None:
        """At each step's edge: raise the failure of a background save, if this rank knows of one. Not collective.

        Raises:
            UserError: the disk was full, or could not be written for another reason of the outside world.
        """
        self._task.poll()

    def wait(self) -> None:
        """Return when the last save is published; collective: if it failed on any rank, or another process has taken the run
        folder, this raises on every rank."""
        failure: BaseException | None = None
        try:
            with contextlib.suppress(OSError):  # the next save will tell
                self._confirm()
            self._task.wait()
        except Exception as e:
            failure = e
        told = [m for m in collectives.gather(None if failure is None else str(failure)) if m is not None]
        if failure is not None:
            raise failure
        if told:
            raise UserError(told[0])

    def _confirm(self) -> None:
        if self._owner is not None:
            self._owner.confirm()

    def prepare(self, engine: Any, ema: list[Tensor] | None) -> None:
        """Take the host memory that saves will need (bytes of the shard) before the first step, not in the first save."""
        local = LocalState(engine)
        states = ("param", *MOMENTS, *(() if ema is None else ("ema",)))
        self.buffer.take(self._layout(local, states)[0].size).zero_()

    def _manifest(self, local: LocalState, states: tuple[str, ...], meta: Mapping[str, Any]) -> Manifest:
        kept = dict(json.loads(json.dumps(dict(meta))))
        step, samples = kept["step"], kept["samples_seen"]
        if not isinstance(step, int) or not isinstance(samples, int):
            raise TypeError(f"step={step!r} and samples_seen={samples!r} must be integers")
        return Manifest(
            step=step,
            samples_seen=samples,
            world=self.world,
            stage=local.stage,
            precision=self.description.precision,
            states=states,
            parameters=local.parameters,
            buffers=tuple(local.buffers()),
            engine=local.scalars(),
            groups=local.groups(),
            meta=kept,
            config_sha256=self.description.config_sha256,
            versions=self.description.versions,
            saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    def _layout(
        self, local: LocalState, states: tuple[str, ...]
    ) -> tuple[Layout, dict[str, tuple[Fragment | None, str]]]:
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
        if self.rank == 0:
            for name, buffer in local.buffers().items():
                dtype = load.DTYPE_NAMES[buffer.dtype]
                piece = Piece("buffer", name, 0, buffer.numel(), dtype, tuple(buffer.shape))
                source[piece.key] = (None, "buffer")
                pieces.append(piece)
        return rank_file.layout(pieces), source

    @torch.no_grad()
    def _stage(
        self, local: LocalState, states: tuple[str, ...], ema: list[Tensor] | None
    ) -> tuple[Layout, memoryview, SideCopy]:
        """Lay this rank's part out in the host buffer as in the file; the copy is what remains to be done."""
        layout, source = self._layout(local, states)
        host = self.buffer.take(layout.size)
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
        return layout, image, SideCopy(host, copies)

    # On the thread

    def _write(
        self, folder: Path, manifest: Manifest, layout: Layout, image: memoryview, copy: SideCopy
    ) -> None:
        shard = folder / checkpoint.shard_name(self.rank)
        try:
            copy.run()
            with doing(f"making the folder {folder.name}"):
                folder.mkdir(parents=True, exist_ok=True)
            with doing(f"writing {shard.name}"):
                digest = rank_file.write(shard, image, len(layout.header))
            if self.rank:
                _leave(folder, f"{shard.name}.done", digest.to_json())
                return
            files = {shard.name: digest}
            for rank in range(1, self.world):
                name = checkpoint.shard_name(rank)
                files[name] = self._await(folder, name)
            for rank in range(1, self.world):
                (folder / f"{checkpoint.shard_name(rank)}.done").unlink()
            self._confirm()
            final = checkpoint.publish(folder, dataclasses.replace(manifest, files=files))
            log.info("saved %s (%.1f MB)", final.name, sum(f.size for f in files.values()) / 1e6)
        except BaseException as e:
            self._abandon(folder, shard, e)
            raise self._explain(manifest.step, e) from e
        try:
            self._confirm()
            self._damaged.discard(final.name)
            for name in retention.prune(self.root, self.policy, self._damaged):
                log.info("removed %s", name)
        except OSError as e:
            raise UserError(f"checkpoints under {self.root} could not be pruned: {e}") from e

    def _await(self, folder: Path, name: str) -> Digest:
        waited = Stopwatch()
        while waited.look() < self.patience:
            if (folder / f"{name}.done").exists():
                return Digest.from_json(json.loads((folder / f"{name}.done").read_text()))
            if (folder / f"{name}.failed").exists():
                raise UserError(json.loads((folder / f"{name}.failed").read_text()))
            time.sleep(_POLL_SECONDS)
        raise UserError(f"{name} was not written within {self.patience:.0f} s")

    def _abandon(self, folder: Path, shard: Path, error: BaseException) -> None:
        """Give the space back first; then say why, if the disk lets us."""
        with contextlib.suppress(OSError):
            if self.rank == 0:
                shutil.rmtree(folder)
            else:
                shard.unlink(missing_ok=True)
                _leave(folder, f"{shard.name}.failed", f"rank {self.rank}: {error}")

    def _explain(self, step: int, error: BaseException) -> BaseException:
        if isinstance(error, OSError):
            why = str(error) if isinstance(error, Failed) else reason(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                why += f" ({shutil.disk_usage(self.root).free / 1e9:.2f} GB free); make room or lower checkpoint.keep_last"
        elif isinstance(error, UserError):
            why = str(error)
        else:
            return error
        newest = checkpoint.find(self.root).folder
        left = f"the last whole checkpoint is {newest.name}" if newest else "there is no whole checkpoint yet"
        return UserError(f"the checkpoint of step {step} could not be written to {self.root}: {why}; {left}")

    # Restoring

    def resume(
        self, engine: Any, ema: list[Tensor] | None, *, folder: Path | None = None
    ) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint (or ``folder``); collective. Returns its ``meta``, None if there is none at all.

        A damaged one is passed over, by name and reason, in the log and in ``passed_over``, and the one before is taken.

        Raises:
            UserError: every checkpoint is damaged, or the newest whole one is of another model.
        """
        self.settle()
        local = LocalState(engine)
        skip: dict[str, str] = {}
        while True:
            # One rank looks: a thousand that read the manifest and ask for every shard's size are a load of their own.
            found = collectives.from_first(functools.partial(self._choose, folder, skip))
            self.passed_over = found.passed_over
            if found.folder is None or found.manifest is None:
                if self.passed_over:
                    raise UserError(checkpoint.none_whole(self.root, self.passed_over))
                return None
            try:
                load.load(local, found.folder, found.manifest, ema, verify=self.verify)
                break
            except Damaged as e:
                if folder is not None:
                    raise UserError(f"{folder} is damaged: {e}") from e
                skip[found.folder.name] = str(e)
        self._damaged = {name for name, _ in self.passed_over}
        for name, why in self.passed_over:
            if self.rank == 0:
                log.warning("passed over %s: %s", name, why)
        local.refresh()
        self.resumed_from = found.folder
        return dict(found.manifest.meta)

    def rollback(self, engine: Any, ema: list[Tensor] | None) -> dict[str, Any]:
        """Wait for the save in flight, then restore the newest whole checkpoint. Collective. Returns its ``meta``.

        Raises:
            UserError: there is none, or the save in flight has failed.
        """
        self.wait()
        meta = self.resume(engine, ema)
        if meta is None:
            raise UserError(f"{self.root} holds no checkpoint to roll back to")
        return meta

    def _choose(self, folder: Path | None, skip: Mapping[str, str]) -> Found:
        if folder is None:
            return checkpoint.find(self.root, skip=skip)
        try:
            return Found(folder, checkpoint.check(folder))
        except Damaged as e:
            raise UserError(f"{folder} is damaged: {e}") from e


def describe(config: Config) -> Description:
    """What the manifests of a run of ``config`` say of it."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return Description(hashlib.sha256(text.encode()).hexdigest(), config.train.precision, versions())


def versions() -> dict[str, str]:
    """Versions that a manifest records."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("dattrain", "torch", "deepspeed", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _leave(folder: Path, name: str, value: Any) -> None:
    part = folder / f"{name}.part"
    with doing(f"writing {part.name}"):
        part.write_text(json.dumps(value))
    with doing(f"renaming {part.name} to {name}"):
        os.rename(part, folder / name)
