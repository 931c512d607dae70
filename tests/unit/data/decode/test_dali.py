"""The DALI decoder, on the CPU, against the CPU decoder and torchvision on the same plan."""

from __future__ import annotations

import gc
import io
import weakref
from collections import deque

import numpy as np
import pytest
import torch
from pictures import encode, write_tar
from PIL import Image

from dattrain.config.data_sections import Augment, Data
from dattrain.data.decode import images
from dattrain.data.decode.cpu import CpuDecoder, EvalTransform
from dattrain.data.decode.dali import DaliDecoder
from dattrain.data.decode.dali_pipeline import device_of, fits, train_pipeline
from dattrain.data.decode.dali_probe import versions
from dattrain.data.feed import EvalFeed, RankShare, TrainFeed, fetch
from dattrain.data.order import Order
from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import UserError

pytest.importorskip("nvidia.dali")

CPU = torch.device("cpu")
PLAIN = Augment(randaugment=None)

# Maximum and mean difference in levels of 255, over a whole image, of crop, resize and flip. The CPU decoder rounds
# between the two passes of the resize, and DALI does not; where bicubic overshoots, they clip at different moments.
MAX, MEAN = 24, 0.35


def shards(folder, files: list[bytes], per_shard: int = 8):
    folder.mkdir()
    for shard in range(-(-len(files) // per_shard)):
        members = []
        for i in range(shard * per_shard, min(len(files), (shard + 1) * per_shard)):
            members += [(f"{i:05d}.jpg", files[i]), (f"{i:05d}.cls", b"%d" % (i % 10))]
        write_tar(folder / f"train-{shard:04d}.tar", members)
    index_shards([str(path) for path in sorted(folder.glob("*.tar"))])
    return str(folder)


def train_feed(dataset, augment=PLAIN, size=(224, 224), batch=8, samples_seen=0) -> TrainFeed:
    order = Order(dataset.counts, seed=3, lanes=2, window=2)
    return TrainFeed(order, augment, 3, size, RankShare(batch, batch, 0, 1, samples_seen))


def both(dataset, feed, size, *, skip_bad=False, transform=None, interpolation="bicubic", count=None, **data):
    def read(number):
        return fetch(dataset, feed.request(number), num_classes=10, skip_bad=skip_bad)

    dali = DaliDecoder(
        read,
        batch=feed.share.micro_batch if isinstance(feed, TrainFeed) else feed.batch,
        size=size,
        skip_bad=skip_bad,
        interpolation=interpolation,
        data=Data(dali_threads=1, **data),
        device=CPU,
        transform=transform,
        count=count,
        threads=2,
    )
    cpu = CpuDecoder(read, size=size, skip_bad=skip_bad, transform=transform)
    return cpu, dali


def same_samples(a, b) -> None:
    assert a.keys == b.keys and torch.equal(a.labels, b.labels) and torch.equal(a.position, b.position)
    assert torch.equal(a.weight, b.weight) and a.bad == b.bad
    if a.plan is not None:
        for field in ("crop", "flip", "ops", "args", "jitter", "erase", "mix", "mix_box"):
            assert np.array_equal(getattr(a.plan, field), getattr(b.plan, field)), field


def difference(a, b) -> torch.Tensor:
    """B x 2: maximum and mean difference of each image."""
    d = (a.images.int() - b.images.int()).abs().flatten(1)
    return torch.stack((d.amax(1).float(), d.float().mean(1)), 1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, encodings, photo):
    """Every encoding three times, among them photographs of 300 to 500 pixels, as shards."""
    rng = np.random.default_rng(1)
    files = []
    for _ in range(3):
        for data in encodings.values():
            w, h = rng.integers(200, 500, 2).tolist()
            x, y = int(rng.integers(0, 512 - w)), int(rng.integers(0, 600 - h))
            kinds = ({"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"progressive": True})
            more = encode(photo.crop((x, y, x + w, y + h)), **kinds[len(files) % 3], quality=90)
            files += [data, more]
    return shards(tmp_path_factory.mktemp("mixed") / "set", files)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_pixels(mixed, interpolation):
    dataset = open_dataset(mixed)
    augment = Augment(randaugment=None, interpolation=interpolation)
    cpu, dali = both(dataset, train_feed(dataset, augment), (224, 224), interpolation=interpolation)
    found = []
    for number in range(12):
        a, b = cpu(number), next(dali)
        same_samples(a, b)
        assert b.images.dtype == torch.uint8 and b.images.is_contiguous(memory_format=torch.channels_last)
        found.append(difference(a, b))
    dali.close()
    found = torch.cat(found)
    assert found[:, 0].max() <= MAX and found[:, 1].max() <= MEAN, found.max(0)
    assert (found[:, 0] > 0).any()
    assert dali.rebuilt == 0


def test_crops_that_the_cpu_decoder_reduces_are_the_same_region(tmp_path, photo):
    """DALI reduces nothing, and takes the edges that the reduction's grid has."""
    dataset = open_dataset(shards(tmp_path / "set", [encode(photo, quality=92)] * 16))
    feed = train_feed(dataset, size=(36, 36), batch=16)
    cpu, dali = both(dataset, feed, (36, 36))
    a, b = cpu(0), next(dali)
    dali.close()
    assert sum(a.plan.region(i, photo.height, photo.width).factor > 1 for i in range(16)) > 8
    assert difference(a, b)[:, 1].max() <= 1.0


@pytest.mark.parametrize("policy", ["shorter", "squash"])
def test_evaluation_pixels(mixed, policy):
    dataset = open_dataset(mixed)
    feed = EvalFeed(dataset.counts, 7, 0, 1)
    transform = EvalTransform(policy, 0.875, "bicubic")
    cpu, dali = both(dataset, feed, (224, 224), transform=transform, count=len(feed))
    found = []
    for number, b in enumerate(dali):
        a = cpu(number)
        same_samples(a, b)
        found.append(difference(a, b))
    assert number == len(feed) - 1
    found = torch.cat(found)
    assert len(found) == dataset.counts.sum()
    assert found[:, 0].max() <= MAX and found[:, 1].max() <= MEAN, found.max(0)


def test_evaluation_against_torchvision(mixed):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    dataset = open_dataset(mixed)
    feed = EvalFeed(dataset.counts, 16, 0, 1)
    theirs = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])
    _, dali = both(
        dataset, feed, (224, 224), transform=EvalTransform("shorter", 0.875, "bicubic"), count=len(feed)
    )
    worst = torch.zeros(2)
    for number, batch in enumerate(dali):
        request = feed.request(number)
        for i, (shard, sample) in enumerate(zip(request.shards, request.samples)):
            image = images.decode_pillow(dataset.read(int(shard), int(sample)).data)
            expected = torch.from_numpy(np.array(theirs(image))).permute(2, 0, 1)
            d = (expected.int() - batch.images[i].int()).abs().float()
            worst = torch.maximum(worst, torch.stack((d.max(), d.mean())))
    assert worst[0] <= MAX and worst[1] <= MEAN, worst


def test_randaugment_is_the_same_one(mixed):
    # Operations like solarize turn a difference of one level into one of hundreds, so only the mean is bounded.
    dataset = open_dataset(mixed)
    feed = train_feed(dataset, Augment(color_jitter=0.2), (96, 128))
    cpu, dali = both(dataset, feed, (96, 128))
    for number in range(6):
        a, b = cpu(number), next(dali)
        same_samples(a, b)
        assert (a.plan.ops >= 0).any()
        assert difference(a, b)[:, 1].median() < 0.6 and difference(a, b)[:, 1].max() < 4
    dali.close()


def test_which_files_dali_gets(encodings):
    given = {name for name, data in encodings.items() if fits(data)}
    assert given == {"420", "422", "444", "gray", "progressive", "exif", "png", "png-gray"}
    for name in ("420", "png"):
        assert not fits(encodings[name][:-100])


@pytest.mark.parametrize(
    "last", [b"\xff\xc0\0\x11\x08\0\x08\0\x08\xff", b"\xff\xee\0\x0eAdobe\0", b"\xff\xc2", b"\xff\xfe\xff"]
)
@pytest.mark.parametrize("more", range(12))
def test_a_header_at_the_end_of_a_file_is_no_plain_jpeg(last, more):
    assert not fits(b"\xff\xd8" + last + b"\xff\xd9"[:more] + b"\xff\xd9" * more)


def damaged(jpeg: bytes) -> dict[str, bytes]:
    """Files that are no images, by what is wrong with them; the last one only shows when it is decoded."""
    table = jpeg.index(b"\xff\xc4") + 5
    return {
        "text": b"<html>not found</html>",
        "cut": jpeg[: len(jpeg) // 2],
        "huge": encode(Image.new("L", (30_000, 8))),
        "a false Huffman table": jpeg[:table] + b"\xff" * 16 + jpeg[table + 16 :],
    }


def test_bad_samples_keep_their_place(tmp_path, encodings):
    good = encodings["420"]
    files = [good] * 40
    for place, data in zip((1, 11, 17, 30), damaged(good).values()):
        files[place] = data
    files[22] = b""
    # Every libjpeg shows what there is and fills up with gray, and so do both decoders.
    files[6] = good[: len(good) // 2] + b"\xff\xd9"
    dataset = open_dataset(shards(tmp_path / "set", files))
    feed = train_feed(dataset, Augment(), (96, 96))
    cpu, dali = both(dataset, feed, (96, 96), skip_bad=True)
    bad = 0
    for number in range(20):
        a, b = cpu(number), next(dali)
        same_samples(a, b)
        assert not b.images[b.weight == 0].any()
        assert difference(a, b)[:, 1].median() < 0.6
        bad += len(b.bad)
    assert bad == 4 * 5
    # Batches that were read ahead when DALI failed may bring the same image once more; later ones do not.
    assert 1 <= dali.rebuilt <= 2
    dali.close()


@pytest.mark.parametrize("kind", list(damaged(encode(Image.new("RGB", (64, 64))))))
def test_a_bad_sample_is_an_error_that_names_it(tmp_path, encodings, kind):
    good = encodings["420"]
    files = [good] * 16
    files[13] = damaged(good)[kind]
    dataset = open_dataset(shards(tmp_path / "set", files))
    feed = train_feed(dataset, PLAIN, (64, 64), batch=4)
    cpu, dali = both(dataset, feed, (64, 64))
    messages = []
    for batches in (map(cpu, range(4)), dali):
        served = []
        with pytest.raises(UserError) as caught:
            for batch in batches:
                served.append(batch.keys)
        messages.append((str(caught.value), served))
    assert messages[0] == messages[1]
    assert "train-0001.tar" in messages[0][0] and "'00013' at offset" in messages[0][0]
    with pytest.raises(StopIteration):
        next(dali)


def test_more_ranks_than_images(tmp_path, encodings):
    dataset = open_dataset(shards(tmp_path / "set", [encodings["420"]] * 3))
    transform = EvalTransform("shorter", 0.875, "bicubic")
    seen = []
    for rank in range(4):
        feed = EvalFeed(dataset.counts, 2, rank, 4)
        _, dali = both(dataset, feed, (64, 64), transform=transform, count=len(feed))
        batches = list(dali)
        assert len(batches) == 1
        seen += [key for batch in batches for key in batch.keys]
        assert batches[0].images.shape[1:] == (3, 64, 64)
    assert len(seen) == len(set(seen)) == 3


def test_seek_is_the_same_as_going_there(tmp_path, jpegs):
    dataset = open_dataset(shards(tmp_path / "set", jpegs * 4))
    _, dali = both(dataset, train_feed(dataset, Augment(), (64, 64)), (64, 64))
    batches = [next(dali) for _ in range(10)]
    dali.close()
    _, later = both(dataset, train_feed(dataset, Augment(), (64, 64), samples_seen=7 * 8), (64, 64))
    for batch in batches[7:]:
        again = next(later)
        same_samples(batch, again)
        assert torch.equal(batch.images, again.images)
    later.close()


def test_exif_orientation_is_ignored(encodings):
    upright = Image.open(io.BytesIO(encodings["420"])).size
    assert Image.open(io.BytesIO(encodings["exif"])).size == upright == (301, 427)


@pytest.mark.parametrize("failure", ["CUDA error: out of memory", "nvImageCodec failure: '#8'"])
def test_a_pipeline_that_is_broken_is_an_error(tmp_path, jpegs, monkeypatch, failure):
    """What is no image's fault must not turn into training on the CPU unnoticed."""
    dataset = open_dataset(shards(tmp_path / "set", jpegs * 4))
    cpu, dali = both(dataset, train_feed(dataset, PLAIN, (64, 64)), (64, 64))

    class Broken:
        def run(self, stream):
            dali._source()
            raise RuntimeError(failure)

    monkeypatch.setattr(dali, "_build", Broken)
    dali._pipeline = Broken()
    for number in range(3):
        same_samples(cpu(number), next(dali))
    with pytest.raises(UserError) as caught:
        next(dali)
    message = str(caught.value)
    assert "DALI failed on 4 batches one after the other" in message and failure in message
    assert versions() in message and "data.decoder=cpu" in message
    with pytest.raises(StopIteration):
        next(dali)


def test_inputs_may_change_once_their_batch_is_there(encodings):
    """DALI reads them in place, batches ahead."""
    names = ("420", "progressive", "gray", "png")

    def outputs(overwrite):
        sent: deque = deque()

        def source():
            corner = np.array([[3, 5]] * len(names), np.int32)
            files = [np.frombuffer(encodings[name], np.uint8).copy() for name in names]
            sent.append((files, corner, corner + 120, np.array([0, 1, 0, 1], np.int32)))
            return sent[-1]

        pipeline = train_pipeline(source, len(names), (64, 64), "bicubic", device_of(None, Data(prefetch=3)))
        for _ in range(6):
            (output,) = pipeline.run()
            files, *others = sent.popleft()
            for array in [*files, *others] if overwrite else []:
                array.fill(0)
            yield np.array(output.as_array())

    (first, *rest) = [*outputs(False), *outputs(True)]
    assert first.any() and all(np.array_equal(output, first) for output in rest)


def test_inputs_live_until_their_batch_is_there_and_no_longer(tmp_path, jpegs, monkeypatch):
    dataset = open_dataset(shards(tmp_path / "set", jpegs * 4))
    _, dali = both(dataset, train_feed(dataset, PLAIN, (64, 64)), (64, 64))
    source, made = dali._source, []

    def watched():
        inputs = source()
        made.append([weakref.ref(array) for array in (*inputs[0], *inputs[1:])])
        return inputs

    monkeypatch.setattr(dali, "_source", watched)
    dali._pipeline = dali._build()
    for served in range(1, 9):
        next(dali)
        # One batch is made ahead of those served; DALI has asked for some more.
        assert len(made) > served + 1
        assert all(ref() is not None for refs in made[served + 1 :] for ref in refs)
    gc.collect()
    assert all(ref() is None for refs in made[: served + 1] for ref in refs)
    dali.close()
