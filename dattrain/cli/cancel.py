"""``dattrain cancel``: end a run's jobs, those that wait included."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, chain or array")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where Slurm does not answer. Cancelling twice is harmless; a run that is over is left as it is."""
    from dattrain.errors import UserError
    from dattrain.submit import history, local, queue, run_folders, run_status

    for folder in run_folders.find(args.runs):
        job, state = run_status.active_job(folder)
        if job is None and state == "UNKNOWN":
            raise UserError(
                f"{folder}: Slurm does not answer, so nothing is cancelled; try again (squeue says more)"
            )
        if job is None:
            print(f"{folder}: no job to cancel" + _explain(folder))
            continue
        # Written first: the job hook of a job that ends between this line and the next must not requeue it.
        history.record(folder, "cancel")
        if not local.cancel(folder):
            jobs = [
                e["job"] for e in history.since_submission(history.history(folder)) if e["event"] == "submit"
            ]
            alive = [
                j for j, state in queue.states(jobs).items() if not state.final and state.state != "UNKNOWN"
            ]
            queue.cancel(alive or [job])
        print(f"{folder}: cancelled job {job}")
    return 0


def _explain(folder: Path) -> str:
    """Why a folder that may look as if it had a job has none."""
    from dattrain.runtime import owner
    from dattrain.submit import history

    found = owner.current_owner(folder)
    if found is not None and found[1] == "alive":
        return f"; it is {found[0].purpose} by {found[0].who()}: dattrain stop {folder} has it save and end"
    origin = history.origin(folder)
    return f" ({origin})" if origin else ""
