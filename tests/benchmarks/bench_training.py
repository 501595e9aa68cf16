"""Seconds and memory of training steps, each kind in a process of its own.

    python tests/benchmarks/bench_training.py [coarse] [fine] [frozen] [augment] [moments] [--threads 2] [--sides 64 96 128] [--data ../shared/data]

coarse   a step on block fractions at 64³ against those that take the same loss at 256³: as released (features upsampled, then the head) and
         with the head at 64³, as ``LODBrain.forward`` has it
fine     whole heads and windows of 64, in float32 and bfloat16, with and without checkpoints
frozen   the fine stage with its coarse level trained and frozen
augment  augmenting before pooling against after it: seconds a sample, and how the images differ
moments  the finest level's group norms on windows against the whole head, with the authors' weights on a real scan

A step is forward, loss, backward and Adam: the median of three after one more. Memory is the largest resident size less that before the
first batch was made; a tiny step has then loaded the libraries and Adam's state, which are the same for all.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PARTS = ("coarse", "fine", "frozen", "augment", "moments")
HEAD = f"{'':46}{'s a step':>9}{'GB':>7}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data")
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(CHECKOUT))
    if args.step:
        return print(json.dumps(measure(threads=args.threads, **args.step)))
    for part in args.parts or PARTS:
        {"coarse": coarse, "fine": fine, "frozen": frozen, "augment": augmentation, "moments": moments}[part](args)


def coarse(args: argparse.Namespace) -> None:
    print(f"coarse stage, float32\n{HEAD}")
    blocks = line(args, "64³, block fractions", kind="blocks", side=256)
    for name, kind in (("256³, head at 64³", "full"), ("256³, as released", "released")):
        full = line(args, name, kind=kind, side=256)
        print(f"{'  times the first':46}{full['seconds'] / blocks['seconds']:9.1f}{full['gb'] / blocks['gb']:7.1f}")


def fine(args: argparse.Namespace) -> None:
    print(f"fine stage\n{HEAD}")
    for side, patch, half, blocks in itertools.product(args.sides, (None, 64), (False, True), (False, True)):
        if patch is None or patch < side:
            name = f"{side}³, {f'window {patch}³' if patch else 'whole'}, {'bfloat16' if half else 'float32'}{', checkpointing' if blocks else ''}"
            line(args, name, kind="fine", side=side, patch=patch, half=half, checkpointing=blocks)


def frozen(args: argparse.Namespace) -> None:
    print(f"coarse level of the fine stage, 96³, float32\n{HEAD}")
    for patch, held in itertools.product((None, 64), (False, True)):
        line(args, f"{'window 64³' if patch else 'whole'}, {'frozen' if held else 'trained'}", kind="fine", side=96, patch=patch, frozen=held)


def line(args: argparse.Namespace, name: str, **step) -> dict:
    """Measure a step in a process of its own and print its line."""
    command = [sys.executable, __file__, "--threads", str(args.threads), "--step", json.dumps(step)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=CHECKOUT).stdout.splitlines()[-1])
    print(f"{name:46}{result['seconds']:9.2f}{result['gb']:7.2f}", flush=True)
    return result


def measure(*, threads: int, kind: str, side: int, patch: int | None = None, half=False, checkpointing=False, frozen=False) -> dict:
    """Seconds a step and GB of one kind of step; blocks, full and released are those of the coarse stage for a head of ``side`` voxels."""
    import torch

    from lod_model import networks
    from lod_model.losses import block_dice_loss, dice_loss

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = networks.build_coarse("lod_brain") if kind != "fine" else networks.build("lod_brain")
    if frozen:
        networks.load_coarse(network, networks.build_coarse("lod_brain"), freeze=True)
    network.train().checkpoint_blocks(checkpointing)
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-4)

    def batch(side: int, patch: int | None) -> tuple:
        if kind == "blocks":
            return torch.randn(1, 1, *[side // 4] * 3), torch.rand(1, 7, *[side // 4] * 3).softmax(1), None
        window = [slice(0, patch)] + [slice(side - patch, side)] * 2 if patch else None
        return torch.randn(1, 1, *[side] * 3), torch.randint(0, 7, [1] + [patch or side] * 3, dtype=torch.uint8), window

    def logits(image: torch.Tensor, window: list[slice] | None) -> torch.Tensor:
        if kind == "released":
            pool = torch.nn.functional.max_pool3d(image, 4)
            level = network.levels[0]
            return network.head(torch.nn.functional.interpolate(level.out(level(pool, None)[0]), scale_factor=4))
        return network.forward_window(image, window) if window else network(image)

    def step(image: torch.Tensor, target: torch.Tensor, window: list[slice] | None) -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = block_dice_loss(network.forward_coarse(image), target, 64) if kind == "blocks" else dice_loss(logits(image, window), target)
        loss.backward()
        optimiser.step()

    step(*batch(64 if kind == "blocks" else 32, 16 if patch else None))
    before = resident("VmRSS")
    real, seconds = batch(side, patch), []
    for _ in range(4):
        start = time.perf_counter()
        step(*real)
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds[1:])[1], "gb": (resident("VmHWM") - before) / 1e6}


def resident(field: str) -> int:
    """kB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def scan(args: argparse.Namespace):
    """A real head: uint8 (256, 256, 256), and the labels that the authors' weights give it."""
    import numpy as np

    reference = np.load(args.data / "lod_brain_weights/reference/t1w_philips_elition.npz")
    return reference["volume"], reference["labels"]


def augmentation(args: argparse.Namespace) -> None:
    """Both ways with the same seeds; the pose drawn is the same, noise and thickness of slices are those of another grid."""
    import numpy as np
    import torch

    from data_registry import protocol
    from data_registry.shards import block_counts, pooled
    from lod_model.augment import augment

    torch.set_num_threads(args.threads)
    (volume, labels), mirrored = scan(args), protocol.load("lod7").mirrored()
    small, fractions = pooled(volume, 4), block_counts(labels, 4, 7).astype(np.float32) / 64
    seconds, images, targets = {"before": [], "after": []}, {"before": [], "after": []}, {"before": [], "after": []}
    for seed in range(7):
        start = time.perf_counter()
        image, target = augment(volume, labels, preset="light", seed=seed, mirrored=mirrored)
        image, target = pooled((image - image.mean()) / image.std(), 4), block_counts(target, 4, 7).astype(np.float32) / 64
        middle = time.perf_counter()
        other, moved = augment(small, fractions, preset="light", seed=seed, mirrored=mirrored, voxel_mm=4.0)
        other = (other - other.mean()) / other.std()
        for how, took, x, y in (("before", middle - start, image, target), ("after", time.perf_counter() - middle, other, moved)):
            seconds[how].append(took)
            images[how].append((x - x.mean()) / x.std())
            targets[how].append(y)
    print(f"augmenting, preset light, 256³ → 64³\n{'':10}{'s a sample':>11}{'roughness':>11}")
    for how in images:
        print(f"{how:10}{np.median(seconds[how][1:]):11.3f}{np.mean([np.abs(np.diff(x, axis=0)).mean() for x in images[how]]):11.4f}")
    pairs = list(zip(images["before"], images["after"], strict=True))
    print(f"correlation of the two images {np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]):.3f},"
          f" |Δ| of fractions {np.mean([np.abs(a - b).mean() for a, b in zip(targets['before'], targets['after'], strict=True)]):.4f}")  # fmt: skip


def moments(args: argparse.Namespace) -> None:
    """Deviation of the whole head and shift of the mean, by norm; and voxels of another class in the windows."""
    import numpy as np
    import torch

    from lod_model import weights
    from lod_model.data import Windows
    from lod_model.networks.group_norm import GroupNorm, group_moments

    torch.set_num_threads(args.threads)
    volume, labels = scan(args)
    x = torch.from_numpy((volume - volume.mean(dtype=np.float64)) / volume.std(dtype=np.float64)).float()[None, None]
    network = weights.load(args.data / "lod_brain_weights/weights_lv1.h5").network
    seen: list = []
    for norm in (m for m in network.levels[-1].modules() if isinstance(m, GroupNorm)):
        norm.register_forward_pre_hook(lambda norm, given: seen.append(group_moments(given[0], norm.groups)))
    with torch.inference_mode():
        classes = network(x)[0].argmax(0)
        whole, seen[:] = list(seen), []
        print("moments of the finest level on windows, σ and |Δμ| in σ of the whole head")
        print(f"{'':11}{'σ, median':>12}{'least':>8}{'most':>8}{'|Δμ|, median':>14}{'most':>8}{'other class':>13}")
        for side in (64, 96, 128, 192):
            ratios, shifts, wrong = [], [], []
            for seed in range(8):
                first = Windows(side, 8).first(labels, seed, where="")
                box = [slice(int(s), int(s) + side) for s in first]
                wrong.append((network.forward_window(x, box)[0].argmax(0) != classes[*box]).float().mean().item())
                for (mean, variance), (whole_mean, whole_variance) in zip(seen, whole, strict=True):
                    ratios.append((variance / whole_variance).sqrt())
                    shifts.append((mean - whole_mean).abs() / whole_variance.sqrt())
                seen.clear()
            ratio, shift = torch.cat(ratios).flatten(), torch.cat(shifts).flatten()
            figures = f"{ratio.median():12.2f}{ratio.min():8.2f}{ratio.max():8.2f}{shift.median():14.2f}{shift.max():8.2f}{np.mean(wrong):13.2%}"
            print(f"{side:10}³{figures}", flush=True)


if __name__ == "__main__":
    main()
