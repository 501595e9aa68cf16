"""NeuroNet over a volume in windows: the network as written, window by window, against its exact rewrite, a few slices at a time.

    python tests/benchmarks/bench_neuronet.py [--volume 128] [--side 64] [--stride 32] [--protocols all] [--threads 2] [--repeats 3]
    python tests/benchmarks/bench_neuronet.py --volume 256 --side 128 --stride 64 --repeats 1     # as published: minutes, some 9 GB as written

The weights are random, with norms that are not idle; the image is noise. Each call is a process of its own, and the two take turns. Columns:
seconds of the fastest and of the median call, how often faster than as written, peak memory (resident), voxels whose class differs, over all
protocols, and for the rewrite the share of its time that the encoder takes: what sharing it between windows could save at most.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
VARIANTS = ("as written", "rewritten")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volume", type=int, default=128, help="voxels along each side")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--protocols", default="all", help="all, or names with commas between")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    runs: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeats):
            for variant, own in runs.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant, "--out", str(Path(folder, f"{variant}.npz"))]
                own.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=CHECKOUT).stdout.splitlines()[-1]))
        written, rewritten = (np.load(Path(folder, f"{variant}.npz")) for variant in VARIANTS)
        differing = sum(int(np.count_nonzero(written[name] != rewritten[name])) for name in written.files)
        voxels = sum(written[name].size for name in written.files)
    print(f"{args.volume}³ voxels, windows of {args.side}³ every {args.stride}, protocols {args.protocols}, {args.threads} threads")
    print(f"{'':12}{'best s':>9}{'median s':>10}{'/written':>10}{'peak GB':>9}{'differing':>11}{'of':>12}{'encoder':>9}")
    fastest = {variant: min(run["seconds"] for run in own) for variant, own in runs.items()}
    for variant, own in runs.items():
        median, peak = statistics.median(run["seconds"] for run in own), max(run["peak_gb"] for run in own)
        end = f"{differing:11d}{voxels:12d}{own[-1]['encoder']:9.0%}" if variant == "rewritten" else ""
        print(f"{variant:12}{fastest[variant]:9.2f}{median:10.2f}{fastest['as written'] / fastest[variant]:10.2f}{peak:9.2f}{end}")


def measure(args: argparse.Namespace) -> dict:
    """One call of one variant, after one over a single window; its classes go to ``args.out``."""
    sys.path.insert(0, str(CHECKOUT))
    import torch

    from lod_model import neuronet_engine
    from lod_model.networks.neuronet import PROTOCOLS, NeuroNet, NeuroNetConfig
    from lod_model.windows import window_classes

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names = PROTOCOLS if args.protocols == "all" else args.protocols.split(",")
    network = NeuroNet(NeuroNetConfig(protocols={name: PROTOCOLS[name] for name in names}))
    for norm in (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm3d)):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    encoding = [0.0]

    class Timed(neuronet_engine.Window):
        def __init__(self, *given) -> None:
            start = time.perf_counter()
            super().__init__(*given)
            encoding[0] += time.perf_counter() - start

    neuronet_engine.Window = Timed
    if args.variant == "rewritten":
        network = neuronet_engine.FastNeuroNet(network)
    x = torch.randn(1, 1, *[args.volume] * 3)
    window_classes(network, x[:, :, : args.side, : args.side, : args.side], side=args.side, stride=args.stride)
    encoding[0], start = 0.0, time.perf_counter()
    classes = window_classes(network, x, side=args.side, stride=args.stride)
    seconds = time.perf_counter() - start
    peak_kb = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]
    np.savez(args.out, **classes)
    return {"seconds": seconds, "peak_gb": int(peak_kb) * 1024 / 1e9, "encoder": encoding[0] / seconds}


if __name__ == "__main__":
    main()
