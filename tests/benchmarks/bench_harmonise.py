"""One scan from its files to a written shard, against libraries that only bring its image to 256³ at 1 mm; one thread each.

    python tests/benchmarks/bench_harmonise.py [DATABASE ...] [--repeats 3] [--data ../shared/data/bids]

Ours: read T1w and labels, conform, levels of detail, relabel, block counts, zstd, Parquet, fsync. nibabel: load and
``nibabel.processing.conform`` with its defaults. TorchIO: load, ToCanonical, Resample(1), CropOrPad(256). Neither touches the labels. Wanted:
at most a third of nibabel's time and half of TorchIO's. The best of the repeats counts, in seconds of this process's processor time, so that
a busy machine disturbs little.

Quality: what the stage of that name adds to a scan: reading it back, its figures, its picture.

Floor: gunzip of both files, SimpleITK's linear resampling to the grid (none where the scan is on it already), zstd of what is kept. The
second table says where our milliseconds go. Likeness: ours with the numbers by which the split finds people (``harmonise.likeness``).
"""

import argparse
import cProfile
import functools
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))
STEPS = ("load_image", "load_labels", "conform", "labels_to_grid", "pooled", "classes_of", "block_counts", "write_shard")
DATABASES = ("georgetown", "mrtrixbids", "voxelmorph")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("databases", nargs="*", default=DATABASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data/bids")
    args = parser.parse_args()
    peers = "".join(f"{peer:>11}{'ratio':>7}" for peer in ("nibabel s", "TorchIO s", "floor s"))
    print(f"{'':12}{'shape':>14}{'voxel mm':>16}{'ours s':>8}{peers}{'likeness':>10}{'quality s':>11}{'ratio':>7}")
    profiles = {}
    for name in args.databases:
        scan = first_scan(args.data / name)
        times = {how: best(function, scan, args.repeats) for how, function in WAYS.items()}
        peers = "".join(f"{times[peer]:11.2f}{times['ours'] / times[peer]:7.2f}" for peer in ("nibabel", "torchio", "floor"))
        own = f"{times['likeness']:10.2f}{times['quality']:11.3f}{times['quality'] / times['ours']:7.2f}"
        print(f"{name:12}{scan['about']}{times['ours']:8.2f}{peers}{own}", flush=True)
        profiles[name] = profile(scan)
    print("\nours, ms" + "".join(f"{step:>16}" for step in (*STEPS, "the rest")))
    for name, spent in profiles.items():
        print(f"{name:8}" + "".join(f"{1000 * seconds:16.0f}" for seconds in spent))


def first_scan(root: Path) -> dict:
    """The first labelled scan of a database, as a row of the scans table has it."""
    import nibabel

    from data_registry.label_sources import find_labels

    t1w = sorted(root.glob("sub-*/**/*_T1w.nii.gz"))[0]
    subject = t1w.relative_to(root).parts[0].removeprefix("sub-")
    labels = [{"source": source, "path": str(path.relative_to(root))} for source, path in find_labels(root, subject, "").items()]
    image = nibabel.load(t1w)
    voxel = " ".join(f"{size:.3g}" for size in image.header.get_zooms()[:3])
    about = f"{'×'.join(map(str, image.shape)):>14}{voxel:>16}"
    return {"scan_id": subject, "database": root.name, "site": root.name, "t1w_path": str(t1w.relative_to(root)), "labels": labels,
            "root": root, "about": about}  # fmt: skip


def best(function, scan: dict, repeats: int) -> float:
    """Least seconds of processor time of ``repeats`` calls after a first one."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function(scan)
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def ours(scan: dict, likeness: bool = False) -> dict:
    from data_registry import shards
    from data_registry.params import Harmonise
    from pipelines.harmonise import harmonise_scan

    arrays, sample = harmonise_scan(scan, scan["root"], Harmonise(likeness=likeness))
    with tempfile.TemporaryDirectory() as folder:
        shards.write_shard(Path(folder, "one.parquet"), [{"scan_id": scan["scan_id"], **arrays}], metadata={"samples": [sample]})
    return arrays


def with_nibabel(scan: dict) -> None:
    import nibabel.processing

    nibabel.processing.conform(nibabel.load(scan["root"] / scan["t1w_path"])).get_fdata(dtype="float32")


def with_torchio(scan: dict) -> None:
    import torch
    import torchio

    torch.set_num_threads(1)
    image = torchio.ScalarImage(scan["root"] / scan["t1w_path"])
    torchio.Compose([torchio.ToCanonical(), torchio.Resample(1), torchio.CropOrPad(256)])(image).numpy()


def floor(scan: dict) -> None:
    """Only what cannot be left out."""
    import pyarrow
    import SimpleITK
    from isal import igzip

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    paths = [scan["root"] / path for path in (scan["t1w_path"], *(label["path"] for label in scan["labels"]))]
    for path in paths:
        igzip.decompress(path.read_bytes())
    image, arrays = scan.setdefault("image", SimpleITK.ReadImage(str(paths[0]))), scan.get("arrays")
    if image.GetSize() != (256,) * 3:
        SimpleITK.Resample(image, [256] * 3, SimpleITK.Transform(), SimpleITK.sitkLinear, image.GetOrigin(), [1.0] * 3, image.GetDirection())
    if arrays is None:
        arrays = scan["arrays"] = ours(scan)
    for array in arrays.values():
        pyarrow.compress(array.tobytes(), codec="zstd", asbytes=False)


def quality(scan: dict) -> None:
    """The stage's work on one scan, from a shard that is written in the first call."""
    from data_registry.params import Harmonise
    from data_registry.shard_store import FolderStore
    from data_registry.shards import write_shard
    from pipelines.harmonise import harmonise_scan
    from pipelines.quality import look_at_shard

    if "folder" not in scan:
        scan["folder"] = tempfile.TemporaryDirectory()
        arrays, sample = harmonise_scan(scan, scan["root"], Harmonise())
        write_shard(Path(scan["folder"].name, "one.parquet"), [{"scan_id": scan["scan_id"], **arrays}], metadata={})
        scan["sample"] = sample | {"shard": "one.parquet", "row_group": 0, "shard_sha256": ""}
    item = {"samples": [scan["sample"]], "intensity": "robust", "found": f"{scan['folder'].name}/found.json"}
    look_at_shard(FolderStore(Path(scan["folder"].name)), item)


def profile(scan: dict) -> list[float]:
    """Seconds in each of ``STEPS``, with all that it calls, and in the rest."""
    recorded = cProfile.Profile(timer=time.process_time)
    recorded.runcall(ours, scan)
    statistics = pstats.Stats(recorded)
    spent = dict.fromkeys(STEPS, 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in statistics.stats.items():
        if function in spent and "data_registry" in file and not file.endswith("protocol.py"):   # shards.classes_of calls that one
            spent[function] += cumulative
    return [*spent.values(), statistics.total_tt - sum(spent.values())]


WAYS = {"ours": ours, "nibabel": with_nibabel, "torchio": with_torchio, "floor": floor, "likeness": functools.partial(ours, likeness=True),
        "quality": quality}  # fmt: skip

if __name__ == "__main__":
    main()
