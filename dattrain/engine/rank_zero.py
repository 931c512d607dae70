"""What rank 0 does or finds for all of them. Collective, but for taking the run folder."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from dattrain.errors import UserError
from dattrain.runtime import collectives, owner, process
from dattrain.runtime.environment import Env
from dattrain.runtime.owner import Owner
from dattrain.runtime.signals import Preemption, StopRequest
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest


class Claim:
    """Rank 0's attempt to become the owner of the run folder, before anything is written there.

    So it is made before the other ranks can learn how it went; they may wait for it in the meantime.
    """

    def __init__(self, run_dir: Path, env: Env, preemption: Preemption) -> None:
        self.owner: Owner | None = None
        self._refusal: UserError | None = None
        if env.rank != 0:
            return
        self._fresh = _is_fresh(run_dir)
        try:
            self.owner = owner.acquire(
                run_dir, give_up=lambda: preemption.request(look_for_file=False) == StopRequest.STOP
            )
        except UserError as error:
            if env.world == 1:
                raise
            self._refusal = error

    def check(self) -> None:
        """Raise the refusal, where there was one."""
        if self._refusal is not None:
            raise self._refusal

    def release(self, *, undo: bool = False) -> None:
        """Let go of the folder; ``undo`` removes what a start has written that was refused, where it found no folder, or an empty one."""
        if self.owner is None:
            return
        folder = self.owner.path.parent
        undo = undo and self._fresh and not self.owner.lost
        if undo:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != owner.NAME:
                    path.unlink(missing_ok=True)
        self.owner.release()
        if undo:
            with contextlib.suppress(OSError):  # somebody else has begun there
                folder.rmdir()


def _is_fresh(folder: Path) -> bool:
    """Whether nothing is in ``folder`` but the logs of ranks that were faster than this one."""
    try:
        if any(path.name != "logs" for path in folder.iterdir()):
            return False
        began = process.began()
        return all(path.stat().st_mtime >= began for path in (folder / "logs").glob("*"))
    except OSError:
        return not folder.exists()


def newest_checkpoint(root: Path, *, read_all: bool = False) -> tuple[Path, Manifest] | None:
    """The newest complete checkpoint under ``root``, as rank 0 finds it: judged by sizes, or by reading it (``read_all``).

    Raises:
        UserError: there are checkpoints, and none is complete.
    """
    found = collectives.from_first(lambda: checkpoint.find(root, read_all=read_all))
    if found.folder is None or found.manifest is None:
        if found.skipped:
            raise UserError(checkpoint.none_complete(root, found.skipped))
        return None
    return found.folder, found.manifest
