"""Weights files: what is refused by name, and what comes back as it was."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dattrain.errors import UserError
from dattrain.models import create, surgery
from dattrain.pretrained import weights
from dattrain.pretrained.pretrained_cfg import cfg_of_model


def test_files_that_are_not_ours_are_named_as_such(tmp_path, weights_file):
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(UserError, match="does not say which model"):
        weights.load_model(other)
    other.write_bytes(weights_file.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        weights.load_model(other)
    with pytest.raises(UserError, match="no such run folder"):
        weights.load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="dattrain import"):
        (tmp_path / "x.pth").write_bytes(b"PK")
        weights.load_model(tmp_path / "x.pth")


def test_tensors_that_do_not_fit_the_model_are_named(tmp_path, atto, cfg):
    state = dict(atto.state_dict())
    state["surplus"] = state.pop("norm.bias")
    weights.save(tmp_path / "a.safetensors", state, cfg)
    with pytest.raises(UserError, match=r"norm.bias is missing.*surplus is unknown"):
        weights.load_model(tmp_path / "a.safetensors")


def test_tables_that_were_sampled_keep_their_size(tmp_path, atto, cfg):
    # As after a fine-tune with init.bias_table=sample: laid out for 96, deformable tables of 64.
    model = create("dat_atto", num_classes=10, img_size=96)
    surgery.resize_for(model, dict(atto.state_dict()), bias_table="sample")
    model.eval()
    weights.save(tmp_path / "a.safetensors", model.state_dict(), cfg_of_model(model))
    back, _ = weights.load_model(tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(back(x), model(x))
