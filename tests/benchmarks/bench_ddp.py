"""Weak scaling: training steps of LOD-Brain on one process and on two, each with a scan of its own and one thread; and what they tell each other.

    python tests/benchmarks/bench_ddp.py [--sides 64 96] [--steps 5] [--rounds 3]

A step is forward, loss, backward with DDP's mean of the gradients over gloo on loopback, and Adam. Rounds of one and of two processes take
turns; the median step of all rounds counts. Two processes of one machine share its memory bandwidth too, which two nodes do not; so
`all-reduce` is also measured by itself, between processes that do nothing else, and given as a share of a step.
"""

import argparse
import os
import socket
import statistics
import sys
import time
import warnings
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{'':24}{'steps/s, 1 process':>20}{'2 processes':>13}{'efficiency':>12}{'all-reduce ms':>15}{'of a step':>11}")
    for side in args.sides:
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(args.rounds):
            for world in times:
                steps, reduced, parameters = measured(world, side, args.steps)
                times[world] += steps
        one, two = (statistics.median(times[world]) for world in (1, 2))
        alone = statistics.median(reduced)
        print(f"fine stage, {f'{side}³':12}{1 / one:20.2f}{1 / two:13.2f}{one / two:12.0%}{1e3 * alone:15.2f}{alone / one:11.2%}", flush=True)
    print(f"all-reduced a step: {4 * parameters:,} bytes, {parameters:,} parameters in float32")


def measured(world: int, side: int, steps: int) -> tuple[list[float], list[float], int]:
    """Seconds of steps, and of all-reduces alone, in the first process; and the number of parameters."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    torch.multiprocessing.spawn(_process, (world, port, side, steps, answers), nprocs=world)
    return answers.get()


def _process(rank: int, world: int, port: int, side: int, steps: int, answers) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    sys.path.insert(0, str(CHECKOUT))
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from lod_model import networks
    from lod_model.losses import dice_loss

    warnings.filterwarnings("ignore", message=".*bucket view strides")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    network = networks.build("lod_brain", {})
    parameters = sum(p.numel() for p in network.parameters())
    wrapped = DistributedDataParallel(network, find_unused_parameters=True, gradient_as_bucket_view=True) if world > 1 else network
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-4)
    image, target = torch.randn(1, 1, side, side, side), torch.randint(0, 7, (1, side, side, side))
    seconds, alone, gradient = [], [], torch.zeros(parameters)
    for step in range(steps + 1):
        distributed.barrier()
        begin = time.perf_counter()
        optimiser.zero_grad()
        dice_loss(wrapped(image), target).backward()
        optimiser.step()
        if step:
            seconds.append(time.perf_counter() - begin)
    for _ in range(20):
        distributed.barrier()
        begin = time.perf_counter()
        distributed.all_reduce(gradient)
        alone.append(time.perf_counter() - begin)
    if rank == 0:
        answers.put((seconds, alone, parameters))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
