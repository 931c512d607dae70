"""The Python of the batch script, which runs the job hook on a node's host: which one, and the message where it does not do.

RHEL and Rocky 8 have a ``python3`` of 3.6, so the default is no name to be found on a node but an interpreter that works:
that of the tasks, which every node must have, or the submitting one where the tasks run in a container.
"""

from __future__ import annotations

import shlex
import subprocess
import sys

from dattrain.submit.cluster import Profile

OLDEST = (3, 8)


def interpreter(profile: Profile) -> str:
    """``host_python`` of the profile, or the default."""
    if profile.host_python is not None:
        return profile.host_python
    inside = profile.container is not None
    return sys.executable if inside or profile.python is None else profile.python


def version_check(profile: Profile) -> str:
    """A line of the batch script that ends the job in one sentence where the node's interpreter does not do.

    Any Python since 2.7 runs the test.
    """
    python = shlex.quote(interpreter(profile))
    test = f"import sys; sys.exit(sys.version_info < {OLDEST})"
    return (
        f"{python} -c {shlex.quote(test)} 2>/dev/null || "
        f'{{ echo "dattrain: $(hostname) has no Python {_text(OLDEST)} or newer at "{python}" ($({python} -V 2>&1 | head -n 1)); '
        'set host_python in the profile to one" >&2; exit 1; }'
    )


def problem(profile: Profile) -> str | None:
    """Why the profile's ``host_python`` cannot do, as far as this machine can tell; None if it can, or only the node knows.

    A name without a slash may mean another interpreter once the profile's ``setup`` has run (``module load python``).
    """
    python = profile.host_python
    if python is None or ("/" not in python and profile.setup):
        return None
    need = f"it must be a Python {_text(OLDEST)} or newer, which needs nothing installed"
    default = f"leave it out to take {interpreter(profile.model_copy(update={'host_python': None}))}"
    command = [python, "-c", "import sys; print('.'.join(map(str, sys.version_info[:3])))"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "strerror", None) or "it does not answer"
        return f"host_python: {python} cannot be run on this machine ({why}); {need}; {default}"
    seen = done.stdout.strip()
    parts = seen.split(".")
    if done.returncode != 0 or len(parts) != 3 or not all(part.isdigit() for part in parts):
        return f"host_python: {python} is not a Python that works (exit status {done.returncode}); {need}; {default}"
    if tuple(map(int, parts)) < OLDEST:
        return f"host_python: {python} is Python {seen}; {need}; {default}"
    return None


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
