"""Volumes a second of each augmentation preset beside a training step, and how many loader workers make augmentation no bottleneck.

    python tests/benchmarks/bench_augment.py [--sides 64 96 128 256] [--repeats 12] [--threads 2] [--no-fine]

One worker is one core: augmentation runs in one thread. A head-like phantom fills the grid. Coarse: class fractions (7, n, n, n), a step
of the coarse level alone (what the network sees is n, its grid 4n). Fine: classes (n, n, n), a step of both levels. A step is forward,
loss, backward, Adam, in bfloat16 where the processor computes in it, else float32, the fastest of three. Last column: workers needed, each
with a core of its own beside the step's. Fine steps beyond 128³ take over 10 GB and are extrapolated by voxels (marked ~).
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96, 128, 256])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-fine", action="store_true")
    args = parser.parse_args()
    import torch

    from lod_model.augment import PRESETS

    torch.set_num_threads(args.threads)
    print(f"{'target':10}{'side':>5}{'preset':>8}{'ms a volume':>13}{'volumes/s':>11}{'step ms':>10}{'steps/s':>9}{'bottleneck':>14}{'workers':>9}")
    for level in ("coarse",) if args.no_fine else ("coarse", "fine"):
        known = None
        for side in args.sides:
            if level == "coarse" and side > 128:
                continue  # a coarse level of 256 voxels would be a grid of 1024
            mark = "~" if level == "fine" and side > 128 and known else " "
            seconds = known[1] * (side / known[0]) ** 3 if mark == "~" else step_seconds(level, side)
            known = (side, seconds)
            for preset in PRESETS:
                own = augment_seconds(level, side, preset, args.repeats if side < 256 else max(4, args.repeats // 3))
                slower = "augmentation" if own > seconds else "training"
                print(f"{level:10}{side:5d}{preset:>8}{own * 1e3:13.1f}{1 / own:11.2f}{mark:>2}{seconds * 1e3:8.1f}{1 / seconds:9.2f}{slower:>14}"
                      f"{math.ceil(own / seconds):9d}", flush=True)  # fmt: skip


def phantom(side: int, level: str) -> tuple[np.ndarray, np.ndarray]:
    """A brain of six nested shells inside a head: (n, n, n) uint8 and classes, or fractions where ``level`` is coarse."""
    at = (np.arange(side) - (side - 1) / 2) / side
    radius = np.sqrt((at[:, None, None] / 0.26) ** 2 + (at[:, None] / 0.24) ** 2 + (at / 0.32) ** 2)
    classes = np.where(radius < 1, 1 + np.floor(radius * 5.999), 0).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 8, classes.shape)
    image = np.where(radius < 1.4, 60 + 20 * classes, 0).astype(np.uint8) + noise.astype(np.uint8)
    return image, classes if level == "fine" else np.stack([classes == c for c in range(7)]).astype(np.float32)


def augment_seconds(level: str, side: int, preset: str, repeats: int) -> float:
    """Mean seconds of one call over ``repeats`` seeds, after one to warm up."""
    from lod_model.augment import augment

    image, target = phantom(side, level)
    arguments = {"preset": preset, "mirrored": np.arange(7), "voxel_mm": 256 / side}
    augment(image, target, seed=0, **arguments)
    start = time.perf_counter()
    for seed in range(1, repeats + 1):
        augment(image, target, seed=seed, **arguments)
    return (time.perf_counter() - start) / repeats


def step_seconds(level: str, side: int) -> float:
    """The fastest of three Adam steps, after one to warm up."""
    import torch

    from lod_model.losses import block_dice_loss, dice_loss
    from lod_model.networks.lod_brain import LODBrain, LODBrainConfig

    network = LODBrain(LODBrainConfig(levels=1, coarse_pool=4) if level == "coarse" else LODBrainConfig())
    network = network.train().to(memory_format=torch.channels_last_3d)
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-4)
    image, target = (torch.from_numpy(array)[None] for array in phantom(side, level))
    image = ((image.float() - image.float().mean()) / image.float().std())[None]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            coarse = level == "coarse"
            loss = block_dice_loss(network.forward_coarse(image), target, 64) if coarse else dice_loss(network(image), target.long())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
