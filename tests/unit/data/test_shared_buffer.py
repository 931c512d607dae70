"""Batches in memory that workers use again: nothing that anyone still holds may change."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from dattrain.config.schema import Config
from dattrain.data.classes import Classes
from dattrain.data.factory import eval_loader, train_loader
from dattrain.data.shared_buffer import SharedBatchBuffer

CPU = torch.device("cpu")


def config(folder, workers: int) -> Config:
    return Config.model_validate(
        {
            "model": {"num_classes": 10},
            "data": {"train": str(folder), "val": str(folder), "workers": workers, "prefetch": 1},
            "train": {"global_batch": 4, "micro_batch": 4},
            "eval": {"batch": 9},
        }
    )


def opened(folder, workers):
    return train_loader(config(folder, workers), rank=0, world=1, samples_seen=0, device=CPU, img_size=32)


def test_a_slot_is_free_when_the_last_view_is_gone():
    buffer = SharedBatchBuffer(2, 2, 100)
    assert [buffer.take(1), buffer.take(1), buffer.take(1), buffer.take(0)] == [2, 3, None, 0]
    buffer.write(3, 50).fill_(7)
    view = buffer.read(3, 50).view(5, 10)[1:, 2]
    gc.collect()
    assert buffer.take(1) is None and view.tolist() == [7] * 4
    del view
    assert buffer.take(1) == 3


@pytest.mark.parametrize("keep", ["all", "views", "none"])
def test_what_is_held_stays_as_it_was(make_shards, keep):
    folder = make_shards()
    alone, loader = opened(folder, 0), opened(folder, 2)
    held = []
    for expected, batch in itertools.islice(zip(alone, loader), 25):
        assert torch.equal(batch.images, expected.images)
        if keep == "all":
            held.append((batch, expected.images))
        elif keep == "views":
            held.append((batch.images[1, :, ::2], expected.images[1, :, ::2].clone()))
        del batch
    loader.close()
    for found, expected in held:
        assert torch.equal(found if keep == "views" else found.images, expected)


def test_memory_is_used_again(make_shards):
    """25 batches in sequence, none kept, lie in no more places than the buffer has slots."""
    loader = opened(make_shards(), 1)
    places = set()
    for batch in itertools.islice(loader, 25):
        places.add(batch.images.data_ptr())
        del batch
    loader.close()
    assert len(places) <= 3


def test_a_loader_that_is_gone_leaves_its_batches(make_shards):
    folder = make_shards()
    loader, alone = opened(folder, 2), opened(folder, 0)
    batches = list(itertools.islice(loader, 3))
    loader.close()
    del loader
    gc.collect()
    for batch, expected in zip(batches, alone):
        assert torch.equal(batch.images, expected.images)


def test_evaluation_with_a_short_last_batch(make_shards):
    folder = make_shards()
    found = [
        list(eval_loader(config(folder, workers), Classes(10), rank=0, world=1, device=CPU, img_size=32))
        for workers in (0, 2)
    ]
    assert [len(b) for b in found[1]] == [9] * 5 + [4]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*found))
