"""The class of every pixel of people's own images: pictures, maps, shares, and photographs that lie on their side."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from fashion_images import MAP_NAMES
from PIL import Image

from dattrain import api
from dattrain.cli import main as cli
from dattrain.errors import ConfigError
from dattrain.palette import palette
from dattrain.pretrained import preprocess
from dattrain.pretrained.segment import Segmentation, segment
from dattrain.visualize.legend import LISTED, with_legend


@pytest.fixture(scope="module")
def photo(scenes):
    return Image.open(scenes / "images" / "validation" / "0.png").convert("RGB")


def test_an_image_in_any_form_has_the_same_classes(tmp_path, segmenter, dense_cfg, photo):
    pixels = np.asarray(photo)
    photo.save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", photo, pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1)]
    found = list(segment(segmenter, dense_cfg, forms))
    assert all((each.classes == found[0].classes).all() for each in found)
    assert found[0].classes.shape == pixels.shape[:2] and (found[0].pixels == pixels).all()
    assert found[0].confidence.min() >= 1 / 11 and found[0].confidence.max() <= 1
    # The network's own answer at the size that it is run at, laid over the image.
    x = preprocess.normalise(preprocess.prepare(preprocess.as_pixels(photo), dense_cfg)[None], dense_cfg)
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(segmenter(x), pixels.shape[:2], mode="bilinear")
    assert (logits.argmax(1)[0].numpy() == found[0].classes).mean() > 0.99


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    image = photo.transpose(stored[orientation]) if orientation > 1 else photo
    image.save(tmp_path / "a.png", exif=exif)
    upright = preprocess.read(tmp_path / "a.png", upright=True)
    assert (upright.permute(1, 2, 0).numpy() == np.asarray(photo)).all()
    assert (preprocess.as_pixels(Image.open(tmp_path / "a.png"), upright=True) == upright).all()


def test_pictures_maps_and_shares(tmp_path, capsys, segmenter_file, scenes):
    out, table = tmp_path / "out", tmp_path / "shares.csv"
    images = scenes / "images" / "validation"
    (tmp_path / "bad.png").write_bytes(b"no image")
    command = ["predict", str(images), str(tmp_path / "bad.png"), "--checkpoint", str(segmenter_file)]
    assert cli.main([*command, "--out", str(out), "--maps", "--topk", "2", "--csv", str(table)]) == 1
    shown = capsys.readouterr()
    assert "bad.png" in shown.err  # after the others are done
    assert {p.name for p in out.iterdir()} == {f"{n}{end}" for n in range(5) for end in (".png", ".map.png")}
    numbers = np.asarray(Image.open(out / "0.map.png"))
    (found,) = api.predict(segmenter_file, images / "0.png", device="cpu")
    assert isinstance(found, Segmentation) and (numbers == found.classes).all()
    drawn = np.asarray(Image.open(out / "0.png"))
    height, width = numbers.shape
    assert (drawn[:height, :width] == found.overlay()).all() and len(drawn) > height
    shares = found.shares()
    assert (
        repr(found).startswith(f"Segmentation({height} x {width}: {shares[0].name} ")
        and len(repr(found)) < 200
    )
    assert sum(each.share for each in shares) == pytest.approx(1)
    assert shares == sorted(shares, key=lambda each: -each.share)
    assert (
        shares[0].share == (numbers == shares[0].number).mean()
        and shares[0].name == MAP_NAMES[shares[0].number]
    )
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and float(rows[0]["share"]) == pytest.approx(shares[0].share, abs=1e-6)
    assert f"{100 * shares[0].share:6.2f} %  {shares[0].name}" in shown.out and " more" in shown.out


def test_files_of_others_stay_and_pictures_of_predict_are_no_input(tmp_path, capsys, segmenter_file, photo):
    photo.save(tmp_path / "a.png")
    command = ["predict", str(tmp_path / "a.png"), "--checkpoint", str(segmenter_file)]
    for own in ("a.png", "a.map.png"):
        out = tmp_path / own[:-4]
        out.mkdir()
        (out / own).write_bytes(b"mine")
        assert cli.main([*command, "--out", str(out), "--maps"]) == 2
        assert f"{out / own} is there, and predict did not write it" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [own] and (out / own).read_bytes() == b"mine"
    for _ in range(2):  # it takes the place of its own
        assert cli.main([*command, "--out", str(tmp_path / "out"), "--maps"]) == 0
    for again in ("a.png", "a.map.png"):
        command[1] = str(tmp_path / "out" / again)
        assert cli.main([*command, "--out", str(tmp_path / "more")]) == 2
        assert f"{again}: is a picture that predict wrote" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_a_legend_names_the_largest_and_sums_up_the_rest():
    count = LISTED + 10
    numbers = np.repeat(np.arange(count, dtype=np.uint8), 50)[None].repeat(40, 0)
    pixels = np.zeros((*numbers.shape, 3), np.uint8)
    names = tuple(f"a class of a name that is much too long for a legend {n}" for n in range(count))

    def draw(names):
        return np.asarray(with_legend(Segmentation(pixels, numbers, numbers.astype(np.float32), names)))

    drawn = draw(names)
    below = drawn[len(numbers) :].reshape(-1, 3)
    colours = {tuple(each) for each in np.unique(below, axis=0).tolist()}
    assert {tuple(each) for each in palette(LISTED).tolist()} <= colours
    assert not {tuple(each) for each in palette(count)[LISTED:].tolist()} & colours
    assert draw(("x" * 500, *names[1:])).shape == drawn.shape, "a long name is cut"
    plain = draw(("background", *names[1:]))
    assert (plain[: len(pixels), :50] == 0).all() and (drawn[: len(pixels), :50] > 0).any()
    assert not (plain.reshape(-1, 3) == palette(1)[0]).all(1).any(), "nor has the legend its colour"


def test_options_of_the_other_task_are_refused(
    tmp_path, capsys, segmenter_file, weights_file, photo, atto, cfg
):
    photo.save(tmp_path / "a.png")
    for file, option in ((segmenter_file, ["--batch", "2"]), (segmenter_file, ["--resize", "squash"]),
                         (weights_file, ["--maps"]), (weights_file, ["--out", "x"])):  # fmt: skip
        assert cli.main(["predict", str(tmp_path / "a.png"), "--checkpoint", str(file), *option]) == 2
        assert f"for which {option[0]} has no meaning" in capsys.readouterr().err
    for option, value, words in (
        ("--out", tmp_path / "a.png" / "x", f"{tmp_path / 'a.png'} is no folder"),
        ("--out", tmp_path / "a.png", "is a file; name a folder"),
        ("--csv", tmp_path, "is a folder; name a file"),
        ("--topk", 0, "--topk 0 must be at least 1"),
    ):
        command = [
            "predict",
            str(tmp_path / "a.png"),
            "--checkpoint",
            str(segmenter_file),
            option,
            str(value),
        ]
        assert cli.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    with pytest.raises(ConfigError, match="topk is for image classifiers and detectors"):
        api.predict(segmenter_file, photo, topk=3, device="cpu")
    with pytest.raises(ConfigError, match="is an image classifier"):
        next(segment(atto, cfg, [photo]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
