"""``data.reader: webdataset``, which keeps an order of its own."""

from __future__ import annotations

import itertools
import logging
from collections import Counter

import pytest
import torch

from dattrain.config.load import loads
from dattrain.config.schema import Config
from dattrain.data.factory import train_loader
from dattrain.errors import ConfigError, UserError

CPU = torch.device("cpu")


def config(source, reader: str, *, micro_batch: int = 4, **data) -> Config:
    return Config.model_validate(
        {
            "model": {"num_classes": data.pop("num_classes", 10)},
            "data": {
                "train": str(source),
                "reader": reader,
                "workers": 0,
                **data,
            },
            "train": {"global_batch": 24, "micro_batch": micro_batch},
        }
    )


def opened(cfg, *, rank=0, world=1, seen=0):
    return train_loader(cfg, rank=rank, world=world, samples_seen=seen, device=CPU, img_size=32)


def run(cfg, batches, **where):
    loader = opened(cfg, **where)
    try:
        return list(itertools.islice(loader, batches))
    finally:
        loader.close()


class TestWebdataset:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_pipe(self, make_shards, caplog, workers):
        folder = make_shards()
        source = f"pipe:cat {folder}/train-{{0000..0003}}.tar"
        with caplog.at_level(logging.WARNING):
            loader = opened(config(source, "webdataset", samples=49, workers=workers))
        assert "not exact" in caplog.text and loader.samples_per_epoch == 49
        batches = list(itertools.islice(loader, 30))
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
            [k for b in run(cfg, 6, **where) for k in b.keys]
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
        assert {key.split(":")[1] for batch in skipped for key, _ in batch.bad} == {"00005"}
        with pytest.raises(UserError, match=r"label \d, but model.num_classes=2"):
            run(config(source, "webdataset", samples=49, num_classes=2), 60)
        with pytest.raises(UserError, match="nothing-0.tar"):
            run(config(f"{tmp_path}/nothing-{{0..1}}.tar", "webdataset", samples=49), 1)
        with pytest.raises(UserError, match="data.train=pipe:false"):
            run(config("pipe:false", "webdataset", samples=49), 1)


def test_the_reader_of_dali_is_gone_and_says_what_to_use():
    with pytest.raises(
        ConfigError,
        match=r"data\.reader: the reader dali is gone.*data\.reader=index with data\.decoder=dali",
    ):
        loads("", ["data.reader=dali"])
