"""What the trainer calls: save, wait, resume. Ties engine state, folders and ranks together.

Ranks agree at the beginning of a run (one broadcast of a token) and at ``resume`` and ``wait``; a save itself has no
collective, on no thread (``writer`` says how it is done). So a rank that dies in the middle of a save leaves the others
waiting for nothing but it, and a dead rank 0 leaves a folder that does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import platform
import secrets
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dattrain.errors import Damaged, UserError
from dattrain.files import reason
from dattrain.runtime import collectives
from dattrain.runtime.owner import InUse, Owner, current_owner
from dattrain.state import load
from dattrain.state.background import BackgroundTask, HostBuffer, StagingCopy
from dattrain.state.format import checkpoint, retention
from dattrain.state.format.manifest import MANIFEST, Manifest
from dattrain.state.format.retention import Policy
from dattrain.state.partition import MOMENTS, LocalState
from dattrain.state.writer import Staged, Writer, lay_out, stage

if TYPE_CHECKING:
    from dattrain.config.schema import Config

log = logging.getLogger(__name__)


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
        patience: seconds that rank 0 waits for the other ranks' files before it gives a save up.
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
        self.background, self.verify = background, verify
        self._owner = owner
        self.skipped: tuple[tuple[str, str], ...] = ()
        """Checkpoints that the last ``resume`` skipped: (name, reason), newest first."""
        # Their names, for retention: newer than what is saved now, they count for nothing.
        self._damaged: set[str] = set()
        self.resumed_from: Path | None = None
        self.rank, self.world = collectives.rank_and_world()
        self._writer = Writer(self.root, self.rank, self.world, patience, self._confirm)
        self._task = BackgroundTask("checkpoint")
        self.buffer = HostBuffer(pinned=torch.cuda.is_available())
        """Where the state lies while it is written: after a save, the bytes of this rank's file."""
        self._copy: StagingCopy | None = None
        self._hooked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._saves = 0
        # Who comes second writes the metrics of a step down: the thread that has published it, or its evaluation.
        self._lock = threading.Lock()
        self._writing: int | None = None
        self._metrics: tuple[int, Mapping[str, float]] | None = None
        token = ""
        if self.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            free = owner is not None or current_owner(self.root.parent) is None
            for name in checkpoint.recover(self.root) if free else ():
                log.info("removed %s, left by a process that was killed", name)
            token = secrets.token_hex(4)
        self._token = collectives.broadcast(token)

    @classmethod
    def from_config(cls, run: Path, config: Config, owner: Owner | None = None) -> Checkpointer:
        """A checkpointer as the recipe says."""
        c = config.checkpoint
        policy = Policy(c.keep_last, c.keep_every_epochs, c.keep_best, c.metric)
        return cls(run, policy, describe(config), background=c.background, verify=c.verify, owner=owner)

    # Saving

    @property
    def failed(self) -> bool:
        """Whether a background save has failed on this rank, or another process has taken the run folder.

        For the ranks to agree on before ``wait`` raises.
        """
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
        must call ``wait_for_staging`` first. Without, it is ``wait()`` too.

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
        states = _states(ema)
        manifest = self._manifest(local, states, meta)
        staged = stage(local, states, ema, self.buffer)
        self._hook_steps(local)
        self._saves += 1
        folder = checkpoint.temporary_folder(self.root, manifest.step, f"{self._token}-{self._saves}")
        self._writing = manifest.step
        self._task.start(lambda: self._write(folder, manifest, staged))
        self._copy = staged.copy
        if not background:
            self.wait()
        return time.perf_counter() - begin

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the evaluation of the checkpoint of ``step``, if there is one; retention keeps the best by it. Rank 0 calls it.

        At once, or by the thread that is still writing that checkpoint. A disk that takes no more is a warning: numbers that
        cannot be noted end no training.
        """
        with self._lock:
            self._metrics = step, metrics
            if self._writing is None:
                self._note_metrics()

    def _note_metrics(self) -> None:
        if self._metrics is None:
            return
        (step, metrics), self._metrics = self._metrics, None
        folder = self.root / checkpoint.folder_name(step)
        try:
            if (folder / MANIFEST).exists():
                self._confirm()
                checkpoint.write_metrics(folder, metrics)
                self._prune()
        except InUse:  # ``failed`` says so, for all ranks to agree on
            return
        except OSError as error:
            log.warning("%s: the evaluation cannot be noted there (%s)", folder, reason(error))

    def let_finish(self) -> None:
        """Let this rank's part of a save that is under way be written, before an error ends the process. Not collective."""
        with contextlib.suppress(Exception):  # another error is on its way already
            self._task.wait()

    def wait_for_staging(self) -> None:
        """Return when weights, moments and averages may be changed: the last save has them in host memory. Not collective."""
        if self._copy is not None:
            self._copy.wait()
            self._copy = None

    def _hook_steps(self, local: LocalState) -> None:
        for optimizer in local.optimizers:
            if optimizer not in self._hooked:
                optimizer.register_step_pre_hook(lambda *_: self.wait_for_staging())
                self._hooked.add(optimizer)

    def wait(self) -> None:
        """Return when the last save is published. Collective.

        Raises:
            UserError: it failed on any rank, or another process has taken the run folder; on every rank.
        """

        def settle() -> None:
            with contextlib.suppress(OSError):  # the next save will tell
                self._confirm()
            self._task.wait()

        collectives.together(settle)

    def _confirm(self) -> None:
        if self._owner is not None:
            self._owner.confirm()

    def prepare(self, engine: Any, ema: list[Tensor] | None) -> None:
        """Take the host memory that saves will need (the bytes of the rank file) before the first step, not in the first save."""
        local = LocalState(engine)
        self.buffer.take(lay_out(local, _states(ema))[0].size).zero_()

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

    def _write(self, folder: Path, manifest: Manifest, staged: Staged) -> None:
        """The thread's work: write, and on rank 0 remove what the policy does not keep."""
        final = None
        try:
            final = self._writer.write(folder, manifest, staged)
            if final is None:
                return
            self._confirm()
            self._damaged.discard(final.name)
            self._prune()
        except OSError as e:
            if final is None:
                raise
            raise UserError(f"checkpoints under {self.root} could not be pruned: {e}") from e
        finally:
            with self._lock:
                self._writing = None
                if final is not None:
                    self._note_metrics()

    def _prune(self) -> None:
        for name in retention.prune(self.root, self.policy, self._damaged):
            log.info("removed %s", name)

    # Restoring

    def resume(self, engine: Any, ema: list[Tensor] | None) -> dict[str, Any] | None:
        """Restore the newest complete checkpoint; collective. Returns its ``meta``, None if there is none at all.

        A damaged one is skipped, by name and reason, in the log and in ``skipped``, and the one before is taken.

        Raises:
            UserError: every checkpoint is damaged, or the newest complete one is of another model.
        """
        self.wait_for_staging()
        local = LocalState(engine)
        skip: dict[str, str] = {}
        while True:
            # One rank looks: a thousand that read the manifest and ask for every file's size are a load of their own.
            found = collectives.from_first(lambda: checkpoint.find(self.root, skip=skip))
            self.skipped = found.skipped
            if found.folder is None or found.manifest is None:
                if self.skipped:
                    raise UserError(checkpoint.none_complete(self.root, self.skipped))
                return None
            try:
                load.load(local, found.folder, found.manifest, ema, verify=self.verify)
                break
            except Damaged as e:
                skip[found.folder.name] = str(e)
        self._damaged = {name for name, _ in self.skipped}
        for name, why in self.skipped:
            if self.rank == 0:
                log.warning("skipped %s: %s", name, why)
        local.refresh()
        self.resumed_from = found.folder
        return dict(found.manifest.meta)


def _states(ema: list[Tensor] | None) -> tuple[str, ...]:
    return ("param", *MOMENTS, *(() if ema is None else ("ema",)))


def describe(config: Config) -> Description:
    """What the manifests of a run of ``config`` say of it."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return Description(hashlib.sha256(text.encode()).hexdigest(), config.train.precision, versions())


def versions() -> dict[str, str]:
    """Versions that a manifest records."""
    found = {"python": platform.python_version()}
    for package in ("dattrain", "torch", "deepspeed", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
