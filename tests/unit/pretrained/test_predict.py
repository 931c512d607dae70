"""Predictions from Python: the classes of images in whatever form they come, with their names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fashion_images import fashion
from PIL import Image

from dattrain.errors import UserError
from dattrain.pretrained import class_names, preprocess
from dattrain.pretrained.predict import predict


def test_an_image_in_any_form_has_the_same_classes(tmp_path, atto, cfg):
    images = [Image.fromarray(array).convert("RGB") for array in fashion(5)[0]]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    files = predict(atto, cfg, [tmp_path / f"{i}.png" for i in range(5)], topk=3, batch=2)
    arrays = [np.asarray(image) for image in images]
    assert predict(atto, cfg, images, topk=3, batch=2) == files
    assert predict(atto, cfg, arrays, topk=3, batch=2) == files
    assert (
        predict(atto, cfg, [torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays], topk=3, batch=2)
        == files
    )
    assert predict(atto, cfg, [a[..., 0] for a in arrays], topk=3, batch=2) == files
    assert [len(best) for best in files] == [3] * 5
    x = preprocess.normalise(
        torch.stack([preprocess.prepare(preprocess.as_pixels(a), cfg) for a in arrays[:2]]), cfg
    )
    with torch.no_grad():
        expected = atto(x).softmax(1).topk(3)
    assert [[p.number for p in best] for best in files[:2]] == expected.indices.tolist()
    assert files[0][0].probability == pytest.approx(float(expected.values[0, 0]))
    assert files[0][0].name == cfg.classes[files[0][0].number]


def test_what_is_no_image_is_refused(atto, cfg):
    with pytest.raises(UserError, match=r"shape \(28, 28, 3\) and float64"):
        predict(atto, cfg, [np.zeros((28, 28, 3))])
    with pytest.raises(UserError, match="no classification head"):
        predict(atto, replace(cfg, num_classes=0), [np.zeros((28, 28, 3), np.uint8)])
    assert predict(atto, cfg, []) == []


def test_imagenet_heads_have_names():
    assert class_names.names(1000, "imagenet-1k")[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert class_names.names(2, known=["n01440764", "n01443537"])[0] == "tench, Tinca tinca"
    assert class_names.names(3) == ["class 0", "class 1", "class 2"]
    assert class_names.names(1000)[7] == "class 7", "of no known label set"


def test_a_model_of_other_channels_is_refused(cfg):
    with pytest.raises(UserError, match="takes 4 channels, and an image file gives 3"):
        preprocess.normalise(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), replace(cfg, in_chans=4))
