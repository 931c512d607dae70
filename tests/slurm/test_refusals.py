"""What cannot work is refused before anything is queued or written, in one clear message."""

from __future__ import annotations

import pytest
from conftest import Site


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--partition", "gpuu"],
            "partition 'gpuu' does not exist here; there are: main, re0, spot, spot0, urgent",
        ),
        (["--nodes", "8", "train.micro_batch=2"], "Requested node configuration is not available"),
        (["--time", "2-00:00:00"], "partition main allows 1-00:00:00"),
        (["--time", "0:20", "--cluster", "slow.yaml"], "not longer than the profile's signal_delay_s=90"),
        (["--nodes", "3"], "with 3 node(s) of 2 device(s)"),
        (["--after", "nothing"], "neither a job id nor a run folder"),
        (["--time", "1", "--images-per-second", "0.5"], "signal_delay_s=30"),
        (["--time", "1", "--images-per-second", "1.1"], "--time of 1 min is shorter than"),
        (["optim.lrr=1"], "did you mean optim.lr"),
    ],
)
def test_one_clear_message_and_nothing_is_left_behind(site: Site, arguments: list[str], words: str) -> None:
    (site.folder / "slow.yaml").write_text(
        site.profile.read_text().replace("signal_delay_s: 30", "signal_delay_s: 90")
    )
    folder = site.folder / "runs" / "refused"
    done = site.dattrain(
        "submit",
        str(site.recipe),
        "--cluster",
        str(site.profile),
        "--run",
        str(folder),
        *arguments,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not folder.exists()


def test_a_misspelled_key_of_a_profile(site: Site) -> None:
    wrong = site.folder / "wrong.yaml"
    wrong.write_text("partiton: main\n")
    done = site.dattrain("submit", str(site.recipe), "--cluster", str(wrong), "--dry-run", check=False)
    assert done.returncode == 2
    assert "did you mean partition?" in done.stderr


def test_a_dry_run_touches_nothing(site: Site) -> None:
    before = sorted(str(path) for path in site.folder.rglob("*"))
    jobs = site.cluster.run("squeue", "-h", "-t", "all", "-o", "%i")
    shown = site.dattrain(
        "submit", str(site.recipe), "--cluster", str(site.profile), "--nodes", "2", "--dry-run"
    ).stdout
    assert "#SBATCH --nodes=2" in shown
    assert sorted(str(path) for path in site.folder.rglob("*")) == before
    assert site.cluster.run("squeue", "-h", "-t", "all", "-o", "%i") == jobs


def test_a_run_that_has_a_job_is_not_given_another(site: Site) -> None:
    run = site.submit("taken", "--nodes", "1", "train.micro_batch=16")
    done = site.dattrain(
        "submit",
        str(site.recipe),
        "train.micro_batch=16",
        "--cluster",
        str(site.profile),
        "--run",
        str(run),
        check=False,
    )
    site.dattrain("cancel", str(run))
    assert done.returncode == 1
    assert "already has job" in done.stderr
    site.wait(run, "cancelled")
