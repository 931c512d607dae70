"""Several runs on this machine, as a shell sees them: what begins and ends is said, and Ctrl-C stops all of them.

The supervisor (``local``) does not need the shell: closing it ends nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dattrain.errors import UserError
from dattrain.files import shown
from dattrain.submit import history


def follow(
    process: subprocess.Popen[bytes],
    runs: Sequence[Path],
    *,
    again: str,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Wait for the supervisor of ``runs``, saying what becomes of each. Returns 0 if all have finished, 130 after Ctrl-C.

    Args:
        again: the command that goes on.

    Raises:
        UserError: runs have not ended well; it names the first of them, and those that were not started for it.
    """
    seen = {run: len(history.history(run)) for run in runs}
    try:
        while process.poll() is None:
            _tell(runs, seen, say)
            time.sleep(0.2)
    except KeyboardInterrupt:
        say("stopping: what is running saves and ends")
        os.kill(process.pid, signal.SIGTERM)
        process.wait()
        _tell(runs, seen, say)
        say(f"stopped; what has finished stays so, and the rest goes on with: {again}")
        return 130
    _tell(runs, seen, say)
    bad = [run for run in runs if not _finished(run)]
    if not bad:
        return 0
    others = ", ".join(run.name for run in bad[1:])
    raise UserError(
        f"{shown(bad[0])} has not ended well: {_why(bad[0])}{f'; not finished either: {others}' if others else ''}. "
        f"Go on, once the cause is mended, with: {again}"
    )


def _tell(runs: Sequence[Path], seen: dict[Path, int], say: Callable[[str], None]) -> None:
    for run in runs:
        events = history.history(run)
        for event in events[seen[run] :]:
            if event["event"] == "begin":
                step = event["checkpoint"]
                say(f"{run.name}: begins{'' if step is None else f' at step {step}'}")
            elif event["event"] == "end":
                follows = "; starts again" if event["action"] == "again" else ""
                say(f"{run.name}: {event['detail']}{follows}")
        seen[run] = len(events)


def _finished(run: Path) -> bool:
    ends = [e for e in history.since_submission(history.history(run)) if e["event"] == "end"]
    return bool(ends) and ends[-1]["action"] == "done"


def _why(run: Path) -> str:
    events = history.since_submission(history.history(run))
    if history.cancelled(events):
        return "cancelled"
    ends = [e for e in events if e["event"] == "end"]
    return str(ends[-1]["why"]) if ends else f"see {shown(run / 'submit' / 'local.log')}"
