"""The two readers that keep an order of their own."""

from __future__ import annotations

import itertools
import json
import logging
import tarfile
from collections import Counter

import pytest
import torch
from pictures import write_tar

from dattrain.config.schema import Config
from dattrain.data.loader import train_loader
from dattrain.data.source.build_index import index_shards
from dattrain.errors import ConfigError, UserError

CPU = torch.device("cpu")


def config(source, reader: str, *, micro_batch: int = 4, **data) -> Config:
    return Config.model_validate(
        {
            "model": {"num_classes": data.pop("num_classes", 10)},
            "data": {
                "train": str(source),
                "reader": reader,
                "decoder": "dali" if reader == "dali" else "cpu",
                "workers": 0,
                "dali_threads": 1,
                **data,
            },
            "train": {"global_batch": 24, "micro_batch": micro_batch},
        }
    )


def opened(cfg, *, rank=0, world=1, seen=0, states=None):
    return train_loader(
        cfg, rank=rank, world=world, samples_seen=seen, device=CPU, img_size=32, states=states
    )


def run(cfg, batches, **where):
    loader = opened(cfg, **where)
    try:
        return [
            (batch, json.loads(json.dumps(loader.state_dict())))
            for batch in itertools.islice(loader, batches)
        ]
    finally:
        loader.close()


class TestDali:
    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("nvidia.dali")

    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_every_sample_once_per_epoch_over_the_ranks(self, make_shards, world):
        cfg = config(make_shards(), "dali")
        epochs = 3
        for_epoch = [Counter() for _ in range(epochs)]
        for rank in range(world):
            loader = opened(cfg, rank=rank, world=world)
            assert not loader.exact and loader.num_classes_seen == 10
            per_rank = loader.samples_per_epoch // world // 4
            assert loader.samples_per_epoch >= 49
            for epoch in range(epochs):
                for batch in itertools.islice(loader, per_rank):
                    assert [int(k.split(":")[1]) % 10 for k in batch.keys] == batch.labels.tolist()
                    kept = [k for k, w in zip(batch.keys, batch.weight.tolist()) if w]
                    assert not batch.bad
                    for pair in range(2):
                        if not batch.weight[2 * pair : 2 * pair + 2].all():
                            rows = slice(2 * pair, 2 * pair + 2)
                            assert (batch.plan.mix[rows] == 1).all() and not batch.plan.mix_box[rows].any()
                    for_epoch[epoch].update(kept)
            loader.close()
        for seen in for_epoch:
            assert len(seen) == 49 and set(seen.values()) == {1}

    def test_it_goes_on_exactly_where_a_checkpoint_was_made(self, make_shards):
        cfg = config(make_shards(), "dali")
        whole = [run(cfg, 20, rank=rank, world=2) for rank in range(2)]
        for at in (3, 6, 9, 18):  # three micro-batches of a rank are one update
            states = [ran[at - 1][1] for ran in whole]
            for rank in range(2):
                again = run(cfg, 20 - at, rank=rank, world=2, seen=at // 3 * 24, states=states)
                for (a, _), (b, _) in zip(whole[rank][at:], again):
                    assert a.keys == b.keys and torch.equal(a.weight, b.weight)
                    assert torch.equal(a.position, b.position) and torch.equal(a.images, b.images)
        assert len(json.dumps(states[0])) < 10_000

    def test_a_state_of_something_else_is_refused(self, make_shards):
        folder = make_shards()
        cfg = config(folder, "dali")
        states = [run(cfg, 6, rank=rank, world=2)[-1][1] for rank in range(2)]
        opened(cfg, rank=1, world=2, seen=48, states=states).close()
        other = make_shards((13, 7, 20), name="other")
        for wrong, where, words in (
            (cfg, {"world": 1}, "world=2, this run has world=1"),
            (
                config(folder, "dali", micro_batch=6),
                {"world": 2},
                "micro_batch=4, this run has micro_batch=6",
            ),
            (config(other, "dali"), {"world": 2}, "shards="),
        ):
            with pytest.raises(UserError, match=words):
                opened(wrong, seen=48, states=states, **where)
        old = [{**state, "dali": "1.0"} for state in states]
        with pytest.raises(UserError, match=r"dali=1\.0"):
            opened(cfg, world=2, seen=48, states=old)
        with pytest.raises(UserError, match="state of 1 ranks, not 2"):
            opened(cfg, world=2, seen=48, states=states[:1])
        for nothing in (None, []):
            with pytest.raises(UserError, match="without the state"):
                opened(cfg, world=2, seen=48, states=nothing)

    def test_bad_samples(self, make_shards):
        folder = make_shards(bad={5: b"<html>", 30: b"\xff\xd8\xff\xe0 cut"})
        loader = opened(config(folder, "dali", on_bad="skip"))
        keys = [key for batch in itertools.islice(loader, 13) for key, _ in batch.bad]
        assert sorted(k.split(":")[1] for k in keys) == ["00005", "00030"] and loader.bad.count == 2
        loader.close()
        with pytest.raises(UserError, match=r"train-000\d\.tar: sample '000(05|30)' at offset"):
            run(config(folder, "dali"), 13)

    def test_hard_links(self, tmp_path, jpegs):
        """Two samples of one image, at an offset before that of others."""
        link = tarfile.TarInfo("00003.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "00000.jpg"
        parts = [(f"{i:05d}.{x}", d) for i in range(3) for x, d in (("jpg", jpegs[i]), ("cls", b"%d" % i))]
        write_tar(tmp_path / "a.tar", parts, end=b"")
        with open(tmp_path / "a.tar", "ab") as file:
            file.write(link.tobuf(tarfile.USTAR_FORMAT))
        last = write_tar(tmp_path / "last", [("00003.cls", b"3")]).read_bytes()
        with open(tmp_path / "a.tar", "ab") as file:
            file.write(last)
        index_shards([str(tmp_path / "a.tar")])
        loader = opened(config(tmp_path / "a.tar", "dali"))
        batch = next(iter(loader))
        assert sorted(zip(batch.keys, batch.labels.tolist())) == [(f"a.tar:{i:05d}", i) for i in range(4)]
        loader.close()

    def test_what_it_cannot_read(self, tmp_path, jpegs):
        (tmp_path / "images" / "cat").mkdir(parents=True)
        for i in range(30):
            (tmp_path / "images" / "cat" / f"{i}.jpg").write_bytes(jpegs[0])
        with pytest.raises(ConfigError, match="image folder"):
            opened(config(tmp_path / "images", "dali", num_classes=1))


class TestWebdataset:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_pipe(self, make_shards, caplog, workers):
        folder = make_shards()
        source = f"pipe:cat {folder}/train-{{0000..0003}}.tar"
        with caplog.at_level(logging.WARNING):
            loader = opened(config(source, "webdataset", samples=49, workers=workers))
        assert "not exact" in caplog.text and not loader.exact and loader.samples_per_epoch == 49
        batches = list(itertools.islice(loader, 30))
        assert loader.state_dict() == {}
        loader.close()
        keys = Counter(key for batch in batches for key in batch.keys)
        assert len(keys) > 35
        for batch in batches:
            assert batch.images.shape == (4, 3, 32, 32) and batch.weight.all()
            assert [int(k.split(":")[1]) % 10 for k in batch.keys] == batch.labels.tolist()
        assert torch.equal(torch.cat([b.position for b in batches]), torch.arange(120))

    def test_ranks_and_restarts_differ(self, make_shards):
        folder = make_shards()
        cfg = config(f"{folder}/train-{{0000..0003}}.tar", "webdataset", samples=49)
        first, second, later = (
            [k for b, _ in run(cfg, 6, **where) for k in b.keys]
            for where in ({"world": 2}, {"world": 2, "rank": 1}, {"world": 2, "seen": 24})
        )
        assert first != second and first != later

    def test_errors(self, make_shards, tmp_path):
        folder = make_shards(bad={5: b"<html>"})
        source = f"{folder}/train-{{0000..0003}}.tar"
        with pytest.raises(ConfigError, match=r"data\.samples"):
            opened(config(source, "webdataset"))
        with pytest.raises(UserError, match=r"00005.*not an image"):
            run(config(source, "webdataset", samples=49), 60)
        skipped = run(config(source, "webdataset", samples=49, on_bad="skip"), 60)
        assert {key.split(":")[1] for batch, _ in skipped for key, _ in batch.bad} == {"00005"}
        with pytest.raises(UserError, match=r"label \d, but model.num_classes=2"):
            run(config(source, "webdataset", samples=49, num_classes=2), 60)
        with pytest.raises(UserError, match="nothing-0.tar"):
            run(config(f"{tmp_path}/nothing-{{0..1}}.tar", "webdataset", samples=49), 1)
        with pytest.raises(UserError, match="data.train=pipe:false"):
            run(config("pipe:false", "webdataset", samples=49), 1)


def test_the_exact_reader_needs_no_state(make_shards):
    loader = opened(config(make_shards(), "index"))
    assert loader.exact and loader.state_dict() == {}
    loader.close()
