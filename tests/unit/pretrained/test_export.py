"""Every export is loaded back by what it is for, and gives the model's logits on real images."""

from __future__ import annotations

import json
import types

import huggingface_hub
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from dattrain.cli import main as cli
from dattrain.errors import UserError
from dattrain.models import create
from dattrain.models.authors import convert
from dattrain.pretrained import export, export_authors, export_graph, export_timm, import_authors, weights
from dattrain.pretrained.exported import GRAPH, Exported
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, cfg_of_model

SMALL = {"dims": (16, 32, 32, 32), "heads": (1, 2, 2, 2), "groups": (1, 1, 1, 2)}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A DAT with every kind of its blocks and large offsets, at 64 and 32 x 64."""
    return _save(tmp_path_factory, "dat_atto", blocks=("L", "S", "D", "D"), **SMALL)


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """The same blocks in a graph of half the size."""
    return _save(
        tmp_path_factory,
        "dat_atto",
        blocks=("L", "SD"),
        **{"dims": (16, 32), "heads": (1, 2), "groups": (1, 2)},
        **{"strides": (2, 1), "offset_kernels": (5, 3), "sr_ratios": (1, 1)},
    )


@pytest.fixture(scope="module")
def small_pp(tmp_path_factory):
    return _save(tmp_path_factory, "dat_pp_tiny", blocks=("ND", "N", "D", "D"), **SMALL)


def _save(tmp_path_factory, name, **overrides):
    torch.manual_seed(2)
    model = create(name, num_classes=7, img_size=64, **overrides)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias_table" in key:
                parameter.normal_(std=0.5)
            elif "offset.proj" in key:
                parameter.mul_(20)
    path = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
    weights.save(
        path,
        model.state_dict(),
        PretrainedCfg(name, 7, (64, 64), overrides=overrides, classes=tuple("abcdefg")),
    )
    return path


@pytest.mark.parametrize("which", ["small", "small_pp"])
@pytest.mark.parametrize("to", ["safetensors", "authors", "timm"])
def test_weights_come_back_bit_for_bit(tmp_path, capsys, request, which, to):
    source, out = request.getfixturevalue(which), tmp_path / "out"
    assert cli.main(["export", str(source), "--to", to, "--out", str(out)]) == 0
    assert "same best class on 8 of 8 images" in capsys.readouterr().out
    model = weights.load_model(source)[0]
    if to == "authors":
        state, *_ = import_authors.load(out.with_suffix(".pth"))
        assert any("conv_offset" in name for name in state)
        back = convert.from_authors(state, import_authors.read_config(out.with_suffix(".yaml")))
    elif to == "timm":
        back = timm.create_model(f"local-dir:{out}", pretrained=True)
        features = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True)
        assert [f.shape[1] for f in features(torch.zeros(1, 3, 64, 64))] == [16, 32, 32, 32]
    else:
        back, cfg = weights.load_model(out.with_suffix(".safetensors"))
        assert cfg == weights.load_model(source)[1]
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.state_dict().items())


def test_windows_that_are_no_squares_and_another_pooling_come_back_or_are_refused(tmp_path):
    """Their code has one side; a file of ours, whose pretrained config was made of the model, and a folder for timm have them."""
    given = {"blocks": ("L", "S", "D", "D"), "window_size": (2, 4), "global_pool": "max", **SMALL}
    model = create("dat_atto", num_classes=7, img_size=64, **given).eval()
    cfg = cfg_of_model(model)
    with pytest.raises(UserError, match="square windows; this model's are 2 x 4"):
        export_authors.authors_config(model)
    for to in ("safetensors", "timm"):
        back = export.write(model, cfg, to, tmp_path / to).run
        assert back.global_pool == "max"
        assert back.windows((64, 64)) == [(2, 4), (2, 4), (2, 4), (2, 2)]


@pytest.mark.parametrize(("name", "limit"), [("dat_atto", "clamp"), ("dat_pp_tiny", "tanh")])
def test_a_range_of_offsets_that_the_other_code_of_the_authors_has_is_refused(name, limit):
    # Theirs is -1 for either: with small offsets the logits hardly tell.
    with torch.device("meta"):
        model = create(name, num_classes=7, img_size=64, offset_range=limit)
    with pytest.raises(UserError, match=f"no offset_range={limit}"):
        export_authors.authors_config(model)


def test_timm_exports_take_another_head(tmp_path, small):
    assert cli.main(["export", str(small), "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_the_hubs_folder_is_timms_with_a_card_that_leaves_the_license_open(tmp_path, capsys, small):
    out = tmp_path / "mine"
    assert cli.main(["export", "--to", "hub", str(small), str(out)]) == 0
    assert "states no license" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "license" not in json.loads((out / "config.json").read_text())["pretrained_cfg"]
    back = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(back(images), weights.load_model(small)[0](images))
    assert back.pretrained_cfg["label_names"] == list("abcdefg")
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.library_name == "timm" and card.data.license is None and card.data.eval_results is None
    assert "- classes: 7: a, b, c, d, e, f, g" in card.text and "accuracy: not on record" in card.text


@pytest.mark.parametrize("words", [["bogus", "x"], ["timm"], ["timm", "a", "--out", "b"]])
def test_a_place_to_write_to_is_named_once(small, capsys, words):
    assert cli.main(["export", str(small), "--to", *words]) == 2
    assert f"--to {words[0]}" in capsys.readouterr().err


def test_authors_export_of_a_released_architecture_needs_no_yaml(tmp_path):
    torch.manual_seed(0)
    model = create("dat_tiny", num_classes=1000, img_size=224)
    weights.save(tmp_path / "a.safetensors", model.state_dict(), cfg_of_model(model))
    # One image to compare on: it is a large model.
    Image.new("RGB", (64, 48), (90, 150, 30)).save(tmp_path / "x.png")
    command = ["export", str(tmp_path / "a.safetensors"), "--images", str(tmp_path / "x.png")]
    assert cli.main([*command, "--to", "authors", "--out", str(tmp_path / "b.pth")]) == 0
    assert cli.main(["import", str(tmp_path / "b.pth")]) == 0
    back, cfg = weights.load_model(tmp_path / "b.safetensors")
    assert cfg.name == "dat_tiny"
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))


def test_a_model_the_authors_code_cannot_hold_is_refused(tmp_path, capsys):
    model = create("dat_atto", num_classes=7, img_size=(64, 32), blocks=("L", "S", "D", "D"), **SMALL)
    weights.save(tmp_path / "a.safetensors", model.state_dict(), cfg_of_model(model))
    assert (
        cli.main(
            ["export", str(tmp_path / "a.safetensors"), "--to", "authors", "--out", str(tmp_path / "b.pth")]
        )
        == 1
    )
    assert "64 x 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("which", "sizes"),
    [
        ("two_stages", [(32, 96)]),
        pytest.param("small", [(64, 64), (32, 96)], marks=pytest.mark.full),
        pytest.param("small_pp", [(64, 64), (32, 96)], marks=pytest.mark.full),
    ],
)
def test_onnx_runs_with_its_sampling_intact(tmp_path, capsys, request, which, sizes):
    source = request.getfixturevalue(which)
    command = ["export", str(source), "--to", "onnx", "--out", str(tmp_path / "m")]
    for height, width in sizes:
        command += ["--img-size", str(height), str(width)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("same best class on 8 of 8 images") == len(sizes)
    for size in sizes:
        file = tmp_path / (f"m_{size[0]}x{size[1]}.onnx" if len(sizes) > 1 else "m.onnx")
        graph = onnx.load(file)
        # Two samplings per deformable block: of the keys, and of the bias at continuous displacements.
        assert sum(node.op_type == "GridSample" for node in graph.graph.node) >= (
            2 if which == "two_stages" else 4
        )
        properties = {item.key: item.value for item in graph.metadata_props}
        assert json.loads(properties["classes"]) == list("abcdefg")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        model, _ = weights.load_model(source, img_size=size)
        for batch in (1, 3):
            x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
            with torch.no_grad():
                expected = model(x).numpy()
            np.testing.assert_allclose(
                session.run(None, {"images": x.numpy()})[0], expected, atol=2e-4, rtol=1e-3
            )


def test_an_opset_that_cannot_be_written_is_refused(tmp_path, small, capsys, monkeypatch):
    command = ["export", str(small), "--to", "onnx", "--out", str(tmp_path / "m.onnx"), "--opset"]
    assert cli.main([*command, "17"]) == 1
    assert "--opset 17: 18 is the lowest" in capsys.readouterr().err
    # Where torch's conversion to a later one fails, it gives what it had.
    kept = types.SimpleNamespace(model=types.SimpleNamespace(opset_imports={"": 18}))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: kept)
    monkeypatch.setattr(export_graph, "_traced", lambda model, cfg: None)
    assert cli.main([*command, "99"]) == 1
    assert "--opset 99" in (message := capsys.readouterr().err) and "gave 18" in message
    assert not (tmp_path / "m.onnx").exists()


def test_class_names_are_in_timms_config(tmp_path):
    named = PretrainedCfg("dat_atto", 2, (64, 64), classes=("cat", "dog"))
    assert export_timm.timm_config(named)["label_names"] == ["cat", "dog"]
    assert "label_descriptions" not in export_timm.timm_config(named)
    config = export_timm.timm_config(PretrainedCfg("dat_atto", 1000, (64, 64), labels="imagenet-1k"))
    assert config["label_names"][1] == "n01443537" and len(config["label_names"]) == 1000
    assert config["label_descriptions"]["n01443537"] == "goldfish, Carassius auratus"
    assert "label_names" not in export_timm.timm_config(PretrainedCfg("dat_atto", 1000, (64, 64)))
    # timm gives them to whoever loads the folder.
    model = create("dat_atto", num_classes=2, img_size=64)
    export.write(model.eval(), named, "timm", tmp_path / "hub")
    assert timm.create_model(f"local-dir:{tmp_path / 'hub'}").pretrained_cfg["label_names"] == ["cat", "dog"]


def test_a_model_of_other_channels_is_exported(tmp_path, capsys):
    model = create("dat_atto", num_classes=2, img_size=64, in_chans=4)
    weights.save(tmp_path / "a.safetensors", model.state_dict(), cfg_of_model(model))
    command = ["export", str(tmp_path / "a.safetensors"), "--to", "safetensors", "--out", str(tmp_path / "b")]
    assert cli.main(command) == 0


def test_torch_export_loads_back_for_any_batch(tmp_path, two_stages):
    assert (
        cli.main(["export", str(two_stages), "--to", "torch.export", "--out", str(tmp_path / "m.pt2")]) == 0
    )
    extra = {"card.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert PretrainedCfg.from_json(extra["card.json"]) == weights.load_model(two_stages)[1]
    x = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            program.module()(x), weights.load_model(two_stages)[0](x), atol=1e-4, rtol=1e-3
        )


def pretend(monkeypatch, factor):
    """Instead of a graph, whose making takes long: the model itself, its logits times ``factor``."""

    def written(model, cfg, out):
        out.write_text(f"{cfg.img_size}")
        return Exported(out, cfg, lambda x: model(x) * factor, GRAPH)

    monkeypatch.setattr(export, "write_torch_export", written)


def test_a_graph_that_differs_is_an_error(tmp_path, small, monkeypatch, capsys):
    pretend(monkeypatch, 1.1)
    assert cli.main(["export", str(small), "--to", "torch.export", "--out", str(tmp_path / "m")]) == 1
    assert "does not give the model's logits" in capsys.readouterr().err


def test_every_size_has_a_graph_of_its_own(tmp_path, small, monkeypatch, capsys):
    pretend(monkeypatch, 1.0)
    command = ["export", str(small), "--to", "torch.export", "--out", str(tmp_path / "m")]
    assert cli.main([*command, "--img-size", "64", "--img-size", "32", "96"]) == 0
    assert capsys.readouterr().out.count("same best class on 8 of 8 images") == 2
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"m_64x64.pt2": "(64, 64)", "m_32x96.pt2": "(32, 96)"}


def test_nothing_is_overwritten_unasked(tmp_path, small, capsys):
    out = tmp_path / "a.safetensors"
    out.write_text("mine")
    assert cli.main(["export", str(small), "--to", "safetensors", "--out", str(out)]) == 1
    assert out.read_text() == "mine" and "--force" in capsys.readouterr().err


def test_one_size_for_weights(tmp_path, small, capsys):
    command = [
        "export",
        str(small),
        "--to",
        "authors",
        "--out",
        str(tmp_path / "m"),
        "--img-size",
        "64",
        "--img-size",
        "96",
    ]
    assert cli.main(command) == 2
    assert "one --img-size" in capsys.readouterr().err
