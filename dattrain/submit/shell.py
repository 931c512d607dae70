"""What a submission takes along from the shell (or the job) that it is made in.

Standard library alone, Python >= 3.8, since the job hook uses it too.

sbatch reads options from its command line, then from ``SBATCH_`` variables, then from the script's ``#SBATCH`` lines: so a
variable of the shell overrides the script. Here the script holds, which says what the profile and the command line said; what
it leaves open comes from the shell, as with plain sbatch. The check (``sbatch --test-only``), the submission and each
follow-up use the one rule, ``clean_environment``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

OWN = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_")
"""Describe the job or step that the shell lies in; a job submitted from within would inherit its sizes."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Say where the cluster is and who asks, and nothing of a job."""
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""torchrun's, of this process; the new job's ranks are others. A profile's ``environment`` may set the last two."""

SETTINGS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_TIMELIMIT": "time",
}
"""Variables that are settings of a profile too; what the profile leaves open is taken from them, and written into the script."""

_OPTIONS = {
    "timelimit": "time", "array-inx": "array", "mem-per-node": "mem", "no-requeue": "requeue", "req-switch": "switches",
    "wait4switch": "switches",
}  # fmt: skip
"""Variables whose option has another name."""
_ALONE = (
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("cpus-per-task", "cpus-per-gpu"),
    ("requeue", "no-requeue"),
    ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres"),
)
"""Options of which one excludes or doubles the others."""
_NEVER = ("array", "clusters", "wait", "ntasks-per-gpu", "ntasks-per-tres", "tres-per-task")
"""An array comes from ``--array`` alone; squeue and scancel would not find another cluster's job (SLURM_CLUSTERS they read); a
submission does not wait for the job; tasks are counted by the node."""


def options(script: str) -> dict[str, str]:
    """The ``#SBATCH`` options of a script by their long names; empty for one without a value."""
    found = {}
    for line in script.splitlines():
        match = re.match(r"#SBATCH --([a-z-]+)(?:=(.*))?$", line)
        if match:
            found[match.group(1)] = "".join(shlex.split(match.group(2) or ""))
    return found


def overruled(environ: Mapping[str, str], script: str) -> dict[str, tuple[str, str]]:
    """``SBATCH_`` variables that do not hold, each with the option of the script that does and its value (or twice nothing)."""
    named = options(script)
    found = {}
    for variable in environ:
        if not variable.startswith("SBATCH_"):
            continue
        option = variable[len("SBATCH_") :].lower().replace("_", "-")
        option = _OPTIONS.get(option, option)
        rivals = [o for group in _ALONE if option in group for o in group] or [option]
        if option == "gres" and "gpu" not in environ[variable]:
            rivals = [option]
        said = [o for o in [option, *rivals] if o in named]
        if said:
            found[variable] = said[0], named[said[0]]
        elif option in _NEVER:
            found[variable] = "", ""
    return found


def clean_environment(environ: Mapping[str, str], script: str) -> dict[str, str]:
    """The environment in which ``script`` is checked and submitted."""
    gone = overruled(environ, script)
    return {
        name: value
        for name, value in environ.items()
        if name not in gone and name not in RANK and (name in KEPT or not name.startswith(OWN))
    }


def job_id(printed: str) -> str | None:
    """The id in what ``sbatch --parsable`` printed on stdout, where a site's wrapper or banner may have had its say too.

    It is what sbatch prints without ``--parsable``, which a wrapper may leave out, else the last line that is an id (``123``, or
    ``123;cluster``).
    """
    lines = printed.splitlines()
    for pattern in (r"\s*Submitted batch job (\d+)\b.*", r"\s*(\d+)(?:;\S*)?\s*"):
        for line in reversed(lines):
            match = re.fullmatch(pattern, line)
            if match:
                return match.group(1)
    return None
