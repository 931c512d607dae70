"""What is made of Slurm's words; the texts are those of Slurm 22.05 on four nodes."""

from __future__ import annotations

import pytest

from dattrain.submit import job_state
from dattrain.submit.job_state import JobStatus

JOB = "slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-27T06:17:06{} ***\n"
STEP = "slurmstepd-n1: error: *** STEP 5.0 ON n1 CANCELLED AT 2026-11-27T06:17:06{} ***\n"
SHOWN = (
    "JobId=5 JobName=x\n   JobState={} Reason={} Dependency=(null)\n"
    "   Requeue=1 Restarts={} BatchFlag=1 Reboot=0 ExitCode=0:0\n   PreemptEligibleTime=2026-11-27T06:17:03 PreemptTime={}\n"
)


@pytest.mark.parametrize(
    ("stderr", "state"),
    [
        ("", None),
        (JOB.format(" DUE TO PREEMPTION"), "PREEMPTED"),
        (STEP.format(" DUE TO PREEMPTION"), "PREEMPTED"),
        (JOB.format(" DUE TO JOB REQUEUE"), "REQUEUED"),
        (JOB.format(" DUE TO TIME LIMIT"), "TIMEOUT"),
        (JOB.format(" DUE TO NODE FAILURE"), "NODE_FAIL"),
        (STEP.format("") + JOB.format(""), "CANCELLED"),
        (JOB.format(" DUE to SIGNAL Terminated"), "CANCELLED"),
        # srun ends a step one of whose tasks died.
        (STEP.format(""), None),
        # A user's scancel while it is being preempted: the last word counts.
        (JOB.format(" DUE TO PREEMPTION") + JOB.format(""), "CANCELLED"),
    ],
)
def test_slurmstepd_says_why_a_job_is_ended(stderr: str, state: str | None) -> None:
    assert job_state.state_from_stderr(stderr) == state


@pytest.mark.parametrize(
    ("stderr", "shown", "accounted", "restart", "found"),
    [
        # PreemptMode=CANCEL without grace: nothing will start this job again.
        (JOB.format(" DUE TO PREEMPTION"), SHOWN.format("COMPLETING", "None", 0, "2026"), "", 0, JobStatus("PREEMPTED")),
        # PreemptMode=REQUEUE, and an administrator's requeue: Slurm has counted on already.
        (JOB.format(" DUE TO PREEMPTION"), SHOWN.format("COMPLETING", "None", 1, "None"), "", 0, JobStatus("PREEMPTED", True)),
        ("", SHOWN.format("COMPLETING", "None", 1, "None"), "", 0, JobStatus("REQUEUED", True)),
        ("", SHOWN.format("RUNNING", "None", 1, "None"), "", 1, JobStatus("RUNNING")),
        # No error file (a site's own --error): sacct, else scontrol.
        ("", SHOWN.format("COMPLETING", "None", 0, "None"), "PREEMPTED", 0, JobStatus("PREEMPTED")),
        ("", SHOWN.format("COMPLETING", "None", 0, "2026"), "", 0, JobStatus("PREEMPTED")),
        ("", SHOWN.format("RUNNING", "None", 0, "2026"), "", 0, JobStatus("PREEMPTING")),
        ("", SHOWN.format("COMPLETING", "None", 0, "None"), "", 0, JobStatus("COMPLETING")),
        (JOB.format(""), SHOWN.format("COMPLETING", "None", 0, "2026"), "CANCELLED", 0, JobStatus("CANCELLED")),
        (JOB.format(""), SHOWN.format("COMPLETING", "None", 0, "2026"), "", 0, JobStatus("CANCELLED")),
        ("", SHOWN.format("COMPLETING", "TimeLimit", 0, "None"), "", 0, JobStatus("TIMEOUT")),
        ("", SHOWN.format("COMPLETING", "NodeDown", 0, "None"), "", 0, JobStatus("NODE_FAIL")),
        ("", "", "", 0, JobStatus(None)),
    ],
)  # fmt: skip
def test_the_sources_are_put_together(
    stderr: str, shown: str, accounted: str, restart: int, found: JobStatus
) -> None:
    assert job_state.combine(stderr, shown, accounted, restart) == found


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("SyntaxError: future feature annotations is not defined\n", "SyntaxError: future feature annotations is not defined"),
        ("slurm_script: line 20: python3: command not found\n\n", "slurm_script: line 20: python3: command not found"),
        ("+ module load nosuch\nno such module\n+ exit 1\n++ echo bye\n", "no such module"),
        (
            "ModuleNotFoundError: No module named 'torch'\nsrun: error: n1: task 0: Exited with exit code 1\n"
            "srun: Terminating StepId=5.0\n" + STEP.format("") + "srun: error: n1: tasks 1-3: Terminated\n",
            "ModuleNotFoundError: No module named 'torch'",
        ),
        ("srun: error: Unable to create step for job 5: Job/step already completing\n", "srun: error: Unable to create step for job 5: Job/step already completing"),
        ("srun: error: n1: task 0: Exited with exit code 1\n", "srun: error: n1: task 0: Exited with exit code 1"),
    ],
)  # fmt: skip
def test_the_last_line_that_tells_something(text: str, line: str) -> None:
    assert job_state.last_error_line(text) == line
