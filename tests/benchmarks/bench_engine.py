"""Time, memory and agreement of one 256³ pass: the plain network in contiguous float32 against the fast engine in float32 and bfloat16.

    python tests/benchmarks/bench_engine.py [--threads 2] [--repeats 3] [--scan t1w_philips_elition] [--data ../shared/data]

Each runs in a process of its own, whose peak memory is that of reading the volume, compiling and predicting. Columns: seconds of the first
call and of the fastest (the plain network is called once), the plain network's seconds over the fastest, peak memory (resident), voxels
whose class is not the reference's and not the plain network's, and the largest difference of a probability from the plain network's.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
VARIANTS = ("plain", "fast float32", "fast bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scan", default="t1w_philips_elition")
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data = args.data / "lod_brain_weights"
    if args.variant:
        print(json.dumps(measure(args)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    labels = np.load(args.data / "reference" / f"{args.scan}.npz")["labels"]
    print(f"{'':14}{'first s':>9}{'best s':>9}{'ratio':>7}{'peak GB':>9}{'≠ reference':>13}{'≠ plain':>9}{'max Δp':>10}")
    with tempfile.TemporaryDirectory() as folder:
        plain = None
        for variant in VARIANTS:
            out = Path(folder, f"{variant}.npy")
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant, "--out", str(out)]
            line = subprocess.run(command, check=True, capture_output=True, text=True, cwd=CHECKOUT).stdout.splitlines()[-1]
            result = json.loads(line) | {"probabilities": np.load(out, mmap_mode="r")}
            result["labels"] = result["probabilities"].argmax(0)
            plain = plain or result
            first, best = result["seconds"][0], min(result["seconds"])
            wrong, moved = (np.count_nonzero(result["labels"] != other) for other in (labels, plain["labels"]))
            error = max(float(np.abs(p - q).max()) for p, q in zip(result["probabilities"], plain["probabilities"], strict=True))
            ratio = min(plain["seconds"]) / best
            print(f"{variant:14}{first:9.2f}{best:9.2f}{ratio:7.1f}{result['peak_gb']:9.2f}{wrong:13d}{moved:9d}{error:10.1e}", flush=True)


def measure(args: argparse.Namespace) -> dict:
    """Run one variant; write its probabilities (7, 256, 256, 256) to ``args.out``, return seconds of each call and the peak."""
    sys.path.insert(0, str(CHECKOUT))
    import torch

    from lod_model import weights
    from lod_model.engine import compile_network

    torch.set_num_threads(args.threads)
    volume = torch.from_numpy(np.load(args.data / "reference" / f"{args.scan}.npz")["volume"])
    counts = torch.bincount(volume.flatten(), minlength=256).double()        # exact moments without a float64 volume
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / volume.numel()
    deviation = ((counts * (values - mean).square()).sum() / volume.numel()).sqrt()
    x = volume.float().sub_(mean.item()).div_(deviation.item())[None, None]
    network = weights.load(args.data / "weights_lv1.h5").network
    seconds = []
    with torch.inference_mode():
        if args.variant == "plain":
            network = network.to(memory_format=torch.contiguous_format)
            start = time.perf_counter()
            probabilities = network(x).softmax(1)
            seconds.append(time.perf_counter() - start)
        else:
            start = time.perf_counter()
            fast = compile_network(network, dtype=getattr(torch, args.variant.split()[1]))
            for _ in range(args.repeats):
                probabilities = None   # the next call's memory is not on top of the last one's
                probabilities = fast.probabilities(x)
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    np.save(args.out, probabilities[0].numpy())
    return {"seconds": seconds, "peak_gb": peak_gb}


if __name__ == "__main__":
    main()
