"""Graphs of a model for other programs: ONNX, and torch.export's own; one image size each, any batch size."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain import ops
from dattrain.errors import UserError
from dattrain.models.dat import DAT
from dattrain.pretrained.exported import GRAPH, Exported
from dattrain.pretrained.formats import LOWEST_OPSET
from dattrain.pretrained.pretrained_cfg import PretrainedCfg


def write_onnx(model: DAT, cfg: PretrainedCfg, out: Path, opset: int) -> Exported:
    """Write an ONNX graph and load it in onnxruntime. Raises UserError without these packages, or for an opset that torch lacks."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it, and names it late)
    except ImportError as error:
        raise UserError(
            f"--to onnx needs {error.name}: in the checkout, pip install -e '.[export]'"
        ) from None

    if opset < LOWEST_OPSET:
        raise UserError(f"--opset {opset}: {LOWEST_OPSET} is the lowest that torch writes")
    with _quiet("torch.onnx", "onnxscript"):
        program = torch.onnx.export(
            _traced(model, cfg),
            dynamo=True,
            opset_version=opset,
            optimize=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
        )
    assert program is not None
    found = program.model.opset_imports.get("")
    if found != opset:
        # Where its conversion fails, torch logs that and gives what it had.
        raise UserError(
            f"--opset {opset}: torch {torch.__version__} cannot write it (it gave {found}); take a lower one"
        )
    _describe(program.model.metadata_props, cfg)
    program.save(str(out))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return Exported(out, cfg, logits, GRAPH)


def write_torch_export(model: DAT, cfg: PretrainedCfg, out: Path) -> Exported:
    """Write a graph of ``torch.export`` and load it back."""
    extra = {"card.json": cfg.to_json()}
    torch.export.save(_traced(model, cfg), out, extra_files=extra)
    return Exported(out, cfg, torch.export.load(out).module(), GRAPH)


def _traced(model: DAT, cfg: PretrainedCfg) -> Any:
    """The model as a graph of torch's own operators, for any batch size and this image size."""
    images = torch.zeros(2, cfg.in_chans, *cfg.img_size)
    batch = torch.export.Dim("batch", min=1)
    with ops.use_backend("reference"), _plain_attention(), torch.no_grad():
        return torch.export.export(model.eval(), (images,), dynamic_shapes=({0: batch},))


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Warnings of other libraries' loggers are not shown: what matters of them is checked."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Within it torch's fused attention is written out as matrix products and a softmax.

    Fused kernels lay their output out otherwise than what an exporter puts in their place, and the graph holds views of it.
    """
    fused = F.scaled_dot_product_attention

    def plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        logits: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v

    F.scaled_dot_product_attention = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def _describe(metadata: Any, cfg: PretrainedCfg) -> None:
    metadata["dattrain"] = replace(cfg, classes=()).to_json()
    if cfg.classes:
        metadata["classes"] = json.dumps(list(cfg.classes))
