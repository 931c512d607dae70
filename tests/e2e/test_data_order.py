"""One order and one plan: for both decoders, for 1, 2 and 4 ranks, and wherever a run is taken up again."""

from __future__ import annotations

import dataclasses
import io
import itertools
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dattrain.config.schema import Config
from dattrain.data.factory import train_loader
from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.source import tar

GLOBAL, MICRO, SAMPLES = 16, 4, 253


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """253 small JPEGs in seven uneven shards."""
    out, rng, number = tmp_path_factory.mktemp("order"), np.random.default_rng(0), 0
    for shard, count in enumerate((40, 17, 63, 5, 48, 51, 29)):
        with open(out / f"train-{shard:04d}.tar", "wb") as file:
            for _ in range(count):
                buffer = io.BytesIO()
                size = rng.integers(20, 48, 2).tolist()
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "JPEG")
                for name, data in (
                    (f"{number:05d}.jpg", buffer.getvalue()),
                    (f"{number:05d}.cls", b"%d" % (number % 10)),
                ):
                    file.write(tar.header(name, len(data)) + data + tar.padding(len(data)))
                number += 1
            file.write(tar.END)
    index_shards([str(path) for path in sorted(out.glob("*.tar"))])
    return out


def seen(folder: Path, decoder: str, world: int, start: int, updates: int) -> list[list[tuple]]:
    """What each update is made of, in the order of slots: keys, labels, positions, and a digest of the plan."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    config = Config.model_validate(
        {
            "model": {"num_classes": 10},
            "data": {
                "train": str(folder),
                "lanes": 8,
                "window": 1,
                "workers": 0,
                "decoder": decoder,
                "dali_threads": 1,
            },
            "train": {"global_batch": GLOBAL, "micro_batch": MICRO, "seed": 5},
        }
    )
    out: list[list[tuple]] = [[] for _ in range(updates)]
    for rank in range(world):
        loader = train_loader(
            config,
            rank=rank,
            world=world,
            samples_seen=start * GLOBAL,
            device=torch.device("cpu"),
            img_size=32,
        )
        for update in range(updates):
            for batch in itertools.islice(loader, GLOBAL // world // MICRO):
                digest = sha256()
                for field in dataclasses.fields(batch.plan):
                    value = getattr(batch.plan, field.name)
                    digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
                assert batch.weight.all()
                out[update].append(
                    (batch.keys, batch.labels.tolist(), batch.position.tolist(), digest.hexdigest())
                )
        loader.close()
    return out


@pytest.mark.parametrize(
    ("updates", "places"), [(24, 3), pytest.param(300, 20, marks=pytest.mark.full)], ids=["24", "300"]
)
def test_one_order_for_every_decoder_world_and_restart(folder, updates, places):
    whole = seen(folder, "cpu", 1, 0, updates)
    key_at = {
        at: key for update in whole for keys, _, positions, _ in update for at, key in zip(positions, keys)
    }
    first, second = (
        [key_at[at] for at in range(start, start + SAMPLES) if at in key_at] for start in (0, SAMPLES)
    )
    assert sorted(key_at) == list(range(updates * GLOBAL))
    assert len(first) == len(set(first)) == SAMPLES and len(second) == len(set(second))
    assert first[: len(second)] != second
    for decoder in ("cpu", "dali"):
        for world in (1, 2, 4):
            assert seen(folder, decoder, world, 0, updates) == whole, (decoder, world)
    rng = np.random.default_rng(updates)
    for place in sorted(rng.integers(1, updates, places).tolist()):
        decoder, world = ("cpu", "dali")[place % 2], int(rng.choice([1, 2, 4]))
        assert seen(folder, decoder, world, place, updates - place) == whole[place:], (decoder, world, place)
