"""A model as a folder of timm's hub format, which ``timm.create_model("local-dir:...")`` takes after ``import dattrain.models``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm

from dattrain.models.dat import DAT
from dattrain.models.zoo import VARIANTS
from dattrain.pretrained import class_names, model_card, weights
from dattrain.pretrained.exported import EXACT, Exported
from dattrain.pretrained.pretrained_cfg import Network, PretrainedCfg, classes_of


def write_timm(model: DAT, cfg: PretrainedCfg, out: Path) -> Exported:
    """model.safetensors and config.json as on the hub; ``import dattrain.models`` must come before timm.create_model."""
    out.mkdir(parents=True, exist_ok=True)
    weights.save(out / "model.safetensors", model.state_dict(), cfg)
    write_timm_config(cfg, out)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    return Exported(out, cfg, loaded, EXACT)


def write_hub(model: Network, cfg: PretrainedCfg, out: Path, source: str | Path | None) -> Exported:
    """``write_timm``, and a model card of what the run of ``source`` (as ``load_model`` takes it) says.

    A network of dense prediction, of which timm knows nothing, is ``model.safetensors`` and the card.
    """
    training = model_card.Training()
    if source is not None:
        training = model_card.training_of(source, averaged=cfg.source.endswith("EMA"))
    if isinstance(model, DAT):
        done = write_timm(model, cfg, out)
    else:
        weights.save(out / "model.safetensors", model.state_dict(), cfg)
        done = Exported(out, cfg, weights.load_model(out)[0], EXACT)
    (out / "README.md").write_text(model_card.text(model, cfg, training, out.name), encoding="utf-8")
    return done


def write_timm_config(cfg: PretrainedCfg, folder: Path) -> None:
    """``config.json`` beside ``model.safetensors``, for ``timm.create_model("local-dir:FOLDER")`` after ``import dattrain.models``."""
    (folder / "config.json").write_text(json.dumps(timm_config(cfg), indent=2) + "\n", encoding="utf-8")


def timm_config(cfg: PretrainedCfg) -> dict[str, Any]:
    """What timm's hub format says of a model: its architecture with arguments, and how its images are prepared."""
    arguments = {**VARIANTS[cfg.name], **(cfg.overrides or {})}
    return {
        "architecture": cfg.name,
        "num_classes": cfg.num_classes,
        "num_features": arguments["dims"][-1],
        "global_pool": arguments.get("global_pool", "avg"),
        "model_args": {"img_size": list(cfg.img_size), "in_chans": cfg.in_chans, **(cfg.overrides or {})},
        "pretrained_cfg": {
            "tag": "dattrain",
            "custom_load": False,
            "input_size": [cfg.in_chans, *cfg.img_size],
            "fixed_input_size": False,
            "interpolation": cfg.interpolation,
            "crop_pct": cfg.crop_pct,
            "crop_mode": "squash" if cfg.resize == "squash" else "center",
            "mean": list(cfg.mean),
            "std": list(cfg.std),
            "num_classes": cfg.num_classes,
            "first_conv": "patch_embed.conv1" if arguments.get("stem") == "conv" else "patch_embed.proj",
            "classifier": "head.fc",
        },
        **_label_names(cfg),
    }


def _label_names(cfg: PretrainedCfg) -> dict[str, Any]:
    """Names of the classes, as timm's hub format and transformers' pipelines read them.

    ``label_names``, one per output, and where these are synsets ``label_descriptions``, their words; nothing where the
    classes are not known.
    """
    names = list(classes_of(cfg).names)
    if not names:
        return {}
    words = class_names.names(len(names), known=names)
    described = {"label_descriptions": dict(zip(names, words))} if words != names else {}
    return {"label_names": names, **described}
