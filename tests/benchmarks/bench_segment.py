"""What ``lodbrain segment`` costs beside its network: one scan as a whole process, and twenty scans in one call.

    python tests/benchmarks/bench_segment.py [--scans 20] [--weights FILE] [--scan T1W] [--engine fast] [--threads N]

The whole process counts, from its start to its end: imports, weights, reading, conforming, the way back, cleaning, judging, writing. From
that wall time the network's own seconds, as the sidecars have them, are taken. A network that shares the processor with reading and writing
takes longer itself, so the batch is also compared with the same number of times the network alone (the first scan's, in the single run).
Wanted: at most 2 s over the network for one scan, at most 0.7 s each in a batch.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DATA = CHECKOUT / "../shared/data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--weights", type=Path, default=DATA / "lod_brain_weights/weights_lv1.h5")
    parser.add_argument("--scan", type=Path, help="by default the first whole head of georgetown")
    parser.add_argument("--engine", default="fast")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    scan = args.scan or sorted((DATA / "bids/georgetown").glob("sub-*/anat/*_T1w.nii.gz"))[0]
    print(f"{scan}, engine {args.engine}")
    print(f"{'scans':>5}{'wall s':>9}{'network s':>11}{'over it, each':>15}{'over the network alone, each':>30}")
    alone = None
    for count in dict.fromkeys((1, args.scans)):
        wall, network = measure(scan, count, args)
        alone = alone or network[0]
        print(f"{count:5d}{wall:9.2f}{sum(network):11.2f}{(wall - sum(network)) / count:15.2f}{wall / count - alone:30.2f}", flush=True)


def measure(scan: Path, count: int, args: argparse.Namespace) -> tuple[float, list[float]]:
    """Wall seconds of one process that segments ``count`` copies, and the network's seconds of each."""
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder, f"sub-{number:02d}_T1w.nii.gz") for number in range(count)]
        for copy in copies:
            shutil.copyfile(scan, copy)
        out = Path(folder, "out")
        command = [sys.executable, "-c", "from lod_model.cli import main; main()", "segment", *map(str, copies), "-o", str(out)]
        command += ["--weights", str(args.weights), "--engine", args.engine]
        command += ["--threads", str(args.threads)] if args.threads else []
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=CHECKOUT)
        wall = time.perf_counter() - start
        return wall, [json.loads(path.read_text())["network_seconds"] for path in sorted(out.glob("*_dseg.json"))]


if __name__ == "__main__":
    main()
