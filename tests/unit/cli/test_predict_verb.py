"""``dattrain predict``: what it prints and writes, and what it says of files that it cannot use."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from fashion_images import fashion
from PIL import Image

import dattrain
from dattrain.cli import main as cli
from dattrain.errors import UserError
from dattrain.models import create
from dattrain.pretrained import class_names, preprocess, weights
from dattrain.pretrained.pretrained_cfg import cfg_of_model


@pytest.fixture
def images(tmp_path):
    for i, image in enumerate(fashion(3)[0]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return tmp_path


def test_rows_are_the_models_best_classes(images, atto, cfg, weights_file, capsys):
    assert (
        cli.main(["predict", str(images), "--checkpoint", str(weights_file), "--topk", "3", "--csv", "-"])
        == 0
    )
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 9
    x = preprocess.normalise(preprocess.prepare(preprocess.read(images / "1.png"), cfg)[None], cfg)
    with torch.no_grad():
        best = atto(x).softmax(1).topk(3)
    mine = [row for row in rows if row["image"].endswith("1.png")]
    assert [int(row["class"]) for row in mine] == best.indices[0].tolist()
    assert [row["name"] for row in mine] == [cfg.classes[i] for i in best.indices[0]]
    assert [float(row["probability"]) for row in mine] == pytest.approx(best.values[0].tolist(), abs=1e-5)


def test_names_file_and_printed_block(images, weights_file, capsys, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {i}" for i in range(10)))
    command = ["predict", str(images / "0.png"), "--checkpoint", str(weights_file), "--classes", str(names)]
    assert cli.main([*command, "--csv", str(tmp_path / "p.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "thing" in lines[1] and "%" in lines[1]
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 6
    names.write_bytes(b"\xef\xbb\xbfant\r\nbee\r\n")
    assert class_names.read(names, 2) == ["ant", "bee"]
    names.write_text("only one")
    assert cli.main(command) == 1
    assert "1 names, but the model has 10" in capsys.readouterr().err


def test_a_bad_image_does_not_hide_the_others(images, weights_file, capsys):
    (images / "bad.png").write_bytes(b"no image")
    assert cli.main(["predict", str(images), "--checkpoint", str(weights_file)]) == 1
    out = capsys.readouterr()
    assert "2.png" in out.out and "bad.png" in out.err


def test_what_a_folder_holds_beside_images_is_named(images, weights_file, capsys):
    (images / "a.heic").write_bytes(b"")
    (images / "deeper").mkdir()
    (images / ".hidden").write_bytes(b"")
    assert cli.main(["predict", str(images), "--checkpoint", str(weights_file)]) == 0
    assert "2 skipped: a.heic, deeper/" in capsys.readouterr().err
    with pytest.raises(UserError, match="a folder without images$"):
        preprocess.find([images / "deeper"])
    (images / "deeper/b.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"without images \(it holds b.heic\)"):
        preprocess.find([images / "deeper"])


def test_a_checkpoint_that_is_not_there_is_named_first(images, capsys):
    for verb in (["predict"], ["viz", "points"]):
        assert cli.main([*verb, str(images / "gone.png"), "--checkpoint", "nothere"]) == 1
        assert "nothere: no such run folder, checkpoint" in capsys.readouterr().err


def test_what_is_no_image_is_refused_with_what_was_given(weights_file):
    for image, says in (
        ("nope.png", "nope.png: cannot be read .No such file"),
        (3, "an image that is 3: give a file"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\) and uint8: give uint8.*one pixel at least"),
        (np.zeros((4, 4), np.uint16), r"shape \(4, 4\) and uint16"),
        (np.zeros(3, np.uint8), r"shape \(3,\)"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"shape \(4, 4\) and torch.uint8"),
    ):
        with pytest.raises(UserError, match=says):
            dattrain.predict(weights_file, [image])
    with pytest.raises(UserError, match="an image that is 3"):
        dattrain.predict(weights_file, 3)


def test_a_bad_image_is_skipped_where_that_is_asked_for(images, weights_file, segmenter_file, caplog):
    (images / "1.png").write_bytes(b"no image")
    for file in (weights_file, segmenter_file):
        with pytest.raises(UserError, match=r'1.png.*on_bad="skip" goes on without it'):
            dattrain.predict(file, images)
        alone = [dattrain.predict(file, images / name)[0] for name in ("0.png", "2.png")]
        first, bad, last = dattrain.predict(file, images, on_bad="skip")
        assert bad is None and "1.png" in caplog.text and "skipped" in caplog.text
        for one, other in zip((first, last), alone):
            if file == weights_file:
                assert [each.name for each in one] == [each.name for each in other]
            else:
                assert (one.classes == other.classes).all()
    with pytest.raises(UserError, match="no on_bad='ignore'; choose error or skip"):
        dattrain.predict(weights_file, images, on_bad="ignore")


def test_a_misspelt_option_of_evaluate_is_refused_with_the_one_meant(weights_file):
    with pytest.raises(UserError, match="evaluate has no option lineer_probe; did you mean linear_probe?"):
        dattrain.Run(weights_file).evaluate(lineer_probe=True)


def test_a_model_of_other_channels_is_refused_by_name(images, tmp_path, capsys):
    model = create("dat_atto", num_classes=2, img_size=64, in_chans=4)
    weights.save(tmp_path / "c4.safetensors", model.state_dict(), cfg_of_model(model))
    assert cli.main(["predict", str(images / "0.png"), "--checkpoint", str(tmp_path / "c4.safetensors")]) == 1
    assert "takes 4 channels" in capsys.readouterr().err
