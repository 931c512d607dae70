from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tvt
from torchvision.transforms import functional as tvf
from torchvision.transforms.v2 import functional as tv2

from dattrain.config.data_sections import Augment
from dattrain.data.augment import randaugment
from dattrain.data.augment.cpu_transforms import eval_image, train_image
from dattrain.data.augment.plan import crop_box, draw
from dattrain.data.decode.images import decode, decode_pillow

SIZE = (64, 96)
PLAIN = Augment(randaugment=None, color_jitter=0)


def ours(image: torch.Tensor, plan, i: int) -> np.ndarray:
    out = torch.empty(*plan.size, 3, dtype=torch.uint8)
    train_image(image, plan, i, out)
    return out.numpy().astype(int)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_crops_are_torchvisions(encodings, interpolation):
    """torchvision's resized crop with the same box: its v2 tensor path exactly, its Pillow path nearly."""
    plan = draw(PLAIN.model_copy(update={"interpolation": interpolation}), 0, np.arange(40), SIZE)
    mode = tvt.InterpolationMode(interpolation)
    for name in ("420", "gray", "progressive", "png", "exif"):
        tensor, pillow = decode(encodings[name]), decode_pillow(encodings[name])
        for i in range(len(plan)):
            box = crop_box(plan.crop[i], pillow.height, pillow.width, plan.crop_ratio)
            exact = tv2.resized_crop(tensor, *box, list(SIZE), mode)
            near = tvf.resized_crop(pillow, *box, list(SIZE), mode)
            if plan.flip[i]:
                exact, near = tvf.hflip(exact), tvf.hflip(near)
            mine = ours(tensor, plan, i)
            np.testing.assert_array_equal(mine, exact.permute(1, 2, 0).numpy())
            difference = np.abs(mine - np.asarray(near))
            assert difference.mean() < 0.3 and (difference > 1).mean() < 2e-3 and difference.max() <= 16


def test_randaugment_and_jitter_follow_the_crop(encodings):
    config = Augment(color_jitter=0.4)
    image = decode(encodings["444"])
    plan = draw(config, 0, np.arange(30), SIZE)
    plain = draw(PLAIN, 0, np.arange(30), SIZE)
    jitter = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)
    for i in range(30):
        theirs = Image.fromarray(ours(image, plain, i).astype(np.uint8))
        for op, argument in zip(plan.ops[i], plan.args[i]):
            theirs = randaugment.apply(
                theirs, op, argument, fill=(124, 116, 104), resample=Image.Resampling.BICUBIC
            )
        for which in plan.jitter_order[i]:
            theirs = jitter[which](theirs, float(plan.jitter[i, which]))
        np.testing.assert_array_equal(ours(image, plan, i), np.asarray(theirs))


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_evaluation_is_torchvisions(encodings, crop_pct):
    """Resize and central crop of the Pillow image by torchvision, as everybody evaluates."""
    side = 64
    theirs = tvt.Compose(
        [tvt.Resize(int(side / crop_pct), tvt.InterpolationMode.BICUBIC), tvt.CenterCrop(side)]
    )
    for name in ("420", "444", "gray", "progressive", "exif", "png"):
        out = torch.empty(side, side, 3, dtype=torch.uint8)
        eval_image(
            decode(encodings[name]),
            (side, side),
            out,
            policy="shorter",
            crop_pct=crop_pct,
            interpolation="bicubic",
        )
        difference = np.abs(out.numpy().astype(int) - np.asarray(theirs(decode_pillow(encodings[name]))))
        assert difference.max() <= 1 and difference.mean() < 0.05, name


def test_the_authors_squash(encodings):
    theirs = tvt.Compose([tvt.Resize((73, 73), tvt.InterpolationMode.BICUBIC), tvt.CenterCrop(64)])
    out = torch.empty(64, 64, 3, dtype=torch.uint8)
    eval_image(
        decode(encodings["420"]), (64, 64), out, policy="squash", crop_pct=0.875, interpolation="bicubic"
    )
    difference = np.abs(out.numpy().astype(int) - np.asarray(theirs(decode_pillow(encodings["420"]))))
    assert difference.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_images_survive(size):
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    plan = draw(PLAIN, 0, np.arange(20), SIZE)
    for i in range(20):
        assert (ours(image, plan, i) == 77).all()
    out = torch.empty(*SIZE, 3, dtype=torch.uint8)
    eval_image(image, SIZE, out, policy="shorter", crop_pct=0.875, interpolation="bicubic")
    assert (out == 77).all()
