"""The best and the worst images of a run with the sampling points that its network chose for them.

The images were kept by the newest evaluation (``tasks.predictions``) as the network saw them, so no data are needed, but the weights.
Where no evaluation kept any, as in a run of an older version, the newest checkpoint is evaluated on ``data.val``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.errors import UserError
from dattrain.evaluation import detection, inference, segmentation
from dattrain.evaluation.options import Options, adjusted
from dattrain.files import write_atomically
from dattrain.models.dat import DAT
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.segmenter import Segmenter
from dattrain.observe.events import PREDICTIONS
from dattrain.pretrained import preprocess
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.pretrained.weights import config_of, load_classifier, load_model
from dattrain.runtime.progress import Progress
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import read_manifest
from dattrain.tasks.create import create_task
from dattrain.urls import mask
from dattrain.visualize.draw import COLOURS
from dattrain.visualize.sampling_points import Deformed, capture, select

_AREA, _COVERED = 0.0012, 0.08
"""Mean area of a point at most, and of all together, as shares of the image."""


def evaluate(run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Predictions of the newest weights on ``data.val``, written down as a training's evaluation does.

    Raises:
        UserError: no checkpoint, or no images there.
    """
    model, cfg = load_model(run_dir, device=device)
    config = config_of(run_dir)
    if config is None or config.data.val is None:
        raise UserError(f"{run_dir}: data.val is not set, so there is nothing to evaluate on")
    spec, config = config.data.val, adjusted(config, Options())
    manifest = read_manifest(checkpoint.locate(run_dir))
    if isinstance(model, Segmenter):
        _, predictions, _ = segmentation.run(config, model, cfg, spec, device)
    elif isinstance(model, Detector):
        predictions = detection.run(config, model, cfg, spec, device).predictions
    else:
        predictions = _classified(config, model, cfg, spec, device, run_dir.name)
    about = {"step": manifest.step, "data": mask(spec), "averaged": "ema" in manifest.states}
    found = {**about, **predictions}
    write_atomically(run_dir / PREDICTIONS, json.dumps(found))
    return found


def _classified(
    config: Config, model: DAT, cfg: PretrainedCfg, spec: str, device: torch.device, title: str
) -> dict[str, Any]:
    evaluator = create_task(config).evaluator(device, torch.float32)
    loader = inference.open_loader(config, cfg, spec, inference.Views(), device=device)
    with closing(loader), torch.inference_mode(), Progress(title, "batches", shown=True) as progress:
        for number, batch in enumerate(loader, 1):
            evaluator.update(model, batch, lockstep=False)
            progress(number, len(loader))
    return dict(evaluator.predictions(inference.Alone()))


def with_points(run_dir: Path, found: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """``found`` (predictions) with ``points`` for each image that it shows, and where they are from; written down too.

    Of the checkpoint of the evaluation's step; where that was removed, of the newest. Per block: ``label`` and ``groups``, of each its
    points as [x, y, radius] in thousandths of the width, the height and the width; the area is the attention received. Those of
    dense prediction are as they are: its images were kept too small for the network to look at them as it did.

    Raises:
        UserError: no weights there; ``model`` has no deformable attention.
    """
    if "kind" in found:
        return dict(found)
    folder = run_dir / "checkpoints" / checkpoint.folder_name(found["step"])
    source = folder if (folder / "manifest.json").is_file() else checkpoint.locate(run_dir)
    shown = [item for kind in ("worst", "best") for item in found[kind]]
    if not shown:
        return dict(found)
    pixels = [_pixels(item["picture"]) for item in shown]
    height, width = pixels[0].shape[1:]
    model, cfg = load_classifier(
        source, "this", ema=bool(found["averaged"]), device=device, img_size=(height, width)
    )
    points = []
    for image in pixels:
        # One at a time: the attention of a batch of large images would not fit a small device.
        (blocks,) = capture(model, preprocess.normalise(image[None], cfg, device), attention=True)
        points.append([_block(block, (height, width)) for block in _chosen(blocks)])
    each = iter(points)
    kept = {
        kind: [{**item, "points": next(each)} for item in found[kind]]
        for kind in ("worst", "best")
    }  # fmt: skip
    result = {**found, **kept, "points_of": source.name, "colours": COLOURS}
    write_atomically(run_dir / PREDICTIONS, json.dumps(result))
    return result


def _chosen(blocks: list[Deformed]) -> list[Deformed]:
    """The last deformable block of the first stage with several groups, which the paper draws, and of the last stage."""
    last = select(blocks)
    first = next((block for block in last if block.groups > 1), last[0])
    return [first, *([last[-1]] if last[-1] is not first else [])]


def _block(block: Deformed, size: tuple[int, int]) -> dict[str, Any]:
    count = block.positions[..., 0].size
    area = min(_AREA, _COVERED / count)
    groups = []
    for group in range(block.groups):
        yx = block.pixels(block.positions[group].reshape(-1, 2), size) / np.asarray(size)
        radius = np.sqrt(area * block.received(group) * len(yx) / np.pi)
        # Wide images have points of the same share of their area.
        columns = np.stack([yx[:, 1], yx[:, 0], np.clip(radius, 0.003, None)], 1)
        groups.append(np.rint(1000 * columns).astype(int).tolist())
    return {"label": f"stage {block.stage}, block {block.block}", "groups": groups}


def _pixels(url: str) -> Tensor:
    data = base64.b64decode(url.partition(",")[2])
    return preprocess.from_array(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
