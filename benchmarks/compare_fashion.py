"""DAT against Swin and against DAT without offsets, at an equal recipe, on Fashion-MNIST.

Three networks of the same parameters and multiply-accumulates: dat_atto, the same with offsets off, and timm's Swin with
dat_atto's widths, depths, heads and windows. Same images in the same order with the same augmentation, same optimizer and
schedule, same initialisation (truncated normal), several seeds. Each finished run is added to the results file, and is not
done again: interrupt and go on as you like.

    python -m benchmarks.compare_fashion --seeds 3 --epochs 4 --out compare_fashion.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dattrain.data.prepare.arrays import read_idx
from dattrain.models import create

SIZE, CLASSES, BATCH, LR, WEIGHT_DECAY, DROP_PATH, CLIP, SHIFT = 64, 10, 128, 1e-3, 0.05, 0.05, 5.0, 4


def models() -> dict[str, Any]:
    """Name to a function that builds the network with fresh weights."""
    arguments: dict[str, Any] = {
        "num_classes": CLASSES, "img_size": SIZE, "drop_path_rate": DROP_PATH, "init": "trunc_normal"
    }  # fmt: skip
    return {
        "DAT (dat_atto)": lambda: create("dat_atto", **arguments),
        "DAT, offsets off": lambda: create("dat_atto", offsets=False, **arguments),
        "Swin (timm)": lambda: SwinTransformer(
            img_size=SIZE,
            num_classes=CLASSES,
            embed_dim=32,
            depths=(1, 1, 2, 1),
            num_heads=(2, 4, 8, 16),
            window_size=4,
            drop_path_rate=DROP_PATH,
        ),
    }


def images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, test) of the vendored 10,000 images: normalised n x 3 x 64 x 64 and labels; 8,000 and 2,000, drawn with seed 0."""
    folder = resources.files("dattrain") / "demo"
    with (
        resources.as_file(folder / "t10k-images-idx3-ubyte.gz") as pixels,
        resources.as_file(folder / "t10k-labels-idx1-ubyte.gz") as labels,
    ):
        x, y = (
            torch.from_numpy(read_idx(str(pixels)).copy()),
            torch.from_numpy(read_idx(str(labels)).astype(np.int64)),
        )
    x = F.interpolate(x[:, None].float(), (SIZE, SIZE), mode="bilinear", antialias=True)
    x = ((x / 255 - 0.286) / 0.353).expand(-1, 3, -1, -1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    return (x[order[:8000]], y[order[:8000]]), (x[order[8000:]], y[order[8000:]])


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images; shift each by up to four pixels, edges repeated."""
    count = len(x)
    flip = torch.rand(count, generator=generator) < 0.5
    shift = torch.randint(0, 2 * SHIFT + 1, (count, 2), generator=generator)
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    padded = F.pad(x, (SHIFT,) * 4, mode="replicate")
    return torch.stack(
        [p[:, top : top + SIZE, left : left + SIZE] for p, (top, left) in zip(padded, shift.tolist())]
    )


def train(build: Any, seed: int, epochs: int, device: torch.device) -> dict[str, float]:
    """One run: top-1 on the 2,000 test images after the last epoch, mean loss of it, and seconds of training."""
    (x, y), (test, answers) = images()
    torch.manual_seed(seed)
    model = build().to(device)
    decayed = [p for p in model.parameters() if p.dim() == 2 or p.dim() == 4]
    others = [p for p in model.parameters() if p.dim() not in (2, 4)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LR, weight_decay=WEIGHT_DECAY)
    per_epoch = len(x) // BATCH
    steps, warmup = epochs * per_epoch, per_epoch // 2
    generator = torch.Generator().manual_seed(seed)
    started, step, loss_sum = time.perf_counter(), 0, 0.0
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        loss_sum = 0.0
        for batch in order[: per_epoch * BATCH].split(BATCH):
            rate = LR * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = model(augment(x[batch], generator).to(device))
            loss = F.cross_entropy(logits, y[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            loss_sum, step = loss_sum + float(loss.detach()), step + 1
        print(
            f"    epoch {epoch + 1}/{epochs}: loss {loss_sum / per_epoch:.4f}, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(a.to(device)).argmax(1).cpu() == b).sum())
            for a, b in zip(test.split(250), answers.split(250))
        )
    return {"top1": 100 * right / len(answers), "loss": loss_sum / per_epoch, "seconds": seconds}


def cost(build: Any) -> tuple[int, float]:
    """Parameters, and multiply-accumulates of one image in millions as torch counts them (bilinear sampling left out)."""
    model = build().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, SIZE, SIZE))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e6


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: mean and deviation over seeds, and the difference to DAT seed by seed."""
    lines = [
        "| | parameters | M MACs | top-1, % | loss of the last epoch | to DAT, points |",
        "|---|---|---|---|---|---|",
    ]
    builders = models()
    base = results.get("DAT (dat_atto)", {})
    for name, runs in results.items():
        top1 = [run["top1"] for run in runs.values()]
        gain = [
            run["top1"] - base[seed]["top1"]
            for seed, run in runs.items()
            if seed in base and runs is not base
        ]
        parameters, macs = cost(builders[name])
        lines.append(
            f"| {name} | {parameters:,} | {macs:.2f} | {_spread(top1)} | {mean(r['loss'] for r in runs.values()):.3f} "
            f"| {_spread(gain, sign=True) if gain else ''} |"
        )
    return "\n".join(lines)


def _spread(values: list[float], *, sign: bool = False) -> str:
    form = "+.2f" if sign else ".2f"
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def main() -> None:
    """Do the runs that the results file lacks, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("compare_fashion.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    done: dict[str, Any] = (
        json.loads(args.out.read_text()) if args.out.exists() else {"epochs": args.epochs, "runs": {}}
    )
    if done["epochs"] != args.epochs:
        parser.error(f"{args.out} holds runs of {done['epochs']} epochs, not {args.epochs}")
    for seed in range(args.seeds):
        for name, build in models().items():
            runs = done["runs"].setdefault(name, {})
            if str(seed) in runs:
                continue
            print(f"{name}, seed {seed}", flush=True)
            runs[str(seed)] = train(build, seed, args.epochs, torch.device(args.device))
            print(f"    top-1 {runs[str(seed)]['top1']:.2f} %", flush=True)
            args.out.write_text(json.dumps(done, indent=2) + "\n")
    print(table(done["runs"]))


if __name__ == "__main__":
    main()
