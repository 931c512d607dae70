"""Local ranks: spawn N processes that each know their place, forward signals, take all down when one dies.

For machines without Slurm. Restarting after a crash is the caller's business (run the same command again).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dattrain.errors import REQUEUE
from dattrain.urls import mask

REPORT = "DATTRAIN_REPORT"
"""Names the file in which a rank says why it ends."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
GRACE_S = 5.0
"""Between the first rank's death and SIGKILL to the others: time for their error messages."""
_TRACEBACK = "Traceback (most recent call last)"
_LOST = re.compile(
    r"Connection (was likely )?(reset|closed|refused)|Broken pipe|Read error|Write error", re.IGNORECASE
)
"""What gloo and torch's store raise where the other side is gone."""
CLEAN_GRACE_S = 120.0
"""The same after an orderly end (0 or ``REQUEUE``): all ranks are about to end by themselves."""


def launch(command: Sequence[str], nproc: int, environ: Mapping[str, str] | None = None) -> int:
    """Run ``command`` as ``nproc`` ranks on this machine; returns the job's exit code.

    The code is 0 if all ended with 0, ``REQUEUE`` if all ended with 0 or that, else that of the first rank that failed
    (128 + n for signal n, as a shell has it).
    """
    base = dict(os.environ if environ is None else environ)
    shared = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DATTRAIN_LAUNCHER": "local",
    }
    # One torch thread pool per rank, each as wide as the machine, is slower than one rank alone.
    base.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    ranks: list[subprocess.Popen[bytes]] = []
    reports = Path(tempfile.mkdtemp(prefix="dattrain-"))

    def forward(signum: int, _frame: object) -> None:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in FORWARDED}
    try:
        for rank in range(nproc):
            env = {**base, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env[REPORT] = str(reports / f"{rank}.txt")
            ranks.append(
                subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_die_with_parent)
            )
        rank, code = _wait(ranks)
        if code < 0:
            # No report says why: this line does, and comes last, where it is seen.
            _print_reports(reports, told=True)
            _print_end(rank, f"was killed by {signal.Signals(-code).name}")
            return 128 - code
        if code not in (0, REQUEUE):
            _print_end(rank, f"ended with exit code {code}")
        _print_reports(reports)
        return code
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for process in ranks:
            process.wait()
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        shutil.rmtree(reports, ignore_errors=True)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Rank and exit code (-n for signal n) of the first that failed; if none did, any rank and 0 or ``REQUEUE``."""
    first: tuple[int, int] | None = None
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in ranks]
        ended = [code for code in codes if code is not None]
        failed = [code for code in ended if code not in (0, REQUEUE)]
        now = time.monotonic()
        if failed and first is None:
            # Of several at once one that was killed: the others lost it.
            code = next((code for code in failed if code < 0), failed[0])
            first = (codes.index(code), code)
            deadline = now + GRACE_S
        elif ended and deadline == float("inf"):
            deadline = now + CLEAN_GRACE_S
        if len(ended) == len(ranks):
            break
        if now > deadline:
            late = [rank for rank, code in enumerate(codes) if code is None]
            if first is None:
                print(f"dattrain: ranks {late} did not end with the others; killed", file=sys.stderr)
                first = (late[0], -signal.SIGKILL)
            for process in ranks:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)
    return first or (0, REQUEUE if REQUEUE in ended else 0)


def _print_end(rank: int, how: str) -> None:
    print(f"dattrain: rank {rank} {how}; the other ranks were ended too", file=sys.stderr, flush=True)


def report(text: str) -> None:
    """Say why this rank ends. Ranks that fail for one reason say it once, through their launcher; others print it."""
    text = mask(text)
    if REPORT in os.environ:
        Path(os.environ[REPORT]).write_text(text, encoding="utf-8")
    else:
        print(text, file=sys.stderr)


def _print_reports(folder: Path, told: bool = False) -> None:
    """Print what ranks reported. ``told``: why the job ends is said anyway."""
    texts = [
        path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"), key=lambda p: int(p.stem))
    ]
    told = told or any(not text.startswith(_TRACEBACK) for text in texts)
    for text in dict.fromkeys(texts):
        # What a rank met whose peer ended for a reason that is told tells nothing more; its log has it.
        if not (told and text.startswith(_TRACEBACK) and _LOST.search(text.rstrip().rpartition("\n")[2])):
            print(text, file=sys.stderr, flush=True)


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Have Linux kill this child when the launcher dies, however it dies. Elsewhere the ranks outlive a SIGKILL."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
