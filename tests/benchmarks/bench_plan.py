"""Planning at scale: seconds and memory of index, shard plan, split and epoch order; hours, cost and bytes of harmonising 27,000 scans.

    python tests/benchmarks/bench_plan.py [--scans 27000 1000000] [--indexed 3000 27000] [--price 0.05]

Each part runs in a process of its own on made-up scans: 160 sites with sizes as skewed as open data's (the largest a tenth of all), two
sessions for every fifth person, FreeSurfer's label map for each. The index reads real files, of a few bytes each, in BIDS folders; beyond
what ``--indexed`` names it is extrapolated by scans (marked ~). Memory is the process's peak.

The second table is arithmetic on what one core here takes for one scan of each real database (``bench_harmonise.py``) and on the bytes that
its row takes in a shard: a node has 16 cores at ``--price`` a core hour, and the shared disk gives 1 GB/s to reading.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(Path(__file__).parent)]
SITES = 160
PARTS = ("shard plan", "split", "epoch order", "epoch order, balanced")
CORES, DISK_BYTES_PER_S = 16, 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, nargs="+", default=[27_000, 1_000_000])
    parser.add_argument("--indexed", type=int, nargs="+", default=[3_000, 27_000])
    parser.add_argument("--price", type=float, default=0.05, help="of a core hour, in any currency")
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data/bids")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return print(json.dumps(measure(args.part, args.scans[0])))
    print(f"{'':24}{'scans':>10}{'s':>9}{'GB':>7}")
    for number in args.indexed:
        indexed = line("index", number)
        line("index, hashes known", number)
    for number in (n for n in args.scans if n > args.indexed[-1]):
        print(f"{'index':24}{number:10,d}{'~':>3}{indexed['seconds'] * number / args.indexed[-1]:6.0f}")
    for number in args.scans:
        for part in PARTS:
            line(part, number)
    if args.data.is_dir():
        cost(args)


def line(part: str, number: int) -> dict:
    command = [sys.executable, __file__, "--part", part, "--scans", str(number)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(f"{part:24}{number:10,d}{result['seconds']:9.2f}{result['gb']:7.2f}", flush=True)
    return result


def measure(part: str, number: int) -> dict:
    """Seconds of one part and the process's peak memory."""
    if part.startswith("index"):
        with tempfile.TemporaryDirectory() as folder:
            seconds = indexing(Path(folder), number, twice=part != "index")
    else:
        run = {"shard plan": shard_plan, "split": splitting, "epoch order": ordering, "epoch order, balanced": balanced}[part]
        run(scans(1000))                                                     # imports
        rows = scans(number)
        start = time.perf_counter()
        run(rows)
        seconds = time.perf_counter() - start
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    return {"seconds": seconds, "gb": peak}


def scans(number: int) -> list[dict]:
    """Rows of the scans table, as far as planning reads them."""
    import numpy as np

    shares = 1 / np.arange(1, SITES + 1) ** 0.7                              # the largest site: a tenth
    sizes = np.maximum(2, (shares / shares.sum() * number).astype(int))
    rows = []
    for site, size in enumerate(sizes.tolist()):
        for k in range(min(size, number - len(rows)) if site < SITES - 1 else number - len(rows)):
            subject, session = f"{k - k % 6 // 5:06d}", str(k % 6 // 5)      # the sixth is the fifth's second session
            rows.append({
                "scan_id": f"db{site % 40:02d}_sub-{site:03d}{subject}_ses-{session}", "database": f"db{site % 40:02d}", "site": f"s{site:03d}",
                "place": f"place {site * 3 // 4:03d}", "scanner": f"scanner {site:03d}", "subject": f"{site:03d}{subject}", "family": None,
                "person": f"db{site % 40:02d}/{site:03d}{subject}", "t1w_sha256": f"{site:03d}{k:08d}", "t1w_path": "",
                "labels": [{"source": "aparc_aseg", "path": "", "sha256": f"{k:08d}{site:03d}"}],
            })  # fmt: skip
    return rows


def indexing(folder: Path, number: int, *, twice: bool) -> float:
    """Index databases of tiny files, conflicts written; with ``twice`` the second time counts, when all hashes are known."""
    import os

    from pipelines.conflicts import write_conflicts
    from pipelines.index import index

    content = gzip.compress(b"not a volume: the index reads bytes, not voxels", mtime=0)
    for k, row in enumerate(scans(number)):
        root, subject = folder / "data" / row["database"], f"sub-{row['subject']}"
        session = row["scan_id"].rsplit("_", 1)[1]
        label = root / "derivatives/freesurfer" / f"{subject}_{session}" / "mri/aparc+aseg.mgz"
        t1w = root / subject / session / "anat" / f"{subject}_{session}_T1w.nii.gz"
        for path in (t1w, label):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content + k.to_bytes(8, "little") + bytes([path is label]))
        (root / "dataset_description.json").write_text('{"Name": "made up", "BIDSVersion": "1.10.0"}')
    os.chdir(folder)
    if twice:
        index([folder / "data"])
    checks = []
    start = time.perf_counter()
    index([folder / "data"], checks=checks)
    write_conflicts(checks)
    return time.perf_counter() - start


def shard_plan(rows: list[dict]) -> None:
    from data_registry.params import Harmonise
    from pipelines.harmonise import plan_shards

    plan_shards(rows, Harmonise())


def splitting(rows: list[dict]) -> None:
    """Five folds, their proof and their hash."""
    from data_registry import split
    from data_registry.params import Split

    compiled, _ = split.compile_split(rows, Split())
    assert not any(entry["overlaps"] for entry in split.prove(compiled, rows, Split()))
    split.split_hash(compiled)


def ordering(rows: list[dict], temperature: float = 1.0) -> None:
    from lod_model.data import epoch_order

    epoch_order([(row["database"], row["site"]) for row in rows], 0, 3, temperature)


def balanced(rows: list[dict]) -> None:
    ordering(rows, temperature=0.5)


def cost(args: argparse.Namespace) -> None:
    """Hours, money and bytes of 27,000 scans, each like the mean of the real databases' first scans."""
    import numpy as np
    from bench_harmonise import DATABASES, best, first_scan, ours

    from data_registry import shards

    number, seconds, read, written = 27_000, [], [], []
    for name in DATABASES:
        scan = first_scan(args.data / name)
        seconds.append(best(ours, scan, 2))
        read.append(sum((scan["root"] / path).stat().st_size for path in (scan["t1w_path"], *(label["path"] for label in scan["labels"]))))
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder, "one.parquet")
            shards.write_shard(shard, [{"scan_id": scan["scan_id"], **ours(scan)}], metadata={})
            written.append(shard.stat().st_size)
    each, read_gb, written_gb = np.mean(seconds), np.mean(read) * number / 1e9, np.mean(written) * number / 1e9
    print(f"\n{number:,} scans of {each:.2f} core seconds, {np.mean(read) / 1e6:.1f} MB read and {np.mean(written) / 1e6:.1f} MB written each")
    print(f"{'':24}{'hours':>8}{'core hours':>12}{'cost':>8}{'GB read':>9}{'GB written':>12}")
    for nodes in (1, 8, 64):
        hours = max(number * each / (CORES * nodes), read_gb * 1e9 / DISK_BYTES_PER_S) / 3600
        paid = hours * CORES * nodes
        print(f"{nodes:3d} nodes of {CORES} cores   {hours:8.2f}{paid:12.1f}{paid * args.price:8.2f}{read_gb:9.0f}{written_gb:12.0f}")


if __name__ == "__main__":
    main()
