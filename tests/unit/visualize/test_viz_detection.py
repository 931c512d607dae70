"""Where a detector looked: points over what it found, and attention of maps that are too large to be laid out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dattrain.cli import main as cli
from dattrain.pretrained import preprocess
from dattrain.pretrained.detect import detect
from dattrain.visualize import detected
from dattrain.visualize.draw_points import attended_image
from dattrain.visualize.picture import picture_of
from dattrain.visualize.sampling_points import attended, capture, select


@pytest.fixture(scope="module")
def pixels(object_set):
    return preprocess.read(object_set / "val" / "1025.png")


@pytest.fixture(scope="module")
def x(pixels, detector_cfg):
    return preprocess.model_input(preprocess.prepare(pixels, detector_cfg), detector_cfg)


def test_what_queries_attend_to_is_their_part_of_all_attention(detector, x):
    def queries(height, width):
        return torch.arange(height * width) % 3

    body = detector.backbone
    (captured,) = capture(body, x, attention=True)
    found = attended(body, x, queries, list)
    assert [(each.stage, each.block) for each in found] == [(each.stage, each.block) for each in captured]
    for one, all_ in zip(found, captured):
        share = queries(*one.map_size).numpy()
        assert (one.positions == all_.positions).all() and one.attention is None
        for group in range(one.groups):
            expected = (all_.group_attention(group) * share[:, None]).sum(0) / share.sum()
            np.testing.assert_allclose(one.received(group), expected, atol=1e-6)
    assert not any("_attend" in module.__dict__ for module in body.modules())


def test_a_picture_ends_before_its_padding(detector, detector_cfg, pixels, x):
    picture = picture_of(pixels, detector_cfg)
    height, width = pixels.shape[1:]
    rows, columns = preprocess.prepare(pixels, detector_cfg).shape[1:]
    assert picture.whole and picture.padded and x.shape[2:] != (rows, columns)
    assert picture.window == pytest.approx((0, 0, height * x.shape[2] / rows, width * x.shape[3] / columns))
    # The corners of what is seen are those of the picture.
    assert picture.within((1, 1)) == pytest.approx((rows / x.shape[2], columns / x.shape[3]))
    first = attended_image(detector, preprocess.prepare(pixels, detector_cfg), detector_cfg)[0]
    last_token = picture.place(first, np.array([[1.0, 1.0]]))[0]
    assert (last_token < picture.window[2:]).all()


def test_queries_lie_in_the_objects(detector, detector_cfg, pixels):
    (found,) = detect(detector, detector_cfg, [pixels])
    (nothing,) = detect(detector, detector_cfg, [pixels], score_threshold=1)
    assert len(found) and not len(nothing)
    picture = picture_of(pixels, detector_cfg)
    one = found.best(1)
    weights = detected._queries(picture, one)(40, 40).reshape(40, 40).numpy()
    ys, xs = (np.nonzero(weights)[axis] for axis in (0, 1))
    centre = (ys.mean() + 0.5) / 40 * picture.window[2], (xs.mean() + 0.5) / 40 * picture.window[3]
    own = np.argwhere(one.masks[0]).mean(0)
    assert centre == pytest.approx(own + 0.5, abs=2)
    whole = detected._queries(picture, nothing)(40, 40).reshape(40, 40).numpy()
    share = whole.mean()
    height, width = found.pixels.shape[:2]
    assert share == pytest.approx(height * width / (picture.window[2] * picture.window[3]), abs=0.06)
    assert (whole[0] > 0).any() and (whole[-1] == 0).all() | (whole[:, -1] == 0).all()


def test_a_sheet_has_the_points_of_stages_3_and_4(detector, detector_cfg, pixels):
    (found,) = detect(detector, detector_cfg, [pixels])
    blocks = detected.points_of(detector, detector_cfg, found)
    assert [block.stage for block in blocks] == [3, 4]
    assert [block.block for block in blocks] == [
        each.block for each in select(attended(detector.backbone, torch.zeros(1, 3, 64, 64), lambda h, w: torch.ones(h * w), list))
        if each.stage > 2
    ]  # fmt: skip
    figure = detected.sheet(detector, detector_cfg, found, "a title")
    first, *others = figure.axes
    assert first.get_title() == "a title" and [axes.get_title()[:7] for axes in others] == [
        "stage 3",
        "stage 4",
    ]
    for axes, block in zip(others, blocks):
        orange, yellow = axes.collections
        assert len(orange.get_offsets()) == len(yellow.get_offsets()) == block.positions[0].size / 2
        sizes, received = orange.get_sizes(), block.received(0)
        assert (np.argsort(sizes[sizes < sizes.max()]) == np.argsort(received[sizes < sizes.max()])).all()
        assert axes.get_xlim()[1] == found.pixels.shape[1]


@pytest.mark.filterwarnings("error")
def test_no_name_and_no_shape_ends_the_pictures(tmp_path, capsys, detector_file, object_set):
    folder, names, out = tmp_path / "in", tmp_path / "names.txt", tmp_path / "out"
    folder.mkdir()
    names.write_text("bar\n$\\oops$\nc$_{$\n")
    thin = np.random.default_rng(0).integers(0, 256, (300, 2, 3), dtype=np.uint8)
    Image.fromarray(thin).save(folder / "$\\thin$.png")
    Image.fromarray(thin.transpose(1, 0, 2)).save(folder / "flat.png")
    (folder / "z.png").write_bytes((object_set / "val" / "1025.png").read_bytes())
    command = ["predict", str(folder), "--checkpoint", str(detector_file), "--out", str(out), "--points"]
    (folder / "y.png").write_bytes(b"no image")
    assert cli.main([*command, "--classes", str(names), "--score", "0.05"]) == 1
    assert "y.png" in capsys.readouterr().err and len(list(out.iterdir())) == 6
    for sheet in out.glob("*.points.png"):
        with Image.open(sheet) as picture:
            assert min(picture.size) >= 120
    assert cli.main(["viz", "points", *command[1:-2], str(tmp_path / "viz"), "--stage", "3"]) == 1
    assert "y.png" in capsys.readouterr().err and len(list((tmp_path / "viz").iterdir())) == 4


def test_words_leave_a_small_picture_to_its_objects(detector, detector_cfg, pixels):
    (found,) = detect(detector, detector_cfg, [pixels])
    large = found.overlay(longest=640)
    factor = -(-640 // max(found.pixels.shape[:2]))
    assert large.shape == (factor * found.pixels.shape[0], factor * found.pixels.shape[1], 3)
    assert found.overlay(longest=8).shape == found.pixels.shape


def test_the_verb_draws_without_all_attention(tmp_path, capsys, detector_file, object_set):
    file = object_set / "val" / "1025.png"
    for kind in ("points", "attention"):
        command = ["viz", kind, str(file), "--checkpoint", str(detector_file), "--out", str(tmp_path / kind)]
        assert cli.main([*command, "--stage", "3"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"{tmp_path / kind / f'1025.{kind}.png'}  ") and " bar" in said[0]
    assert {path.name for path in (tmp_path / "points").iterdir()} == {"1025.points.png", "points.html"}
    assert [path.name for path in (tmp_path / "attention").iterdir()] == ["1025.attention.png"]
    page = (tmp_path / "points" / "points.html").read_text()
    assert '"received"' in page and '"attention":"' not in page
