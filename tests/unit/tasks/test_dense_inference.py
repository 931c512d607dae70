"""Whole, sliding, several scales and mirrored: against mmsegmentation's inference written out at full size."""

import numpy as np
import pytest
import scenes
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from dattrain.config.load import loads
from dattrain.data.augment.dense_plan import resized_size
from dattrain.data.augment.dense_transforms import resize
from dattrain.tasks import dense_inference
from dattrain.tasks.dense_inference import Inference, decide, window_corners

MODES = {
    "whole": [],
    "scales": ["eval.scales=[0.5,1.0,1.75]"],
    "flip": ["eval.flip=true"],
    "slide": ["eval.mode=slide", "geometry.crop=[40,32]", "eval.stride=[25,20]"],
    "slide, scales and flip": [
        "eval.mode=slide",
        "geometry.crop=48",
        "eval.scales=[0.5,1.5]",
        "eval.flip=true",
    ],
}
K = 21


class Net(nn.Module):
    """Logits at a quarter of the size, which depend on the place in the window, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, K, 3, padding=1)
        self.calls = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        x = F.avg_pool2d(x, 4, ceil_mode=True, count_include_pad=False)
        ramp = torch.linspace(-1, 1, x.shape[3]).expand_as(x[:, :1])
        return 3 * self.conv(x + ramp)


def config(*overrides):
    return loads(yaml.safe_dump(scenes.RECIPE), [f"model.num_classes={K}", *overrides]).config


def image(height=70, width=93, seed=1):
    small = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 9, 12), dtype=np.uint8))
    return resize(small, (height, width), "bicubic")


def mmseg(net, picture, cfg):
    """H x W probabilities by class, as ``EncoderDecoder.aug_test`` makes them: everything at full size, one window at a time."""
    original, found = picture.shape[1:], []
    for scale in cfg.eval.scales:
        size = resized_size(
            *original, short_side=cfg.geometry.short_side, long_side=cfg.geometry.long_side, scale=scale
        )
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.augment.mean, cfg.augment.std))
        x = ((resize(picture, size, cfg.augment.interpolation) / 255 - mean) / std)[None]
        for flip in (False, True) if cfg.eval.flip else (False,):
            turned = x.flip(3) if flip else x
            if cfg.eval.mode == "slide":
                crop = np.broadcast_to(cfg.geometry.crop, 2)
                stride = crop * 2 // 3 if cfg.eval.stride is None else np.broadcast_to(cfg.eval.stride, 2)
                rows, columns = (max(s - c + t - 1, 0) // t + 1 for s, c, t in zip(size, crop, stride))
                total, count = torch.zeros(1, K, *size), torch.zeros(1, 1, *size)
                for row in range(rows):
                    for column in range(columns):
                        y2, x2 = (
                            min(row * stride[0] + crop[0], size[0]),
                            min(column * stride[1] + crop[1], size[1]),
                        )
                        y1, x1 = max(y2 - crop[0], 0), max(x2 - crop[1], 0)
                        piece = turned[:, :, y1:y2, x1:x2]
                        logits = F.interpolate(net(piece), size=piece.shape[2:], mode="bilinear")
                        total[:, :, y1:y2, x1:x2] += logits
                        count[:, :, y1:y2, x1:x2] += 1
                logits = total / count
            else:
                logits = F.interpolate(net(turned), size=size, mode="bilinear")
            probability = F.interpolate(logits, size=original, mode="bilinear").softmax(1)
            found.append(probability.flip(3) if flip else probability)
    return torch.stack(found).mean(0)[0]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_equal_to_everything_at_full_size(mode, monkeypatch):
    monkeypatch.setattr(dense_inference, "CLASSES", 8)
    cfg, net, picture = config(*MODES[mode]), Net().eval(), image()
    expected = mmseg(net, picture, cfg)
    truth = torch.randint(K, expected.shape[1:], dtype=torch.uint8)
    truth[:20] = 255
    found = decide(Inference(cfg, torch.float32).views(net, picture), picture.shape[1:], truth)
    assert found.classes.dtype == torch.uint8 and found.classes.shape == picture.shape[1:]
    top = expected.topk(2, dim=0).values
    sure = top[0] - top[1] > 1e-4  # elsewhere the order of sums decides
    assert sure.float().mean() > 0.99 and torch.equal(found.classes[sure].long(), expected.argmax(0)[sure])
    torch.testing.assert_close(found.confidence, expected.amax(0), rtol=1e-4, atol=1e-5)
    losses = F.nll_loss(expected.log()[None], truth[None].long(), ignore_index=255, reduction="none")[0]
    torch.testing.assert_close(found.loss, losses, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_scale_without_mirror_is_the_argmax_of_logits():
    cfg, net, picture = config("geometry.short_side=70"), Net().eval(), image()
    normalised = Inference(cfg, torch.float32)._normalize(picture[None])
    logits = F.interpolate(net(normalised), size=(70, 93), mode="bilinear", align_corners=False)[0]
    found = decide(Inference(cfg, torch.float32).views(net, picture), (70, 93))
    assert torch.equal(found.classes.long(), logits.argmax(0)) and found.loss is None


def test_windows_cover_the_image_and_end_with_it():
    assert window_corners((10, 10), (10, 10), (4, 4)) == [(0, 0)]
    assert window_corners((10, 7), (4, 7), (3, 5)) == [(0, 0), (3, 0), (6, 0)]
    assert window_corners((11, 4), (4, 4), (3, 3)) == [(0, 0), (3, 0), (6, 0), (7, 0)]
    random = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(int(x) for x in random.integers(1, 40, 2))
        window = tuple(int(random.integers(1, side + 1)) for side in size)
        stride = tuple(int(random.integers(1, side + 1)) for side in window)
        seen = np.zeros(size, int)
        for top, left in window_corners(size, window, stride):
            assert top + window[0] <= size[0] and left + window[1] <= size[1]
            seen[top : top + window[0], left : left + window[1]] += 1
        assert seen.min() >= 1


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_in_lockstep_every_image_takes_as_many_calls_as_none(mode):
    cfg = config(*MODES[mode])
    inference, calls = Inference(cfg, torch.float32), []
    for size in (None, (70, 93), (30, 200)):
        net = Net().eval()
        if size is None:
            inference.nothing(net, torch.device("cpu"))
        else:
            views = inference.views(net, image(*size), lockstep=True)
            free = decide(inference.views(Net().eval(), image(*size)), size).confidence
            torch.testing.assert_close(decide(views, size).confidence, free, rtol=1e-4, atol=1e-5)
        calls.append(len(net.calls))
    assert calls == [len(cfg.eval.scales)] * 3
