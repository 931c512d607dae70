"""Weights of segmentation networks: files that come back as they were, and what only classifiers are good for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors import safe_open

from dattrain.cli import main as cli
from dattrain.errors import ConfigError
from dattrain.models.dense.segmenter import Segmenter
from dattrain.pretrained import weights
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, build
from dattrain.pretrained.recipe_model import dense_recipe
from dattrain.pretrained.segmentation_cfg import SegmentationCfg
from dattrain.pretrained.start_from import Start

SMALL_SWIN = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 1, 2, 2]}


def test_a_file_holds_the_network_its_task_and_its_images(segmenter, dense_cfg, segmenter_file):
    back, cfg = weights.load_model(segmenter_file)
    assert isinstance(back, Segmenter) and not back.training
    assert cfg == replace(dense_cfg, overrides={})
    x = torch.randn(1, 3, 70, 93)  # of any size
    with torch.no_grad():
        torch.testing.assert_close(back(x), segmenter(x))
    recipe = dense_recipe(cfg)
    assert (recipe.task.head, recipe.task.norm, recipe.geometry.short_side) == ("semantic_fpn", "group", 64)
    # A version before there were such files must not take it for a classifier's; files of classifiers are as ever.
    assert json.loads(cfg.to_json())["format"] == 2
    plain = json.loads(replace(cfg, segmentation=None).to_json())
    assert plain["format"] == 1 and "segmentation" not in plain
    assert PretrainedCfg.from_json(json.dumps(plain)).segmentation is None
    with pytest.raises(ValueError, match="of format 4, and 1, 2, 3 are known"):
        PretrainedCfg.from_json(json.dumps({**plain, "format": 4}))


@pytest.mark.parametrize(
    ("name", "overrides"), [("dat_atto", {}), ("swin_tiny_patch4_window7_224", SMALL_SWIN)]
)
def test_running_statistics_come_back_and_run_on_a_cpu(tmp_path, name, overrides):
    dense = SegmentationCfg("upernet", "sync", 16)
    cfg = PretrainedCfg(name, 3, (64, 64), overrides=overrides, segmentation=dense)
    model = build(cfg).eval()
    for key, buffer in model.named_buffers():
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    weights.save(tmp_path / "a.safetensors", model.state_dict(), cfg)
    back, again = weights.load_model(tmp_path / "a.safetensors")
    assert again.segmentation == dense
    assert not any(buffer.is_meta for buffer in back.buffers())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(back(x), model(x))


def test_what_only_classifiers_are_good_for_is_refused(tmp_path, segmenter_file, capsys):
    with pytest.raises(ConfigError, match=r"is a segmentation network.* leave img_size"):
        weights.load_model(segmenter_file, img_size=96)
    with pytest.raises(ConfigError, match="`dattrain finetune` is for image classifiers"):
        Start(str(segmenter_file))
    for to in ("timm", "authors", "onnx", "torch.export"):
        assert cli.main(["export", str(segmenter_file), "--to", to, "--out", str(tmp_path / "x")]) == 2
        assert f"--to {to} takes image classifiers alone; write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_exports_are_read_back(tmp_path, segmentation_run, segmenter_file, capsys):
    assert cli.main(["export", str(segmenter_file), "--to", "safetensors", str(tmp_path / "a")]) == 0
    assert "same class of every pixel on 8 of 8 images" in capsys.readouterr().out
    hub, run = tmp_path / "scenes-fpn", str(segmentation_run)
    assert cli.main(["export", run, "--to", "hub", str(hub)]) == 0
    assert sorted(path.name for path in hub.iterdir()) == ["README.md", "model.safetensors"]
    card = (hub / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-segmentation" and front["library_name"] == "dattrain"
    (result,) = front["model-index"][0]["results"]
    (row,) = (r for r in map(json.loads, (segmentation_run / "metrics.jsonl").open()) if "miou" in r)
    assert result["metrics"][0] == {"type": "mean_iou", "name": "mIoU", "value": round(row["ema_miou"], 3)}
    assert "A semantic segmentation network: Semantic FPN on DAT" in card and "timm" not in card
    assert cli.main(["ckpt", "export", run, str(tmp_path / "ck")]) == 0
    assert [path.name for path in (tmp_path / "ck").iterdir()] == ["model.safetensors"]
    with (
        safe_open(hub / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "ck" / "model.safetensors", "pt") as two,
    ):
        assert one.metadata() == two.metadata()
        assert set(one.keys()) == set(two.keys())
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())  # noqa: SIM118
