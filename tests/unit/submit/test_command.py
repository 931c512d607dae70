"""Slurm's commands as sites wrap them and users set them up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dattrain.submit import command


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"]))
    return tmp_path


def _program(site: Path, name: str, text: str) -> None:
    (site / name).write_text(f"#!/bin/sh\n{text}\n")
    (site / name).chmod(0o755)


def test_what_is_missing_refuses_or_hangs_is_said(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.run("scancel-of-the-site", "5") == "scancel-of-the-site: No such file or directory"
    _program(site, "scancel", "exec sleep 60")
    with monkeypatch.context() as patch:
        patch.setattr(command, "TIMEOUT_S", 0.2)
        assert command.run("scancel", "5") == "scancel did not answer within 0 s"
    assert command.output("scancel", "5", timeout_s=0.2) == ""
    _program(site, "scancel", "echo 'scancel: error: no right to do so' >&2; exit 1")
    assert command.run("scancel", "5") == "no right to do so"
    _program(site, "scancel", "echo 'not before noon'; exit 1")
    assert command.run("scancel", "5") == "not before noon", "a wrapper may say it on stdout"
    _program(site, "scancel", "")
    assert command.run("scancel", "5") is None


def test_a_users_views_of_slurm_do_not_change_its_answers(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_CONF", raising=False)
    for name in (
        "SQUEUE_PARTITION",
        "SINFO_PARTITION",
        "SCANCEL_INTERACTIVE",
        "SQUEUE_FEDERATION",
        "SLURM_CLUSTERS",
    ):
        monkeypatch.setenv(name, "true")
    _program(site, "squeue", "env | grep -oE '^(SQUEUE|SINFO|SCANCEL|SLURM)_[A-Z]*' | sort; cat")
    assert command.output("squeue").split() == ["SLURM_CLUSTERS", "SQUEUE_FEDERATION"]


@pytest.mark.parametrize(
    ("prints", "job", "why"),
    [
        (r"printf 'Gr\374\337e\n42\n'", "42", ""),
        ("echo 'Submitted batch job 42 on cluster east'; echo 99", "42", ""),
        ("echo 'sbatch: error: over your quota' >&2", None, "over your quota"),
        ("echo 'over your quota'; exit 1", None, "sbatch said: over your quota"),
        ("", None, "but: nothing"),
    ],
)  # fmt: skip
def test_an_id_or_the_reason_why_there_is_none(site: Path, prints: str, job: str | None, why: str) -> None:
    _program(site, "sbatch", prints)
    found, said = command.sbatch(site / "script", "")
    assert found == job
    assert said == why or (job is None and said.endswith(why))
