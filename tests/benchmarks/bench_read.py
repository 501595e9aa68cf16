"""Time to read T1w and classes of one protocol at 256³: a row of a shard against other ways to keep the same volumes.

    python tests/benchmarks/bench_read.py [--scans 5] [--repeats 5] [--processes 16] [--folder DIR] [--data ../shared/data]

Every way holds the same real scans, conformed to 1 mm, and gives T1w and lod7 classes as (256, 256, 256) uint8:

- ``shard``: T1w and classes of a row; ``ids mapped``: T1w and source ids (uint16), mapped through the protocol, as for a protocol whose
  classes are not stored; ``× 4``: the coarse stage's columns alone, T1w and class counts. zstd level 1, Parquet's own, checksums verified;
- ``two .nii.gz``: T1w and source ids through nibabel, ids mapped; gzip;
- ``MONAI``: a PersistentDataset's cache of T1w and classes, not compressed, as it comes; ``MONAI, zstd``: of their zstd frames, level 1,
  decompressed after the cache;
- ``litData``: T1w and classes, a chunk a scan, zstd level 1;
- ``Zarr``: T1w and classes, a chunk a volume, zstd level 1; ``Zarr × 4`` the coarse arrays.

Peers that are not installed are named and left out (pip install litdata zstd zarr). Columns: MB on disk a scan; milliseconds a scan, median
and fastest, in one process with the files in the page cache (warm) and after asking the kernel to drop them (cold: posix_fadvise; what the
disk keeps in caches of its own stays); scans a second of all ``--processes`` readers together, warm.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))
Volumes = dict[str, np.ndarray]
Reader = Callable[[int], tuple[np.ndarray, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: a temporary folder)")
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        compare(Path(folder), volumes(args.data, args.scans), args)


def compare(folder: Path, scans: list[Volumes], args: argparse.Namespace) -> None:
    print(f"{len(scans)} scans, {args.repeats} repeats, {args.processes} readers on {os.cpu_count()} processors")
    print(f"{'':24}{'MB/scan':>8}{'warm ms':>9}{'best':>8}{'cold ms':>9}{'best':>8}{'scans/s':>9}")
    for name, (needs, write, openers) in WAYS.items():
        if missing := [module for module in needs if importlib.util.find_spec(module) is None]:
            print(f"{name:24}not installed: {', '.join(missing)}", flush=True)
            continue
        own = folder / name.replace(" ", "_")
        own.mkdir()
        write(own, scans)
        os.sync()  # a page that is not yet on the disk cannot be dropped
        for label, opener in openers.items():
            reader = opener(own)
            check(label, reader, scans)
            warm = [time for _ in range(args.repeats) for time in timed(reader, range(len(scans)))]
            cold = [time for _ in range(args.repeats) for time in dropped(reader, own, len(scans))]
            size = sum(path.stat().st_size for path in own.rglob("*") if path.is_file()) / len(scans) / 1e6
            rate = together(opener, own, args.processes, 4 * len(scans), len(scans))
            row = f"{size:8.1f}{statistics.median(warm):9.2f}{min(warm):8.2f}{statistics.median(cold):9.2f}{min(cold):8.2f}{rate:9.1f}"
            print(f"{label:24}{row}", flush=True)


def volumes(data: Path, number: int) -> list[Volumes]:
    """Arrays by column name of the first scans with FreeSurfer labels, conformed to 1 mm; the same again where there are fewer."""
    from data_registry import conform, protocol, shards
    from data_registry.volume import load_image, load_labels

    table, made = protocol.load("lod7"), []
    for labels in sorted((data / "bids").glob("*/derivatives/freesurfer/sub-*/mri/aparc+aseg.mgz"))[:number]:
        root, subject = labels.parents[4], labels.parents[1].name
        image = sorted((root / subject).rglob("anat/*_T1w.nii*"))[0]
        conformed = conform.conform(load_image(image), grid="1mm")
        ids = conform.labels_to_grid(load_labels(labels), conformed.placement)
        classes = table.classes_of(ids)
        pooled = {f"t1w_x{factor}": shards.pooled(conformed.data, factor) for factor in shards.FACTORS}
        counts = {f"lod7_x{factor}": shards.block_counts(classes, factor, table.classes) for factor in shards.BLOCK_FACTORS}
        arrays = pooled | counts | {"aparc_aseg_x1": ids.astype(np.uint16), "lod7_classes_x1": classes}
        made.append({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    if not made:
        sys.exit(f"error: {data}: no scan with FreeSurfer labels below bids/; --data wants a folder that has some")
    return [made[index % len(made)] for index in range(number)]


def write_shard(folder: Path, scans: list[Volumes]) -> None:
    from data_registry import shards

    rows = [{"scan_id": str(i), **scan} for i, scan in enumerate(scans)]
    shards.write_shard(folder / "part-000.parquet", rows, metadata={})


def open_shard(*columns: str, mapped: bool = False) -> Callable[[Path], Reader]:
    def opened(folder: Path) -> Reader:
        from data_registry import protocol
        from data_registry.shards import classes_of, read_row

        table = protocol.load("lod7")

        def read(index: int) -> tuple[np.ndarray, np.ndarray]:
            t1w, labels = read_row(folder / "part-000.parquet", index, columns).values()
            return t1w, classes_of(labels, table) if mapped else labels

        return read

    return opened


def write_nifti(folder: Path, scans: list[Volumes]) -> None:
    import nibabel

    for index, scan in enumerate(scans):
        for key in ("t1w_x1", "aparc_aseg_x1"):
            nibabel.save(nibabel.Nifti1Image(scan[key], np.eye(4)), folder / f"{index}_{key}.nii.gz")


def open_nifti(folder: Path) -> Reader:
    import nibabel

    from data_registry import protocol
    from data_registry.shards import classes_of

    table = protocol.load("lod7")

    def volume(name: str) -> np.ndarray:
        return np.asanyarray(nibabel.load(folder / f"{name}.nii.gz").dataobj)

    return lambda index: (volume(f"{index}_t1w_x1"), classes_of(volume(f"{index}_aparc_aseg_x1"), table))


def write_monai(folder: Path, scans: list[Volumes]) -> None:
    import torch

    fill_monai(folder, len(scans), lambda index: tuple(torch.from_numpy(scans[index][key]) for key in ("t1w_x1", "lod7_classes_x1")))


def write_monai_zstd(folder: Path, scans: list[Volumes]) -> None:
    import pyarrow as pa
    import torch

    codec = pa.Codec("zstd", compression_level=1)

    def frame(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(codec.compress(array.tobytes()), np.uint8).copy())

    fill_monai(folder, len(scans), lambda index: tuple(frame(scans[index][key]) for key in ("t1w_x1", "lod7_classes_x1")))


def fill_monai(folder: Path, number: int, load: Callable) -> None:
    dataset = monai_dataset(folder, number, load)
    for index in range(number):
        dataset[index]  # the first time fills its cache


def open_monai(folder: Path) -> Reader:
    dataset = monai_dataset(folder, len(list(folder.glob("*.pt"))), never)
    return lambda index: tuple(tensor.numpy() for tensor in dataset[index])


def open_monai_zstd(folder: Path) -> Reader:
    import pyarrow as pa

    codec, side = pa.Codec("zstd"), 256
    dataset = monai_dataset(folder, len(list(folder.glob("*.pt"))), never)
    return lambda index: tuple(
        np.frombuffer(codec.decompress(frame.numpy(), side**3), np.uint8).reshape(side, side, side) for frame in dataset[index]
    )


def never(index: int):
    raise AssertionError(f"{index} is not in the cache")


def monai_dataset(folder: Path, number: int, load: Callable):
    from monai.data import PersistentDataset
    from monai.transforms import Lambda

    return PersistentDataset(list(range(number)), Lambda(load), cache_dir=folder)


def write_litdata(folder: Path, scans: list[Volumes]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "chunks"), chunk_size=1, compression="zstd:1")
    for index, scan in enumerate(scans):
        writer[index] = {"t1w": scan["t1w_x1"], "lod7_classes_x1": scan["lod7_classes_x1"]}
    writer.done()
    writer.merge()


def open_litdata(folder: Path) -> Reader:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder / "chunks"), cache_dir=str(folder / "cache"), shuffle=False, max_cache_size="100GB")
    return lambda index: tuple(dataset[index].values())


def write_zarr(folder: Path, scans: list[Volumes]) -> None:
    import zarr

    for index, scan in enumerate(scans):
        for key in ("t1w_x1", "lod7_classes_x1", "t1w_x4", "lod7_x4"):
            compressor = zarr.codecs.ZstdCodec(level=1, checksum=True)
            zarr.create_array(folder / f"{index}_{key}.zarr", data=scan[key], chunks=scan[key].shape, compressors=compressor)


def open_zarr(*keys: str) -> Callable[[Path], Reader]:
    def opened(folder: Path) -> Reader:
        import zarr

        return lambda index: tuple(zarr.open_array(folder / f"{index}_{key}.zarr", mode="r")[:] for key in keys)

    return opened


WAYS = {
    "shard": ((), write_shard, {
        "shard": open_shard("t1w_x1", "lod7_classes_x1"), "shard, ids mapped": open_shard("t1w_x1", "aparc_aseg_x1", mapped=True),
        "shard × 4": open_shard("t1w_x4", "lod7_x4"),
    }),
    "two .nii.gz": (("nibabel",), write_nifti, {"two .nii.gz": open_nifti}),
    "MONAI": (("monai",), write_monai, {"MONAI PersistentDataset": open_monai}),
    "MONAI, zstd": (("monai",), write_monai_zstd, {"MONAI, zstd": open_monai_zstd}),
    "litData": (("litdata", "zstd"), write_litdata, {"litData": open_litdata}),
    "Zarr": (("zarr",), write_zarr, {"Zarr": open_zarr("t1w_x1", "lod7_classes_x1"), "Zarr × 4": open_zarr("t1w_x4", "lod7_x4")}),
}  # fmt: skip
"""Name → modules it needs, what writes all scans into a folder, and what opens it: by row of the table."""


def check(label: str, reader: Reader, scans: list[Volumes]) -> None:
    """What is compared must be the same volumes."""
    for index, scan in enumerate(scans):
        wanted = (scan["t1w_x4"], scan["lod7_x4"]) if "× 4" in label else (scan["t1w_x1"], scan["lod7_classes_x1"])
        for came, array in zip(reader(index), wanted, strict=True):
            assert came.dtype == array.dtype and np.array_equal(came, array), f"{label}: scan {index}"


def timed(reader: Reader, indices) -> list[float]:
    """Milliseconds of each scan; every voxel page is touched, so that lazily mapped ones count."""
    times = []
    for index in indices:
        start = time.perf_counter()
        for array in reader(index):
            array.reshape(-1)[::4096].max()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def dropped(reader: Reader, folder: Path, number: int) -> list[float]:
    drop(folder)
    return timed(reader, range(number))


def drop(folder: Path) -> None:
    """Ask the kernel to forget the pages of all files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def together(opener: Callable[[Path], Reader], folder: Path, processes: int, rows: int, number: int) -> float:
    """Scans a second of forked readers that start together, each with an order of its own."""
    forked = multiprocessing.get_context("fork")
    barrier = forked.Barrier(processes + 1)

    def work(seed: int) -> None:
        reader, order = opener(folder), np.random.default_rng(seed).integers(number, size=rows)
        reader(0)
        barrier.wait()
        timed(reader, order.tolist())
        barrier.wait()

    readers = [forked.Process(target=work, args=(seed,)) for seed in range(processes)]
    for reader in readers:
        reader.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    for reader in readers:
        reader.join()
    return processes * rows / seconds


if __name__ == "__main__":
    main()
