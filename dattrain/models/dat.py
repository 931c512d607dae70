"""DAT assembled: stem, four stages, head; timm's model protocol over it. Variants are in ``zoo``.

One layout from the stem to the head: B x H x W x C. DAT++ is the same network with the parts of ``datpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from timm.layers.classifier import ClassifierHead
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models.arguments import (
    MlpKind,
    Size,
    StemKind,
    WindowSize,
    check_blocks,
    check_choices,
    check_offset_range,
    check_positive,
    check_rates,
    check_window_size,
    pair,
    per_stage,
)
from dattrain.models.attention import Shift, SpatialReductionAttention, WindowAttention
from dattrain.models.blocks import (
    Block,
    Downsample,
    Mlp,
    PatchEmbed,
    Stage,
    drop_path_rates,
    drop_scale,
    has_dropout,
    recompute,
)
from dattrain.models.datpp import ConvDownsample, ConvMlp, ConvStem, LocalPerception, NeighborhoodAttention
from dattrain.models.deformable import (
    Conventions,
    DeformableAttention,
    OffsetRange,
    Position,
    Reference,
)
from dattrain.models.init import Init, init_weights
from dattrain.models.protocol import TimmProtocol
from dattrain.ops.deformable_attention.coordinates import QueryGrid


class DAT(TimmProtocol):
    """Vision Transformer with Deformable Attention (Xia et al., CVPR 2022).

    Sequences have one entry per stage. Any input size works in ``forward``; ``img_size`` lays out windows and tables.

    Args:
        img_size: side, or (height, width).
        dims: channels.
        blocks: one string per stage, one letter per block: L local windows, S shifted windows, D deformable,
            P spatial reduction (PVT), N neighbourhood.
        heads, groups: attention heads, offset groups of D blocks.
        strides: how many pixels apart the keys of D blocks are.
        offset_kernels: of the offset networks.
        sr_ratios: reduction of P blocks.
        window_size: of L and S blocks; a side, (height, width), or one of these per stage, never larger than the stage's map.
            None takes the shorter side of the image / ``window_divisor`` (7 at 224, 12 at 384: the authors' settings).
        shift: how half a window is rounded in S blocks: ``ceil`` (authors) or ``floor`` (Swin).
        neighborhood: odd side of the window of each token in N blocks; one for all stages or one each.
        stem: patch embedding and downsampling by ``patch`` (non-overlapping) or ``conv`` (overlapping 3 x 3, DAT++).
        mlp: ``linear``, or ``conv`` with a depthwise convolution inside (DAT++).
        local_perception: a depthwise convolution added to the input of every block (DAT++).
        offsets, offset_range, reference, query_grid, position: see ``deformable.Conventions``.
        drop_rate, proj_drop_rate: dropout before the classifier; after projections and in the MLP.
        drop_path_rate: of the last block; it grows linearly from 0 over the blocks, the same for both branches.
        init: ``paper`` or ``trunc_normal``, see ``init``.
        strict_img_size: refuse images of another size than ``img_size``, as timm's Swin does by default.

    Raises:
        UserError: settings that do not fit together, by name.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        blocks: Sequence[str] = ("LS", "LS", "LDLDLD", "LD"),
        heads: Sequence[int] = (3, 6, 12, 24),
        groups: Sequence[int] = (1, 2, 3, 6),
        strides: Sequence[int] = (4, 2, 1, 1),
        offset_kernels: Sequence[int] = (9, 7, 5, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: WindowSize | None = None,
        window_divisor: int = 32,
        shift: Shift = "ceil",
        neighborhood: int | Sequence[int] = 7,
        stem: StemKind = "patch",
        mlp: MlpKind = "linear",
        local_perception: bool = False,
        mlp_ratio: float = 4.0,
        offsets: bool = True,
        offset_range: OffsetRange = 2.0,
        reference: Reference = "center",
        query_grid: QueryGrid = "center",
        position: Position = "relative",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init: Init = "paper",
        strict_img_size: bool = False,
    ) -> None:
        super().__init__()
        check_choices(
            shift=(shift, Shift),
            reference=(reference, Reference),
            query_grid=(query_grid, QueryGrid),
            position=(position, Position),
            stem=(stem, StemKind),
            mlp=(mlp, MlpKind),
        )
        if stem == "conv" and patch_size != 4:
            raise UserError(f"stem='conv' is two convolutions of stride 2: patch_size={patch_size} must be 4")
        check_offset_range(offset_range)
        check_positive(
            patch_size=patch_size, in_chans=in_chans, mlp_ratio=mlp_ratio, window_divisor=window_divisor
        )
        check_rates(drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        stages = len(blocks)
        self.blocks = tuple(blocks)
        self.dims = per_stage("dims", dims, stages)
        self.heads = per_stage("heads", heads, stages)
        self.groups = per_stage("groups", groups, stages)
        self.strides = per_stage("strides", strides, stages)
        self.offset_kernels = per_stage("offset_kernels", offset_kernels, stages)
        self.sr_ratios = per_stage("sr_ratios", sr_ratios, stages)
        self.neighborhood = per_stage("neighborhood", neighborhood, stages)
        check_blocks(self.blocks, self.dims, self.heads, self.groups, self.offset_kernels, self.neighborhood)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.patch_size = patch_size
        self.img_size = pair(img_size)
        self.window_size = check_window_size(window_size, stages)
        self.window_divisor = window_divisor
        self.shift: Shift = shift
        self.stem: StemKind = stem
        self.mlp: MlpKind = mlp
        self.local_perception = local_perception
        self.mlp_ratio = mlp_ratio
        self.conventions = Conventions(offsets, offset_range, reference, query_grid, position)
        self.proj_drop_rate = proj_drop_rate
        self.drop_path_rate = drop_path_rate
        self.init: Init = init
        self.depths = tuple(len(kinds) for kinds in blocks)
        self.num_layers = sum(self.depths) + 1
        self.num_drop_path = 2 * sum(self.depths)
        self.num_features = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**index, "module": f"stages.{index}"}
            for index, dim in enumerate(dims)
        ]

        self.patch_embed = self._make_stem()
        self.strict_img_size = strict_img_size
        self.patch_embed.only_size = self.img_size if strict_img_size else None
        sizes, windows = self.map_sizes(self.img_size), self.windows(self.img_size)
        self.stages = nn.Sequential(
            *(
                Stage(
                    self._make_downsample(stage) if stage else nn.Identity(),
                    [self._make_block(stage, kind, sizes[stage], windows[stage]) for kind in kinds],
                )
                for stage, kinds in enumerate(blocks)
            )
        )
        self.norm: nn.Module = nn.LayerNorm(dims[-1])
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.head.num_features  # of pooling by ``catavgmax``, twice the map's
        self.checkpoint_stages = False
        init_weights(self, init)

    # Assembly -----------------------------------------------------------------------------------------------------

    def _make_stem(self) -> PatchEmbed | ConvStem:
        if self.stem == "conv":
            return ConvStem(self.in_chans, self.dims[0], self.patch_size)
        return PatchEmbed(self.in_chans, self.dims[0], self.patch_size)

    def _make_downsample(self, stage: int) -> nn.Module:
        """What leads into ``stage``."""
        kind = ConvDownsample if self.stem == "conv" else Downsample
        return kind(self.dims[stage - 1], self.dims[stage])

    def _make_mlp(self, stage: int) -> nn.Module:
        kind = ConvMlp if self.mlp == "conv" else Mlp
        return kind(self.dims[stage], int(self.mlp_ratio * self.dims[stage]), self.proj_drop_rate)

    def _make_attention(
        self, stage: int, kind: str, size: tuple[int, int], window: tuple[int, int]
    ) -> nn.Module:
        dim, heads, drop = self.dims[stage], self.heads[stage], self.proj_drop_rate
        if kind == "N":
            return NeighborhoodAttention(dim, heads, self.neighborhood[stage], drop)
        if kind == "P":
            return SpatialReductionAttention(dim, heads, self.sr_ratios[stage], drop)
        if kind == "D":
            kernel, stride = self.offset_kernels[stage], self.strides[stage]
            return DeformableAttention(
                dim, heads, self.groups[stage], size, kernel, stride, self.conventions, drop
            )
        return WindowAttention(dim, heads, window, self.shift if kind == "S" else None, drop)

    def _make_block(self, stage: int, kind: str, size: tuple[int, int], window: tuple[int, int]) -> nn.Module:
        local = LocalPerception(self.dims[stage]) if self.local_perception else None
        attention = self._make_attention(stage, kind, size, window)
        return Block(self.dims[stage], attention, self._make_mlp(stage), local)

    def map_sizes(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of every stage's map."""
        height, width = (ceil(side / self.patch_size) for side in img_size)
        return [(ceil(height / 2**stage), ceil(width / 2**stage)) for stage in range(len(self.dims))]

    def windows(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of every stage's windows."""
        wanted = self.window_size
        if wanted is None:
            wanted = max(1, ceil(min(img_size) / self.window_divisor))
        windows = ((wanted, wanted),) * len(self.dims) if isinstance(wanted, int) else wanted
        return [
            (min(height, rows), min(width, columns))
            for (height, width), (rows, columns) in zip(windows, self.map_sizes(img_size))
        ]

    # Forward ------------------------------------------------------------------------------------------------------

    def drop_path_rates(self, device: torch.device | None = None) -> Tensor:
        """Rate of each residual branch, num_drop_path, fp32: 0 to ``drop_path_rate`` over the blocks."""
        return drop_path_rates(sum(self.depths), self.drop_path_rate, device)

    def _drop_path_scale(self, x: Tensor, noise: Tensor | None) -> Tensor | None:
        if not self.training or self.drop_path_rate == 0:
            return None
        return drop_scale(x, self.drop_path_rates(x.device), noise)

    def stage_maps(self, x: Tensor, noise: Tensor | None, count: int) -> list[Tensor]:
        """Maps after the stem and the first ``count`` stages, one per stage, B x H x W x C; ``noise`` as in ``forward``."""
        scale = self._drop_path_scale(x, noise)
        x = self.patch_embed(x)
        maps, first = [], 0
        for depth, stage in zip(self.depths[:count], self.stages):
            columns = None if scale is None else scale[:, first : first + 2 * depth]
            first += 2 * depth
            if self.checkpoint_stages and torch.is_grad_enabled():
                x = recompute(stage, x, columns, random=has_dropout(stage))
            else:
                x = stage(x, columns)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Normalised map of the last stage: B x 3 x H x W -> B x H/32 x W/32 x C."""
        out: Tensor = self.norm(self.stage_maps(x, drop_path_noise, len(self.stages))[-1])
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features (``pre_logits``) or logits of a map of ``forward_features``."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            x: B x in_chans x H x W, any H and W.
            drop_path_noise: B x num_drop_path fp32 uniforms in [0, 1): branch j of sample b is dropped where
                noise[b, j] < rate_j. None draws from torch's generator. Without effect outside training.

        Returns:
            B x num_classes.
        """
        return self.forward_head(self.forward_features(x, drop_path_noise))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        drop_path_noise: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages ``indices`` (the last n for an int, all for None), B x C x H x W or B x H x W x C.

        Args:
            norm: apply the final norm to the last stage's map.
            stop_early: do not run the stages after the last one asked for.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: leave out the final map (B x H x W x C) that otherwise comes first.
            drop_path_noise: as in ``forward``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NHWC'")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps = self.stage_maps(x, drop_path_noise, last + 1 if stop_early else len(self.stages))
        complete = len(maps) == len(self.depths)
        final = self.norm(maps[-1]) if complete else maps[-1]
        if norm and complete:
            maps = maps[:-1] + [final]
        chosen = [maps[index] for index in wanted]
        if output_fmt == "NCHW":
            chosen = [each.permute(0, 3, 1, 2).contiguous() for each in chosen]
        return chosen if intermediates_only else (final, chosen)
