"""DAT, DAT++, and timm's Swin and PVT v2 as backbones: four maps of an image of any size, and a LayerNorm on each that is used.

Follows ``backbones/dat.py`` of LeapLabTHU/DAT-Detection and ``swin_transformer.py`` of Swin-Transformer-Object-Detection: the
next stage takes the map before that LayerNorm, and the classifier's own norm is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models import zoo
from dattrain.models.arguments import Size, check_choices, check_rates
from dattrain.models.blocks import drop_path_rates, drop_scale
from dattrain.models.dat import DAT
from dattrain.models.dense import timm_networks
from dattrain.models.init import Init
from dattrain.models.protocol import CheckpointMode


class Backbone(nn.Module):
    """A network whose stages' maps are its outputs; made by ``create_backbone``.

    Attributes:
        body: the network, under its own parameter names, without classifier and final norm.
        norms: one per stage: LayerNorm (eps 1e-5) where its map is used, else Identity.
        outs: the stages whose maps are given.
        channels: of those maps.
        strides: pixels of the image to one of those maps.
        depths: blocks of each stage.
        num_drop_path: residual branches that drop path may drop.
        num_layers: layers of layer decay: the stem, blocks, and one for what comes after.
    """

    body: nn.Module
    norms: nn.ModuleList

    def __init__(
        self, body: nn.Module, dims: Sequence[int], depths: Sequence[int], outs: Sequence[int]
    ) -> None:
        super().__init__()
        stages = len(dims)
        if not outs or list(outs) != sorted(set(outs)) or outs[0] < 0 or outs[-1] != stages - 1:
            # An earlier end would leave parameters that no loss reaches.
            raise ValueError(f"outs={tuple(outs)} must be increasing stages, the last of them {stages - 1}")
        self.body = body
        self.outs = tuple(outs)
        self.channels = tuple(dims[stage] for stage in outs)
        self.strides = tuple(4 * 2**stage for stage in outs)
        self.depths = tuple(depths)
        self.num_drop_path = 2 * sum(depths)
        self.num_layers = sum(depths) + 1
        self.norms = nn.ModuleList(
            nn.LayerNorm(dim) if stage in outs and self._has_output_norms else nn.Identity()
            for stage, dim in enumerate(dims)
        )

    _has_output_norms = True

    def _maps(self, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        """Maps of all stages, B x H x W x C."""
        raise NotImplementedError

    def forward(self, x: Tensor, drop_path_noise: Tensor | None = None) -> list[Tensor]:
        """Maps of the stages ``outs``.

        Args:
            x: B x in_chans x H x W, any H and W.
            drop_path_noise: B x num_drop_path fp32 uniforms in [0, 1): branch j of sample b is dropped where
                noise[b, j] < rate_j. None draws from torch's generator. Without effect outside training.

        Returns:
            B x channels[i] x ceil(H / strides[i]) x ceil(W / strides[i]) each, channels last in memory.
        """
        maps = self._maps(x, drop_path_noise)
        return [self.norms[stage](maps[stage]).permute(0, 3, 1, 2) for stage in self.outs]

    def layer_of(self, parameter_name: str) -> int:
        """Depth of a parameter, for layer decay: 0 stem, then one per block, ``num_layers`` the norms of outputs.

        Raises:
            ValueError: not a name of this backbone's parameters.
        """
        parts = parameter_name.split(".")
        if parts[0] == "norms":
            return self.num_layers
        if parts[0] == "body":
            if parts[1] == "patch_embed":
                return 0
            if parts[1] in ("stages", "layers"):
                stage, rest = int(parts[2]), parts[3]
                if rest == "norm":  # which ends a stage of PVT
                    return sum(self.depths[: stage + 1])
                return sum(self.depths[:stage]) + (int(parts[4]) if rest == "blocks" else 0) + 1
        raise ValueError(f"{parameter_name!r} is not a parameter of {type(self).__name__}")

    def no_weight_decay(self) -> set[str]:
        """Names of position biases; norms and biases are 1-D and excluded by that."""
        return {f"body.{name}" for name in self.body.no_weight_decay()}  # type: ignore[operator]

    def set_grad_checkpointing(self, enable: bool = True, mode: CheckpointMode = "block") -> None:
        """Recompute activations in the backward pass; ``mode`` as in ``DAT.set_grad_checkpointing``."""
        raise NotImplementedError


class DATBackbone(Backbone):
    """DAT or DAT++."""

    body: DAT

    def __init__(self, body: DAT, outs: Sequence[int]) -> None:
        body.norm = nn.Identity()
        super().__init__(body, body.dims, body.depths, outs)

    def _maps(self, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        return self.body.stage_maps(x, noise, len(self.depths))

    def set_grad_checkpointing(self, enable: bool = True, mode: CheckpointMode = "block") -> None:
        """Recompute activations in the backward pass; ``mode`` as in ``DAT.set_grad_checkpointing``."""
        self.body.set_grad_checkpointing(enable, mode)


class TimmBackbone(Backbone):
    """timm's Swin or PVT v2. Stages of PVT v2 end in a LayerNorm of their own, so that its outputs have no second one."""

    def __init__(self, name: str, body: nn.Module, drop_path_rate: float, outs: Sequence[int]) -> None:
        check_rates(drop_path_rate=drop_path_rate)
        self._has_output_norms = not name.startswith("pvt_")
        depths = [len(stage.blocks) for stage in timm_networks.stages(body)]
        super().__init__(body, timm_networks.channels(body), depths, outs)
        self.name = name
        self.drop_path_rate = drop_path_rate
        self.recomputed: CheckpointMode | None = None

    def _maps(self, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        scale = None
        if self.training and self.drop_path_rate:
            scale = drop_scale(x, drop_path_rates(sum(self.depths), self.drop_path_rate, x.device), noise)
        return timm_networks.run(self.body, x, scale, self.recomputed)

    def set_grad_checkpointing(self, enable: bool = True, mode: CheckpointMode = "block") -> None:
        """Recompute activations of whole stages or blocks in the backward pass.

        Raises:
            UserError: ``selective``, which is of DAT's blocks.
        """
        check_choices(mode=(mode, CheckpointMode))
        if enable and mode == "selective":
            raise UserError(
                f"train.activation_checkpointing=selective is for DAT's blocks; choose block or stage for {self.name}"
            )
        self.recomputed = mode if enable else None


def create_backbone(
    name: str,
    *,
    img_size: Size = 224,
    drop_path_rate: float = 0.0,
    outs: Sequence[int] = (0, 1, 2, 3),
    init: Init = "paper",
    in_chans: int = 3,
    **overrides: Any,
) -> Backbone:
    """Build a backbone with fresh weights from torch's generator.

    Args:
        name: a variant of ``dattrain.models``, or a Swin (``swin_*``) or PVT v2 (``pvt_v2_*``) of timm.
        img_size: side or (height, width) that DAT's windows and bias tables are laid out for, whatever the images' size is:
            that of the classification training, so that its weights fit.
        drop_path_rate: of the last block; it grows linearly from 0.
        outs: stages whose maps are given, the last one among them.
        init: of DAT; timm's networks are drawn as timm does.
        overrides: other arguments of the network: the ablations.

    Raises:
        UserError: unknown network or argument, or settings that do not fit together.
    """
    if name in zoo.VARIANTS:
        body = zoo.create(
            name,
            num_classes=0,
            img_size=img_size,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            init=init,
            **overrides,
        )
        return DATBackbone(body, outs)
    network = timm_networks.create(name, img_size=img_size, in_chans=in_chans, **overrides)
    return TimmBackbone(name, network, drop_path_rate, outs)
