"""Predictions with names, from the command line and from weights of every kind."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
import torch
from fashion_images import fashion
from PIL import Image

from dattrain.cli import main as cli
from dattrain.cli import predict
from dattrain.errors import UserError
from dattrain.models import create
from dattrain.pretrained import class_names, preprocess, weights


@pytest.fixture
def images(tmp_path):
    for i, image in enumerate(fashion(3)[0]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return tmp_path


def test_rows_are_the_models_best_classes(images, atto, card, weights_file, capsys):
    assert (
        cli.main(["predict", str(images), "--checkpoint", str(weights_file), "--topk", "3", "--csv", "-"])
        == 0
    )
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 9
    x = preprocess.normalise(preprocess.prepare(preprocess.read(images / "1.png"), card)[None], card)
    with torch.no_grad():
        best = atto(x).softmax(1).topk(3)
    mine = [row for row in rows if row["image"].endswith("1.png")]
    assert [int(row["class"]) for row in mine] == best.indices[0].tolist()
    assert [row["name"] for row in mine] == [card.classes[i] for i in best.indices[0]]
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
    assert predict.read_names(names, 2) == ["ant", "bee"]
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
    assert "2 passed over: a.heic, deeper/" in capsys.readouterr().err
    with pytest.raises(UserError, match="a folder without images$"):
        preprocess.find([images / "deeper"])
    (images / "deeper/b.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"without images \(it holds b.heic\)"):
        preprocess.find([images / "deeper"])


def test_a_model_of_other_channels_is_refused_by_name(images, tmp_path, capsys):
    model = create("dat_atto", num_classes=2, img_size=64, in_chans=4)
    weights.save(tmp_path / "c4.safetensors", model.state_dict(), weights.card_of_model(model))
    assert cli.main(["predict", str(images / "0.png"), "--checkpoint", str(tmp_path / "c4.safetensors")]) == 1
    assert "takes 4 channels" in capsys.readouterr().err


def test_imagenet_heads_have_names():
    assert class_names.names(1000, "imagenet-1k")[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert class_names.names(2, known=["n01440764", "n01443537"])[0] == "tench, Tinca tinca"
    assert class_names.names(3) == ["class 0", "class 1", "class 2"]
    assert class_names.names(1000)[7] == "class 7", "of no known label set"


def test_files_that_are_not_ours_are_named_as_such(tmp_path, weights_file):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(UserError, match="does not say which model"):
        weights.load_model(other)
    other.write_bytes(weights_file.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        weights.load_model(other)
    with pytest.raises(UserError, match="no such run folder"):
        weights.load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="dattrain import"):
        (tmp_path / "x.pth").write_bytes(b"PK")
        weights.load_model(tmp_path / "x.pth")


def test_tensors_that_do_not_fit_the_card_are_named(tmp_path, atto, card):
    state = dict(atto.state_dict())
    state["surplus"] = state.pop("norm.bias")
    weights.save(tmp_path / "a.safetensors", state, card)
    with pytest.raises(UserError, match=r"norm.bias is missing.*surplus is unknown"):
        weights.load_model(tmp_path / "a.safetensors")


def test_tables_that_were_sampled_keep_their_size(tmp_path, atto, card):
    # As after a fine-tune with init.bias_table=sample: laid out for 96, deformable tables of 64.
    from dattrain.models import surgery

    model = create("dat_atto", num_classes=10, img_size=96)
    surgery.resize_for(model, dict(atto.state_dict()), bias_table="sample")
    model.eval()
    weights.save(tmp_path / "a.safetensors", model.state_dict(), weights.card_of_model(model))
    back, _ = weights.load_model(tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(back(x), model(x))


def test_a_model_of_other_channels_is_refused(card):
    with pytest.raises(UserError, match="takes 4 channels, and an image file gives 3"):
        preprocess.normalise(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), replace(card, in_chans=4))
