"""A backbone with a decoder: the class of every pixel."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from dattrain.models.arguments import check_choices
from dattrain.models.dense.backbone import Backbone
from dattrain.models.dense.norm import Norm
from dattrain.models.dense.semantic_fpn import SemanticFPN
from dattrain.models.dense.upernet import AuxiliaryHead, UperNet
from dattrain.models.protocol import CheckpointMode

HeadKind = Literal["upernet", "semantic_fpn"]


class Segmenter(nn.Module):
    """Backbone, decoder, and perhaps an auxiliary head that training alone runs; made by ``create_segmenter``.

    Attributes:
        num_drop_path: columns of ``drop_path_noise``: the backbone's residual branches, the channels that the decoder
            drops, those that the auxiliary head drops, in this order.
        num_layers: as the backbone's; everything after the blocks is the last.
    """

    def __init__(
        self, backbone: Backbone, head: SemanticFPN | UperNet, aux_head: AuxiliaryHead | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.aux_head = aux_head
        self.num_classes = head.classifier.conv.out_channels
        self.noise_columns = (
            backbone.num_drop_path,
            head.num_dropped,
            aux_head.num_dropped if aux_head is not None else 0,
        )
        self.num_drop_path = sum(self.noise_columns)
        self.num_layers = backbone.num_layers

    def forward(self, x: Tensor, drop_path_noise: Tensor | None = None) -> Any:
        """Logits at a quarter of the image's height and width, rounded up.

        Args:
            x: B x in_chans x H x W, any H and W.
            drop_path_noise: B x num_drop_path fp32 uniforms in [0, 1): what is dropped is a function of them. None draws
                from torch's generator. Without effect outside training.

        Returns:
            B x num_classes x ceil(H / 4) x ceil(W / 4); in training with an auxiliary head a pair of that and of the
            auxiliary logits, B x num_classes x ceil(H / 16) x ceil(W / 16).
        """
        noise: tuple[Tensor | None, ...] = (None, None, None)
        if drop_path_noise is not None and self.training:
            if tuple(drop_path_noise.shape) != (x.shape[0], self.num_drop_path):
                raise ValueError(
                    f"drop_path_noise is {tuple(drop_path_noise.shape)}, not {(x.shape[0], self.num_drop_path)}"
                )
            noise = drop_path_noise.split(self.noise_columns, dim=1)
        maps = self.backbone(x, noise[0])
        logits = self.head(maps, noise[1])
        if self.training and self.aux_head is not None:
            return logits, self.aux_head(maps[2], noise[2])
        return logits

    def layer_of(self, parameter_name: str) -> int:
        """Depth of a parameter, for layer decay: 0 stem, one per block, ``num_layers`` norms of outputs and the heads.

        Raises:
            ValueError: not a name of this model's parameters.
        """
        part, _, name = parameter_name.partition(".")
        if part == "backbone":
            return self.backbone.layer_of(name)
        if part in ("head", "aux_head"):
            return self.num_layers
        raise ValueError(f"{parameter_name!r} is not a parameter of {type(self).__name__}")

    def no_weight_decay(self) -> set[str]:
        """Names of position biases; norms and biases are 1-D and excluded by that."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True, mode: CheckpointMode = "block") -> None:
        """Recompute the backbone's activations in the backward pass; ``mode`` as in ``DAT.set_grad_checkpointing``."""
        self.backbone.set_grad_checkpointing(enable, mode)

    def get_classifier(self) -> nn.Module:
        """What is trained when the backbone's weights are frozen: the heads, and the norms of its outputs."""
        heads = [self.head] if self.aux_head is None else [self.head, self.aux_head]
        return nn.ModuleList([self.backbone.norms, *heads])


def create_segmenter(
    backbone: Backbone,
    head: HeadKind,
    num_classes: int,
    *,
    norm: Norm = "sync",
    channels: int | None = None,
    dropout: float = 0.1,
    aux: bool = True,
) -> Segmenter:
    """Put a decoder with fresh weights on a backbone of four maps.

    Args:
        head: ``upernet``, or ``semantic_fpn``, which has no auxiliary head.
        norm: of the heads, see ``norm.create_norm``.
        channels: None takes 512 for UperNet (its auxiliary head has half of them), and 256 for Semantic FPN.
        dropout: share of channels dropped before each classifier.
        aux: whether UperNet has its auxiliary head, on the map of stride 16.

    Raises:
        UserError: a head, norm or rate that there is not.
    """
    check_choices(head=(head, HeadKind))
    if head == "semantic_fpn":
        decoder = SemanticFPN(
            backbone.channels, num_classes, channels=channels or 256, norm=norm, dropout=dropout
        )
        return Segmenter(backbone, decoder, None)
    width = channels or 512
    aux_head = None
    upernet = UperNet(backbone.channels, num_classes, channels=width, norm=norm, dropout=dropout)
    if aux:
        aux_head = AuxiliaryHead(
            backbone.channels[2], num_classes, channels=max(1, width // 2), norm=norm, dropout=dropout
        )
    return Segmenter(backbone, upernet, aux_head)
