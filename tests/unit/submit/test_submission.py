"""A submission with programs in place of Slurm's: what sbatch is given, which id is written down, what is said."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dattrain.cli import submit as verb
from dattrain.errors import UserError
from dattrain.submit import dependency, history, submission
from dattrain.submit.plan import SubmitRequest

ASKED = SubmitRequest("r.yaml", cluster="./c.yaml")


class Site:
    """A working folder with a recipe, a profile, and Slurm's commands as far as they are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "r.yaml").write_text(
            "name: demo\ntrain: {global_batch: 64, micro_batch: 8}\ndata: {train: shards}\n"
        )
        self.profile("partition: main")
        self.program("srun", "exit 1")
        self.program(
            "sbatch",
            f'env > {folder}/seen; case "$1" in --test-only) exit 0;; esac; echo "$@" > {folder}/given; echo 42',
        )

    def program(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def profile(self, text: str) -> None:
        (self.folder / "c.yaml").write_text(f"tasks_per_node: 2\nsignal_delay_s: 60\n{text}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"]))
    made = Site(tmp_path)
    for name in ("squeue", "sacct", "scontrol", "sinfo"):
        made.program(name, "exit 1")
    return made


def test_a_banner_of_the_site_is_not_the_job(site: Site) -> None:
    site.program(
        "sbatch",
        'case "$1" in --test-only) exit 0;; esac; echo "Welcome, job 1"; echo "> job 7 verified"; echo 42; echo "job 9"',
    )
    assert submission.submit(ASKED) == 0
    run = site.folder / "runs" / "demo"
    assert [e["job"] for e in history.history(run)] == ["42"]
    named = {path.name for path in (run / "submit" / "slurm").iterdir() if not path.name.startswith(".")}
    assert named == {"42_submission.sh", "42_submitted.pkl"}
    site.program("sbatch", 'case "$1" in --test-only) exit 0;; esac; echo "Welcome, job 1"')
    with pytest.raises(UserError, match="sbatch gave no job id .*see squeue.* Welcome, job 1"):
        submission.submit(replace(ASKED, folder="runs/other"))


def test_the_shell_fills_what_the_profile_leaves_open(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "SBATCH_ACCOUNT": "proj2", "SBATCH_PARTITION": "urgent", "SBATCH_WCKEY": "key", "SLURM_JOB_ID": "5", "MASTER_ADDR": "n9",
        "RANK": "0", "WORLD_SIZE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert submission.submit(ASKED) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "dattrain submit: account=proj2 comes from SBATCH_ACCOUNT of this shell",
        "dattrain submit: SBATCH_PARTITION=urgent of this shell is not used: the job says --partition=main",
        "dattrain submit: MASTER_ADDR=n9 of this shell is not used: the job has other nodes; where it is right nevertheless, set "
        "it under environment in the profile",
    ]
    # In the script, and so in the follow-ups', whose shell is the job's.
    script = (site.folder / "runs/demo/submit/slurm/42_submission.sh").read_text()
    assert "#SBATCH --account=proj2\n" in script and "#SBATCH --partition=main\n" in script
    seen = (site.folder / "seen").read_text()
    assert "SBATCH_WCKEY=key" in seen
    assert not [
        line for line in seen.splitlines() if line.startswith(("SBATCH_PART", "SLURM_", "RANK", "MASTER"))
    ]
    assert os.environ["SLURM_JOB_ID"] == "5" and os.environ["SBATCH_PARTITION"] == "urgent"
    submission.submit(replace(ASKED, dry_run=True, partition="big"))
    shown = capsys.readouterr()
    assert "#SBATCH --account=proj2" in shown.out and "the job says --partition=big" in shown.err


def test_a_python_that_is_too_old_for_the_batch_script_is_refused(site: Site) -> None:
    site.program("python36", "echo 3.6.8")
    site.profile(f"host_python: {site.folder}/bin/python36")
    with pytest.raises(
        UserError, match=r"profile ./c.yaml: host_python: .*python36 is Python 3.6.8; it must be"
    ):
        submission.submit(ASKED)
    assert not (site.folder / "runs").exists()


def test_nodes_that_are_drained_are_said_and_waited_for(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.program(
        "sbatch",
        'case "$1" in --test-only) echo "allocation failure: Requested node configuration is not available" >&2; exit 1;; '
        "esac; echo 42",
    )
    site.program("sinfo", 'case "$*" in *-N*) echo "main*|n1|4|drained";; esac')
    assert submission.submit(ASKED) == 0
    assert "queued, though some nodes are not available now: n1 (drained)" in capsys.readouterr().err
    with pytest.raises(UserError, match="Requested node configuration is not available"):
        submission.submit(replace(ASKED, folder="runs/large", nodes="2"))
    assert not (site.folder / "runs" / "large").exists()


def test_an_array_runs_some_at_a_time(site: Site) -> None:
    assert submission.submit(replace(ASKED, array=("optim.lr=1e-3,5e-4,1e-4",), array_parallel=2)) == 0
    script = (site.folder / "runs/demo/submit/slurm/42_submission.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in script


def _run(site: Site, *events: dict[str, object]) -> str:
    run = site.folder / "runs" / "first"
    for event in events:
        history.record(run, **event)  # type: ignore[arg-type]
    return str(run)


SUBMIT = {"event": "submit", "job": "7", "by": "user"}
BEGIN = {"event": "begin", "job": "7", "restart": 0, "nodes": ["n1"], "checkpoint": None}
END = {
    "event": "end",
    "job": "7",
    "restart": 0,
    "reason": "crashed",
    "detail": "no such file",
    "new": False,
    "why": "no such file",
}


def test_after_a_run_that_is_over_asks_its_own_history(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(site, SUBMIT, BEGIN, {**END, "action": "stop"})
    with pytest.raises(UserError, match=rf"(?s)not ended well .*failed: no such file.*dattrain submit {run}"):
        submission.submit(replace(ASKED, after=run))
    assert not (site.folder / "runs" / "demo").exists()
    _run(site, SUBMIT, BEGIN, {**END, "action": "done", "reason": "finished"})
    assert submission.submit(replace(ASKED, after=run)) == 0
    assert "has ended well already, so nothing is waited for" in capsys.readouterr().err
    assert "--dependency" not in (site.folder / "runs/demo/submit/slurm/42_submission.sh").read_text()


def test_after_a_run_that_resumes_is_after_its_newest_job(site: Site) -> None:
    site.program("squeue", "echo '7|RUNNING|None|n1'; echo '9|PENDING|Dependency|'")
    run = _run(site, SUBMIT, BEGIN)
    assert dependency.dependency_on(run) == ("afterok:7", Path(run))
    _run(site, {**SUBMIT, "job": "9", "by": "follow-up", "after": "7", "dependency": "afternotok:7"})
    assert dependency.dependency_on(run) == ("afterok:7?afterok:9", Path(run))
    site.program("squeue", "echo '9|RUNNING|None|n1'")  # forgotten: Slurm 23.02 would refuse to wait for it
    assert dependency.dependency_on(run) == ("afterok:9", Path(run))
    _run(site, {"event": "cancel"})
    with pytest.raises(UserError, match="cancelled: by dattrain cancel"):
        dependency.dependency_on(run)


def test_after_a_run_whose_job_nobody_knows_is_refused_but_in_a_dry_run(site: Site) -> None:
    run = _run(site, SUBMIT, BEGIN)
    with pytest.raises(UserError, match=r"\(unknown: no answer from squeue, sacct or scontrol\)"):
        dependency.dependency_on(run)
    assert dependency.dependency_on(run, ask=False) == ("afterok:7", Path(run))
    local = _run(site, {**SUBMIT, "job": "local-1"})
    with pytest.raises(UserError, match="on one machine, without Slurm"):
        dependency.dependency_on(local)


@pytest.mark.parametrize(
    ("squeue", "sacct", "expected"),
    [
        ("echo '7|RUNNING|None|n1'", "exit 1", "afterok:7"),
        ("exit 1", "echo '7|COMPLETED|n1'", None),
        ("exit 1", "echo '7|FAILED|n1'", "job 7 ended FAILED"),
        (
            "echo '7|PENDING|DependencyNeverSatisfied|'",
            "exit 1",
            "job 7 is PENDING: DependencyNeverSatisfied",
        ),
        ("exit 1", "exit 1", "neither squeue nor sacct nor scontrol knows"),
        ("echo '7_1|RUNNING|None|n1'", "echo '7_0|COMPLETED|n1'", "afterok:7"),
        ("echo '7_1|RUNNING|None|n1'", "echo '7_0|TIMEOUT|n1'", "job 7_0 ended TIMEOUT"),
    ],
)
def test_after_a_job_is_after_what_slurm_knows(
    site: Site, squeue: str, sacct: str, expected: str | None
) -> None:
    site.program("squeue", squeue)
    site.program("sacct", sacct)
    if expected is None or expected.startswith("afterok"):
        assert dependency.dependency_on("7") == (expected, None)
    else:
        with pytest.raises(UserError, match=expected):
            dependency.dependency_on("7")
    assert dependency.dependency_on("7", ask=False) == ("afterok:7", None)


def test_the_default_python_of_the_batch_script_is_the_one_that_submits(site: Site) -> None:
    submission.submit(ASKED)
    script = (site.folder / "runs/demo/submit/slurm/42_submission.sh").read_text()
    assert f'\n{sys.executable} "$DATTRAIN_RUN' in script


def test_a_chain_that_slurm_takes_a_part_of_says_what_is_queued_and_how_the_rest_follows(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.folder / "chain.yaml").write_text(
        "name: two\nstages:\n  a: {config: r.yaml}\n  b: {config: r.yaml, from: a}\n"
    )
    site.program(
        "sbatch",
        'case "$1" in --test-only) exit 0;; esac; grep -q afterok "$2" && { echo "sbatch: error: QOSMaxSubmit" >&2; exit 1; }; '
        "echo 42",
    )
    with pytest.raises(
        UserError,
        match="b: not submitted: sbatch said: QOSMaxSubmit.*dattrain submit runs/two/b --after runs/two/a",
    ):
        submission.submit(replace(ASKED, config="chain.yaml"))
    assert "a: job 42" in capsys.readouterr().out
    assert not [e for e in history.history(site.folder / "runs/two/b") if e["event"] == "submit"]
    site.program("squeue", "echo '42|PENDING|None|'")
    site.program("sbatch", 'case "$1" in --test-only) exit 0;; esac; echo 43')
    assert submission.submit(replace(ASKED, config="runs/two/b", after="runs/two/a")) == 0
    assert history.history(site.folder / "runs/two/b")[-1]["dependency"] == "afterok:42"


def test_the_command_that_goes_on_is_the_one_that_was_given() -> None:
    words = [
        "r.yaml",
        "data.train=my photos",
        "--cluster",
        "local",
        "--array",
        "optim.lr=1,2",
        "train.seed=0,1",
    ]
    words += ["--gpus-per-node", "2", "--retries", "0", "--run", "there", "--yes"]
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    seen: list[SubmitRequest] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "submit", lambda request: seen.append(request) or 0)
        verb.run(parser.parse_args(words))
    assert shlex.split(submission._again(seen[0])) == ["dattrain", "submit", *words]


def test_a_dry_run_asks_a_slurm_that_answers_and_shows_the_script_all_the_same(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(ASKED, dry_run=True)
    site.program("sbatch", 'echo "sbatch: error: invalid partition specified: main" >&2; exit 1')
    assert submission.submit(asked) == 0
    assert "no Slurm answers here" in capsys.readouterr().err
    site.program("sinfo", "echo 'main*'")
    with pytest.raises(UserError, match="profile ./c.yaml: invalid partition specified: main"):
        submission.submit(asked)
    assert "#SBATCH --partition=main" in capsys.readouterr().out
    assert not (site.folder / "runs").exists()
