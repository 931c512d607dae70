"""One rank of the tests beside DeepSpeed's own checkpoints: ``save`` or ``load`` a list of (folder, job)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from state_worker import Job, build, finish, start_distributed, train_step

from dattrain.state.checkpointer import Checkpointer
from dattrain.state.partition import LocalState


def save(job: Job, folder: Path) -> None:
    """Train twice; save by DeepSpeed into ``folder`` and by us into ``job.run``."""
    engine = build(job)
    for step in range(2):
        train_step(engine, job, step)
    engine.save_checkpoint(str(folder), client_state={"mine": 1})
    Checkpointer(Path(job.run)).save(engine, None, {"step": 2, "samples_seen": 24}, background=False)


def load(job: Job, folder: Path) -> None:
    """Load the universal checkpoint in ``folder`` by DeepSpeed into a fresh engine; save by us into ``job.run``."""
    engine = build(job)
    engine._config.load_universal_checkpoint = True
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None
    groups = [(g["lr"], g["weight_decay"]) for g in LocalState(engine).groups()]
    assert groups == [(3e-3, 0.05), (1e-3, 0.0)], groups
    Checkpointer(Path(job.run)).save(engine, None, {"step": 2, "samples_seen": 24}, background=False)
    train_step(engine, job, 2)


def main() -> None:
    """Run the plan."""
    what, plan = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    start_distributed()
    actions: dict[str, Any] = {"save": save, "load": load}
    code = 0
    try:
        for folder, entry in plan:
            actions[what](Job(**entry), Path(folder))
        dist.barrier()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finish(code)


if __name__ == "__main__":
    main()
