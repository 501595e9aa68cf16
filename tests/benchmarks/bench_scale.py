"""Hours and cost of training LOD-Brain on 27,000 volumes of 160 sites on 1, 8 and 64 GPUs: what is measured here, what is assumed, what limits.

    python tests/benchmarks/bench_scale.py [--gpus 1 8 64] [--peak 312] [--share 0.09] [--price 2] [--preset paper] [--help]

Measured in this run: arithmetic of a step (counted) and that its time grows with it; reading and augmenting a sample on one core (both in
seconds of the processor, whoever else is at work); bytes of a sample in a shard; an all-reduce of all gradients between two processes, and two
processes' steps against one's, in turns; the order of an epoch and which shards each process touches. Assumed, each an argument: the GPU's peak
and the share of it that training reaches (default: what the authors' 75 hours on an RTX 8000 make of its float32 peak, waiting for data
included), launching a step's kernels, the network between GPUs, the disk, cores a GPU, the price. The recipe is the paper's: two stages of 50
epochs, one volume a step and GPU, training and validation volumes as 1,049 : 121.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(Path(__file__).parent)]
VOLUMES, EPOCHS, TRAINED = 27_000, 50, 1049 / (1049 + 121)
PAPER_HOURS, PAPER_STEPS, RTX_8000_TFLOPS = 75, 50 * 1049, 16.3  # float32 peak by its data sheet
SIDE, POOLED = 256, 64
STAGES = ("coarse", "fine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--peak", type=float, default=312, help="10¹² operations a second; default: A100, bfloat16, by its data sheet")
    parser.add_argument("--share", type=float, help="of the peak that a step reaches; default: the authors' run's")
    parser.add_argument("--launch", type=float, default=10, help="ms that a step takes at least, for its kernels to be launched (assumed)")
    parser.add_argument("--network", type=float, default=12.5, help="GB/s between GPUs (assumed: 100 Gbit/s)")
    parser.add_argument("--latency", type=float, default=20, help="µs a message between GPUs (assumed)")
    parser.add_argument("--disk", type=float, default=1, help="GB/s that the shared disk gives to all together (assumed)")
    parser.add_argument("--cores", type=int, default=16, help="for the readers of a GPU (assumed)")
    parser.add_argument("--price", type=float, default=2, help="of a GPU hour, in any currency (assumed)")
    parser.add_argument("--preset", default="paper", choices=["light", "strong", "paper"], help="augmentation")
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96], help="at which steps are measured")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        return print(json.dumps(process(*args.process)))
    work = {stage: step_tflop(stage) for stage in STAGES}
    steps(args, work)
    samples = reading(args)
    exchange()
    table(args, work, samples)
    simulation(args, samples["fine"]["bytes"])


def step_tflop(stage: str, side: int | None = None) -> float:
    """10¹² operations of a step on one volume: multiply-accumulates of the pass twice, and twice as many for the gradients."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network, small = built(stage), 16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(network, stage, torch.zeros(1, 1, *[small] * 3))
    return 3 * counter.get_total_flops() * ((side or (POOLED if stage == "coarse" else SIDE)) / small) ** 3 / 1e12


def built(stage: str):
    from lod_model import networks

    return networks.build_coarse("lod_brain") if stage == "coarse" else networks.build("lod_brain")


def forward(network, stage: str, image):
    return network.forward_coarse(image) if stage == "coarse" else network(image)


def stepping(stage: str, side: int):
    """A function that does one Adam step in the precision of ``train.precision: auto``; ``after`` the gradients are there."""
    import torch

    from lod_model.losses import block_dice_loss, dice_loss

    torch.manual_seed(0)
    network = built(stage).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-4)
    image, half = torch.randn(1, 1, *[side] * 3), torch.ops.mkldnn._is_mkldnn_bf16_supported()
    target = torch.rand(1, 7, *[side] * 3).softmax(1) if stage == "coarse" else torch.randint(0, 7, (1, *[side] * 3))

    def step(after=lambda: None, clock=time.perf_counter) -> float:
        start = clock()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = forward(network, stage, image)
            loss = block_dice_loss(logits, target, 64) if stage == "coarse" else dice_loss(logits, target)
        loss.backward()
        after()
        optimiser.step()
        return clock() - start

    step()
    return step


def steps(args: argparse.Namespace, work: dict[str, float]) -> None:
    """That time follows arithmetic, so that a GPU's rate is enough to tell a step's time."""
    import torch

    torch.set_num_threads(1)
    print(f"measured here, steps of one volume, one core\n{'':10}{'side':>6}{'GFLOP':>9}{'s':>8}{'GFLOP/s':>9}")
    for stage, sides in (("coarse", [32, POOLED]), ("fine", args.sides)):
        for side in sides:
            step = stepping(stage, side)
            seconds, gflop = min(step(clock=time.process_time) for _ in range(2)), step_tflop(stage, side) * 1e3
            print(f"{stage:10}{side:5d}³{gflop:9.1f}{seconds:8.2f}{gflop / seconds:9.0f}", flush=True)
    print(f"whole volumes: coarse {work['coarse'] * 1e3:.0f}, fine {work['fine'] * 1e3:.0f} GFLOP a step")


def reading(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Stage → seconds of one core to read and to augment a sample, and its bytes in a shard."""
    import numpy as np
    import pyarrow.parquet as pq
    from bench_augment import phantom

    from data_registry import protocol
    from data_registry.shards import block_counts, pooled, read_row, write_shard
    from lod_model.augment import augment

    reference = args.data / "lod_brain_weights/reference/t1w_philips_elition.npz"
    if reference.is_file():
        loaded = np.load(reference)
        volume, classes = loaded["volume"], loaded["labels"].astype(np.uint8)
    else:
        volume, classes = phantom(SIDE, "fine")
    row = {"t1w_x1": volume, "t1w_x4": pooled(volume, 4), "lod7_classes_x1": classes, "lod7_x4": block_counts(classes, 4, 7)}
    columns = {"coarse": ["t1w_x4", "lod7_x4"], "fine": ["t1w_x1", "lod7_classes_x1"]}
    mirrored, found = protocol.load("lod7").mirrored(), {}
    print(f"\nmeasured here, one core, {'a real head' if reference.is_file() else 'a phantom'}\n{'':10}{'MB':>8}{'ms read':>9}{'ms augmented':>14}")
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "one.parquet")
        write_shard(shard, [{"scan_id": "one", **row}], metadata={})
        group = pq.read_metadata(shard).row_group(0)
        sizes = {group.column(k).path_in_schema: group.column(k).total_compressed_size for k in range(group.num_columns)}
        for stage, names in columns.items():
            took, moved = [], []
            for seed in range(4):
                start = time.process_time()
                image, target = read_row(shard, 0, names).values()
                middle = time.process_time()
                target = target.astype(np.float32) / 64 if stage == "coarse" else target
                augment(image, target, preset=args.preset, seed=seed, mirrored=mirrored, voxel_mm=4.0 if stage == "coarse" else 1.0)
                took.append(middle - start)
                moved.append(time.process_time() - middle)
            found[stage] = {"bytes": sum(sizes[name] for name in names), "read": min(took), "augment": statistics.mean(moved[1:])}
            print(f"{stage:10}{found[stage]['bytes'] / 1e6:8.2f}{found[stage]['read'] * 1e3:9.1f}{found[stage]['augment'] * 1e3:14.1f}", flush=True)
    return found


def process(rank: str, store: str) -> dict[str, float]:
    """One of two processes on a core each: median seconds of the processor for a coarse step of the first alone, of both at once without and
    with an all-reduce of gradients, in turns; and seconds of that by itself."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    step, gradients = stepping("coarse", 32), torch.zeros(parameters())  # of the whole network: more than the coarse stage has
    took: dict[str, list[float]] = {"alone": [], "together": [], "exchanging": [], "reduce": []}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    for _ in range(8):
        for name, after in (("alone", None), ("together", None), ("exchanging", lambda: dist.all_reduce(gradients))):
            dist.barrier()
            if name != "alone" or rank == "0":
                took[name] += [step(after or (lambda: None), time.process_time) for _ in range(5)]
        for _ in range(10):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(gradients)
            took["reduce"].append(time.perf_counter() - start)
    dist.barrier()
    dist.destroy_process_group()
    return {name: statistics.median(seconds) if seconds else 0.0 for name, seconds in took.items()}


def parameters() -> int:
    return sum(parameter.numel() for parameter in built("fine").parameters())


def exchange() -> None:
    """Weak scaling on this machine: the same work a process, one process and two."""
    import os

    own = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, __file__, "--process", str(rank), f"{folder}/store"] for rank in range(2)]
        pair = [subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) for command in commands]
        two = [json.loads(one.communicate(timeout=300)[0].splitlines()[-1]) for one in pair]
    ms = {name: max(one[name] for one in two) * 1e3 for name in two[0]}
    print(
        f"\nmeasured here, coarse steps at 32³, one core a process, ms of the processor: alone {ms['alone']:.0f}, two at once {ms['together']:.0f}, "
        f"with an all-reduce of {parameters():,} float32 {ms['exchanging']:.0f}; that by itself {ms['reduce']:.1f} ms\n"
        f"weak scaling to two {ms['alone'] / (ms['together'] + ms['reduce']):.2f}, of which the exchange "
        f"{ms['together'] / (ms['together'] + ms['reduce']):.3f}"
    )


def table(args: argparse.Namespace, work: dict[str, float], samples: dict[str, dict[str, float]]) -> None:
    """Hours and cost, and for each stage what the step waits for."""
    authors = PAPER_STEPS * sum(work.values()) / (PAPER_HOURS * 3600)  # waiting for data included
    share = args.share or authors / RTX_8000_TFLOPS
    training, validation = round(VOLUMES * TRAINED), round(VOLUMES * (1 - TRAINED))
    size = 4 * parameters()
    print(
        f"\nby arithmetic: the authors' {PAPER_HOURS} h are {authors:.1f} TFLOP/s, {authors / RTX_8000_TFLOPS:.2f} of that card's peak\n"
        f"assumed: {args.peak:g} TFLOP/s × {share:.2f}, {args.launch:g} ms a step at least, {args.network:g} GB/s and {args.latency:g} µs "
        f"between GPUs, disk {args.disk:g} GB/s, {args.cores} cores and {args.price:g} an hour for a GPU\n"
        f"{training:,} volumes to train on, {validation:,} to validate, {EPOCHS} epochs a stage, {size / 1e6:.2f} MB of gradients a step"
    )
    columns = {"GPUs": 5, "stage": 8, "steps/epoch": 13, "step ms": 9, "reduce ms": 11, "readers": 9, "GB/s read": 11, "hours": 8, "GPU hours": 11}
    print("".join(name.rjust(width) for name, width in columns.items()) + "    cost  limit")
    for gpus in args.gpus:
        whole = 0.0
        for stage in STAGES:
            compute = max(work[stage] / (args.peak * share), args.launch / 1e3)
            reduce = 0 if gpus == 1 else 2 * (gpus - 1) / gpus * size / (args.network * 1e9) + 2 * (gpus - 1) * args.latency / 1e6
            sample = samples[stage]["read"] + samples[stage]["augment"]
            waits = {"readers": sample / args.cores, "disk": gpus * samples[stage]["bytes"] / (args.disk * 1e9), "GPU": compute + reduce}
            if compute == args.launch / 1e3:
                waits["launching"] = waits.pop("GPU")
            limit = max(waits, key=waits.get)
            count = math.ceil(training / gpus)
            seconds = EPOCHS * (count * waits[limit] + math.ceil(validation / gpus) * max(compute / 3, samples[stage]["read"] / args.cores))
            whole += seconds
            print(f"{gpus:5d}{stage:>8}{count:13,d}{compute * 1e3:9.0f}{reduce * 1e3:11.2f}{math.ceil(sample / (compute + reduce)):9d}"
                  f"{waits['disk'] * args.disk / waits[limit]:11.2f}{seconds / 3600:8.1f}{seconds * gpus / 3600:11.0f}"
                  f"{seconds * gpus / 3600 * args.price:8.0f}  {limit}")  # fmt: skip
        hours = whole / 3600
        print(f"{gpus:5d}{'both':>8}{'':53}{hours:8.1f}{hours * gpus:11.0f}{hours * gpus * args.price:8.0f}")


def simulation(args: argparse.Namespace, row_bytes: float) -> None:
    """The real order over made-up sites for the most GPUs: sites of a step, shards of a process, downloads of a node of eight GPUs."""
    from bench_plan import scans

    from data_registry.params import Harmonise
    from lod_model.data import EpochOrder
    from pipelines.harmonise import plan_shards

    rows = [row | {"labels": [{"source": "aparc_aseg", "sha256": ""}]} for row in scans(round(VOLUMES * TRAINED))]
    shard_of = {row["scan_id"]: item["shard"] for item in plan_shards(rows, Harmonise()) for row in item["scans"]}
    size = {name: row_bytes * count for name, count in counted(shard_of.values()).items()}
    members = [SimpleNamespace(database=row["database"], site=row["site"]) for row in rows]
    gpus = max(args.gpus)
    total = sum(size.values())
    places = [(member.database, member.site) for member in members]
    print(f"\nsimulated: {len(rows):,} volumes, {len(set(places))} sites, {len(size)} shards, {total / 1e9:.0f} GB; {gpus} processes")
    for temperature in (1.0, 0.5):
        order = EpochOrder(members, seed=0, temperature=temperature)
        start = time.perf_counter()
        epochs = []
        for epoch in range(3):
            order.set_epoch(epoch)
            epochs.append([index for _, index in order])
        seconds = (time.perf_counter() - start) / len(epochs)
        batches = [epochs[0][first : first + gpus] for first in range(0, len(rows), gpus)]
        sites = statistics.mean(len({places[index] for index in batch}) for batch in batches[:-1])
        own = [[batch[rank] for batch in batches if rank < len(batch)] for rank in range(gpus)]
        touched = [len({shard_of[rows[index]["scan_id"]] for index in samples}) for samples in own]
        print(
            f"site temperature {temperature:g}: an epoch's order {seconds:.2f} s; {min(map(len, own))} to {max(map(len, own))} samples a process, "
            f"{sites:.0f} sites a step; a process touches {min(touched)} to {max(touched)} shards an epoch, reads "
            f"{len(own[0]) * row_bytes / 1e9:.1f} GB of a folder"
        )
        firsts, width = range(0, len(rows), gpus), min(8, gpus)
        node = [[shard_of[rows[index]["scan_id"]] for first in firsts for index in epoch[first : first + width]] for epoch in epochs]
        for cache in (50e9, 1.1 * total):
            gigabytes = ", ".join(f"{fetched / 1e9:.0f}" for fetched in downloads(node, size, cache))
            print(f"  a node of {width} of them fetches from a bucket, with cache_gb {cache / 1e9:.0f}: {gigabytes} GB in epochs 1, 2, 3")


def counted(names) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def downloads(epochs: list[list[str]], size: dict[str, float], cache_bytes: float) -> list[float]:
    """Bytes fetched in each epoch through a cache that drops the least recently used shard first."""
    held, within, fetched = OrderedDict(), 0.0, []
    for epoch in epochs:
        fetched.append(0.0)
        for name in epoch:
            if name in held:
                held.move_to_end(name)
                continue
            held[name] = size[name]
            within += size[name]
            fetched[-1] += size[name]
            while within > cache_bytes:
                within -= held.popitem(last=False)[1]
    return fetched


if __name__ == "__main__":
    main()
