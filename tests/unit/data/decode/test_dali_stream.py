"""What the DALI decoder does on CUDA, without a device: the order on its streams, and that the host waits for nothing."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_waits import fake_cuda
from pictures import write_tar

from dattrain.config.data_sections import Augment, Data
from dattrain.data.decode import dali, dali_base
from dattrain.data.feed import RankShare, TrainFeed, fetch
from dattrain.data.order import Order
from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import UserError

pytest.importorskip("nvidia.dali")

SIZE = (64, 64)
BATCH = 16


@pytest.fixture
def recorded(monkeypatch):
    """torch.cuda's streams and events, which write down what is asked of them."""
    log: list[tuple] = []
    events = []

    class Event:
        def __init__(self):
            self.number, self.passed = len(events), False
            events.append(self)

        def record(self, stream):
            log.append(("record", self.number, stream.name))

        def query(self):
            return self.passed

    class Stream:
        def __init__(self, device=None, name="side"):
            self.name, self.cuda_stream = name, 7

        def wait_event(self, event):
            log.append(("wait", event.number, self.name))

    @contextmanager
    def on(stream):
        log.append(("enter", stream.name))
        yield
        log.append(("leave", stream.name))

    trainer = Stream(name="trainer")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: trainer)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(("held for", stream.name))
    )
    monkeypatch.setattr(dali_base, "probe", lambda device: "GPU (nvjpeg_cuda_decoder)")
    return SimpleNamespace(log=log, events=events)


def decoder(folder, encodings, recorded, monkeypatch, bad=()):
    """On ``cuda:0``, with a pipeline that decodes nothing."""
    files = [data for _ in range(4) for data in encodings.values()]
    members = []
    for i, data in enumerate(files):
        members += [(f"{i:05d}.jpg", b"no image" if i in bad else data), (f"{i:05d}.cls", b"%d" % (i % 10))]
    write_tar(folder / "train-0000.tar", members)
    index_shards([str(folder / "train-0000.tar")])
    dataset = open_dataset(str(folder))
    order = Order(dataset.counts, seed=3, lanes=1, window=2)
    feed = TrainFeed(order, Augment(color_jitter=0.2), 3, SIZE, RankShare(BATCH, BATCH, 0, 1, 0))

    class Pipeline:
        runs = 0

        def run(self, stream):
            made._source()
            recorded.log.append(("run", self.runs, stream.name))
            self.runs += 1
            return (None,)

    monkeypatch.setattr(dali.DaliDecoder, "_build", lambda self: Pipeline())
    monkeypatch.setattr(dali_base, "release", lambda device: None)
    made = dali.DaliDecoder(
        lambda number: fetch(dataset, feed.request(number), num_classes=10, skip_bad=True),
        batch=BATCH,
        size=SIZE,
        skip_bad=True,
        interpolation="bicubic",
        data=Data(dali_threads=1),
        device=torch.device("cuda", 0),
    )
    return made


def test_batches_are_made_one_ahead_on_a_stream_of_their_own(tmp_path, encodings, recorded, monkeypatch):
    made = decoder(tmp_path, encodings, recorded, monkeypatch)
    pixels = torch.zeros(BATCH, *SIZE, 3, dtype=torch.uint8)
    monkeypatch.setattr(
        made,
        "_finish",
        lambda prepared, output: dali.assemble(pixels.permute(0, 3, 1, 2), prepared.encoded, {}),
    )
    keys = [next(made).keys, next(made).keys]

    def own(n):
        return [("enter", "side"), ("run", n, "side"), ("record", n, "side"), ("leave", "side")]

    def handed(n):
        return [("wait", n, "trainer"), ("held for", "trainer")]

    assert recorded.log == [*own(0), *own(1), *handed(0), *own(2), *handed(1)]
    # What DALI reads in place is held until the device is past the batch that it is for.
    assert [held.encoded.keys for _, held in made._used][:2] == keys and len(made._used) == 3
    recorded.events[0].passed = recorded.events[1].passed = True
    next(made)
    assert [event.number for event, _ in made._used] == [2, 3]
    made.close()
    with pytest.raises(StopIteration):
        next(made)


def test_an_error_comes_after_the_batches_before_it(tmp_path, encodings, recorded, monkeypatch):
    made = decoder(tmp_path, encodings, recorded, monkeypatch)
    pixels = torch.zeros(BATCH, *SIZE, 3, dtype=torch.uint8)

    def finish(prepared, output):
        if made._given == 2:
            raise UserError("the third one is bad")
        return dali.assemble(pixels.permute(0, 3, 1, 2), prepared.encoded, {})

    monkeypatch.setattr(made, "_finish", finish)
    next(made), next(made)
    with pytest.raises(UserError, match="the third one"):
        next(made)
    made.close()
    with pytest.raises(StopIteration):
        next(made)


def test_the_host_waits_for_nothing(tmp_path, encodings, recorded, monkeypatch):
    """With images that DALI decodes, that are decoded elsewhere, and that are bad."""
    made = decoder(tmp_path, encodings, recorded, monkeypatch, bad=range(0, 60, 7))
    prepared = [made._prepare(number) for number in range(3)]
    assert any(p.bad for p in prepared) and all(p.done and p.here.any() and p.work.steps for p in prepared)
    monkeypatch.undo()
    with fake_cuda() as waits:
        for p in prepared:
            pixels = torch.empty(BATCH, *SIZE, 3, dtype=torch.uint8, device="cuda")
            batch = made._assemble(p, pixels)
            assert batch.images.device.type == "cuda"
    assert not waits.found, waits.report()


def test_assembled_pixels(tmp_path, encodings, recorded, monkeypatch):
    """Images that were decoded elsewhere and bad ones get to their places, on whatever device."""
    made = decoder(tmp_path, encodings, recorded, monkeypatch, bad=range(0, 60, 7))
    prepared = made._prepare(0)
    made._device = torch.device("cpu")
    pixels = torch.full((BATCH, *SIZE, 3), 77, dtype=torch.uint8)
    prepared.work.steps.clear()
    images = made._assemble(prepared, pixels).images.permute(0, 2, 3, 1)
    assert prepared.bad and prepared.done
    for i in range(BATCH):
        expected = 0 if i in prepared.bad else prepared.done.get(i, 77)
        assert np.array_equal(images[i].numpy(), np.broadcast_to(expected, (*SIZE, 3)))
    made.close()
