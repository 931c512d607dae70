"""Weights of detectors: files that come back as they were, and what only classifiers are good for."""

from __future__ import annotations

import json
from dataclasses import replace

import objects
import pytest
import torch
import yaml
from safetensors import safe_open

from dattrain.cli import main as cli
from dattrain.config.load import loads
from dattrain.errors import ConfigError
from dattrain.models.dense.detector import Detector
from dattrain.pretrained import weights
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, build, cfg_of_recipe
from dattrain.pretrained.recipe_model import dense_recipe
from dattrain.pretrained.start_from import Start


@pytest.mark.parametrize("head", ["retinanet", "cascade_mask_rcnn"])
def test_a_file_holds_the_network_its_heads_and_its_images(tmp_path, head):
    recipe = objects.recipe_of(head)
    recipe["eval"] |= {"max_detections": 30, "score_threshold": 0.02}
    recipe["geometry"] |= {"pad_to": 64}
    if head != "retinanet":
        recipe["task"]["norm"] = "sync"
    config = loads(yaml.safe_dump(recipe)).config
    cfg = cfg_of_recipe(config, source="a test")
    model = build(cfg).eval()
    for key, buffer in model.named_buffers():
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    weights.save(tmp_path / "a.safetensors", model.state_dict(), cfg)
    back, again = weights.load_model(tmp_path / "a.safetensors")
    assert isinstance(back, Detector) and not back.training and again == cfg
    assert (back.max_detections, back.score_threshold) == (30, 0.02)
    assert not any(buffer.is_meta for buffer in back.buffers())
    x = torch.randn(1, 3, 64, 128)  # of any size
    with torch.no_grad():
        (one,), (two,) = (each(x, [(60, 100)]) for each in (model, back))
    assert len(one["boxes"]) <= 30 and all(torch.equal(one[key], two[key]) for key in one)
    same = dense_recipe(again)
    assert same.task.model_dump() == config.task.model_dump()
    assert (same.geometry.short_side, same.geometry.long_side, same.geometry.pad_to) == (64, 96, 64)
    assert same.eval.model_dump() == config.eval.model_dump()


def test_other_networks_are_not_taken_for_one(detector_cfg):
    assert json.loads(detector_cfg.to_json())["format"] == 3
    content = {**json.loads(detector_cfg.to_json()), "format": 1}
    with pytest.raises(ValueError, match="of format 1"):
        PretrainedCfg.from_json(json.dumps(content))


def test_what_only_classifiers_are_good_for_is_refused(tmp_path, detector_file, capsys):
    with pytest.raises(ConfigError, match=r"is a detector.* leave img_size"):
        weights.load_model(detector_file, img_size=96)
    with pytest.raises(ConfigError, match=r"is a detector, and `dattrain finetune` is for image classifiers"):
        Start(str(detector_file))
    for to in ("timm", "onnx"):
        assert cli.main(["export", str(detector_file), "--to", to, "--out", str(tmp_path / "x")]) == 2
        assert (
            f"is a detector, and --to {to} takes image classifiers alone; write --to safetensors or --to hub"
            in capsys.readouterr().err
        )
    assert not list(tmp_path.iterdir())


def test_exports_are_read_back(tmp_path, capsys, detection_run, detector_file):
    hub, run = tmp_path / "shapes", str(detection_run)
    assert cli.main(["export", run, "--to", "hub", str(hub)]) == 0
    said = capsys.readouterr().out
    assert "same objects on 8 of 8 images" in said and "of outputs" in said and "logits" not in said
    assert sorted(path.name for path in hub.iterdir()) == ["README.md", "model.safetensors"]
    card = (hub / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "object-detection"
    title = "dat_atto with RetinaNet"
    assert f"\n# {title}\n" in card and front["model-index"][0]["name"] == title
    (result,) = front["model-index"][0]["results"]
    (row,) = (r for r in map(json.loads, (detection_run / "metrics.jsonl").open()) if "ap" in r)
    assert result["metrics"][0] == {
        "type": "mean_average_precision", "name": "box AP", "value": round(row["ema_ap"], 3),
    }  # fmt: skip
    assert "network: RetinaNet on DAT" in card and "Focal Loss" in card and "found.masks" not in card
    assert cli.main(["ckpt", "export", run, str(tmp_path / "ck")]) == 0
    assert [path.name for path in (tmp_path / "ck").iterdir()] == ["model.safetensors"]
    with (
        safe_open(hub / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "ck" / "model.safetensors", "pt") as two,
    ):
        assert one.metadata() == two.metadata()
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in two.keys())  # noqa: SIM118


def test_an_export_of_other_weights_shows(tmp_path, detector, detector_cfg, detector_file):
    from dattrain.pretrained.exported import EXACT, Exported, compare, images_for

    other = build(replace(detector_cfg)).eval()
    images = images_for(detector_cfg, None)[:2]
    difference, same = compare(detector, Exported(tmp_path, detector_cfg, other, EXACT), images)
    assert difference > 0.01 and same == "0 of 2 images"
