"""Files as the authors saved them come in safely, and the model in them is told."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dattrain.cli import main as cli
from dattrain.errors import UserError
from dattrain.models import create
from dattrain.models.authors import convert
from dattrain.pretrained import export, import_authors, weights
from dattrain.pretrained.pretrained_cfg import cfg_of_model

SMALL = {"dims": (16, 32, 32, 32), "heads": (1, 2, 2, 2), "groups": (1, 1, 1, 2)}
TWO_STAGES = {
    **{"dims": (16, 32), "heads": (1, 2), "groups": (1, 1), "blocks": ("L", "SD")},
    **{"strides": (2, 1), "offset_kernels": (5, 3), "sr_ratios": (1, 1)},
}
ASSETS = Path(__file__).parents[2] / "assets/models"


def vector(name):
    with np.load(ASSETS / f"{name}.npz", allow_pickle=False) as file:
        state = {
            n.removeprefix("state/"): torch.from_numpy(file[n]) for n in file.files if n.startswith("state/")
        }
        return (
            state,
            json.loads(str(file["config"])),
            torch.from_numpy(file["input"]),
            torch.from_numpy(file["logits"]),
        )


@pytest.fixture
def cfg_node(monkeypatch):
    """A class that pickles under yacs' name, as their config does; yacs itself is not there when the file is read."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in values.items()})
            self.__dict__["__immutable__"] = True
            self.__dict__["__deprecated_keys__"] = set()

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


@pytest.mark.parametrize("name", ["dat_cvpr_small", "dat_pp_small"])
def test_a_checkpoint_with_their_config_gives_their_logits(tmp_path, capsys, cfg_node, monkeypatch, name):
    state, config, image, logits = vector(name)
    file = tmp_path / "ckpt_epoch_299.pth"
    whole = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 299,
        "max_accuracy": 82.0,
    }
    torch.save({**whole, "config": cfg_node({"MODEL": {"TYPE": "dat", "DAT": config}, "AMP": True})}, file)
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert cli.main(["import", str(file)]) == 0
    assert "every tensor is identical" in capsys.readouterr().out
    model, cfg = weights.load_model(tmp_path / "ckpt_epoch_299.safetensors")
    assert cfg.resize == "squash" and cfg.num_classes == 11
    with torch.no_grad():
        ours = model.double()(image.double())
    torch.testing.assert_close(ours, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "size"),
    [("dat_tiny", 224), pytest.param("dat_base", 384, marks=pytest.mark.full), ("dat_pp_tiny", 224)],
)
def test_the_variant_is_inferred_from_names_and_shapes(tmp_path, variant, size):
    # Real shapes with one number behind each: test_export reads a file of a real model.
    with torch.device("meta"):
        model = create(variant, num_classes=1000, img_size=size)
    for parameter in model.to_empty(device="cpu").parameters():
        torch.nn.init.zeros_(parameter)
    state = {
        n: t if t.any() else t.new_zeros(()).expand(t.shape) for n, t in convert.to_authors(model).items()
    }
    file = tmp_path / "released.pth"
    torch.save({"model": state}, file)
    loaded, cfg, origin = import_authors.read(file)
    assert (cfg.name, cfg.img_size, dict(cfg.overrides or {})) == (variant, (size, size), {})
    assert cfg.labels == "imagenet-1k" and "inferred" in origin
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def test_their_names_in_safetensors_need_the_yaml_for_a_small_model(tmp_path):
    state, config, *_ = vector("dat_pp_small")
    file, yaml = tmp_path / "theirs.safetensors", tmp_path / "small.yaml"
    save_file({n: t.contiguous() for n, t in state.items()}, file)
    yaml.write_text(json.dumps({"MODEL": {"DAT": config}}))
    assert cli.main(["import", str(file), "--config", str(yaml)]) == 0
    model, cfg = weights.load_model(tmp_path / "theirs.dattrain.safetensors")
    assert cfg.name == "dat_pp_tiny" and cfg.overrides["neighborhood"] == (7, 5, 3, 3)
    assert model.dims == (16, 32, 64, 128)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_code_in_a_file_is_never_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "extra": Malicious()}, "evil.pth")
    assert cli.main(["import", "evil.pth"]) == 1
    assert "cannot be read safely" in capsys.readouterr().err
    with open("plain.pth", "wb") as file:
        pickle.dump(Malicious(), file)
    assert cli.main(["import", "plain.pth"]) == 1
    assert not (tmp_path / "owned").exists()


def test_another_kind_of_file_is_called_so(tmp_path, capsys):
    (tmp_path / "dat.yaml").write_text("MODEL: {DAT: {}}")
    assert cli.main(["import", str(tmp_path / "dat.yaml")]) == 1
    said = capsys.readouterr().err
    assert "dat.yaml: is no .pth and no .safetensors file, it begins with b'MODEL: {D'" in said
    assert "configuration goes with --config" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"fc.weight": torch.zeros(2, 2)}},
            "not a checkpoint of the authors' DAT (KeyError: 'patch_proj",
        ),
        ({"epoch": 3}, "holds no tensors"),
        ([1, 2], "holds a list"),
    ],
)
def test_other_files_are_named_as_such(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "other.pth")
    assert cli.main(["import", str(tmp_path / "other.pth")]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_or_extra_tensor_or_a_cut_file_is_an_error(tmp_path, capsys):
    state, *_ = vector("dat_cvpr_small")
    file = tmp_path / "a.pth"
    torch.save({"model": {n: t for n, t in state.items() if n != "cls_norm.norm.bias"}}, file)
    assert cli.main(["import", str(file)]) == 1
    assert "cls_norm.norm.bias" in capsys.readouterr().err
    torch.save({"model": {**state, "surplus": torch.zeros(1)}}, file)
    assert cli.main(["import", str(file)]) == 1
    assert "surplus" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:5000])
    assert cli.main(["import", str(file)]) == 1
    assert "cannot be read safely" in capsys.readouterr().err


def test_weights_that_are_no_numbers_and_half_a_configuration_are_named(tmp_path, capsys):
    state, config, *_ = vector("dat_cvpr_small")
    file, yaml = tmp_path / "a.pth", tmp_path / "a.yaml"
    torch.save({"model": {**state, "cls_head.bias": state["cls_head.bias"] / 0}}, file)
    for broken, message in (
        (config, "cls_head.bias holds numbers that are not finite"),
        (
            {"stage_spec": config["stage_spec"]},
            "not a complete MODEL.DAT configuration of the authors (KeyError",
        ),
        ({**config, "heads": 3}, "not a complete MODEL.DAT configuration of the authors (TypeError"),
    ):
        yaml.write_text(json.dumps({"MODEL": {"DAT": broken}}))
        assert cli.main(["import", str(file), "--config", str(yaml)]) == 1
        assert message in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    state, *_ = vector("dat_cvpr_small")
    file, out = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save({"model": state}, file)
    out.write_text("mine")
    assert cli.main(["import", str(file)]) == 1
    assert "--force" in capsys.readouterr().err and out.read_text() == "mine"
    assert cli.main(["import", str(file), "--force"]) == 0


def authors_state(classes: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return convert.to_authors(create("dat_atto", num_classes=classes, img_size=64))


WRAPPED = {
    "ddp": lambda state: {"model": {f"module.{n}": t for n, t in state.items()}},
    "compiled": lambda state: {"state_dict": {f"_orig_mod.{n}": t for n, t in state.items()}},
    "both": lambda state: {"model": {f"module._orig_mod.{n}": t for n, t in state.items()}},
    "averaged alone": lambda state: {"model_ema": state, "epoch": 3},
    "timm's average": lambda state: {"state_dict_ema": {f"module.{n}": t for n, t in state.items()}},
    "nested": lambda state: {"ema": {"module": state, "decay": 0.999}},
    "detector": lambda state: {
        "state_dict": {f"backbone.{n}": t for n, t in state.items()} | {"neck.conv.weight": torch.zeros(1)},
        "meta": {"epoch": 12},
    },
    "numpy's numbers and arguments": lambda state: {
        "model": state,
        "max_accuracy": np.float64(81.5),
        "best": np.int64(7),
        "curve": np.arange(3.0),
        "args": argparse.Namespace(lr=1e-3, seed=np.int32(0)),
    },
}


@pytest.mark.parametrize("wrapped", list(WRAPPED))
def test_what_trainers_put_around_the_tensors_is_taken_off(tmp_path, wrapped):
    state, file = authors_state(), tmp_path / "a.pth"
    torch.save(WRAPPED[wrapped](state), file)
    found, _, notes = import_authors.load(file)
    assert list(found) == list(state) and all(torch.equal(found[n], t) for n, t in state.items())
    assert ("neck" in " ".join(notes)) == (wrapped == "detector")
    assert ("ema" in " ".join(notes)) == (wrapped in ("averaged alone", "timm's average"))


def test_two_models_in_one_file_are_refused(tmp_path, capsys):
    state = authors_state()
    both = {f"{side}.{n}": t for side in ("student", "teacher") for n, t in state.items()}
    torch.save({"model": both}, tmp_path / "a.pth")
    assert cli.main(["import", str(tmp_path / "a.pth")]) == 1
    assert "holds 2 models, named student., teacher." in capsys.readouterr().err


@pytest.mark.parametrize("dense", [False, True])
def test_a_file_without_head_gives_a_model_without_one(tmp_path, capsys, dense):
    model = create("dat_atto", num_classes=5, img_size=64, blocks=("LS", "L", "LD", "LD"))
    state = convert.to_authors(model)
    headless = {n: t for n, t in state.items() if not n.startswith("cls_head")}
    if dense:
        headless = {n: t for n, t in headless.items() if not n.startswith("cls_norm")}
        headless |= {
            f"norms.{i}.norm.{part}": torch.ones(model.dims[i])
            for i in range(4)
            for part in ("weight", "bias")
        }
        headless = {f"backbone.{n}": t for n, t in headless.items()}
    torch.save({"state_dict": headless}, tmp_path / "a.pth")
    assert cli.main(["import", str(tmp_path / "a.pth")]) == 0
    out = capsys.readouterr().out
    assert "no classification head" in out and ("the last norm is fresh" in out) == dense
    back, cfg = weights.load_model(tmp_path / "a.safetensors")
    assert (cfg.num_classes, cfg.labels) == (0, None)
    assert torch.equal(back.stages[2].blocks[1].attn.q.weight, model.stages[2].blocks[1].attn.q.weight)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for verb in (["predict", str(tmp_path / "a.png"), "--checkpoint"], ["eval"]):
        assert cli.main([*verb, str(tmp_path / "a.safetensors")]) != 0
        assert "has no classification head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "size", "settings"),
    [
        ("dat_atto", 32, {}),
        ("dat_atto", 64, {"window_size": 2}),
        ("dat_tiny", 64, SMALL),
        ("dat_tiny", 384, {**SMALL, "blocks": ("LS", "L", "D", "D")}),
        ("dat_tiny", (64, 96), {**SMALL, "window_size": ((4, 8), (4, 2), (2, 3), (2, 2))}),
        ("dat_tiny", 64, {**SMALL, "window_divisor": 8, "blocks": ("L", "S", "D", "P")}),
        ("dat_tiny", 64, {**TWO_STAGES, "window_size": ((4, 4), (2, 2))}),
        ("dat_pp_tiny", 64, {**SMALL, "blocks": ("N", "N", "D", "D")}),
    ],
)
def test_a_file_with_the_card_of_its_model_is_read_as_that_model(tmp_path, variant, size, settings):
    model = create(variant, num_classes=4, img_size=size, **settings)
    file = tmp_path / "ours.safetensors"
    weights.save(file, model.state_dict(), cfg_of_model(model), model=model)
    loaded, _ = weights.load_model(file)
    assert [
        b.attn.bias_table.shape for s in loaded.stages for b in s.blocks if hasattr(b.attn, "bias_table")
    ] == [b.attn.bias_table.shape for s in model.stages for b in s.blocks if hasattr(b.attn, "bias_table")]


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("dat_atto", {}),
        ("dat_pp_tiny", {**SMALL, "blocks": ("ND", "N", "N", "D")}),
        ("dat_pp_tiny", {**TWO_STAGES, "blocks": ("ND", "LD")}),
    ],
)
def test_what_export_writes_for_the_authors_comes_back_with_its_yaml(tmp_path, capsys, variant, settings):
    model = create(variant, num_classes=4, img_size=32, **settings)
    file, yaml, out = (tmp_path / name for name in ("a.pth", "a.yaml", "back.safetensors"))
    own = cfg_of_model(model)
    export.write(model, own, "authors", file)
    assert cli.main(["import", str(file), "--config", str(yaml), "--out", str(out)]) == 0
    capsys.readouterr()
    back, cfg = weights.load_model(out)
    assert (cfg.name, set(cfg.overrides or {})) == (variant, set(own.overrides or {}))
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    cli.main(["import", str(file), "--out", str(out), "--force"])
    said = capsys.readouterr()
    assert f"{yaml} " in said.err + said.out and "--config" in said.err + said.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {"window_size": 1}}, "could not be read back"),
        ({"overrides": {"strides": (4, 2, 2, 1)}}, "another strides"),
        ({"overrides": {"offset_range": "free"}}, "another conventions"),
    ],
)
def test_a_file_that_is_read_back_as_another_model_gets_no_name(tmp_path, changes, message):
    model = create("dat_atto", num_classes=4, img_size=64)
    cfg = dataclasses.replace(cfg_of_model(model), **changes)
    with pytest.raises(UserError, match=message):
        weights.save(tmp_path / "a.safetensors", model.state_dict(), cfg, model=model)
    assert not list(tmp_path.iterdir())
