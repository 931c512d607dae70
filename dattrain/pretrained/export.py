"""Weights and graphs of a model for other programs, each loaded back; ``exported.compare`` says whether it gives the same logits.

Formats: ``safetensors`` (ours), ``authors`` (their names, with their YAML), ``timm`` (a folder that
``timm.create_model("local-dir:...")`` takes), ``hub`` (that folder with a model card, as it is uploaded), ``onnx`` and ``torch.export`` (one graph per image size, any batch size).
"""

from __future__ import annotations

from pathlib import Path

from dattrain.errors import ConfigError
from dattrain.models.dat import DAT
from dattrain.pretrained import weights
from dattrain.pretrained.export_authors import write_authors
from dattrain.pretrained.export_graph import write_onnx, write_torch_export
from dattrain.pretrained.export_timm import write_hub, write_timm
from dattrain.pretrained.exported import EXACT, Exported
from dattrain.pretrained.pretrained_cfg import NETWORKS, Network, PretrainedCfg


def write(
    model: Network,
    cfg: PretrainedCfg,
    to: str,
    out: Path,
    *,
    opset: int = 20,
    source: str | Path | None = None,
) -> Exported:
    """Write one file (or timm's folder) and load it back.

    Args:
        model: as ``load_model`` gives it, on the CPU.
        cfg: as ``load_model`` gives it beside the model.
        to: one of ``formats.FORMATS``.
        out: the file, or the folder for ``timm`` and ``hub``.
        opset: of ONNX.
        source: what ``load_model`` was given, for the model card.

    Raises:
        UserError: the format cannot hold this model, or needs a package that is not installed.
        ConfigError: a network of dense prediction in another format than ``safetensors`` and ``hub``.
    """
    if to == "safetensors":
        weights.save(out, model.state_dict(), cfg)
        return Exported(out, cfg, weights.load_model(out)[0], EXACT)
    if to == "hub":
        return write_hub(model, cfg, out, source)
    if not isinstance(model, DAT):
        raise ConfigError(
            f"{source or cfg.source or cfg.name}: is {NETWORKS[cfg.task]}, and --to {to} takes image classifiers alone; write --to "
            "safetensors or --to hub"
        )
    if to == "authors":
        return write_authors(model, cfg, out)
    if to == "timm":
        return write_timm(model, cfg, out)
    return write_onnx(model, cfg, out, opset) if to == "onnx" else write_torch_export(model, cfg, out)
