"""One four-node Slurm for all tests of this folder, a little recipe, and the undisturbed run that disturbed ones must equal."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm

import dattrain

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, Unsupported, install, unavailable

ACCOUNTING = os.environ.get("DATTRAIN_TEST_SACCT") == "1"
"""With slurmdbd and MariaDB, so that sacct works; without, squeue and scontrol have to do."""

RECIPE = """
name: tiny
model: {name: dat_atto, img_size: 32, num_classes: 10, drop_path: 0.1}
data: {train: DATA/train, val: DATA/val, lanes: 8, workers: 1}
augment: {randaugment: null, mixup: 0.2, cutmix: 0.0}
eval: {batch: 32}
optim: {lr: 1.0e-3, lr_batch: 32}
schedule: {epochs: 4, warmup_epochs: 0.5}
train: {global_batch: 32, micro_batch: 8, precision: fp32, log_every: 4, threads: 1}
checkpoint: {every_steps: 10, keep_last: 100}
"""
SAMPLES, STEPS = 384, 48

PROFILE = """
kind: slurm
partition: main
tasks_per_node: 2
cpus_per_task: 1
time: "20"
signal_delay_s: 30
environment: {OMP_NUM_THREADS: 1}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    why = unavailable(ACCOUNTING)
    if why is not None:
        pytest.skip(f"no Slurm for the tests: {why}")
    folder = Path(tempfile.mkdtemp(prefix="dattrain-slurm-"))
    made = Cluster(folder, accounting=ACCOUNTING, die_with_parent=True)
    try:
        try:
            install(ACCOUNTING, folder / "apt.log")
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"no Slurm for the tests: apt-get could not install it ({error})")
        try:
            made.start()
        except Unsupported as error:
            pytest.skip(f"no Slurm for the tests: {error}")
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Site:
    """A user's working folder on the cluster: recipe, profile, runs."""

    cluster: Cluster
    folder: Path
    recipe: Path
    profile: Path
    started: list[Path] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """A user's."""
        return {**self.cluster.environment, "XDG_CONFIG_HOME": str(self.folder), "OMP_NUM_THREADS": "1"}

    def dattrain(
        self, *arguments: str, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line as the user would."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("dattrain")), *arguments], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"dattrain {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, run: str, *arguments: str, config: str | None = None) -> Path:
        """Submit the recipe (or ``config``) into ``runs/run``."""
        folder = self.folder / "runs" / run
        self.started.append(folder)
        self.dattrain(
            "submit",
            config or str(self.recipe),
            "--cluster",
            str(self.profile),
            "--run",
            f"runs/{run}",
            *arguments,
        )
        return folder

    def status(self, run: Path) -> dict[str, Any]:
        """What ``dattrain status --json`` says of one run; warm, since it is asked every second."""
        command = [sys.executable, "-m", "dattrain", "status", str(run), "--json"]
        done = warm.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[0])

    # Waits are generous: on a busy machine four ranks take a minute and more to import what they need.
    def wait(self, run: Path, *states: str, seconds: float = 900) -> dict[str, Any]:
        """Poll status until the run is in one of these states (``finished`` if none is given)."""
        wanted = states or ("finished",)
        final = {"finished", "failed", "cancelled", "stopped"}
        deadline = time.monotonic() + seconds
        while True:
            found = self.status(run)
            if found["state"] in wanted:
                return found
            if found["state"] in final or time.monotonic() > deadline:
                pytest.fail(
                    f"{run.name} is {found['state']}, not {' or '.join(wanted)}: {found}\n{self.evidence(run)}"
                )
            time.sleep(1)

    def wait_for(self, what: Callable[[], Any], seconds: float = 600, run: Path | None = None) -> Any:
        """Poll until something is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(0.2)
        pytest.fail("waited in vain\n" + (self.evidence(run) if run else ""))

    def evidence(self, run: Path) -> str:
        """History and the ends of the logs."""
        parts = [self.cluster.run("squeue", "-t", "all", "-o", "%i %T %r %N", check=False)]
        for path in [run / "submit" / "history.jsonl", *sorted(run.glob("submit/slurm/*log*"))]:
            if path.is_file():
                parts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)


def _fashion_mnist(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    folder = Path(dattrain.__file__).parent / "demo"
    images = np.frombuffer(
        gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(
        gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    )
    return images.reshape(-1, 28, 28)[first:last], labels[first:last]


@pytest.fixture(scope="session")
def site(cluster: Cluster) -> Iterator[Site]:
    """A shared folder with packed Fashion-MNIST and a recipe that takes seconds."""
    folder = Path(tempfile.mkdtemp(prefix="dattrain-site-"))
    try:
        for part, first, last in (("train", 0, SAMPLES), ("val", SAMPLES, SAMPLES + 64)):
            images, labels = _fashion_mnist(first, last)
            np.savez(folder / f"{part}.npz", images=images, labels=labels)
            subprocess.run(
                [sys.executable, "-m", "dattrain", "data", "pack", f"{part}.npz", f"data/{part}", "--split", part,
                 "--per-shard", "64", "--format", "png", "--jobs", "1"],
                cwd=folder, check=True, capture_output=True,
            )  # fmt: skip
        # A checkout that is edited after the submission, in the folder where the jobs work: it must not be what they run.
        (folder / "dattrain").mkdir()
        (folder / "dattrain" / "__init__.py").write_text("raise RuntimeError('not the snapshot')")
        (folder / "tiny.yaml").write_text(RECIPE.replace("DATA", str(folder / "data")))
        (folder / "test.yaml").write_text(PROFILE)
        made = Site(cluster, folder, folder / "tiny.yaml", folder / "test.yaml")
        yield made
        for run in made.started:
            made.dattrain("cancel", str(run), check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(site: Site) -> Path:
    """The recipe on 2 nodes x 2 tasks, from the first step to the last in one job."""
    run = site.submit("undisturbed", "--nodes", "2")
    found = site.wait(run)
    assert found["restarts"] == []
    return run


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; a step that is there twice is a bug."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(dict(found)) == len(found)
    return dict(found)


def weights(run: Path, step: int = STEPS) -> dict[str, Any]:
    """Sizes and checksums of the files of a checkpoint: weights, moments and averages of every rank."""
    text = (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text()
    return json.loads(text)["manifest"]["files"]


def step_of(run: Path) -> int:
    """Newest step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(row)["step"] for row in rows if row.endswith("}")), default=0)


def ranks(job: str) -> dict[int, int]:
    """Process of each task of a job on this machine, by rank: children of slurmstepd, not their data workers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                word.partition(b"=")[::2]
                for word in (folder / "environ").read_bytes().split(b"\0")
                if b"=" in word
            )
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            above = Path(f"/proc/{parent}/comm").read_text()
            mine = variables.get(b"SLURM_JOB_ID") == job.encode() and b"SLURM_PROCID" in variables
            if mine and above.startswith("slurmstepd") and "python" in (folder / "comm").read_text():
                found[int(variables[b"SLURM_PROCID"])] = int(folder.name)
        except (OSError, ValueError):
            continue
    return found
