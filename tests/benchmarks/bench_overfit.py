"""Each network learns one real scan by heart: what it is fed, its loss and what `predict` makes of it fit together, or it could not.

    python tests/benchmarks/bench_overfit.py [--network fastsurfer_vinn] [--threads 1] [--data ../shared/data]

The first scan of georgetown on a coarse grid, through a shard, the samples and the loss that training feeds each network with, without
augmentation; then `predict_classes`, as `lodbrain segment` calls it. Wanted: a mean Dice of at least .9 in at most half an hour on one core.
What is smaller than the network's own size stands in the last column. Columns: grid, protocol of the label map, steps, seconds of training and
of prediction, Dice (mean over the classes that the scan has, and the lowest), and how many classes it has. At 4 mm the superior frontal gyri touch:
FastSurfer's post-processing gives both to one side.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))
WANTED = 0.9


@dataclass(frozen=True)
class Plan:
    """How a network is trained here."""

    grid: str
    train: dict
    """Of :class:`data_registry.params.Train`."""
    smaller: str = "nothing"
    levels: tuple[str, ...] = field(default=("fine",))


PLANS = {
    "lod_brain": Plan(
        "4mm", {"coarse": {"epochs": 300, "learning_rate": 5e-3}, "fine": {"epochs": 220, "learning_rate": 5e-3}}, levels=("coarse", "fine")
    ),
    "unet": Plan("4mm", {"fine": {"epochs": 450, "learning_rate": 3e-3}, "network": {"widths": [8, 16, 32, 64]}}, "half the widths"),
    "neuronet": Plan(
        "4mm", {"protocol": ["lod7", "synthseg33"], "fine": {"epochs": 220, "learning_rate": 1e-2}, "visits": 8, "crops": {"side": 48}},
        "cubes of 48³, not 128³",
    ),
    "fastsurfer_cnn": Plan(
        "4mm", {
            "protocol": "fastsurfer79", "fine": {"epochs": 26, "learning_rate": 1e-2}, "batch_size": 4, "visits": 40,
            "slices": {"per_visit": 4, "inner_scale": 0}, "network": {"filters": 24},
        }, "24 filters, not 64",
    ),
    "fastsurfer_vinn": Plan(
        "4mm", {
            "protocol": "fastsurfer79", "fine": {"epochs": 26, "learning_rate": 1e-2}, "batch_size": 4, "visits": 40,
            "slices": {"per_visit": 4, "inner_scale": 0}, "network": {"filters": 24, "native_filters": 16, "base_mm": 4.0, "inner_size": 64},
        }, "24 filters, not 71; no noise on the scale",
    ),
    "monai:BasicUNet": Plan(
        "4mm", {
            "fine": {"epochs": 50, "learning_rate": 3e-3}, "visits": 8, "crops": {"side": 48},
            "network": {"multiple": 16, "arguments": {"features": [16, 16, 32, 64, 128, 16]}},
        }, "half the features; cubes of 48³",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=PLANS, help="by default all, one after the other")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    figures = f"{'steps':>6}{'train s':>9}{'predict s':>10}{'Dice':>7}  {'lowest':32}{'classes':>8}"
    print(f"{'':17}{'grid':>5} {'protocol':13}{figures}  smaller than the network's own")
    worst = 1.0
    with tempfile.TemporaryDirectory() as folder:
        for network in [args.network] if args.network else PLANS:
            worst = min(worst, learned(network, PLANS[network], Path(folder), args))
    if worst < WANTED:
        sys.exit(f"a mean Dice of {worst:.3f}; {WANTED} is wanted")


def learned(network: str, plan: Plan, folder: Path, args: argparse.Namespace) -> float:
    """Train, predict and print; the lowest mean Dice of the network's label maps."""
    import numpy as np
    import torch
    from real_scan import real_scan

    from data_registry import protocol as protocols
    from data_registry.params import Harmonise, Train
    from lod_model import metrics, networks
    from lod_model.predict import predict_classes, with_engine

    torch.set_num_threads(args.threads)
    settings = Train(augmentation="none", schedule="one_cycle", **plan.train)
    scan = real_scan(args.data / "bids/georgetown", folder, Harmonise(grid=plan.grid, class_protocols=settings.protocols))
    start = time.perf_counter()
    net, steps = trained(network, plan, settings, scan)
    trained_s, start = time.perf_counter() - start, time.perf_counter()
    with torch.inference_mode():
        engine, _ = with_engine(net.eval(), "fast", device=torch.device("cpu"))
    maps = predict_classes(
        engine, scan.t1w(), protocols=networks.outputs(network, settings.protocols), voxel_mm=scan.voxel_mm, mean=scan.mean, deviation=scan.deviation,
        method="components",
    )  # fmt: skip
    predicted_s, means = time.perf_counter() - start, []
    for name, labels in maps.items():
        table = protocols.load(name)
        dice = metrics.dice(scan.classes(table), labels, table.classes)
        means.append(float(np.nanmean(dice)))
        lowest = f"{np.nanmin(dice):.3f} {table.foreground[int(np.nanargmin(dice))]}"
        figures = f"{steps:6d}{trained_s:9.0f}{predicted_s:10.1f}{means[-1]:7.3f}  {lowest:32}{np.isfinite(dice).sum():8d}"
        print(f"{network:17}{plan.grid:>5} {name:13}{figures}  {plan.smaller}", flush=True)
    return min(means)


def trained(network: str, plan: Plan, settings, scan) -> tuple:
    """The network after all stages, and their steps."""
    import torch

    from data_registry import protocol as protocols
    from lod_model import networks

    tables = [protocols.load(name) for name in networks.outputs(network, settings.protocols)]
    window = {"window": settings.crops.side} if networks.recipe_of(network).samples == "crops" else {}
    config = networks.config_for(network, tables) | window | settings.network_of(network)
    steps, coarse = 0, None
    for level in plan.levels:
        torch.manual_seed(settings.seed)
        net = networks.build_coarse(network, config) if level == "coarse" else networks.build(network, config)
        if level == "fine" and coarse is not None:
            networks.load_coarse(net, coarse)
        steps += fitted(network, net, level, settings, scan)
        coarse = net
    return net, steps


def fitted(network: str, net, level: str, settings, scan) -> int:
    """Train one stage; returns its steps."""
    import logging
    import warnings

    from pytorch_lightning import Trainer

    from lod_model import networks
    from lod_model.feeding import Feeding
    from lod_model.module import MODULES

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    recipe = networks.recipe_of(network)
    loader = Feeding(network, net, level, settings).loader([scan], training=True, workers=0)
    trainer = Trainer(
        max_epochs=getattr(settings, level).epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(MODULES[recipe.samples](net, level=level, settings=settings, recipe=recipe), loader)
    return trainer.global_step


if __name__ == "__main__":
    main()
