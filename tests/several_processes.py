"""Trainings on several processes of this machine, which are forked from one that has imported everything; on heads made up in memory."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_registry import protocol as protocols
from data_registry.errors import run_stage
from data_registry.intensity import ROBUST
from data_registry.params import Params
from data_registry.shards import block_counts
from lod_model import begin, checkpoints, processes, runs
from lod_model import train as stage
from lod_model.data import Scan
from lod_model.module import StageModule

PRELOADED = ["several_processes", "pytorch_lightning", "lod_model.tracking_store", "lod_model.feeding", "lod_model.weights"]
WAIT_S = 240
SIDE = 16


class Head(Scan):
    """Shells of classes 0 … 6, off the centre, asymmetric; what the shards would give of it."""

    def classes(self, protocol):
        generator = np.random.default_rng(self.row_group)
        centre = SIDE / 2 + generator.uniform(-2, 2, 3)
        radius = np.linalg.norm(np.indices([SIDE] * 3) - centre[:, None, None, None], axis=0)
        return np.clip(7 - radius, 0, protocol.classes - 1).astype(np.uint8)

    def t1w(self, factor=1):
        image = (self.classes(protocols.load("lod7")) * 30 + np.random.default_rng(self.row_group).integers(0, 9, [SIDE] * 3)).astype(np.uint8)
        return image.reshape(*[n for side in image.shape for n in (side // factor, factor)]).max((1, 3, 5)) if factor > 1 else image

    def fractions(self, protocol, factor):
        return block_counts(self.classes(protocol), factor, protocol.classes).astype(np.float32) / factor**3

    def has(self, protocol):
        return protocol.name == "lod7" or self.row_group % 2 == 1


def heads(number: int, first: int = 0) -> list[Head]:
    about = {"database": "a", "place": "p", "store": None, "shard": "", "shard_sha256": "", "mean": 30.0, "deviation": 40.0, "voxel_mm": 8.0}
    names = range(first, first + number)
    return [Head(f"sub-{n:02d}", site=f"s{n % 2}", row_group=n, label_sources=(), histogram=np.zeros(256), **about) for n in names]


def params(**settings) -> Params:
    """Of small networks and the fine stage alone."""
    small = {"lod_brain": {"widths": [2, 4, 8]}, "unet": {"widths": [2, 4, 8]}}
    small |= {"neuronet": {"filters": [2, 4, 4, 4], "units": 1}, "fastsurfer_cnn": {"filters": 4, "depth": 2}}
    train = {"coarse": {"epochs": 0, "learning_rate": 1}, "fine": {"epochs": 3, "learning_rate": 0.01}, "network": small, "crops": {"side": SIDE}}
    train |= {"slices": {"per_visit": 2}, "visits": 1}
    return Params.model_validate({"index": {"roots": ["."]}, "train": train | settings, "resources": {"threads": 1}})


def trained(settings: dict, *, network: str = "lod_brain", train: int = 7, val: int = 3) -> None:
    """Train on made-up heads in the current folder, writing what each pass was given into ``seen-<rank>``."""
    runs.tracking_tags = stage.tracking_tags = begin.tracking_tags = lambda: {"split_hash": "s", "data_hash": "d"}
    stage.preparation = lambda *_, **__: ROBUST
    stage.train(network, params(**settings), {0: {"train": heads(train), "val": heads(val, 50)}})


def told(settings: dict, *, disturb: Callable = lambda module: None, still_norms: bool = False, **how) -> None:
    """:func:`trained`, keeping of each training pass its epoch, step and samples, and of each step the gradient. ``still_norms``: batch norms
    keep their moments."""
    rank, passes, steps = processes.group().rank, StageModule.training_step, StageModule.on_before_optimizer_step

    def training_step(self, batch, index):
        part = self.shares["train"].part(index)
        samples = self.shares["train"].keys[part.start : part.stop]
        with open(f"seen-{rank}", "a") as file:
            file.write(json.dumps([self.current_epoch, self.trainer.global_step, part.start, samples]) + "\n")
        for norm in (m for m in self.network.modules() if still_norms and isinstance(m, torch.nn.modules.batchnorm._BatchNorm)):
            norm.eval()
        disturb(self)
        return passes(self, batch, index)

    def on_before_optimizer_step(self, optimizer):
        gradients = {name: p.grad.clone() for name, p in self.network.named_parameters() if p.grad is not None}
        torch.save(gradients, f"gradient-{rank}-{self.trainer.global_step}")
        with open(f"rates-{rank}", "a") as file:
            file.write(f"{optimizer.param_groups[0]['lr']!r}\n")
        return steps(self, optimizer)

    StageModule.training_step, StageModule.on_before_optimizer_step = training_step, on_before_optimizer_step
    trained(settings, **how)


@dataclass
class Ended:
    """A process's exit status, and what it wrote to stderr."""

    status: int
    said: str


class Signals:
    """Signals this process at a step."""

    def __init__(self, step: int, *numbers: int, rank: int = 0) -> None:
        self.step, self.numbers, self.rank = step, numbers, rank

    def __call__(self, module) -> None:
        if module.trainer.global_step == self.step and processes.group().rank == self.rank:
            for number in self.numbers:
                os.kill(os.getpid(), number)


class Poison:
    """Gives a scan, from an epoch on, a loss that is no number."""

    def __init__(self, scan: str, *, epoch: int) -> None:
        self.scan, self.epoch = scan, epoch

    def __call__(self, module) -> None:
        index = module.trainer.fit_loop.epoch_loop.batch_idx
        if module.current_epoch >= self.epoch and self.scan in module.shares["train"].scans(index):
            losses = module.loss
            module.loss = lambda batch: losses(batch) * float("nan")


class Full:
    """From a step on, no file of the first process may grow beyond so many bytes; MLflow's, of course, would."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def __call__(self, module) -> None:
        if module.trainer.global_step == self.step and processes.group().is_first:
            whole = checkpoints.replacing

            @contextlib.contextmanager
            def limited(path):
                with whole(path) as aside:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
                    try:
                        yield aside
                    finally:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

            checkpoints.replacing = limited


def on(world: int, folder: Path, function: Callable, *arguments, **named) -> list[Ended]:
    """Run a function as each of ``world`` processes in a folder; how they end, by rank. None outlives WAIT_S."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = [context.Process(target=_as_one, args=(rank, world, port, folder, function, arguments, named)) for rank in range(world)]
    for one in started:
        one.start()
    until = time.monotonic() + WAIT_S
    for one in started:
        one.join(max(0, until - time.monotonic()))
        if one.is_alive():
            one.kill()
            one.join()
    return [Ended(one.exitcode, (folder / f"stderr-{rank}").read_text()) for rank, one in enumerate(started)]


def _as_one(rank: int, world: int, port: int, folder: Path, function: Callable, arguments: tuple, named: dict) -> None:
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)

    def main() -> None:
        with processes.together():
            function(*arguments, **named)

    run_stage(main)



