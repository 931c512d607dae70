"""Where the host waits for the device in one update, counted without a GPU: ``python -m benchmarks.host_waits [PART ...]``.

``update-N`` runs a real update under ZeRO stage N on the CPU (two micro-batches, bf16) and counts what would wait on CUDA: reads
of values and DeepSpeed's calls of ``synchronize``. The other parts run on fake CUDA tensors (``tests/host_waits.py``).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from dattrain.bench import step as bench
from dattrain.bench.contender import Batches, Contender
from dattrain.config.derive import derive
from dattrain.config.load import loads
from dattrain.data.augment.mixup import MixupCutmix
from dattrain.data.augment.plan import draw
from dattrain.data.batch import Batch
from dattrain.engine.session import Session, open_session
from dattrain.engine.step_status import reduce_status
from dattrain.models import zoo
from dattrain.runtime import environment
from dattrain.runtime.signals import StopRequest
from tests.host_waits import fake_cuda, faked, on_the_cpu

CPU = torch.device("cpu")
ACCUMULATION = 2
NOT_ON_CUDA = "dattrain/engine/fused_adamw.py"
"""What AdamW on a CPU alone goes through: it reads how often a tensor was stepped."""


@contextmanager
def updates(stage: int) -> Iterator[tuple[Session, Contender]]:
    """A session on the CPU that has run its first updates. One per process for each process group."""
    words = ["model.name=dat_atto", "model.img_size=64", "model.num_classes=10", "train.micro_batch=2"]
    config = bench.read([*words, f"zero.stage={stage}", "train.precision=bf16"], ACCUMULATION)
    session = open_session(config, derive(config, world=1, samples_per_epoch=1000), CPU, 64)
    contender = Contender(session, Batches(config, CPU), config.optim.lr)
    for _ in range(3):  # DeepSpeed's clock begins at its third
        contender()
    try:
        yield session, contender
    finally:
        contender.close()


def update(stage: int) -> Counter[str]:
    """Waits of one update and the agreement after it."""
    with updates(stage) as (_, contender), on_the_cpu() as waits:
        done = contender()
        reduce_status(done, request=StopRequest.NONE, save_failed=False, bad_samples=0, device=CPU)
        assert done.applied
    return Counter({place: n for place, n in waits.found.items() if NOT_ON_CUDA not in place})


def mixing() -> Counter[str]:
    """Waits of a micro-batch's normalisation, erasing and mixing, after the first."""
    config = loads("{}").config
    positions = np.arange(8, dtype=np.int64)
    plan = draw(config.augment, 0, positions, (224, 224))
    with fake_cuda() as waits:
        images = torch.empty(8, 3, 224, 224, dtype=torch.uint8, device="cuda")
        labels = torch.empty(8, dtype=torch.int64, device="cuda")
        batch = Batch(images, labels, torch.empty(8, device="cuda"), torch.arange(8), [""] * 8, plan)
        mixer = MixupCutmix(config.augment, config.model.num_classes)
        mixer(batch)
        waits.clear()
        mixer(batch)
    return waits.found


def forward(name: str) -> Counter[str]:
    """Waits of a model's forward pass, after the first."""
    model = zoo.create(name, num_classes=1000, img_size=224).train()
    with fake_cuda() as waits:
        faked(model)
        images = torch.empty(2, 3, 224, 224, device="cuda")
        model(images)
        waits.clear()
        model(images)
    return waits.found


PARTS: dict[str, Callable[[], Counter[str]]] = {
    **{f"update-{stage}": partial(update, stage) for stage in range(4)},
    "mixing": mixing,
    "dat_tiny": lambda: forward("dat_tiny"),
    "dat_pp_tiny": lambda: forward("dat_pp_tiny"),
}


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--json", action="store_true", help="one object: part, place, count")
    args = parser.parse_args()
    with environment.process_group(environment.resolve({}), CPU):
        found = {part: PARTS[part]() for part in args.parts or PARTS}
    if args.json:
        print(json.dumps(found))
        return
    for part, places in found.items():
        print(f"{part}: {places.total()}")
        for place, count in places.most_common():
            print(f"{count:6d} x {place}")


if __name__ == "__main__":
    main()
