"""Child processes with limits, and ``results.json``: what ran, at which commit, on which device, with what outcome."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.bars import status
from benchmarks.gpu.job import NOT_RUN
from benchmarks.gpu.stages import Stage
from dattrain.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
CODE = ("dattrain", "benchmarks", "configs", "tests")
"""Folders whose contents decide what a stage finds."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOGGED = 2**20
"""Bytes of a stage's output that go into the log."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (None: killed at its limit) and the last line that it printed."""

    code: int | None
    last: str
    seconds: float


def run(
    command: Sequence[str], seconds: float, log: IO[bytes], environ: Mapping[str, str] | None = None
) -> Ended:
    """Run a child for at most ``seconds``, its output (whatever bytes they are) into ``log``; then end all that it started.

    The child leads a process group of its own; that is killed as a whole, since what a stage started would keep the device.
    """
    begin = time.monotonic()
    # A signal that came between the child's start and ``try`` would leave it behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(os.environ if environ is None else environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, ENDING),
        )
        assert process.stdout is not None
        tail = bytearray()
        reader = threading.Thread(target=_copy, args=(process.stdout, log, tail), daemon=True)
        reader.start()
        code: int | None = None
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            # One that hangs in the driver may not even die of this: it is not waited for without end.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            reader.join(10)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    lines = bytes(tail).decode("utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Ended(code, "".join(c for c in last if c.isprintable())[:300], time.monotonic() - begin)


def _copy(source: IO[bytes], log: IO[bytes], tail: bytearray) -> None:
    """Into the log up to ``LOGGED`` bytes, and the end of all of it into ``tail``."""
    count = 0
    while chunk := os.read(source.fileno(), 65536):
        if count < LOGGED:
            log.write(chunk[: LOGGED - count])
            log.flush()
        count += len(chunk)
        tail += chunk
        del tail[:-4096]
    if count > LOGGED:
        log.write(b"\n... %d bytes left out ...\n%s\n" % (count - LOGGED, bytes(tail)))
    log.flush()


def run_stage(stage: Stage, out: Path, device: str, key: Mapping[str, Any], log: IO[bytes]) -> dict[str, Any]:
    """Run a stage in a child and return its entry for ``results.json``."""
    folder = out / "stages" / stage.name
    # A training would go on where that of the last call ended.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines, plan = folder / "figures.jsonl", folder / "plan.json"
    dry = device == "cpu"
    # Limits are a GPU's; a dry run on a busy CPU only needs to end.
    limit = max(stage.seconds, 180) if dry else stage.seconds
    content = {
        "stage": stage.name,
        "module": stage.module,
        "function": stage.function,
        "device": device,
        "folder": str(folder),
        "lines": str(lines),
        "seconds": limit,
    }
    plan.write_text(json.dumps(content), encoding="utf-8")
    log.write(f"\n=== {stage.name}: {stage.about} ===\n".encode())
    log.flush()
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }
    ended = run([sys.executable, "-m", "benchmarks.gpu.child", str(plan)], limit, log, environ)
    return entry(stage, ended, lines.read_bytes() if lines.exists() else b"", key, limit=limit, dry=dry)


def entry(
    stage: Stage, ended: Ended, lines: bytes, key: Mapping[str, Any], *, limit: float, dry: bool
) -> dict[str, Any]:
    """What becomes of a stage: by its end, its figures and its bars."""
    figures, bad = read_figures(lines)
    found: dict[str, Any] = {
        "stage": stage.name,
        "status": "failed",
        "reason": "",
        "seconds": round(ended.seconds, 1),
    }
    if ended.code is None:
        found["reason"] = f"past its limit of {limit:g} s"
    elif ended.code < 0:
        found["reason"] = f"died of {signal.Signals(-ended.code).name}"
    elif ended.code == NOT_RUN:
        found |= {"status": "not run", "reason": ended.last}
    elif ended.code:
        found["reason"] = f"exit code {ended.code}: {ended.last}"
    elif bad:
        found["reason"] = f"{bad} of its lines are no figures"
    else:
        found["status"] = status(stage.name, figures, dry=dry)
        if dry:
            found["reason"] = "walked on a CPU"
    return {**found, "dry": dry, "ran": True, "key": dict(key), "figures": figures}


def late(stage: Stage, key: Mapping[str, Any], left: float) -> dict[str, Any]:
    """The entry of a stage for which there was no time; the next call runs it."""
    return {
        "stage": stage.name,
        "status": "not run",
        "reason": f"its limit is {stage.seconds} s, and {max(left, 0):.0f} s were left",
        "seconds": 0.0,
        "dry": key["dry"],
        "ran": False,
        "key": dict(key),
        "figures": {},
    }


def read_figures(lines: bytes) -> tuple[dict[str, dict[str, Any]], int]:
    """Figures by name, and how many lines are none."""
    figures, bad = {}, 0
    for line in lines.splitlines():
        try:
            found = json.loads(line.decode("utf-8"))
            figures[str(found["figure"])] = {"value": found["value"], "unit": str(found.get("unit", ""))}
        except (ValueError, KeyError, TypeError):
            bad += 1
    return figures, bad


# Results -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> list[dict[str, Any]]:
    """Entries of an earlier call; none where the file is not there or not whole."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return [e for e in entries if isinstance(e, dict) and isinstance(e.get("stage"), str)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def put_aside(path: Path, key: Mapping[str, Any]) -> None:
    """Rename results of another commit, device or kind of run: what they say must not stand beside what this one says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = {name: found[name] for name in key} == dict(key)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        number = next(n for n in range(1, 10**6) if not path.with_name(f"results-{n}.json").exists())
        path.rename(path.with_name(f"results-{number}.json"))


def write(path: Path, key: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> None:
    """``results.json``, complete or not at all."""
    write_atomically(path, json.dumps({**key, "stages": list(entries)}, indent=1) + "\n", durable=True)


def finished(entries: Iterable[Mapping[str, Any]], key: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Entries by stage that need no second run: those that ran, however it went, with this very ``key``."""
    return {e["stage"]: e for e in entries if e.get("ran") and e.get("key") == key}


def revision() -> str:
    """The commit; where the code differs from it, or there is no git, with a digest of the code."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *CODE],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return f"no git, code {digest(ROOT)}"
    return f"{head.strip()} and changes, code {digest(ROOT)}" if changed.strip() else head.strip()


def digest(root: Path) -> str:
    """Digest of the files of ``CODE``: names and contents."""
    total = hashlib.blake2b(digest_size=8)
    for folder in CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so"):
                total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
