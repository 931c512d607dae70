"""One self-contained HTML page of deformable attention: choose image, block and group, point at a query.

Nothing is fetched: images are data URLs, positions and weights are in the page. Attention is kept as one byte per (query,
key), relative to the query's strongest key, and averaged over a group's heads; where it was not captured, there is none to choose.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from dattrain.tasks.predictions import data_url
from dattrain.visualize.draw import COLOURS
from dattrain.visualize.picture import Picture, as_picture
from dattrain.visualize.sampling_points import Deformed


@dataclass(frozen=True)
class View:
    """One image (H x W x 3 uint8, or a ``Picture``), the blocks to show on it, and what is said below it."""

    name: str
    image: np.ndarray | Picture
    blocks: Sequence[Deformed]
    caption: str = ""


def render(views: Sequence[View], *, title: str, kind: str, query: tuple[float, float]) -> str:
    """The page as text; ``kind`` and ``query`` (y, x as fractions) are what it shows first."""
    data = {
        "kind": kind,
        "query": list(query),
        "colours": list(COLOURS),
        "views": [_view(view) for view in views],
    }
    template = resources.files("dattrain.visualize").joinpath("page.html").read_text(encoding="utf-8")
    # "</" would end the script element, whatever string it is in.
    payload = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", payload)


def _view(view: View) -> dict[str, Any]:
    picture = as_picture(view.image)
    height, width = picture.pixels.shape[:2]
    return {
        "name": view.name,
        "caption": view.caption,
        "image": data_url(picture.pixels),
        "height": height,
        "width": width,
        "window": [round(each, 2) for each in picture.window],
        "blocks": [_block(block, picture) for block in view.blocks],
    }


def _block(block: Deformed, picture: Picture) -> dict[str, Any]:
    reference = picture.place(block, block.reference.reshape(-1, 2))
    groups = []
    for group in range(block.groups):
        points = picture.place(block, block.positions[group].reshape(-1, 2))
        item: dict[str, Any] = {"points": points.round(1).tolist()}
        if block.attention is not None:
            weights = block.group_attention(group)
            relative = np.rint(255 * weights / weights.max(1, keepdims=True)).astype(np.uint8)
            item["attention"] = base64.b64encode(relative.tobytes()).decode()
        if block.attention is not None or block.weights is not None:
            item["received"] = (block.received(group) * len(points)).round(3).tolist()
        groups.append(item)
    return {
        "label": f"stage {block.stage}, block {block.block}",
        "map": list(block.map_size),
        "reference": reference.round(1).tolist(),
        "groups": groups,
    }
