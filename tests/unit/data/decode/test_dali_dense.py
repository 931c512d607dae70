"""DALI's decoder of images with maps, on the CPU, against the CPU decoder on the same plan; and what it would wait for on CUDA."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_waits import fake_cuda
from pictures import encode
from PIL import Image
from small_scenes import recipe

from dattrain.data.classes import Classes
from dattrain.data.decode.dali_dense import DaliSegmentationDecoder
from dattrain.data.dense_factory import eval_loader, train_loader
from dattrain.errors import UserError

pytest.importorskip("nvidia.dali")

CPU = torch.device("cpu")
MAX, MEAN = 24, 0.35
"""Of an image before distortion, in levels of 255: those of ``test_dali``, for its reason."""
COUNT = 24


def write(root: Path, photo: Image.Image, encodings: dict[str, bytes]) -> Path:
    """Every encoding once, and photographs of 200 to 500 pixels, with maps of random boxes; returns the folder of images."""
    rng = np.random.default_rng(1)
    files = [(name, data) for name, data in encodings.items() if name not in ("exif", "tiff")]
    while len(files) < COUNT:
        w, h = rng.integers(200, 500, 2).tolist()
        x, y = int(rng.integers(0, 512 - w)), int(rng.integers(0, 600 - h))
        files.append((f"photo{len(files)}", encode(photo.crop((x, y, x + w, y + h)), quality=90)))
    images, maps = (root / kind / "training" for kind in ("images", "annotations"))
    for folder in (images, maps):
        folder.mkdir(parents=True)
    for name, data in files:
        end = name if name in ("webp", "gif", "bmp") else name[:3] if name.startswith("png") else "jpg"
        (images / f"{name}.{end}").write_bytes(data)
        with Image.open(images / f"{name}.{end}") as image:
            numbers = np.zeros(image.size[::-1], np.uint8)
        for _ in range(9):
            top, left = (int(rng.integers(0, side)) for side in numbers.shape)
            numbers[top : top + 90, left : left + 120] = rng.integers(1, 7)
        (maps / f"{name}.png").write_bytes(encode(Image.fromarray(numbers), "PNG"))
    (root / "classes.txt").write_text("\n".join("abcdefg"))
    return images


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photo, encodings) -> Path:
    return write(tmp_path_factory.mktemp("dali") / "set", photo, encodings)


def batches(
    folder: Path, decoder: str, count: int, *, geometry: dict, on_bad: str = "error", **train
) -> list:
    cfg = recipe(
        folder,
        classes=7,
        geometry={"short_side": 200, "long_side": 700, **geometry},
        data={"decoder": decoder, "on_bad": on_bad, "dali_threads": 1},
        train={"global_batch": 6, "micro_batch": 3, **train},
    )
    loader = train_loader(cfg, rank=0, world=1, samples_seen=0, device=CPU)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def assert_same_samples(a: list, b: list) -> None:
    assert [(x.keys, x.bad) for x in a] == [(x.keys, x.bad) for x in b]
    for x, y in zip(a, b, strict=True):
        assert x.images.shape == y.images.shape and y.images.dtype == torch.uint8
        for name in ("maps", "sizes", "weight", "position"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name


def differences(a: list, b: list) -> torch.Tensor:
    """Images x 2: largest and mean difference."""
    found = []
    for x, y in zip(a, b):
        for one, other, (height, width) in zip(x.images, y.images, x.sizes.tolist()):
            assert not other[:, height:].any() and not other[:, :, width:].any()
            d = (one.int() - other.int()).abs()[:, :height, :width].float()
            found.append(torch.stack((d.max(), d.mean())))
    return torch.stack(found)


@pytest.mark.parametrize(
    "geometry",
    [{"crop": 160}, {"crop": 320, "scale": (0.5, 2.0)}, {"crop": None, "pad_to": 32}],
    ids=["crop", "smaller than the crop", "whole"],
)
@pytest.mark.parametrize("distortion", [False, True])
def test_training_is_the_cpu_decoders(folder, geometry, distortion):
    cpu, dali = (
        batches(folder, name, 10, geometry={**geometry, "distortion": distortion}) for name in ("cpu", "dali")
    )
    assert_same_samples(cpu, dali)
    found = differences(cpu, dali)
    assert (found[:, 0] > 0).any()
    if distortion:
        # Contrast and saturation times 1.5 each, and hue where a level turns which channel is the largest.
        assert found[:, 1].max() <= 3 * MEAN, found.max(0)
    else:
        assert found[:, 0].max() <= MAX and found[:, 1].max() <= MEAN, found.max(0)


@pytest.fixture
def broken(tmp_path, photo, encodings) -> Path:
    """The set with a file that is no image, one whose fault only shows in decoding, a map of another size and one with class 9."""
    images = write(tmp_path / "set", photo, encodings)
    jpeg = encodings["420"]
    table = jpeg.index(b"\xff\xc4") + 5
    (images / "420.jpg").write_bytes(b"<html>not found</html>")
    (images / "422.jpg").write_bytes(jpeg[:table] + b"\xff" * 16 + jpeg[table + 16 :])
    maps = images.parents[1] / "annotations" / "training"
    (maps / "444.png").write_bytes(encode(Image.new("L", (30, 20)), "PNG"))
    with Image.open(maps / "photo20.png") as image:
        size = image.size
    (maps / "photo20.png").write_bytes(encode(Image.new("L", size, 9), "PNG"))
    return images


def test_bad_samples_keep_their_place(broken):
    cpu, dali = (
        batches(broken, name, 8, geometry={"crop": 96, "distortion": False}, on_bad="skip")
        for name in ("cpu", "dali")
    )
    assert_same_samples(cpu, dali)
    assert sum(len(batch.bad) for batch in dali) == 4
    assert differences(cpu, dali)[:, 1].max() <= MEAN
    for batch in dali:
        assert not batch.images[batch.weight == 0].any() and (batch.maps[batch.weight == 0] == 255).all()


def test_a_bad_sample_is_the_same_error(broken):
    messages = []
    for name in ("cpu", "dali"):
        with pytest.raises(UserError) as caught:
            batches(broken, name, 8, geometry={"crop": 96})
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "data.on_bad=skip" in messages[0]


def test_evaluation_beside_it_has_workers(folder):
    """They are forked while the pipeline's threads live."""
    cfg = recipe(folder, classes=7, data={"decoder": "dali", "dali_threads": 1, "workers": 2})
    training = train_loader(cfg, rank=0, world=1, samples_seen=0, device=CPU)
    assert isinstance(training._decoder, DaliSegmentationDecoder)
    next(training)
    evaluation = eval_loader(cfg, Classes(7, tuple("abcdefg"), "here"), rank=0, world=1, device=CPU)
    assert sum(len(batch) for batch in evaluation) == COUNT
    next(training)
    evaluation.close()
    training.close()


def test_the_host_waits_for_nothing(broken, monkeypatch):
    """With images that DALI decodes, that are decoded elsewhere, and that are bad."""
    cfg = recipe(
        broken,
        classes=7,
        data={"on_bad": "skip", "decoder": "dali"},
        train={"global_batch": 12, "micro_batch": 12},
    )
    training = train_loader(cfg, rank=0, world=1, samples_seen=0, device=CPU)
    made = training._decoder
    assert isinstance(made, DaliSegmentationDecoder)
    prepared = made._prepare(0)
    assert prepared.bad and prepared.done and prepared.here.any()
    made._device = torch.device("cuda", 0)
    monkeypatch.setattr(
        made, "_fed", lambda output, shape: torch.empty(shape, dtype=torch.uint8, device="cuda")
    )
    with fake_cuda() as waits:
        batch = made._finish(prepared, SimpleNamespace())
        assert {tensor.device.type for tensor in made._made_there(batch)} == {"cuda"}
    assert not waits.found, waits.report()
    training.close()
