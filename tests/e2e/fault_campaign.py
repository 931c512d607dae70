"""Kills ranks of small runs, over and over, and checks what is left; prints one line of JSON.

``python fault_campaign.py FOLDER KILLS SEED``. Torch and DeepSpeed are imported once; every rank of every start is a fork of
this process, so that a start costs half a second instead of ten. Kills are SIGKILLs: of one rank or of all, at a random time
or inside a file operation (rename, fsync, write, read, remove) of a save, a load or a prune, which a patched ``os`` counts.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

import deepspeed
import torch
from state_ranks import free_port
from state_worker import Job, run, start_distributed

import dattrain.state.checkpointer  # noqa: F401  (imported here, once, for all ranks)
from dattrain.errors import UserError
from dattrain.state import gather
from dattrain.state.format import checkpoint

STEPS = 6
WORLD = 2
OPERATIONS = ("rename", "fsync", "write", "preadv", "unlink", "rmdir", "mkdir")


@dataclass(frozen=True)
class Kill:
    """Which ranks die, and when: ``after`` seconds, or at the ``nth`` call of ``operation`` by the first of them."""

    ranks: tuple[int, ...]
    after: float | None = None
    operation: str | None = None
    nth: int = 0

    @property
    def kind(self) -> str:
        """For the count."""
        return f"{'all' if len(self.ranks) == WORLD else 'one'} {self.operation or 'time'}"


def draw(rng: random.Random, seconds: float) -> Kill:
    """A random kill; ``seconds`` is how long an undisturbed start takes."""
    ranks = rng.choice([(0,), (1,), tuple(range(WORLD))])
    if rng.random() < 0.3:
        return Kill(ranks, after=rng.uniform(0, seconds))
    # Few calls, so that most kills hit although a start has only the steps left to do that the ones before did not.
    return Kill(ranks, operation=rng.choice(OPERATIONS), nth=rng.randint(1, 5))


def arm(kill: Kill) -> None:
    """In a rank: die at the nth call of the operation, before or after it is done."""
    real = getattr(os, kill.operation or "")
    count = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        here = next(count) == kill.nth
        if here and kill.nth % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, kill.operation or "", call)


def start(job: Job, kill: Kill | None, log: Path) -> tuple[list[int], float]:
    """Run ``job`` on forked ranks; returns wait statuses, and seconds. As a launcher would, ends all when one dies."""
    port = str(free_port())
    for old in log.parent.glob(f"{log.name}.*"):
        old.unlink()
    begin = time.monotonic()
    pids = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port, kill if kill and kill.operation and rank == kill.ranks[0] else None, log)
        pids.append(pid)
    statuses: dict[int, int] = {}
    while len(statuses) < WORLD:
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[rank] = status
        late = kill is not None and kill.after is not None and time.monotonic() - begin > kill.after
        dead = any(statuses.values())
        for rank, pid in enumerate(pids):
            if rank not in statuses and (dead or (late and kill and rank in kill.ranks)):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() - begin > 120:
            raise TimeoutError(f"a start hangs: {statuses}")
        time.sleep(0.002)
    return [statuses[r] for r in range(WORLD)], time.monotonic() - begin


def child(job: Job, rank: int, port: str, kill: Kill | None, log: Path) -> None:
    """One rank. Never returns."""
    code = 1
    try:
        descriptor = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(WORLD),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        start_distributed()
        if kill is not None:
            arm(kill)
        run(job)
        torch.distributed.barrier()
        code = 0
    except UserError as e:
        print(f"UserError: {e}", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def whole(root: Path) -> list[int]:
    """Steps of all published checkpoints, every byte of which is checked."""
    return [checkpoint.verify(e.folder).step for e in checkpoint.list_all(root)]


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything the last checkpoint holds."""
    folder = run_dir / "checkpoints" / checkpoint.folder_name(STEPS)
    states = checkpoint.check(folder).states
    return {f"{s}/{n}": t for s in states for n, t in gather.iter_tensors(folder, s)}


def campaign(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill until ``kills`` have hit; every run that gets through is compared with the one of its stage never killed."""
    rng = random.Random(seed)
    hit: Counter[str] = Counter()
    starts = runs = 0
    reference: dict[int, dict[str, torch.Tensor]] = {}
    seconds = 1.0
    while sum(hit.values()) < kills:
        stage = (2, 3, 0, 1)[runs % 4]
        job = Job(
            "",
            str(folder / "out"),
            stage,
            ema=0.9,
            until=STEPS,
            save_at=list(range(1, STEPS)),
            keep_last=2,
            resume=True,
        )
        if stage not in reference:
            job.run = str(folder / f"undisturbed-{stage}")
            statuses, seconds = start(job, None, folder / "log")
            assert statuses == [0] * WORLD, (folder / "log.0").read_text()[-3000:]
            reference[stage] = final(Path(job.run))
        run_dir = folder / f"run-{runs}"
        job.run = str(run_dir)
        newest = 0
        for _ in range(200):
            kill = draw(rng, seconds) if sum(hit.values()) < kills else None
            starts += 1
            statuses, _ = start(job, kill, folder / "log")
            steps = whole(run_dir / "checkpoints")
            assert not steps or steps[-1] >= newest, "a checkpoint was lost"
            assert newest == 0 or steps, "all checkpoints were lost"
            newest = max([newest, *steps])
            if statuses == [0] * WORLD:
                break
            if any("EADDRINUSE" in p.read_text() for p in folder.glob("log.*")):
                continue  # somebody took the port that was free a moment ago
            killed = any(os.WIFSIGNALED(s) and os.WTERMSIG(s) == signal.SIGKILL for s in statuses)
            assert kill is not None and killed, (
                kill,
                statuses,
                *(p.read_text()[-2000:] for p in folder.glob("log.*")),
            )
            failed = [r for r, s in enumerate(statuses) if os.WIFEXITED(s) and os.WEXITSTATUS(s)]
            assert not failed or len(failed) < WORLD
            hit[kill.kind] += 1
        else:
            raise AssertionError("200 starts did not finish one run")
        got = final(run_dir)
        assert got.keys() == reference[stage].keys()
        assert all(torch.equal(got[k], reference[stage][k]) for k in got), (
            f"run {runs} (stage {stage}) ended elsewhere"
        )
        leftovers = [p.name for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]
        assert not leftovers, leftovers
        shutil.rmtree(run_dir)
        runs += 1
    return {"kills": sum(hit.values()), "starts": starts, "runs": runs, "by kind": dict(sorted(hit.items()))}


if __name__ == "__main__":
    deepspeed.utils.logging.logger.setLevel("ERROR")
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(json.dumps(campaign(target, int(sys.argv[2]), int(sys.argv[3]))))
