"""What the demo shows at its end: curves and sampling points of its two runs, and a baseline without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torchvision.transforms.v2.functional import normalize, resize

from dattrain.data.decode.images import decode
from dattrain.data.source.dataset import open_dataset
from dattrain.observe import metrics
from dattrain.pretrained.weights import load_model
from dattrain.visualize import draw
from dattrain.visualize.sampling_points import capture

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def read(spec: str) -> tuple[np.ndarray, np.ndarray]:
    """Images n x 28 x 28 and labels n, uint8, decoded from the demo's shards."""
    dataset = open_dataset(spec)
    where = [(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count)]
    images = np.stack([decode(dataset.read(*place).data)[0].numpy() for place in where])
    labels = np.array([dataset.label(*place) for place in where], dtype=np.uint8)
    dataset.close()
    return images, labels


def nearest_neighbour(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Top-1 in percent of 1-nearest neighbour by Euclidean distance on pixels."""
    a = train.reshape(len(train), -1).astype(np.float32)
    b = test.reshape(len(test), -1).astype(np.float32)
    nearest = (np.square(a).sum(1) - 2 * b @ a.T).argmin(1)
    return float((train_labels[nearest] == test_labels).mean() * 100)


def picture(file: Path, pretrain: Path, finetune: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Loss and accuracy of both runs above one image per class with its deformed sampling points (the paper's Figure 4)."""
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    curves, sheet = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.15)))
    loss, accuracy = curves.subplots(1, 2)
    seen = 0
    for name, folder in (("pre-training, 32 x 32", pretrain), ("fine-tuning, 64 x 64", finetune)):
        rows = metrics.read(folder)
        for axis, key, style in ((loss, "loss", "-"), (accuracy, "top1", "o-")):
            points = [(seen + row["samples"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points), style, label=name)
        seen += max(row["samples"] for row in rows)
    loss.set(xlabel="images seen", ylabel="training loss")
    accuracy.set(xlabel="images seen", ylabel="top-1 on 2,000 test images, %")
    loss.legend()
    accuracy.legend(loc="lower right")

    model, cfg = load_model(finetune)
    chosen = images[[int(np.flatnonzero(labels == c)[0]) for c in range(len(CLASSES))]]
    pixels = resize(
        torch.from_numpy(chosen)[:, None].expand(-1, 3, -1, -1), list(cfg.img_size), antialias=True
    )
    inputs = normalize(pixels.float() / 255, list(cfg.mean), list(cfg.std))
    for axis, image, blocks, name in zip(sheet.subplots(2, 5).flat, pixels, capture(model, inputs), CLASSES):
        draw.points(axis, image.permute(1, 2, 0).numpy(), blocks[0], area=9)
        axis.set_title(name, fontsize=9)
    sheet.suptitle(
        "where the first deformable block samples its keys; one colour per offset group", fontsize=10
    )
    figure.savefig(file, dpi=110)
