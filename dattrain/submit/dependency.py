"""``--after``: the state of another run or job, and the dependency that sbatch is given.

Slurm forgets jobs (after MinJobAge, five minutes by default), and takes a dependency on what it does not know for fulfilled, or
since 23.02 refuses it: so a run's own history is asked first, and an id that nobody knows is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from dattrain.errors import UserError
from dattrain.submit import history, local, queue, run_status


def dependency_on(after: str, *, ask: bool = True) -> tuple[str | None, Path | None]:
    """Dependency in sbatch's notation for ``--after``: a job id, or a run folder (its newest job); and that folder.

    None in place of the notation: it has ended well, there is nothing to wait for.

    Args:
        ask: Slurm, whether the job is there. Without it the history alone is looked at, as for a dry run.

    Raises:
        UserError: it is neither a job nor a run, it ended badly, or it is unknown.
    """
    if re.fullmatch(r"\d+(_\d+)?", after):
        return (_on_job(after) if ask else f"afterok:{after}"), None
    folder = Path(after)
    submitted = [e for e in history.history(folder) if e["event"] == "submit"]
    if not submitted:
        raise UserError(f"--after {after}: neither a job id nor a run folder that was submitted")
    states = queue.states(run_status.jobs_of(folder)) if ask else {}
    found = run_status.status_of(folder, states, local_alive=local.alive(folder))
    state, why = found.state, found.why
    if state == "finished":
        return None, folder.resolve()
    newest = submitted[-1]
    if newest["job"].startswith("local"):
        raise UserError(
            f"--after {after}: that run is on one machine, without Slurm, and has not finished: wait for it yourself"
        )
    if state not in ("running", "waiting") and (ask or state != "unknown"):
        raise UserError(
            f"--after {after}: that run has not ended well and has no job ({state}{': ' + why if why else ''}); "
            f"resume it first: dattrain submit {after}"
        )
    before = str(newest.get("after"))
    if (newest.get("dependency") or "").startswith("afternotok") and not (ask and _over(states.get(before))):
        # A follow-up that is there only in case the job before it fails is dropped when that one ends well.
        return f"afterok:{before}?afterok:{newest['job']}", folder.resolve()
    return f"afterok:{newest['job']}", folder.resolve()


def _over(state: queue.JobState | None) -> bool:
    return state is None or state.final or state == queue.UNKNOWN


def _on_job(job: str) -> str | None:
    """Dependency on a job, or on all tasks of an array.

    Raises:
        UserError: it ended badly, or it is unknown.
    """
    states = queue.task_states(job)
    if not states:
        raise UserError(f"--after {job}: neither squeue nor sacct nor scontrol knows a job of that id")
    for name, state in states.items():
        if state.never_starts or (state.final and state.state != "COMPLETED"):
            how = f"ended {state.state}" if state.final else f"is {state.state}: {state.reason}"
            raise UserError(f"--after {job}: job {name} {how}, so nothing would ever start behind it")
    return None if all(state.final for state in states.values()) else f"afterok:{job}"
