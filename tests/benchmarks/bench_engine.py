"""Time, memory and agreement of one 256³ pass: the network in contiguous float32 against the fast engine in float32 and bfloat16.

    python tests/benchmarks/bench_engine.py [--threads 2] [--repeats 3] [--scan t1w_philips_elition] [--data ../shared/data] [--profile]

``as written`` follows the paper step by step: PyTorch's own group norm, every level's 32 channels upsampled and summed, then the head.
``plain`` is ours: exact moments, the head before the upsampling. ``--profile`` instead prints where the fast engine's seconds go, by
operation and shape.

Each runs in a process of its own, whose peak memory is that of reading the volume, compiling and predicting. Columns: seconds of the first
call and of the fastest (the first two are called once), the seconds as written and those of the plain network over the fastest, peak memory
(resident), voxels whose class is not the reference's and not the plain network's (and their share), and the largest difference of a
probability from the plain network's.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
VARIANTS = ("plain", "as written", "fast float32", "fast bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scan", default="t1w_philips_elition")
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data = args.data / "lod_brain_weights"
    if args.variant:
        print(json.dumps(measure(args)))
    elif args.profile:
        profile(args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    labels = np.load(args.data / "reference" / f"{args.scan}.npz")["labels"]
    print(f"{'':14}{'first s':>9}{'best s':>9}{'/written':>9}{'/plain':>8}{'peak GB':>9}{'≠ reference':>13}{'≠ plain':>9}{'share':>9}{'max Δp':>10}")
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, dict] = {}
        for variant in VARIANTS:
            out = Path(folder, f"{variant}.npy")
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant, "--out", str(out)]
            line = subprocess.run(command, check=True, capture_output=True, text=True, cwd=CHECKOUT).stdout.splitlines()[-1]
            result = json.loads(line) | {"probabilities": np.load(out, mmap_mode="r")}
            result["labels"] = result["probabilities"].argmax(0)
            results[variant] = result
            plain, written = results["plain"], results.get("as written", result)
            first, best = result["seconds"][0], min(result["seconds"])
            wrong, moved = (np.count_nonzero(result["labels"] != other) for other in (labels, plain["labels"]))
            error = max(float(np.abs(p - q).max()) for p, q in zip(result["probabilities"], plain["probabilities"], strict=True))
            ratios = "" if len(results) == 1 else f"{min(written['seconds']) / best:.1f}"
            speed = f"{first:9.2f}{best:9.2f}{ratios:>9}{min(plain['seconds']) / best:8.1f}"
            print(f"{variant:14}{speed}{result['peak_gb']:9.2f}{wrong:13d}{moved:9d}{moved / labels.size:9.3%}{error:10.1e}", flush=True)


def as_written(network, x):
    """The network's logits of x (1, 1, D, H, W) as the paper has it, with none of our rewrites."""
    from torch.nn import functional as F

    def block(part, y):
        y = F.group_norm(part.conv(y), part.norm.groups, part.norm.weight, part.norm.bias, part.norm.epsilon).relu_()
        return part.resample(y).relu_()

    def up(y, factor=2):
        return F.interpolate(y, scale_factor=factor, mode="nearest") if factor > 1 else y

    outputs, above = [], ([], [])
    for pool, level in zip(network.config.pools, network.levels, strict=True):
        skips = [level.stem(F.max_pool3d(x, pool))]
        for i, part in enumerate(level.encoder):
            y = block(part, skips[-1])
            skips.append(y + up(above[0][i]) if above[0] else y)
        down, y, ups = skips[1:], block(level.bridge, skips[-1]), []
        for i, part in enumerate(level.decoder):
            y = block(part, y) + skips.pop()
            ups.append(y + up(above[1][i]) if above[1] else y)
            y = ups[-1]
        outputs.append(up(level.out(y), pool))
        above = (down, ups[1:])
    return network.head(sum(outputs))


def profile(args: argparse.Namespace) -> None:
    """Print the operations that take most of one call, in float32 and in bfloat16."""
    import torch

    network, x = network_and_image(args)
    from lod_model.engine import compile_network

    for dtype in (torch.float32, torch.bfloat16):
        fast = compile_network(network, dtype=dtype)
        fast.probabilities(x)
        with torch.profiler.profile(record_shapes=True) as record:
            fast.probabilities(x)
        rows = record.key_averages(group_by_input_shape=True)
        print(dtype, rows.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40), sep="\n")


def network_and_image(args: argparse.Namespace):
    """The authors' network and a z-scored scan (1, 1, 256, 256, 256)."""
    sys.path.insert(0, str(CHECKOUT))
    import torch

    from lod_model import weights

    torch.set_num_threads(args.threads)
    volume = torch.from_numpy(np.load(args.data / "reference" / f"{args.scan}.npz")["volume"])
    counts = torch.bincount(volume.flatten(), minlength=256).double()        # exact moments without a float64 volume
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / volume.numel()
    deviation = ((counts * (values - mean).square()).sum() / volume.numel()).sqrt()
    x = volume.float().sub_(mean.item()).div_(deviation.item())[None, None]
    return weights.load(args.data / "weights_lv1.h5").network, x


def measure(args: argparse.Namespace) -> dict:
    """Run one variant; write its probabilities (7, 256, 256, 256) to ``args.out``, return seconds of each call and the peak."""
    import torch

    network, x = network_and_image(args)
    from lod_model.engine import compile_network

    seconds = []
    with torch.inference_mode():
        if args.variant in ("plain", "as written"):
            network = network.to(memory_format=torch.contiguous_format)
            start = time.perf_counter()
            probabilities = (network(x) if args.variant == "plain" else as_written(network, x)).softmax(1)
            seconds.append(time.perf_counter() - start)
        else:
            start = time.perf_counter()
            fast = compile_network(network, dtype=getattr(torch, args.variant.split()[1]))
            for _ in range(args.repeats):
                probabilities = None   # the next call's memory is not on top of the last one's
                probabilities = fast.probabilities(x)
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
    peak_kb = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]   # ru_maxrss would begin with the parent's
    np.save(args.out, probabilities[0].numpy())
    return {"seconds": seconds, "peak_gb": int(peak_kb) * 1024 / 1e9}


if __name__ == "__main__":
    main()
