"""The protocol between the engine and a task.

The engine owns positions, updates, ranks, precision and checkpoints; a task owns what a batch holds and what is made of it.
A task is a pure function of the recipe: it keeps no state between calls, so nothing of it is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dattrain.data.classes import Classes
from dattrain.data.identity import Part

Size = int | tuple[int, int]
"""Pixels of an image: the side of a square, or (height, width)."""
T = TypeVar("T")
Forward = Callable[..., Any]
"""The model as the engine runs it (autocast, gathered weights); takes what the model's ``forward`` takes."""


class Batch(Protocol):
    """One micro-batch on the device. The engine reads these two; the rest is between a task and its loaders.

    Samples may differ in size and in the number of their labels.
    """

    @property
    def position(self) -> Tensor:
        """Global position of each sample: B int64, on the CPU."""

    @property
    def keys(self) -> list[str]:
        """Names of the B samples, for messages and debug dumps."""


B_co = TypeVar("B_co", bound=Batch, covariant=True)


class Skipped(Protocol):
    """Samples that could not be read and have no part in the loss."""

    @property
    def count(self) -> int:
        """How many there were, on this rank and in this process."""


class TrainLoader(Protocol[B_co]):
    """Micro-batches of one rank for ever, as a function of the position."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the training set."""

    @property
    def classes(self) -> Classes:
        """What the model's outputs stand for."""

    @property
    def identity(self) -> Sequence[Part]:
        """Which set it is, wherever it lies (``dattrain.data.identity``)."""

    @property
    def skipped(self) -> Skipped:
        """The samples that were skipped."""

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data since this was last read."""

    def __next__(self) -> B_co:
        """The next micro-batch (``config.derive.micro_batch`` samples)."""

    def close(self) -> None:
        """End workers and release files."""


class EvalLoader(Protocol[B_co]):
    """Batches of one rank over the evaluation set, each sample once over all ranks.

    Every rank yields as many batches; the last ones may be empty.
    """

    def __len__(self) -> int:
        """How many batches a rank yields."""

    def __iter__(self) -> Iterator[B_co]:
        """The batches from the first on; can be asked for again."""

    def close(self) -> None:
        """End workers and release files."""


@dataclass(frozen=True)
class Loss:
    """What one micro-batch gives. All tensors are scalars on the device."""

    value: Tensor
    """To differentiate: its mean over ranks, summed over the micro-batches of an update, is the update's loss."""
    total: Tensor
    """Sum over the samples of weight * loss, fp64, detached; not finite if any sample's was not."""
    weight: Tensor
    """Sum of the samples' weights, fp64. ``total / weight`` over all ranks is the loss that is logged."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Named components of ``total``, in its units (fp64, detached): ``{"loss_rpn_cls": ...}``. The same names in every
    call and on every rank. They are logged as their own numbers, divided by ``weight``."""


class Ranks(Protocol):
    """The exchanges between ranks that an evaluation needs. Collective."""

    def sum(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over ranks, in place."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, by rank."""

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """The same on rank 0, None on the others: for what is large."""

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` gives, which rank 0 alone runs and which may take long; picklable. What it raises ends all."""


B_contra = TypeVar("B_contra", bound=Batch, contravariant=True)


class Evaluator(Protocol[B_contra]):
    """One pass over the evaluation set."""

    def update(self, forward: Forward, batch: B_contra, *, lockstep: bool) -> None:
        """Add a batch, without gradients; nothing is exchanged with other ranks.

        Args:
            forward: the model, in evaluation mode.
            batch: perhaps an empty one.
            lockstep: calls of ``forward`` gather weights from all ranks: an empty batch must call it as often as a full one.
        """

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """The metrics of the complete set, the same on every rank. Collective.

        ``images`` is among them, and ``loss`` where the evaluation has one.
        """

    def predictions(self, ranks: Ranks) -> Mapping[str, Any]:
        """What a report shows beside the metrics, as JSON; empty where there is nothing. The same on every rank. Collective."""


class Task(Protocol):
    """What is trained by the engine; made of a recipe by ``dattrain.tasks.create.create_task``."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names that an evaluation returns and ``checkpoint.metric`` may be.

        Lower is better where the name has ``loss`` in it, higher in any other.
        """

    # The model

    def build(self, img_size: Size, shapes: Mapping[str, Sequence[int]] | None = None) -> nn.Module:
        """A model with fresh weights drawn from ``train.seed``: the same on every rank.

        It has ``num_layers`` and ``layer_of(parameter)`` for layer decay, and may have ``num_drop_path``,
        ``set_grad_checkpointing``, ``no_weight_decay`` and ``get_classifier``, as timm's models do.

        Args:
            img_size: of the training images.
            shapes: of the parameters in the checkpoint that will be loaded into it, where those decide.
        """

    def initialise(
        self, model: nn.Module, tensors: Mapping[str, Tensor], source: Path, classes: Classes | None
    ) -> str:
        """Fill ``model`` from the weights that ``init.from`` names; returns the status of every tensor, as text.

        Args:
            tensors: by name.
            source: the run folder, checkpoint or file that they are of.
            classes: of the model's outputs; None where they are unknown.

        Raises:
            UserError: tensors or classes that do not fit.
        """

    def resize(self, tensors: Mapping[str, Tensor], img_size: Size) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name as a model of ``img_size`` has them, from those of a model of another size."""

    def noise_width(self, model: nn.Module) -> int:
        """Numbers in [0, 1) that a sample's forward pass takes in training, for what is dropped; 0 where it takes none."""

    def input_size(self, img_size: Size) -> Size:
        """Of the largest image that a training step may see; ``img_size`` is as for ``build``."""

    def flops(self, img_size: Size) -> float:
        """Multiply-adds of the forward pass of one image; NaN where they are not known."""

    # The data

    def train_loader(
        self, *, rank: int, world: int, samples_seen: int, device: torch.device, img_size: Size
    ) -> TrainLoader[Any]:
        """The loader of one rank from position ``samples_seen`` on.

        Raises:
            ConfigError: settings that do not fit the set.
            UserError: no set there, or a damaged one.
        """

    def eval_loader(
        self, classes: Classes, *, rank: int, world: int, device: torch.device, img_size: Size
    ) -> EvalLoader[Any]:
        """The loader of one rank over ``data.val``; raises as ``train_loader``.

        Args:
            classes: of the model's outputs (``TrainLoader.classes``).
        """

    def example(
        self,
        count: int,
        img_size: Size,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.uint8,
        first: int = 0,
    ) -> Any:
        """A micro-batch without a data set, of ``input_size``, to measure with: ``loss`` takes it.

        Args:
            dtype: of the images: uint8 as the loaders give them, with the augmentation of positions ``first`` on; or a float
                dtype, as normalised already and with nothing left to be done to them, which makes no use of NumPy: also under
                torch's fake tensors.
            first: position of the first sample.
        """

    # The loss and the metrics

    def loss(self, forward: Forward, batch: Any, *, noise: Tensor | None, dtype: torch.dtype) -> Loss:
        """Run ``forward`` on a micro-batch of ``train_loader``.

        Args:
            forward: the model, in training mode.
            noise: uniform in [0, 1), B x ``noise_width`` float32, a function of each sample's position; None where that is 0.
            dtype: of the model's input.
        """

    def evaluator(self, device: torch.device, dtype: torch.dtype) -> Evaluator[Any]:
        """A fresh evaluator of batches of ``eval_loader``; ``dtype`` is that of the model's input."""

    def summary(self, metrics: Mapping[str, float]) -> str:
        """The metrics of an evaluation, those of averaged weights under ``ema_`` among them, for a log line."""
