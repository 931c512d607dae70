"""One rank that says how many bytes its tensors hold: ``python plan_worker.py CONFIG OUT`` under RANK, WORLD_SIZE, ...

It counts what exists, through the garbage collector's eyes, between backward and the optimizer's step and after it; it
knows nothing of the formulas that it checks.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch

from dattrain.config.derive import derive
from dattrain.config.load import load
from dattrain.engine.session import open_session
from dattrain.runtime import environment


def held() -> int:
    """Bytes of tensors once gloo's thread has let go of what it reduced, which may be a while after the reduction: the least of some counts."""
    counts = [_held()]
    for _ in range(4):
        time.sleep(0.1)
        counts.append(_held())
    return min(counts)


def _held() -> int:
    """Bytes of all distinct storages that some tensor in the process uses."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if torch.is_tensor(thing):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            if thing.grad is not None:
                storage = thing.grad.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def main() -> None:
    config = load(sys.argv[1]).config
    torch.set_num_threads(1)
    env = environment.resolve(os.environ)
    device = torch.device("cpu")
    environment.connect(env, device)
    before = held()
    derived = derive(config, world=env.world, samples_per_epoch=config.train.global_batch)
    session = open_session(config, derived, device, config.model.img_size)
    size = config.model.img_size
    dtype = torch.bfloat16 if config.train.precision == "bf16-pure" else torch.float32
    highest = 0
    for _ in range(2 * derived.accumulation):
        loss = session.engine(torch.zeros(1, 3, size, size, dtype=dtype)).float().square().mean()
        session.engine.backward(loss)
        del loss
        highest = max(highest, held() - before)
        session.engine.step()
        highest = max(highest, held() - before)
    if env.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps({"bytes": highest}))
    session.close()
    environment.disconnect()
    environment.hard_exit(0)


if __name__ == "__main__":
    main()
