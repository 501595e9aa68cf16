"""Volumes a second read, augmented and trained, where the limit is, and how many workers keep a device busy.

    python tests/benchmarks/bench_feeding.py [--side 128] [--device cpu] [--draws 10] [--threads 1] [--data ../shared/data | --phantom]

One scan, in a shard of its own; a worker is one core, and what it is timed at holds reading. ``workers``: it reads and augments. ``device``:
it reads and draws, the device does what was drawn. The coarse level sees a quarter of the side (grid: ``--side``), "coarse, before" is
augmented on the full grid, the fine level sees all of it. A step is forward, loss, backward and Adam of LOD-Brain at a batch of one, in
bfloat16 where the device computes in it. Fine steps of a processor beyond 128³ take over 10 GB and are extrapolated by voxels (marked ~).

``device ms`` is augmentation there, between steps, with the copy of what was read. ``limit`` is what one worker and one device give, and
which of the two is the slower; ``workers`` how many would keep the device busy. Below, the same for devices of a given number of steps a
second, and the seven transforms of TorchIO that do what preset light does, all of them on, against ours, one after the other in each repeat.
Seconds are a core's own, so that other load does not count, but those of the clock where the device is no processor or has more threads.
"""

import argparse
import ctypes
import functools
import math
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
LEVELS = {"coarse": {"level": "coarse"}, "coarse, before": {"level": "coarse", "augmented": "before"}, "fine": {"level": "fine"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=128, choices=(64, 128, 256), help="of the full grid: 4, 2 or 1 mm")
    parser.add_argument("--device", default="cpu", help="e.g. cuda")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of a processor that is the device")
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 5, 20, 100], help="steps a second of devices to be fed")
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data")
    parser.add_argument("--phantom", action="store_true", help="a synthetic head instead")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"processor, {args.threads} of {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory() as folder:
        scan = phantom_scan(args.side, Path(folder)) if args.phantom else labelled_scan(args.side, args.data, Path(folder))
        print(f"{scan.scan_id}, {args.side}³; device: {name}; means of {args.draws} draws, each the faster of two times")
        rows = table(scan, device, args)
        fed(rows, args.rates)
        memory(scan, device)
        peer(scan, device, args)


def table(scan, device, args: argparse.Namespace) -> list[tuple[str, str, float, float]]:
    """(level, preset, worker's seconds when it augments, when the device does)."""
    rows = []
    print(f"{'level':16}{'preset':8}{'step ms':>9} │{'workers: ms':>12}{'vol/s':>8}{'workers':>9} │{'device: ms':>11}{'vol/s':>8}{'device ms':>11}"
          f"{'vol/s':>8}{'workers':>9}  limit with one worker: on workers │ on the device")  # fmt: skip
    for level, how in LEVELS.items():
        step, mark = step_seconds(scan, how["level"], args.side, device)
        for preset in ("none", "light", "strong", "paper"):
            if preset == "none" and "augmented" in how:
                continue
            whole = mean(functools.partial(sample, scan, preset, how, later=False), args.draws)
            if preset == "none":
                print(f"{level:16}{'(read)':8}{step * 1e3:8.1f}{mark} │{row(whole)}{workers(whole, step):9d} │")
                continue
            drawn = mean(functools.partial(sample, scan, preset, how, later=True), args.draws)
            done = device_seconds(scan, preset, how, device, args.draws)
            busy = step + done
            limits = ["training" if step > whole else "augmentation", "the worker" if drawn > busy else "training" if step > done else "augmentation"]
            rates = [min(1 / step, 1 / whole), min(1 / busy, 1 / drawn)]
            print(f"{level:16}{preset:8}{step * 1e3:8.1f}{mark} │{row(whole)}{workers(whole, step):9d} │{drawn * 1e3:11.1f}{1 / drawn:8.1f}"
                  f"{done * 1e3:11.1f}{1 / done:8.1f}{workers(drawn, busy):9d}  "
                  + " │ ".join(f"{rate:.2f}/s, {limit}" for rate, limit in zip(rates, limits, strict=True)), flush=True)  # fmt: skip
            rows.append((level, preset, whole, drawn))
    return rows


def row(seconds: float) -> str:
    return f"{seconds * 1e3:12.1f}{1 / seconds:8.1f}"


def workers(seconds: float, step: float) -> int:
    """That make a sample in so many seconds each, for one a step."""
    return math.ceil(seconds / step)


def fed(rows: list[tuple[str, str, float, float]], rates: list[float]) -> None:
    print("workers for a device that takes so many volumes a second: augmenting / reading and drawing")
    print(f"{'':24}" + "".join(f"{rate:>10g}/s" for rate in rates))
    for level, preset, whole, drawn in rows:
        print(f"{level:16}{preset:8}" + "".join(f"{f'{math.ceil(whole * rate)} / {math.ceil(drawn * rate)}':>12}" for rate in rates))


def sample(scan, preset: str, how: dict, epoch: int, *, later: bool) -> dict:
    """As a worker makes it, on one thread."""
    import torch

    from lod_model.data import SampleDataset

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = SampleDataset([scan], protocol="lod7", augmentation=preset, deferred=later and preset != "none", **how)[epoch, 0]
    torch.set_num_threads(threads)
    return made


def mean(make: Callable[[int], object], draws: int) -> float:
    """Seconds, after one call to warm up: each draw costs something else, so all of them count, and each the faster of two times."""
    make(0)
    return statistics.mean(min(timed(make, epoch) for _ in range(2)) for epoch in range(draws))


def clock() -> float:
    """Seconds of the one core, or by the clock."""
    import torch

    return time.process_time() if torch.get_num_threads() == 1 and not torch.cuda.is_initialized() else time.perf_counter()


def timed(make: Callable[[int], object], epoch: int) -> float:
    start = clock()
    make(epoch)
    return clock() - start


def device_seconds(scan, preset: str, how: dict, device, draws: int) -> float:
    """Of what is left to the device, the copy with it."""
    import torch

    from lod_model.deferred import collated, finished

    batches = [collated([sample(scan, preset, how, epoch, later=True)]) for epoch in range(draws)]
    if device.type == "cuda":
        batches = [{name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()} for batch in batches]

    def done(index: int) -> None:
        finished({name: value.to(device, non_blocking=True) for name, value in batches[index].items()})
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return mean(done, draws)


def step_seconds(scan, level: str, side: int, device) -> tuple[float, str]:
    """The fastest of three, and a mark where it is extrapolated."""
    import torch

    from lod_model import networks
    from lod_model.losses import block_dice_loss, dice_loss

    largest = 128 if device.type == "cpu" and level == "fine" else side
    half = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    network = (networks.build_coarse("lod_brain") if level == "coarse" else networks.build("lod_brain")).to(device).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-4)
    batch = {name: value[None].to(device) for name, value in sample(scan, "none", {"level": level}, 0, later=False).items()}
    if side > largest:
        batch["image"], batch["target"] = (value[..., :largest, :largest, :largest] for value in (batch["image"], batch["target"]))

    def step(_: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            coarse = level == "coarse"
            logits = network.forward_coarse(batch["image"]) if coarse else network(batch["image"])
            loss = block_dice_loss(logits, batch["target"], 64) if coarse else dice_loss(logits, batch["target"])
        loss.backward()
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step(0)
    return min(timed(step, index) for index in range(3)) * (side / min(side, largest)) ** 3, "~" if side > largest else " "


def memory(scan, device) -> None:
    """The most that augmentation takes on the device beyond what was read."""
    import torch

    from lod_model.deferred import KEY, collated, finished

    voxels, trim = scan.t1w().size, ctypes.CDLL(None).malloc_trim
    for preset in ("light", "strong", "paper"):
        most = 0.0
        for epoch in range(6):
            batch = collated([sample(scan, preset, {"level": "fine"}, epoch, later=True)])
            batch = {name: value if name == KEY else value.to(device) for name, value in batch.items()}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                finished(batch)
                peak = torch.cuda.max_memory_allocated(device)
            else:
                trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
                before = resident("VmRSS")
                finished(batch)
                peak = resident("VmHWM")
            most = max(most, (peak - before) / voxels)
        print(f"memory on the device, fine, {preset}: at most {most:.0f} bytes a voxel of one sample, its result (12) with it", flush=True)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peer(scan, device, args: argparse.Namespace) -> None:
    """TorchIO's transforms on one core against the same list here, image and labels."""
    import torch
    import torchio as tio

    from data_registry import protocol
    from lod_model.augment import Variant
    from lod_model.corrupt import draw_bias
    from lod_model.randomness import reproducible
    from lod_model.torchio_picture import draw_torchio_picture
    from lod_model.warp import draw_pose

    image, classes = (torch.from_numpy(np.ascontiguousarray(array))[None] for array in (scan.t1w(), scan.classes(protocol.load("lod7"))))
    theirs = tio.Compose([
        tio.RandomAffine(scales=0.1, degrees=10, translation=5), tio.RandomElasticDeformation(num_control_points=7, max_displacement=7),
        tio.RandomBiasField(0.4, order=2), tio.RandomGamma((-0.4, 0.4)), tio.RandomAnisotropy(downsampling=(1.5, 3)),
        tio.RandomBlur((0.3, 0.7)), tio.RandomNoise(std=(0, 0.05)),
    ])  # fmt: skip
    shape = tuple(image.shape[1:])
    seconds: dict[str, list[float]] = {"TorchIO, one core": [], "ours, one core": [], f"ours, {device}": []}

    def variant(seed: int) -> Variant:
        with reproducible(seed):
            pose = draw_pose(shape, degrees=10, scale=0.1, shift=0.06, bend=0.025, p_affine=1, p_bend=1)
            steps = draw_torchio_picture(log_gamma=0.4, p_gamma=1, thickness=(1.5, 3), p_thick=1, blur=0.7, p_blur=1, noise=0.05, p_noise=1)
            return Variant(move=pose, after=(draw_bias(limit=0.4, order=2), *steps))

    def ours(seed: int, place) -> None:
        variant(seed)(image[0].to(place), classes.to(place), fractions=False)
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    runs = [lambda seed: theirs(tio.Subject(t1w=tio.ScalarImage(tensor=image.float() / 255), labels=tio.LabelMap(tensor=classes))),
            lambda seed: ours(seed, torch.device("cpu")), lambda seed: ours(seed, device)]  # fmt: skip
    for seed in range(4):
        for name, run in list(zip(seconds, runs, strict=True))[: 2 if device.type == "cpu" else 3]:
            torch.set_num_threads(args.threads if name.endswith("cpu") else 1)
            start = clock()
            run(seed)
            seconds[name].append(clock() - start)
    print("affine, elastic, bias, gamma, thick slices, blur, noise, all on: image and labels")
    first = statistics.median(seconds["TorchIO, one core"][1:])
    for name, found in seconds.items():
        if found:
            own = statistics.median(found[1:])
            print(f"{name:24}{own * 1e3:9.1f} ms{1 / own:9.2f} volumes/s{first / own:8.1f} × TorchIO")


def labelled_scan(side: int, data: Path, folder: Path):
    """A real one."""
    from real_scan import real_scan

    from data_registry.params import Harmonise

    databases = sorted(path.parents[1] for path in (data / "bids").glob("*/derivatives/freesurfer"))
    if not databases:
        sys.exit(f"error: {data}: no scan with FreeSurfer labels below bids/; --data with a folder that has some, or --phantom, is wanted")
    return real_scan(databases[0], folder, Harmonise(grid=f"{256 // side}mm", class_protocols=("lod7",)))


def phantom_scan(side: int, folder: Path):
    """A head-like one, for machines without data."""
    from bench_augment import phantom

    from data_registry.intensity import moments
    from data_registry.shard_store import FolderStore
    from data_registry.shards import block_counts, pooled
    from lod_model.data import COARSE_FACTOR, Scan

    image, classes = phantom(side, "fine")
    columns = {"t1w_x1": image, "lod7_classes_x1": classes}
    columns |= {"t1w_x4": pooled(image, COARSE_FACTOR), "lod7_x4": block_counts(classes, COARSE_FACTOR, 7)}
    store = FolderStore(folder)
    store.write("phantom.parquet", [{"scan_id": "phantom", **columns}], metadata={})
    histogram = np.bincount(image.ravel(), minlength=256)
    mean, deviation = moments(histogram)
    return Scan(scan_id="phantom", database="phantom", site="phantom", place="phantom", store=store, shard="phantom.parquet", shard_sha256="",
                row_group=0, mean=mean, deviation=deviation, voxel_mm=256 / side, label_sources=("aparc_aseg",), histogram=histogram)  # fmt: skip


if __name__ == "__main__":
    main()
