from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm

from dattrain.config.data_sections import Augment
from dattrain.config.schema import Config
from dattrain.data.augment.mixup import MixupCutmix
from dattrain.data.classes import Classes
from dattrain.data.factory import eval_loader, train_loader
from dattrain.data.feed import RankShare, TrainFeed
from dattrain.data.loader import SkippedSamples
from dattrain.data.order import Order
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import ConfigError, UserError

CPU = torch.device("cpu")


def config(folder: Path, **data) -> Config:
    train = data.pop("train", {})
    return Config.model_validate(
        {
            "model": {"num_classes": data.pop("num_classes", 10)},
            "data": {"train": str(folder), "val": str(folder), "workers": 0, "lanes": 8, "window": 1, **data},
            "train": {"global_batch": 24, "micro_batch": 2, **train},
            "eval": {"batch": 5},
        }
    )


def read(cfg: Config, *, rank=0, world=1, seen=0, batches: int) -> list:
    loader = train_loader(cfg, rank=rank, world=world, samples_seen=seen, device=CPU, img_size=32)
    try:
        return list(itertools.islice(loader, batches))
    finally:
        loader.close()


def run_of(cfg: Config, *, world=1, seen=0, updates: int) -> list:
    """Micro-batches of all ranks, update by update, in the order of slots."""
    per_rank = cfg.train.global_batch // world // cfg.train.micro_batch
    ranks = [read(cfg, rank=r, world=world, seen=seen, batches=updates * per_rank) for r in range(world)]
    return [
        batch
        for update in range(updates)
        for batches in ranks
        for batch in batches[update * per_rank : (update + 1) * per_rank]
    ]


def assert_same(a: list, b: list) -> None:
    assert [x.keys for x in a] == [x.keys for x in b]
    for x, y in zip(a, b):
        assert torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
        assert torch.equal(x.position, y.position) and torch.equal(x.weight, y.weight)
        for field in dataclasses.fields(x.plan):
            np.testing.assert_array_equal(getattr(x.plan, field.name), getattr(y.plan, field.name))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_world_sees_the_same(make_shards, world):
    """49 samples in batches of 24: the runs straddle epochs. Keys, plans and pixels are compared."""
    cfg = config(make_shards())
    assert_same(run_of(cfg, updates=5), run_of(cfg, world=world, updates=5))


def test_an_epoch_is_every_sample_once_and_the_next_differs(make_shards):
    cfg = config(make_shards((13, 7, 20, 8)))  # 48 samples: two batches
    keys = [key for batch in run_of(cfg, updates=4) for key in batch.keys]
    assert len(set(keys[:48])) == 48 and set(keys[48:]) == set(keys[:48]) and keys[:48] != keys[48:]
    labels = [int(label) for batch in run_of(cfg, updates=2) for label in batch.labels]
    assert labels == [int(key.split(":")[1]) % 10 for key in keys[:48]]


def test_resuming_anywhere_on_another_world_goes_on_exactly(make_shards):
    cfg = config(make_shards())
    whole = run_of(cfg, updates=12)
    rng = np.random.default_rng(0)
    for world, update in zip((1, 2, 4, 3, 6), rng.integers(1, 11, 5).tolist()):
        rest = run_of(cfg, world=world, seen=24 * update, updates=12 - update)
        assert_same(whole[12 * update :], rest)


@pytest.mark.parametrize(
    ("steps", "places"), [(60, 6), pytest.param(300, 20, marks=pytest.mark.full)], ids=["60", "300"]
)
def test_many_steps_resumed_at_many_places(make_shards, steps, places):
    """Keys and plans of all updates (an epoch has 21) on 1, 2 and 4 ranks, and from random ones on at another rank count."""
    folder = make_shards((90, 41, 77, 5, 63, 110, 28, 99))
    cfg = config(folder, window=2)
    dataset = open_dataset(str(folder))

    def run(world: int, start: int, stop: int) -> list[tuple]:
        out = []
        order = Order(dataset.counts, seed=cfg.train.seed, lanes=8, window=2)
        feeds = [
            TrainFeed(order, cfg.augment, cfg.train.seed, (32, 32), RankShare(24, 6, rank, world, 24 * start))
            for rank in range(world)
        ]
        for update in range(stop - start):
            for feed in feeds:
                for part in range(4 // world):
                    r = feed.request(update * (4 // world) + part)
                    keys = [dataset.key(s, i) for s, i in zip(r.shards.tolist(), r.samples.tolist())]
                    arrays = (getattr(r.plan, f.name) for f in dataclasses.fields(r.plan))
                    out.append((keys, [a.tobytes() for a in arrays if isinstance(a, np.ndarray)]))
        return out

    whole = run(1, 0, steps)
    assert whole == run(2, 0, steps) == run(4, 0, steps)
    rng = np.random.default_rng(1)
    for update in rng.integers(1, steps - 1, places).tolist():
        world, stop = int(rng.choice([1, 2, 4])), min(steps, update + 12)
        assert run(world, update, stop) == whole[4 * update : 4 * stop]


def test_workers_give_what_one_process_gives(make_shards):
    folder = make_shards()
    alone = read(config(folder), batches=30)
    for workers in (1, 3):
        assert_same(alone, read(config(folder, workers=workers), batches=30))


def test_micro_batch_does_not_matter(make_shards):
    folder = make_shards()
    small = read(config(folder), batches=24)
    large = read(config(folder, train={"micro_batch": 8}), batches=6)
    assert [k for b in small for k in b.keys] == [k for b in large for k in b.keys]
    assert torch.equal(torch.cat([b.images for b in small]), torch.cat([b.images for b in large]))
    assert np.array_equal(
        np.concatenate([b.plan.mix for b in small]), np.concatenate([b.plan.mix for b in large])
    )


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_a_mix_group_reaches_over_micro_batches_and_ranks(make_shards, decoder):
    """Groups of 12 in batches of 24 with two bad samples: what is trained on is one, however the batch is cut."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    folder = make_shards(bad={17: b"", 30: b"no image"})

    def mixed(micro: int, world: int) -> list[torch.Tensor]:
        cfg = config(folder, decoder=decoder, on_bad="skip", train={"micro_batch": micro})
        cfg = cfg.model_copy(update={"augment": Augment(mix_group=12)})
        mixer = MixupCutmix(cfg.augment, 10)
        batches = run_of(cfg, world=world, updates=3)
        assert all(len(b) == micro == len(b.keys) == len(b.weight) for b in batches)
        beyond = {len(b.images) - micro for b in batches}
        assert (beyond == {0}) == (micro % 12 == 0) and max(beyond) <= micro
        assert sum(len(b.bad) for b in batches) == sum(int((b.weight == 0).sum()) for b in batches) > 0
        parts = [mixer(b) for b in batches]
        keys = torch.cat([b.position for b in batches])
        return [keys, *(torch.cat([part[i] for part in parts]) for i in range(3))]

    whole = mixed(24, 1)
    for micro, world in ((12, 2), (8, 1), (4, 3), (1, 2)):
        assert all(torch.equal(a, b) for a, b in zip(whole, mixed(micro, world))), (micro, world)


def test_loading_moves_no_global_generator(make_shards):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(config(make_shards(), workers=1), batches=2)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])


@pytest.mark.parametrize("world", [1, 2, 3, 7, 60])
def test_evaluation_takes_each_image_once(make_shards, world):
    cfg = config(make_shards(), workers=1 if world == 2 else 0)
    positions, lengths = [], []
    for rank in range(world):
        loader = eval_loader(cfg, Classes(10), rank=rank, world=world, device=CPU, img_size=32)
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.append(len(batches))
        mine = [p for b in batches for p in b.position.tolist()]
        assert mine == list(range(rank, 49, world))
        positions += mine
        again = list(loader)
        assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again))
        assert all(b.images.shape == (len(b), 3, 32, 32) and b.plan is None for b in batches)
        loader.close()
    assert sorted(positions) == list(range(49)), "once each, nothing padded"
    assert len(set(lengths)) == 1, "ranks can meet after each batch"


def test_facts_that_the_engine_reads(make_shards):
    loader = train_loader(
        config(make_shards()), rank=0, world=1, samples_seen=0, device=CPU, img_size=(32, 64)
    )
    batch = next(loader)
    assert loader.samples_per_epoch == 49
    assert batch.images.shape == (2, 3, 32, 64) and batch.images.dtype == torch.uint8
    assert loader.wait_s > 0
    assert loader.wait_s == 0, "reading resets it"
    assert loader.skipped.count == 0
    loader.close()


def test_image_folders_and_shuffle_off(tmp_path, jpegs):
    for c in ("ant", "bee", "cat"):
        (tmp_path / c / "deep").mkdir(parents=True)
        for i in range(4):
            (tmp_path / c / ("deep" if i % 2 else ".") / f"{i}.JPEG").write_bytes(jpegs[i])
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    cfg = config(tmp_path, train={"global_batch": 12, "micro_batch": 4}, shuffle=False, num_classes=3)
    batches = read(cfg, batches=3)
    seen = {k: int(label) for b in batches for k, label in zip(b.keys, b.labels)}
    assert len(seen) == 12
    assert all(["ant", "bee", "cat"][label] in key for key, label in seen.items())
    assert [p for b in batches for p in b.position.tolist()] == list(range(12))


# --- what is wrong with the data -------------------------------------------------------------------------------------


def test_a_bad_sample_is_an_error_that_names_it(make_shards, jpegs):
    folder = make_shards(bad={17: jpegs[0][:300], 30: b"", 41: b"this is no image"})
    with pytest.raises(UserError, match=r"train-000\d.tar: sample '000(17|30|41)'.*data.on_bad=skip"):
        read(config(folder), batches=24)
    with pytest.raises(UserError, match=r"sample '000(17|30|41)' at offset \d+"):
        read(config(folder, workers=2), batches=24)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_keeps_places_and_counts(make_shards, jpegs, workers):
    """The order and everyone else's pixels and plans are those of the run without bad samples."""
    bad = {17: jpegs[0][:300], 30: b"", 41: b"this is no image"}
    clean = read(config(make_shards()), batches=30)
    cfg = config(make_shards(name="bad", bad=bad), on_bad="skip", workers=workers)
    loader = train_loader(cfg, rank=0, world=1, samples_seen=0, device=CPU, img_size=32)
    dirty = list(itertools.islice(loader, 30))
    loader.close()
    assert [b.keys for b in clean] == [b.keys for b in dirty]
    names = {f"000{i}" for i in bad}
    skipped = 0
    for a, b in zip(clean, dirty):
        hit = torch.tensor([key.split(":")[1] in names for key in b.keys])
        skipped += int(hit.sum())
        assert torch.equal(b.weight, (~hit).float())
        assert torch.equal(a.images[~hit], b.images[~hit]) and torch.equal(a.labels[~hit], b.labels[~hit])
        assert not b.images[hit].any()
        np.testing.assert_array_equal(a.plan.crop, b.plan.crop)
        if hit.any():
            assert (b.plan.mix == 1).all() and not b.plan.mix_box.any(), (
                "a good one is not mixed with a bad one"
            )
    assert skipped >= 3 and loader.skipped.count == skipped
    assert {key.split(":")[1] for key in loader.skipped.samples} == names
    assert all("train-" in reason and "sample" in reason for reason in loader.skipped.samples.values())


def test_labels_must_fit_the_head(make_shards):
    folder = make_shards()
    with pytest.raises(ConfigError, match=r"labels up to 9, but model.num_classes=8"):
        read(config(folder, num_classes=8), batches=1)
    (folder / "_catalogue.json").unlink()
    with pytest.raises(ConfigError, match=r"labels up to 9, but model.num_classes=8"):
        read(config(folder, num_classes=8), batches=1)
    with pytest.raises(ConfigError, match=r"data.labels=imagenet-1k"):
        read(config(folder, labels="imagenet-1k"), batches=1)


def test_too_few_samples_for_a_batch(make_shards):
    with pytest.raises(ConfigError, match=r"has 10 samples, fewer than one train.global_batch=24"):
        read(config(make_shards((4, 6))), batches=1)


def test_settings_that_name_nothing(make_shards, tmp_path):
    with pytest.raises(ConfigError, match="data.train is not set"):
        read(Config.model_validate({"data": {"workers": 0}}), batches=1)
    with pytest.raises(UserError, match="no such shard"):
        read(config(tmp_path / "nowhere"), batches=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither tar shards nor class folders"):
        read(config(tmp_path / "empty"), batches=1)
    with pytest.raises(ConfigError, match="cannot be split over 5 devices"):
        read(config(make_shards()), world=5, batches=1)


def test_an_evaluation_set_that_cannot_be_read_is_refused_when_it_is_opened(tmp_path, jpegs):
    """Not after an epoch: its files are listed, and there is nothing behind one of them."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(jpegs[0])
    (tmp_path / "a" / "1.jpg").symlink_to(tmp_path / "gone.jpg")
    for on_bad, refused in (("error", True), ("skip", False)):
        config = Config.model_validate(
            {"model": {"num_classes": 2}, "data": {"val": str(tmp_path), "on_bad": on_bad}}
        )
        with pytest.raises(UserError, match="1.jpg: a link to") if refused else contextlib.nullcontext():
            eval_loader(
                config, Classes(2, ("a", "b")), rank=0, world=1, device=torch.device("cpu"), img_size=32
            ).close()


def test_a_shard_that_changes_under_the_run_stops_it(make_shards):
    """Cut short while it is open, and written anew with the same size."""
    for name, damage in (("cut", _cut), ("rewritten", _shift)):
        folder = make_shards(name=name)
        loader = train_loader(config(folder), rank=0, world=1, samples_seen=0, device=CPU, img_size=32)
        next(loader)
        for shard in folder.glob("*.tar"):
            damage(shard)
        with pytest.raises(UserError, match=r"train-000\d.tar.*(cut short|not this sample's)"):
            list(itertools.islice(loader, 24))
        loader.close()


def _cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(1024)


def _shift(path: Path) -> None:
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(data[512:] + data[:512])


# --- processes -------------------------------------------------------------------------------------------------------

SCRIPT = """
    import itertools, os, signal, sys, torch
    from dattrain.config.schema import Config
    from dattrain.config.data_sections import Augment
    from dattrain.data.factory import train_loader
    folder, how = sys.argv[1:]
    cfg = Config.model_validate({"model": {"num_classes": 10}, "data": {"train": folder, "workers": 2},
                                 "train": {"global_batch": 24, "micro_batch": 4}})
    def once(n):
        loader = train_loader(cfg, rank=0, world=1, samples_seen=0, device=torch.device("cpu"), img_size=32)
        list(itertools.islice(loader, n))
        return loader
    if how == "loop":
        for i in range(12):
            loader = once(i % 4)
            pids = [p.pid for p in loader._decoder.processes]
            assert len(pids) == 2
            if i % 3 != 2:
                loader.close()
            del loader
            if i % 3 != 2:
                assert not any(os.path.exists(f"/proc/{pid}") for pid in pids), i
        print("done", flush=True)
    elif how == "abandon":
        loader = once(3)
        print("done", flush=True)
    else:
        loader = once(3)
        if how != "raise":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
        print(*[p.pid for p in loader._decoder.processes], flush=True)
        if how == "raise":
            raise RuntimeError("the trainer failed")
        sys.stdin.read(1)
        list(itertools.islice(loader, 40))
        print("more", flush=True)
        sys.stdin.read()
"""


def start(folder: Path, how: str, **kwargs) -> subprocess.Popen:
    return warm.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Its output; where it hangs, it and its workers are killed, and the test fails."""
    try:
        return process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_workers_end_cleanly_twelve_times_of_twelve(make_shards):
    process = start(make_shards(), "loop")
    out, err = finish(process)
    assert (process.returncode, out.strip(), err) == (0, "done", "")


@pytest.mark.parametrize("how", ["abandon", "raise"])
def test_a_trainer_that_just_ends_leaves_nobody(make_shards, how):
    process = start(make_shards(), how)
    out, err = finish(process)
    if how == "abandon":
        assert (process.returncode, err) == (0, "")
    else:
        assert process.returncode == 1 and err.rstrip().endswith("RuntimeError: the trainer failed")
        assert gone([int(pid) for pid in out.split()])


def test_workers_ignore_signals_and_die_with_the_trainer(make_shards):
    """Slurm signals every process of a step; the trainer decides, so its workers must go on until it is done."""
    process = start(make_shards(), "serve")
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.killpg(process.pid, number)
    time.sleep(0.2)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline().strip() == "more", process.stderr.read()
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.wait()
    assert gone(pids), "workers outlive a killed trainer"
    process.stdout.close(), process.stderr.close(), process.stdin.close()


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(make_shards):
    loader = train_loader(
        config(make_shards(), workers=1), rank=0, world=1, samples_seen=0, device=CPU, img_size=32
    )
    next(loader)
    os.kill(loader._decoder.processes[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker died .*lower data.workers"):
        list(itertools.islice(loader, 50))
    loader.close()


def test_a_skipped_sample_is_named_once_in_the_log(caplog):
    skipped = SkippedSamples()
    for _ in range(2):
        skipped.add((("a.tar:7", "a.tar: sample '7' is cut short"),))
    assert skipped.count == 2 and caplog.text.count("sample '7' is cut short") == 1
    skipped.add((f"a.tar:{number}", f"sample {number} is cut short") for number in range(8, 1500))
    assert skipped.count == 1494 and len(skipped.samples) == 1000
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 10
