"""RetinaNet of this package beside torchvision's own, on one backbone, the same batches, optimizer, schedule and evaluation: AP over seeds.

Both have DAT's backbone from the same classification weights, a feature pyramid, and anchors and evaluation of the same sizes; each keeps its own
head, anchor rounding, matching, losses with their normalisers, initial weights and postprocessing. ``rescaled`` is torchvision's with the standard
deviation of the weights of its head as ours have it, which is the same at 256 channels and not at the demo's 64. Batches come from this package's
loader, one process, fp32, AdamW by torch. Scenes: those that `dattrain demo detect` left behind.

    dattrain demo detect
    python -m benchmarks.compare_torchvision --demo demo-detect --updates 600 --seeds 0 1 2 --markdown docs/benchmarks/torchvision.md
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from dattrain.bench import common
from dattrain.config.derive import derive
from dattrain.config.load import load
from dattrain.config.schema import Config
from dattrain.engine.schedule import rate
from dattrain.evaluation import inference
from dattrain.models.dense import Backbone, create_backbone
from dattrain.models.dense.create_detector import outs
from dattrain.models.dense.retina import gain_of_256
from dattrain.models.dense.weights import Dense, initialise
from dattrain.pretrained.weights import load_model
from dattrain.tasks.create import create_task

DEVICE = torch.device("cpu")
CONTENDERS = ("ours", "torchvision", "rescaled")


class Theirs(nn.Module):
    """torchvision's RetinaNet with the calling convention of ``dattrain.models.dense.Detector``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        task, model = config.task, config.model
        self.backbone = create_backbone(
            model.name, img_size=model.img_size, drop_path_rate=model.drop_path, outs=outs("retinanet")
        )
        width = task.channels or 256
        self.model = RetinaNet(
            Pyramid(self.backbone, width),
            model.num_classes,
            # Steps of a third of an octave from four strides on, as the default of torchvision and of the paper.
            anchor_generator=AnchorGenerator(
                tuple(
                    tuple(int(4 * stride * 2 ** (third / 3)) for third in range(3))
                    for stride in (8, 16, 32, 64, 128)
                ),
                ((0.5, 1.0, 2.0),) * 5,
            ),
            head=RetinaNetHead(width, 9, model.num_classes),
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
            score_thresh=config.eval.score_threshold,
            detections_per_img=config.eval.max_detections,
        )
        # Images come resized; torchvision's own `_skip_resize` is of training alone.
        self.model.transform.resize = lambda image, target=None: (image, target)

    def forward(
        self, x: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Any] | None = None, **_: Any
    ) -> Any:
        """Losses in training, else objects."""
        images = [image[:, :height, :width] for image, (height, width) in zip(x, sizes)]
        return self.model(images, None if targets is None else list(targets))


class Pyramid(nn.Module):
    """A backbone with torchvision's pyramid, P3 to P7."""

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, width
        channels = list(backbone.channels)
        self.pyramid = FeaturePyramidNetwork(channels, width, LastLevelP6P7(channels[-1], width))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Five maps by name."""
        maps = {str(number): each for number, each in enumerate(self.backbone(x))}
        found: dict[str, Tensor] = self.pyramid(maps)
        return found


def recipe(args: argparse.Namespace, seed: int) -> Config:
    """The demo's, for one process."""
    scenes = Path(args.demo) / "scene-shards"
    return load(
        "demo/detect.yaml",
        [
            f"data.train={scenes}/train-*.tar",
            f"data.val={scenes}/val-*.tar",
            f"schedule.updates={args.updates}",
            f"train.seed={seed}",
            f"train.micro_batch={args.batch}",
            f"train.global_batch={args.batch}",
            "model.drop_path=0",
        ],
    ).config


def train(which: str, config: Config, args: argparse.Namespace) -> dict[str, float]:
    """Train, evaluate; ``ap``, ``ap50``, ``seconds`` of the training and ``loss`` of its last 20 updates."""
    task = create_task(config)
    torch.manual_seed(config.train.seed)
    model = task.build(config.model.img_size) if which == "ours" else Theirs(config)
    if isinstance(model, Theirs) and which == "rescaled":
        for module in model.model.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=gain_of_256(module.in_channels))
    if args.init:
        source, _ = load_model(args.init)
        initialise(cast(Dense, model), source.state_dict(), bias_table="sample")
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if parameter.dim() > 1 else kept).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.optim.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
    )
    loader = task.train_loader(rank=0, world=1, samples_seen=0, device=DEVICE, img_size=config.model.img_size)
    derived = derive(config, world=1, samples_per_epoch=loader.samples_per_epoch)
    history: list[float] = []
    model.train()
    started = time.perf_counter()
    with closing(loader):
        for update in range(derived.total_steps):
            batch = next(loader)
            for group in optimizer.param_groups:
                group["lr"] = rate(config.schedule, derived, update)
            loss = task.loss(model, batch, noise=None, dtype=torch.float32).value
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            optimizer.step()
            history.append(loss.item())
        classes = loader.classes
    seconds = time.perf_counter() - started
    model.eval()
    evaluator = task.evaluator(DEVICE, torch.float32)
    with (
        closing(
            task.eval_loader(classes, rank=0, world=1, device=DEVICE, img_size=config.model.img_size)
        ) as val,
        torch.inference_mode(),
    ):
        for batch in val:
            evaluator.update(model, batch, lockstep=False)
    found = evaluator.compute(inference.ranks())
    return {
        "ap": found["ap"],
        "ap50": found["ap50"],
        "seconds": seconds,
        "loss": statistics.mean(history[-20:]),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--demo", default="demo-detect", metavar="DIR", help="what `dattrain demo detect` made"
    )
    parser.add_argument("--init", metavar="RUN", help="classification weights of both (default: random)")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[str] = []
    found: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for which in args.contenders:
            one = train(which, recipe(args, seed), args)
            found.setdefault(which, []).append(one)
            rows.append(
                f"| {seed} | {which} | {one['ap']:.2f} | {one['ap50']:.2f} | {one['loss']:.3f} | {one['seconds']:.0f} |"
            )
            print(rows[-1], flush=True)
    lines = [
        "# RetinaNet here and torchvision's",
        "",
        "```",
        shlex.join(["python", "-m", "benchmarks.compare_torchvision", *sys.argv[1:]]),
        "```",
        "",
        *[f"- {key}: {value}" for key, value in common.describe_machine("cpu").items()],
        "",
        *" ".join((__doc__ or "").split("\n\n")[1].split("\n")).splitlines(),
        "",
        "| seed | | AP | AP50 | training loss, last 20 updates (each its own) | s |",
        "|---|---|---|---|---|---|",
        *rows,
        *[
            f"| mean (range) | {which} | {_spread(each, 'ap')} | {_spread(each, 'ap50')} | | |"
            for which, each in found.items()
        ],
    ]
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")


def _spread(results: Sequence[dict[str, float]], key: str) -> str:
    values = [one[key] for one in results]
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
