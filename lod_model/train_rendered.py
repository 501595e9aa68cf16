"""Train a network on renderings of label maps alone → ``<out>/weights.pt``: no scan is ever read.

    python -m lod_model.train_rendered --anatomies folder/ --recipe params/rendered.yaml --out runs/rendered

A step's sample depends on (seed, step) alone, and the state is saved every few minutes: a stopped run goes on where it was, on any number
of workers. The weights that count are the running mean of the last steps' (Polyak averaging).
"""

import argparse
import copy
import dataclasses
import functools
import logging
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_registry import protocol as protocols
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.params import Section, fingerprint, load_settings
from lod_model import networks, weights
from lod_model.augment import sample_seed
from lod_model.render import CUBE_MM, Anatomy, Rendering, load_anatomy, render, zscored

log = logging.getLogger("lodbrain.train_rendered")
SAVE_SECONDS = 120


def _known(overrides: dict) -> dict:
    names = [field.name for field in dataclasses.fields(Rendering)]
    if unknown := sorted(set(overrides) - set(names)):
        raise ValueError(f"{', '.join(unknown)} is not known; {', '.join(names)} are")
    return overrides


RenderingOverrides = Annotated[dict, AfterValidator(_known)]


class Stage(Section):
    """Some steps of Adam on one part of the network."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    level: Literal["coarse", "fine"] = "fine"
    """coarse: level 0 alone, behind the max-pooling that it has in the whole network."""
    steps: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    window: Annotated[int, Field(ge=8)] | None = None
    """Edge, in voxels, of the part of the head that the finest level is trained on; null: all of it."""
    samples: Annotated[int, Field(ge=1, le=6)] | None = None
    """Labels under a voxel, along an axis; null: one a millimetre."""
    rendering: RenderingOverrides = {}
    """Overrides of the recipe's rendering in this stage."""


class Recipe(Section):
    """All that the weights depend on, besides the label maps."""

    network: str = "lod_brain"
    config: dict = {}
    """Overrides of the network's own configuration."""
    protocol: str = "lod7"
    voxel_mm: Annotated[int, Field(ge=1, le=8)] = 2
    seed: int = 0
    rendering: RenderingOverrides = {}
    """Overrides of :class:`lod_model.render.Rendering`."""
    cross_entropy: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the voxel-mean cross-entropy beside the Dice loss; it keeps small classes alive in short trainings."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay a step of the running mean of the weights."""
    stages: tuple[Stage, ...]


def main() -> None:
    """Train by a recipe on the label maps of a folder."""
    parser = argparse.ArgumentParser(prog="python -m lod_model.train_rendered", description=main.__doc__)
    parser.add_argument("--anatomies", type=Path, required=True, help="folder of whole-head label maps with FreeSurfer ids")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes that render; no result depends on it")
    parser.add_argument("--threads", type=int, help="of the training itself")
    parser.add_argument("--licence", help="of the label maps; written into the weights")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = load_settings(arguments.recipe, Recipe)
    train(recipe, load_anatomies(arguments.anatomies), arguments.out, workers=arguments.workers, licence=arguments.licence)


def load_anatomies(folder: Path) -> list[Anatomy]:
    """All label maps of a folder, by name. InputError if it has none."""
    files = sorted(path for path in folder.glob("*") if path.name.endswith((".nii", ".nii.gz", ".mgz")))
    if not files:
        raise InputError(f"{folder}: no label maps; a folder of whole-head .nii.gz or .mgz label maps is wanted")
    return [load_anatomy(path) for path in files]


def train(recipe: Recipe, anatomies: list[Anatomy], out: Path, *, workers: int = 0, licence: str | None = None) -> Path:
    """All stages of the recipe, going on where an earlier call stopped; returns the weights' path."""
    out.mkdir(parents=True, exist_ok=True)
    state = _resumed(out, recipe, anatomies)
    network = None
    for number, stage in enumerate(recipe.stages):
        if number < state["stage"] - 1:
            continue
        previous, network = network, build_stage(recipe, stage)
        if number == state["stage"] - 1:                                          # done: what the next one starts from, if that has not begun
            network.load_state_dict(state["average"]) if not state["step"] else None
            continue
        mine = state if number == state["stage"] and state["step"] else None
        if previous is not None and mine is None:
            grow(network, previous)
        note = functools.partial(_note, out / "log.tsv", stage.name)
        save = functools.partial(_save, out, recipe, anatomies, number)
        network = fit(network, stage, Renderings(anatomies, recipe, stage), recipe=recipe, workers=workers, state=mine, save=save, note=note)
        _save(out, recipe, anatomies, number + 1, {"step": 0, "average": network.state_dict()})
        network_weights(out / f"weights-{stage.name}.pt", network, recipe, anatomies, licence)
    return network_weights(out / "weights.pt", network, recipe, anatomies, licence)


def network_weights(path: Path, network: nn.Module, recipe: Recipe, anatomies: list[Anatomy], licence: str | None) -> Path:
    """The checkpoint, with what it came from."""
    provenance = {"trained_on": "renderings of label maps", "licence": licence, "anatomies": [a.name for a in anatomies]}
    provenance["recipe"] = recipe.model_dump(mode="json")
    grid = f"{recipe.voxel_mm}mm"
    return weights.save(path, network, name=recipe.network, protocol=recipe.protocol, grid=grid, provenance=provenance)


# ---------------------------------------------------------------------------------------------------------------------
# Samples


class Renderings(Dataset):
    """Item n is the sample of step n: image (1, D, H, W) float32 z-scored, fractions (C, D, H, W) float32, window (3,) int64."""

    def __init__(self, anatomies: list[Anatomy], recipe: Recipe, stage: Stage) -> None:
        self.anatomies, self.recipe, self.stage = anatomies, recipe, stage
        self.protocol, self.how = protocols.load(recipe.protocol), Rendering(**recipe.rendering | stage.rendering)
        self.multiple = networks.build(recipe.network, dict(recipe.config)).config.multiple

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        recipe, stage = self.recipe, self.stage
        generator = np.random.default_rng([recipe.seed, sample_seed(recipe.seed, step, stage.name)])
        of_pass = np.random.default_rng([recipe.seed, step // len(self.anatomies)]).permutation(len(self.anatomies))
        anatomy, seed = self.anatomies[of_pass[step % len(self.anatomies)]], int(generator.integers(2**62))
        sample = render(anatomy, protocol=self.protocol, seed=seed, voxel_mm=recipe.voxel_mm, samples=stage.samples, how=self.how)
        image, counts = zscored(sample.image), sample.counts
        if generator.random() < 0.5:                                              # LIA: axis 0 is left–right
            image, counts = image[::-1], counts[self.protocol.mirrored()][:, ::-1]
        return {
            "image": torch.from_numpy(image.copy())[None],
            "fractions": torch.from_numpy(counts.astype(np.float32) / sample.samples),
            "window": torch.from_numpy(_window(counts, stage.window or image.shape[0], generator, step=self.multiple)),
        }


def _window(counts: np.ndarray, edge: int, generator: np.random.Generator, *, step: int) -> np.ndarray:
    """First voxel (3,) of a cube that holds as much of the brain as it can, its place otherwise random, in multiples of ``step``."""
    side, brain = counts.shape[1], counts[0] < counts.sum(0, dtype=np.uint16)
    first = []
    for axis in range(3):
        inside = np.flatnonzero(brain.any(tuple(a for a in range(3) if a != axis)))
        low, high = (inside[0], inside[-1] + 1) if len(inside) else (0, side)
        ends = sorted((min(low, side - edge), max(high - edge, 0)))
        low, high = -(-ends[0] // step), ends[1] // step
        first.append(step * int(generator.integers(min(low, high), max(low, high) + 1)))
    return np.clip(np.array(first), 0, side - edge)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def fit(network: nn.Module, stage: Stage, samples: Dataset, *, recipe: Recipe, workers: int = 0, state: dict | None = None, **hear) -> nn.Module:
    """The network after the stage: the running mean of its weights. Item n of ``samples`` is the sample of step n.

    ``state`` is what an earlier call gave to ``hear["save"]``, called now and then; ``hear["note"]`` gets (step, seconds a step, of which
    waiting for a sample, mean loss, Dice of each class) every 50 steps.
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=stage.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, stage.learning_rate, total_steps=stage.steps, pct_start=0.1, cycle_momentum=False)
    average, first = copy.deepcopy(network), 0
    parts = {"network": network, "average": average, "optimiser": optimiser, "schedule": schedule}
    if state:
        for key, part in parts.items():
            part.load_state_dict(state[key])
        first = state["step"]
    loader = DataLoader(samples, batch_size=1, sampler=range(first, stage.steps), num_workers=workers, worker_init_fn=_one_thread)
    network.train()
    saved = start = asked = time.monotonic()
    waited, recent = 0.0, []
    for step, batch in enumerate(loader, first):
        waited += time.monotonic() - asked
        torch.manual_seed(sample_seed(recipe.seed, step, "dropout"))
        recent.append(_step(network, stage, batch, optimiser, recipe.cross_entropy))
        if not np.isfinite(recent[-1][0]):
            raise InputError(f"stage {stage.name}, step {step}: the loss is {recent[-1][0]}; a lower learning_rate is wanted")
        schedule.step()
        decay = min(recipe.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if len(recent) == 50 or step + 1 == stage.steps:
            seconds, n = time.monotonic() - start, len(recent)
            if "note" in hear:
                hear["note"](step + 1, seconds / n, waited / n, *_means(recent).tolist())
            waited, recent, start = 0.0, [], time.monotonic()
        if "save" in hear and time.monotonic() - saved > SAVE_SECONDS:
            hear["save"]({"step": step + 1} | {key: part.state_dict() for key, part in parts.items()})
            saved = time.monotonic()
        asked = time.monotonic()
    return average.eval()


def _step(network: nn.Module, stage: Stage, batch: dict[str, Tensor], optimiser: torch.optim.Optimizer, cross_entropy: float) -> list[float]:
    """One step of the optimiser; the loss and the Dice of each class before it."""
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=_has_bf16()):
        logits, fractions = _forward(network, stage, batch)
    loss, dice = _loss(logits.float(), fractions, cross_entropy)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
    return [loss.item(), *dice.tolist()]


def _means(rows: list[list[float]]) -> np.ndarray:
    """Column means without NaN; NaN where there is nothing else."""
    values = np.array(rows)
    known = np.isfinite(values)
    return np.divide(np.where(known, values, 0).sum(0), known.sum(0), out=np.full(values.shape[1], np.nan), where=known.any(0))


def _forward(network: nn.Module, stage: Stage, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and the fractions that they are held against."""
    x, fractions = batch["image"], batch["fractions"]
    if stage.level == "coarse":
        pool = network.config.coarse_pool
        return network.forward_coarse(nn.functional.max_pool3d(x, pool)), nn.functional.avg_pool3d(fractions, pool)
    if stage.window is None:
        return network(x), fractions
    box = [slice(int(first), int(first) + stage.window) for first in batch["window"][0]]
    fractions = fractions[:, :, *box]
    if hasattr(network, "forward_window"):
        return network.forward_window(x, box), fractions
    return network(x[:, :, *box]), fractions


def _loss(logits: Tensor, fractions: Tensor, cross_entropy: float) -> tuple[Tensor, Tensor]:
    """Soft Dice over the classes that are there, plus weighted cross-entropy; and the Dice of each class (C,), NaN where it is not there."""
    p = logits.softmax(1)
    there = fractions.sum((0, 2, 3, 4)) > 0
    dice = 2 * (p * fractions).sum((0, 2, 3, 4)) / (p.square().sum((0, 2, 3, 4)) + fractions.square().sum((0, 2, 3, 4)) + 1e-6)
    loss = 1 - dice[there].mean()
    if cross_entropy:
        loss = loss - cross_entropy * (fractions * logits.log_softmax(1)).sum(1).mean()
    return loss, torch.where(there, dice.detach(), torch.nan)


def _has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------------------------
# Stages and states


def build_stage(recipe: Recipe, stage: Stage) -> nn.Module:
    """A fresh network for the stage, the same for the same seed."""
    torch.manual_seed(recipe.seed)
    config = dict(recipe.config)
    if stage.level == "coarse":
        whole = networks.build(recipe.network, config).config
        config |= {"levels": 1, "coarse_pool": whole.pools[0]}
    network = networks.build(recipe.network, config)
    edge = stage.window or CUBE_MM // recipe.voxel_mm
    if edge % network.config.multiple or edge > CUBE_MM // recipe.voxel_mm:
        raise InputError(f"stage {stage.name}: window {edge}; a multiple of {network.config.multiple} up to {CUBE_MM // recipe.voxel_mm} is wanted")
    return network


def grow(network: nn.Module, previous: nn.Module) -> None:
    """Start from the stage before: the same network, or one of fewer levels."""
    if network.config == previous.config:
        network.load_state_dict(previous.state_dict())
    else:
        networks.load_coarse(network, previous)


def _note(path: Path, stage: str, step: int, *figures: float) -> None:
    """A line on stdout and in the log: stage, step, seconds a step, of which waiting, loss, Dice of each class."""
    line = "\t".join([stage, str(step), *(f"{value:.4f}" for value in figures)])
    print(line, flush=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def _identity(recipe: Recipe, anatomies: list[Anatomy], stage: int, step: int) -> str:
    """Of all that the state after so many stages and steps depends on: what comes later may still change."""
    done = recipe.stages[: stage + (step > 0)]
    return fingerprint(recipe.model_copy(update={"stages": done}), [anatomy.name for anatomy in anatomies])


def _save(out: Path, recipe: Recipe, anatomies: list[Anatomy], stage: int, state: dict) -> None:
    with replacing(out / "state.pt") as aside:
        torch.save({"identity": _identity(recipe, anatomies, stage, state["step"]), "stage": stage} | state, aside)


def _resumed(out: Path, recipe: Recipe, anatomies: list[Anatomy]) -> dict:
    path = out / "state.pt"
    if not path.is_file():
        return {"stage": 0, "step": 0}
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != _identity(recipe, anatomies, state["stage"], state["step"]):
        raise InputError(f"{path}: of another recipe or other label maps; another --out is wanted, or this folder removed")
    return state


if __name__ == "__main__":
    run_stage(main)
