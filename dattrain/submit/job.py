"""What runs in each task of a job: a picklable callable that trains (or evaluates) a run folder and writes down how it went.

submitit pickles it by reference, so a node finds this module in the snapshot (``PYTHONPATH``). Requeueing is not done
here: a task that requeues its own job kills its neighbours while they are still closing their files. The job hook
(``dattrain.submit.job_hook``) does it once all tasks have ended.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dattrain.errors import UserError
from dattrain.files import write_atomically
from dattrain.runtime.owner import InUse
from dattrain.submit.history import attempt_folder, this_attempt
from dattrain.urls import mask


@dataclass(frozen=True)
class Job:
    """One stage of a run. ``run`` is an absolute path that all nodes share."""

    run: str
    action: Literal["train", "evaluate"] = "train"

    def __call__(self) -> dict[str, Any]:
        """Run the stage in this task; returns how it went, ``{"status": ..., "step": ...}``.

        ``status`` is ``finished``, ``preempted`` (saved, to be continued) or ``stopped``.
        """
        # submitit listens to the other one from its start on.
        signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGUSR2))
        try:
            result = _evaluate(Path(self.run)) if self.action == "evaluate" else _train(Path(self.run))
        except BaseException as error:
            self._report(error)
            raise
        # What is told to end from here on has nothing left to save.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        if _rank() == 0:
            _publish(self._folder() / "outcome.json", {**result, "time": time.time()})
        atexit.register(_leave)
        return result

    def checkpoint(self) -> Any:
        """Write down that the run is to resume: submitit calls this on rank 0 alone, for a signal before training has started.

        None tells submitit not to requeue: the job hook does.
        """
        _publish(self._folder() / "outcome.json", {"status": "preempted", "step": None, "time": time.time()})
        return None

    def _report(self, error: BaseException) -> None:
        if isinstance(error, SystemExit) and not error.code:
            return
        lines = traceback.format_exception_only(type(error), error)
        report = {
            "rank": _rank(),
            "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "error": str(error) if isinstance(error, UserError) else mask("".join(lines).strip())[-2000:],
            "user_error": isinstance(error, UserError),
            "held": isinstance(error, InUse),
            "time": time.time(),
        }
        _publish(self._folder() / f"rank_{_rank():05d}.json", report)

    def _folder(self) -> Path:
        return attempt_folder(self.run, *attempt())


def _leave() -> None:
    """After submitit has written the result: end without Python's finalisation, in which gloo may abort the process."""
    from dattrain.runtime.environment import hard_exit

    hard_exit(0)


def attempt() -> tuple[str, int]:
    """Job id and restart count of this task, as the job hook names them."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return os.environ["SUBMITIT_LOCAL_JOB_ID"], 0
    return this_attempt()


def _rank() -> int:
    return int(os.environ.get("SUBMITIT_LOCAL_GLOBALID") or os.environ.get("SLURM_PROCID") or 0)


def _publish(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content))


def _train(run: Path) -> dict[str, Any]:
    from dattrain.config.load import load
    from dattrain.runtime.imports import uncollected

    with uncollected("torch", ours=True):
        from dattrain.report.training import train
    from dattrain.submit.history import history

    outcome = train(load(run / "config.yaml").config, run, history)
    return {"status": outcome.status, "step": outcome.step}


def _evaluate(run: Path) -> dict[str, Any]:
    """``dattrain eval`` of the run that this stage starts from, as one rank of it; the figures go to ``evaluation.json``."""
    from dattrain.config.load import load

    source = load(run / "config.yaml").config.init.from_
    if source is None:
        raise UserError(f"{run}: an evaluation needs init.from, the run to evaluate")
    enter = str(Path(__file__).with_name("enter.py"))
    words = ["-m", "dattrain", "eval", source, "--json", str(run / "evaluation.json")]
    code = subprocess.run([sys.executable, enter, *words]).returncode
    if code in (1, 2):
        raise UserError(
            f"dattrain eval {source} ended with status {code}; what it said is in the log of this rank"
        )
    if code != 0:
        raise RuntimeError(f"dattrain eval {source} ended with status {code}")
    return {"status": "finished", "step": None}
