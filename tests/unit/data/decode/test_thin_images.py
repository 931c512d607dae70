"""Images that are much longer than wide: resizing them whole would take thousands of times the crop's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, write_tar
from PIL import Image

from dattrain.config.data_sections import Augment, Data
from dattrain.data.augment.cpu_transforms import eval_image, resize, resize_window, train_image
from dattrain.data.augment.plan import draw, eval_geometry
from dattrain.data.decode.cpu import CpuDecoder, EvalTransform
from dattrain.data.decode.images import decode
from dattrain.data.feed import EvalFeed, fetch
from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.source.dataset import open_dataset
from dattrain.pretrained import preprocess
from dattrain.pretrained.pretrained_cfg import PretrainedCfg

SIZE = (224, 224)
THIN = [(1, 16_384), (16_384, 1), (2, 16_384), (7, 3_000)]
"""Height and width; the first would be 256 x 4,194,304 pixels."""


def ramp(height: int, width: int) -> Image.Image:
    """Gray that rises along the longer side, so that a part taken elsewhere shows."""
    along = np.linspace(0, 240, max(height, width)).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(along[:, None] if height > width else along, (height, width)))


@contextmanager
def peak_below(mib: float) -> Iterator[None]:
    """Within it, this process takes at most so much memory on top of what it has."""

    def kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # the high-water mark is now what is in use
    before = kib("VmRSS")
    yield
    assert kib("VmHWM") - before < mib * 1024


@pytest.mark.parametrize("policy", ["shorter", "squash"])
@pytest.mark.parametrize("hw", THIN)
def test_memory_in_evaluation_is_of_the_order_of_the_crop(hw, policy):
    out = torch.empty(*SIZE, 3, dtype=torch.uint8)
    data = encode(ramp(*hw), "PNG")
    with peak_below(32):
        eval_image(decode(data), SIZE, out, policy=policy, crop_pct=0.875, interpolation="bicubic")
        prepared = preprocess.prepare(decode(data), PretrainedCfg("dat_atto", 2, SIZE, resize=policy))
    assert torch.equal(prepared.permute(1, 2, 0), out)
    assert abs(int(out[112, 112, 0]) - 120) <= 1


@pytest.mark.parametrize("hw", THIN)
def test_memory_in_training_is_of_the_order_of_the_crop(hw):
    out = torch.empty(*SIZE, 3, dtype=torch.uint8)
    plan = draw(Augment(randaugment=None), 0, np.arange(20), SIZE)
    data = encode(ramp(*hw), "PNG")
    with peak_below(32):
        for i in range(len(plan)):
            train_image(decode(data), plan, i, out)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [SIZE, (96, 160)])
@pytest.mark.parametrize("hw", [(30, 500), (500, 30), (1, 300), (300, 1), (40, 1100), (2000, 150)])
def test_cropping_first_gives_what_resizing_first_gives(hw, size, interpolation):
    """Also at the borders, where the filter reads beyond the crop."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (-(-hw[0] // 3), -(-hw[1] // 3), 3), dtype=np.uint8)
    large = Image.fromarray(small).resize((hw[1], hw[0]), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(large)).permute(2, 0, 1)
    new, corner = eval_geometry(*hw, size, resize="shorter", crop_pct=0.875)
    (top, left), (height, width) = corner, size
    whole = resize(image, new, interpolation)[:, top : top + height, left : left + width]
    difference = (resize_window(image, new, corner, size, interpolation).int() - whole.int()).abs().float()
    assert difference.max() <= 2 and difference.mean() < 0.03


@pytest.mark.parametrize("policy", ["shorter", "squash"])
@pytest.mark.parametrize("hw", [(375, 500), (500, 100), (60, 60), (90, 400)])
def test_ordinary_images_are_evaluated_as_ever(photo, hw, policy):
    """To the bit what resizing the whole gives."""
    image = decode(encode(photo.crop((0, 0, hw[1], hw[0])), "PNG"))
    new, (top, left) = eval_geometry(*hw, SIZE, resize=policy, crop_pct=0.875)
    out = torch.empty(*SIZE, 3, dtype=torch.uint8)
    eval_image(image, SIZE, out, policy=policy, crop_pct=0.875, interpolation="bicubic")
    whole = resize(image, new, "bicubic")[:, top : top + SIZE[0], left : left + SIZE[1]]
    assert torch.equal(out.permute(2, 0, 1), whole)


@pytest.mark.parametrize("policy", ["shorter", "squash"])
def test_dali_crops_first_too(tmp_path, policy):
    pytest.importorskip("nvidia.dali")
    from dattrain.data.decode.dali import DaliDecoder

    members = []
    for i, hw in enumerate([*THIN, (30, 500), (500, 30)]):
        members += [(f"{i}.jpg", encode(ramp(*hw), "PNG")), (f"{i}.cls", b"0")]
    write_tar(tmp_path / "val-0000.tar", members)
    index_shards([str(tmp_path / "val-0000.tar")])
    dataset = open_dataset(str(tmp_path))
    feed = EvalFeed(dataset.counts, 3, 0, 1)
    transform = EvalTransform(policy, 0.875, "bicubic")

    def read(number):
        return fetch(dataset, feed.request(number), num_classes=1, skip_bad=False)

    cpu = CpuDecoder(read, size=SIZE, skip_bad=False, transform=transform)
    with peak_below(200):  # mostly what loads when the first pipeline is built
        dali = DaliDecoder(
            read,
            batch=3,
            size=SIZE,
            skip_bad=False,
            interpolation="bicubic",
            data=Data(dali_threads=1),
            device=torch.device("cpu"),
            transform=transform,
            count=len(feed),
        )
        batches = list(dali)
    for number, batch in enumerate(batches):
        assert dali.rebuilt == 0
        # DALI repeats the border where the others leave the filter's rest out, which shows on two rows.
        assert (batch.images.int() - cpu(number).images.int()).abs().max() <= 4
