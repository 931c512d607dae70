"""What an evaluation of a classifier keeps beside its metrics: the classes that it confuses, its worst and its best images.

Everything stays on the device until the end, and ranks exchange the few images that are shown, so it costs an evaluation nothing
that one would notice. The best are those that it is right about and surest of, the worst those that it is wrong about and whose
own class it finds the least likely.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dattrain.config.data_sections import Augment
from dattrain.tasks.base import Ranks

SHOWN = 12
"""Images of either kind."""
PAIRS = 500
"""Confused pairs of classes at most, the most frequent first."""
_KEPT = 4 * SHOWN
"""Candidates of a rank, among which are images of several classes."""
_LARGE = 128
"""Pixels of the longer side from which pictures are JPEG, not PNG."""

Row = tuple[float, int, int, int, float, float]
"""Score, position in the set, label, predicted class, probability of that and of the label."""


class Predictions:
    """Adds up batches of one rank."""

    def __init__(self, augment: Augment) -> None:
        self._mean, self._std = augment.mean, augment.std
        self._pairs: list[Tensor] = []
        self._worst, self._best = _Candidates(), _Candidates()
        self._names: dict[int, str] = {}

    def add(
        self,
        images: Tensor,
        logits: Tensor,
        losses: Tensor,
        labels: Tensor,
        weight: Tensor,
        position: Tensor,
        keys: Sequence[str],
    ) -> None:
        """Count a batch; nothing is waited for.

        Args:
            images: B x 3 x H x W, uint8, or normalised.
            logits: B x classes float32.
            losses: B, cross-entropy in nats.
            labels: B int64.
            weight: B; 0 for samples that do not count.
            position: B int64, places in the set, on the CPU.
            keys: names of the samples.
        """
        best, predicted = logits.max(1)
        sure = (best - logits.logsumexp(1)).exp()
        counts, right = weight > 0, predicted == labels
        self._pairs.append(torch.stack([labels, predicted]).masked_fill(~counts, -1))
        columns = torch.stack(
            [
                position.to(labels.device, non_blocking=True).double(),
                *(x.double() for x in (labels, predicted, sure, (-losses).exp())),
            ],
            1,
        )
        never = torch.full_like(losses, -torch.inf)
        self._worst.add(torch.where(counts & ~right, losses, never), columns, images)
        self._best.add(torch.where(counts & right, sure, never), columns, images)
        self._names.update(zip(position.tolist(), keys))

    def gather(self, ranks: Ranks) -> dict[str, Any]:
        """What all ranks found, as JSON, the same on every rank. Collective.

        ``images``; ``classes``: [label, images, right]; ``pairs``: [label, predicted, images] of mistakes; ``worst`` and
        ``best``: ``position``, ``name``, ``label``, ``predicted``, ``confidence``, ``of_label`` and ``picture``, a data URL of the
        image as the network saw it.
        """
        found = torch.cat(self._pairs, 1).cpu().numpy() if self._pairs else np.empty((2, 0), dtype=np.int64)
        cells, counts = np.unique(found[:, found[0] >= 0], axis=1, return_counts=True)
        mine = [(int(a), int(b), int(n)) for (a, b), n in zip(cells.T, counts)]
        worst, best = self._worst.rows(), self._best.rows()
        gathered = ranks.gather((mine, worst, best))
        total: Counter[tuple[int, int]] = Counter()
        for each, _, _ in gathered:
            for a, b, n in each:
                total[a, b] += n
        of_class: Counter[int] = Counter()
        for (label, _), n in total.items():
            of_class[label] += n
        wrong = sorted((-n, a, b) for (a, b), n in total.items() if a != b)
        chosen = [
            # The worst are varied by what they were taken for, the best by their class.
            _varied([row for each in gathered for row in each[kind]], column)
            for kind, column in ((1, 3), (2, 2))
        ]
        own = {
            row[1]: (self._names[row[1]], self._picture(candidates.image(row[1])))
            for rows, candidates in zip(chosen, (self._worst, self._best))
            for row in rows
            if candidates.has(row[1])
        }
        shown = {key: value for each in ranks.gather(own) for key, value in each.items()}
        return {
            "images": sum(total.values()),
            "classes": [[label, n, total[label, label]] for label, n in sorted(of_class.items())],
            "pairs": [[a, b, -n] for n, a, b in wrong[:PAIRS]],
            **{
                kind: [
                    {
                        "position": position,
                        "name": shown[position][0],
                        "label": label,
                        "predicted": predicted,
                        "confidence": round(sure, 6),
                        "of_label": round(own_class, 6),
                        "picture": shown[position][1],
                    }
                    for _, position, label, predicted, sure, own_class in rows
                ]
                for kind, rows in zip(("worst", "best"), chosen)
            },
        }

    def _picture(self, image: Tensor) -> str:
        """A data URL of one image, 3 x H x W."""
        if image.dtype != torch.uint8:
            mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self._mean, self._std))
            image = ((image.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return data_url(image.permute(1, 2, 0).numpy())


def data_url(pixels: np.ndarray) -> str:
    """H x W x 3 uint8 as a data URL: PNG where it is small, else JPEG."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return png_url(image) if max(image.size) <= _LARGE else _url(image, "jpeg", quality=90)


def png_url(image: Image.Image) -> str:
    """An image as a data URL, without loss."""
    return _url(image, "png", optimize=True)


def _url(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class _Candidates:
    """The images of the highest scores so far, on their device."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self._host: dict[int, Tensor] = {}

    def add(self, score: Tensor, columns: Tensor, images: Tensor) -> None:
        top = score.topk(min(_KEPT, len(score)))
        batch = top.values, columns[top.indices], images[top.indices]
        if self._kept is not None:
            batch = tuple(torch.cat(pair) for pair in zip(self._kept, batch))  # type: ignore[assignment]
            order = batch[0].topk(min(_KEPT, len(batch[0]))).indices
            batch = tuple(each[order] for each in batch)  # type: ignore[assignment]
        self._kept = batch

    def rows(self) -> list[Row]:
        """Those that are candidates at all, best first; the end of ``add``."""
        if self._kept is None:
            return []
        score, columns, images = (each.cpu() for each in self._kept)
        rows = []
        for value, (position, label, predicted, sure, own), image in zip(
            score.tolist(), columns.tolist(), images
        ):
            if value > -float("inf"):
                rows.append((value, int(position), int(label), int(predicted), sure, own))
                self._host[int(position)] = image
        return rows

    def has(self, position: int) -> bool:
        return position in self._host

    def image(self, position: int) -> Tensor:
        return self._host[position]


def _varied(rows: list[Row], column: int) -> list[Row]:
    """``SHOWN`` of the rows, by score; of equal values in ``column`` the first few come before the rest."""
    rows = sorted(rows, key=lambda row: (-row[0], row[1]))
    seen: Counter[Any] = Counter()
    turns = []
    for row in rows:
        turns.append(seen[row[column]] // 2)
        seen[row[column]] += 1
    chosen = [rows[i] for i in sorted(range(len(rows)), key=lambda i: (turns[i], i))[:SHOWN]]
    return sorted(chosen, key=lambda row: (-row[0], row[1]))
