"""Slurm's commands as they are asked here. Standard library alone, Python >= 3.8, since the job hook uses it too.

A site puts wrappers in front of them, which print in whatever encoding, refuse with status 0, or hang; and a user has variables
that change what they print. None of that may end a program that asks.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Sequence  # noqa: UP035 (Python 3.8 runs this file)

from dattrain.submit.shell import clean_environment, job_id

USER_FORMATS = re.compile(r"(SQUEUE|SINFO|SACCT|SCANCEL|SCONTROL)_(?!FEDERATION|CLUSTERS|LOCAL)")
"""A user's own filters and forms (``SQUEUE_PARTITION``), or wishes to be asked (``SCANCEL_INTERACTIVE``)."""

TIMEOUT_S = 300.0
"""Seconds that a command which changes something is waited for: a busy controller may need minutes, and does it all the same."""


def output(*command: str, timeout_s: float = 90.0) -> str:
    """Standard output of a command; empty where it is missing, refuses or hangs."""
    try:
        return _run(command, timeout_s).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def run(*command: str) -> str | None:
    """Run a command. Returns None, or the error: what it printed, or that it is not there or hangs."""
    try:
        done = _run(command, TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        return _failure(command, error)
    return None if done.returncode == 0 else one_line(done.stderr, done.stdout) or f"status {done.returncode}"


def test_only(script: str) -> str | None:
    """Have ``sbatch --test-only`` look at a script, which queues nothing. Returns None, or the error."""
    command = ["sbatch", "--test-only"]
    try:
        done = _run(command, TIMEOUT_S, clean_environment(os.environ, script), script)
    except (OSError, subprocess.SubprocessError) as error:
        return _failure(command, error)
    message = one_line(done.stderr, done.stdout) or f"sbatch --test-only ended with status {done.returncode}"
    return None if done.returncode == 0 else message


def sbatch(script: Path, text: str, *options: str) -> tuple[str | None, str]:
    """Submit ``script``, whose content is ``text``: the job's id, or None and why there is none."""
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        done = _run(command, TIMEOUT_S, clean_environment(os.environ, text))
    except (OSError, subprocess.SubprocessError) as error:
        return None, _failure(command, error)
    if done.returncode != 0:
        return None, f"sbatch said: {one_line(done.stderr, done.stdout) or done.returncode}"
    said = one_line(done.stdout, done.stderr, both=True)
    found = job_id(done.stdout)
    why = f"sbatch gave no job id (see squeue for what it may have queued) but: {said or 'nothing'}"
    return found, "" if found else why


def one_line(said: str, otherwise: str = "", *, both: bool = False) -> str:
    """Output of a command in one line of 400 characters: of stderr, or (``both``: and) of the other stream."""
    text = f"{said}\n{otherwise}" if both or not said.strip() else said
    lines = [
        re.sub(r"^((sbatch|scontrol|scancel): )?(error: |fatal: )?(allocation failure: )?", "", line.strip())
        for line in text.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line))[-400:]


def _run(
    command: Sequence[str], timeout_s: float, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    asking = {k: v for k, v in (os.environ if env is None else env).items() if not USER_FORMATS.match(k)}
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        env=asking,
        timeout=timeout_s,
        encoding="utf-8",
        errors="replace",
    )


def _failure(command: Sequence[str], error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{command[0]} did not answer within {error.timeout:.0f} s"
    return f"{command[0]}: {getattr(error, 'strerror', None) or error}"
