"""Small sets as they are given out: ADE20K's layout, COCO's JSON, VOC's folders."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from pictures import encode
from PIL import Image

OBJECT_INFO = (
    "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t5\t1\twall\n2 \t0.1\t5\t1\tbuilding, edifice \n3\t0.1\t5\t1\tsky\n"
)


def noise(height: int, width: int, seed: int = 0, kind: str = "JPEG") -> bytes:
    """An encoded image that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return encode(Image.fromarray(pixels), kind)


def ade(root: Path, maps_of: dict[str, np.ndarray], split: str = "training") -> Path:
    """An ADE20K-like folder; returns the one to name. Maps are as its files have them: 0 is void."""
    for i, (name, numbers) in enumerate(maps_of.items()):
        for kind, end in (("images", "jpg"), ("annotations", "png")):
            path = root / kind / split / f"{name}.{end}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                noise(*numbers.shape, i) if end == "jpg" else encode(Image.fromarray(numbers), "PNG")
            )
    (root / "objectInfo150.txt").write_text(OBJECT_INFO)
    return root / "images" / split


def voc(root: Path, maps_of: dict[str, np.ndarray], split: str = "train") -> Path:
    """A VOC folder; returns the list to name."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, (name, numbers) in enumerate(maps_of.items()):
        (root / f"JPEGImages/{name}.jpg").write_bytes(noise(*numbers.shape, i))
        image = Image.fromarray(numbers, "P")
        image.putpalette([x % 256 for x in range(0, 768 * 5, 5)])
        image.save(root / f"SegmentationClass/{name}.png")
    path = root / f"ImageSets/Segmentation/{split}.txt"
    path.write_text("\n".join(maps_of) + "\n")
    return path


def coco(
    root: Path, content: dict, folder: str = "train2017", name: str = "instances_train2017.json"
) -> Path:
    """A COCO JSON with its images; returns it."""
    path = root / "annotations" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for i, row in enumerate(content["images"]):
        image = root / folder / row["file_name"]
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(noise(row.get("height", 8), row.get("width", 8), i))
    return path


def turned(size: tuple[int, int], orientation: int) -> bytes:
    """A JPEG, black but for its upper left corner, with an EXIF orientation."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, "JPEG", quality=95, exif=exif)


def size_of(data: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(data)).size
