"""timm's model protocol, as a base class of ``dat.DAT``: groups of parameters, checkpointing, head and input size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers.classifier import ClassifierHead
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models.arguments import Size, WindowSize, check_choices, check_window_size, pair, per_stage
from dattrain.models.attention import WindowAttention
from dattrain.models.blocks import Interior, PatchEmbed, Stage
from dattrain.models.datpp import ConvStem
from dattrain.models.deformable import DeformableAttention
from dattrain.models.init import Init, init_weights
from dattrain.models.resize import resize_fixed_table, resize_table

CheckpointMode = Literal["stage", "block", "selective"]


class TimmProtocol(nn.Module):
    """What timm's tools ask of a model beside ``forward``; DAT sets the attributes and lays out maps and windows."""

    stages: nn.Sequential
    norm: nn.Module
    head: ClassifierHead
    num_classes: int
    num_features: int
    head_hidden_size: int
    global_pool: str
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_layers: int
    img_size: tuple[int, int]
    patch_size: int
    strict_img_size: bool
    patch_embed: PatchEmbed | ConvStem
    window_size: int | tuple[tuple[int, int], ...] | None
    init: Init
    checkpoint_stages: bool

    def map_sizes(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of every stage's map."""
        raise NotImplementedError

    def windows(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of every stage's windows."""
        raise NotImplementedError

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of ``indices``, and with them (or when asked) final norm and head."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.dims[last]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def no_weight_decay(self) -> set[str]:
        """Names of position biases; norms and biases are 1-D and excluded by that."""
        return {
            name for name, _ in self.named_parameters() if "bias_table" in name or "position_conv" in name
        }

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters into layers: stages, or blocks."""
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        )
        return {"stem": r"^patch_embed", "blocks": blocks}

    def layer_of(self, parameter_name: str) -> int:
        """Depth of a parameter, for layer decay: 0 stem, then one per block, ``num_layers`` head.

        A stage's downsampling counts with its first block, the final norm with the last one: timm's layers.

        Raises:
            ValueError: not a name of this model's parameters.
        """
        parts = parameter_name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] == "head":
            return self.num_layers
        if parts[0] == "norm":
            return self.num_layers - 1
        if parts[0] != "stages":
            raise ValueError(f"{parameter_name!r} is not a parameter of {type(self).__name__}")
        block = int(parts[3]) if parts[2] == "blocks" else 0
        return sum(self.depths[: int(parts[1])]) + block + 1

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def set_grad_checkpointing(self, enable: bool = True, mode: CheckpointMode = "block") -> None:
        """Recompute activations in the backward pass, with torch's non-reentrant checkpoint.

        Args:
            enable: False stores everything.
            mode: ``stage`` recomputes whole stages (least memory), ``block`` blocks, ``selective`` only the interiors
                between two matrix products: windows, scores and weighted sums of attention, and the MLP's activation.
        """
        check_choices(mode=(mode, CheckpointMode))
        self.checkpoint_stages = enable and mode == "stage"
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpoint_blocks = enable and mode == "block"
            elif isinstance(module, Interior):
                module.checkpoint_interior = enable and mode == "selective"

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def get_classifier(self) -> nn.Module:
        """The classifier: linear layer, or identity without classes."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: none), drawn as ``init`` says."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        parameter = next(self.parameters())
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features)
        self.head.to(device=parameter.device, dtype=parameter.dtype)
        self.head_hidden_size = self.head.num_features
        init_weights(self.head, self.init)

    def set_input_size(
        self,
        img_size: Size | None = None,
        patch_size: Size | None = None,
        window_size: WindowSize | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Lay windows and bias tables out for another size; tables are resized bicubically, in place.

        Args:
            img_size: side or (height, width); None keeps it.
            patch_size: that of the model, or None.
            window_size: as in the constructor; None keeps the rule that the model was made with.
            window_ratio: makes it each side of the map of patches / ratio, rounded down, one ratio for all stages or one each;
                without effect beside ``window_size``.
            always_partition: False, or None: windows end at the map.

        Raises:
            UserError: another size of patches, windows larger than the map, or values that do not fit. The model is as it was.
        """
        size = self.img_size if img_size is None else pair(img_size)
        if patch_size is not None and patch_size not in (self.patch_size, (self.patch_size, self.patch_size)):
            raise UserError(
                f"patch_size={patch_size}: this model's patches are of {self.patch_size}, and its weights fit no others; "
                "create a model with that patch_size"
            )
        if always_partition:
            raise UserError(
                "always_partition=True: windows of this model are never larger than a stage's map"
            )
        if window_size is None and window_ratio is not None:
            rows, columns = self.map_sizes(size)[0]
            ratios = per_stage("window_ratio", window_ratio, len(self.depths))
            window_size = [(max(1, rows // ratio), max(1, columns // ratio)) for ratio in ratios]
        if window_size is not None:
            self.window_size = window_size = check_window_size(window_size, len(self.depths))
        self.img_size = size
        if self.strict_img_size:
            self.patch_embed.only_size = size
        for stage, map_size, window in zip(self.stages, self.map_sizes(size), self.windows(size)):
            for module in stage.modules():
                if isinstance(module, WindowAttention):
                    module.window = window
                    shape = (2 * window[0] - 1, 2 * window[1] - 1)
                    module.bias_table = _replaced(
                        module.bias_table, resize_table(module.bias_table.detach(), shape)
                    )
                elif isinstance(module, DeformableAttention):
                    _resize_deformable(module, map_size)
        update_model_input_size(self, size, window_size=window_size)


def _resize_deformable(module: DeformableAttention, size: tuple[int, int]) -> None:
    table, old, module.size = module.bias_table, module.size, size
    if table is None:
        return
    if module.conventions.position == "fixed":
        resized = resize_fixed_table(table.detach(), module.map_sizes(old), module.map_sizes(size))
    else:
        resized = resize_table(table.detach(), module.table_size(size))
    module.bias_table = _replaced(table, resized)


def _replaced(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    if value.shape == parameter.shape:
        return parameter
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
