"""Does coarse-to-fine pay? Progressive LOD-Brain against the same network trained at once and a plain 3-D U-Net, at equal compute.

    python -m lod_model.learning_curve --anatomies folder/ --settings params/learning_curve.yaml --out runs/learning_curve

A *site* is one rendering: one contrast of its own and a scanner's corruptions, applied to every head. Every arm trains on the same scans
(training anatomies × 1, 4, 16 sites) for the same number of multiply-accumulates, and is tested on anatomies never trained on, under the
training sites (seen) and under other sites (unseen). Dice is the mean of the foreground classes on the rendered grid.

Finished runs are kept in ``<out>/runs.tsv`` and skipped; each is a child of its arm in the MLflow experiment ``learning_curve``.
"""

import argparse
import csv
import functools
import logging
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from scipy import stats
from torch import nn
from torch.utils.data import Dataset

from data_registry import protocol as protocols
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.params import Section, fingerprint, load_settings
from lod_model import metrics, networks
from lod_model.augment import sample_seed
from lod_model.networks.cost import macs
from lod_model.render import CUBE_MM, Anatomy, Rendering, Sample, render, zscored
from lod_model.tracking import Tracker
from lod_model.train_rendered import Recipe, Stage, build_stage, fit, grow, load_anatomies

log = logging.getLogger("lodbrain.learning_curve")
PROTOCOL = "lod7"
BACKWARD = 3
"""A training step costs three forward passes: one forward, two backward."""
COLUMNS = ("arm", "training_sites", "seed", "steps", "tera_macs", "seen", "unseen")


class ShareStage(Section):
    """A stage of training, by its share of the compute."""

    name: str
    level: Literal["coarse", "fine"]
    share: Annotated[float, Field(gt=0, le=1)]
    learning_rate: Annotated[float, Field(gt=0)]


class Arm(Section):
    """A network and how it is trained."""

    network: str
    config: dict = {}
    stages: tuple[ShareStage, ...]


class Settings(Section):
    """The experiment."""

    voxel_mm: Annotated[int, Field(ge=1, le=8)] = 4
    train_anatomies: Annotated[int, Field(ge=1)]
    training_sites: tuple[Annotated[int, Field(ge=1)], ...]
    test_sites: Annotated[int, Field(ge=1)]
    seeds: tuple[int, ...]
    tera_macs: Annotated[float, Field(gt=0)]
    arms: dict[str, Arm]


def main() -> None:
    """Run what is not finished, then write the table, the figure and the MLflow runs."""
    parser = argparse.ArgumentParser(prog="python -m lod_model.learning_curve", description=main.__doc__)
    parser.add_argument("--anatomies", type=Path, required=True, help="folder of whole-head label maps with FreeSurfer ids")
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mlflow-uri", help="tracking server; default: SQLite in mlflow/ of the current folder")
    arguments = parser.parse_args()
    anatomies = load_anatomies(arguments.anatomies)
    run(load_settings(arguments.settings, Settings), anatomies, arguments.out, tracker=Tracker("learning_curve", uri=arguments.mlflow_uri))


def run(settings: Settings, anatomies: list[Anatomy], out: Path, *, tracker: Tracker) -> None:
    """All arms × numbers of sites × seeds that are not finished."""
    if not settings.train_anatomies < len(anatomies):
        raise InputError(f"train_anatomies is {settings.train_anatomies}: of {len(anatomies)} label maps some must be left to test on")
    out.mkdir(parents=True, exist_ok=True)
    identity = fingerprint(settings.model_dump(mode="json", exclude={"arms", "seeds", "training_sites"}), [a.name for a in anatomies])
    table = out / "runs.tsv"
    done = {(row["arm"], int(row["training_sites"]), int(row["seed"])): row for row in _read(table, identity)}
    for sites in settings.training_sites:
        for seed in settings.seeds:
            todo = [name for name in settings.arms if (name, sites, seed) not in done]
            if not todo:
                continue
            train, tests = scans(settings, anatomies, sites, seed)
            for name in todo:
                row = {"arm": name, "training_sites": sites, "seed": seed} | train_and_test(settings, settings.arms[name], train, tests, seed)
                done[name, sites, seed] = {key: str(value) for key, value in row.items()}
                _write(table, identity, list(done.values()))
                _track(tracker, settings, identity, row)
                print("\t".join(str(row[column]) for column in COLUMNS), flush=True)
    draw(list(done.values()), out / "learning_curve.png")


def scans(settings: Settings, anatomies: list[Anatomy], sites: int, seed: int) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """Training scans, and test scans under training sites (seen) and under others (unseen).

    Sites are drawn anew for each seed, the unseen ones from numbers that no training uses; nothing of a test anatomy is trained on.
    """
    training, testing = anatomies[: settings.train_anatomies], anatomies[settings.train_anatomies :]

    def scan(anatomy: Anatomy, site: str) -> Sample:
        how = Rendering(
            rotation_degrees=8, scale=0.06, axis_scale=0.03, translation_mm=8, stripped=0, cut=0.2, arbitrary_contrast=0, inverted=0,
            contrast_seed=sample_seed(seed, 0, site), strength=0.7,
        )  # fmt: skip
        own = sample_seed(seed, 1, f"{site}/{anatomy.name}")
        return render(anatomy, protocol=protocols.load(PROTOCOL), seed=own, voxel_mm=settings.voxel_mm, how=how)

    seen = [f"training {site}" for site in range(sites)]
    unseen = [f"unseen {site}" for site in range(settings.test_sites)]
    tests = {"seen": [scan(a, seen[i % sites]) for i, a in enumerate(testing)], "unseen": [scan(a, site) for site in unseen for a in testing[:3]]}
    return [scan(a, site) for site in seen for a in training], tests


class Scans(Dataset):
    """Item n is the scan of step n, in another order each pass, mirrored half of the time."""

    def __init__(self, rendered: list[Sample], *, seed: int, steps: int, stage: str) -> None:
        self.rendered, self.seed, self.steps, self.stage = rendered, seed, steps, stage
        self.mirrored = protocols.load(PROTOCOL).mirrored()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        cycle, index = divmod(step, len(self.rendered))
        generator = np.random.default_rng(sample_seed(self.seed, cycle, self.stage))
        sample = self.rendered[generator.permutation(len(self.rendered))[index]]
        image, counts = zscored(sample.image), sample.counts
        if np.random.default_rng(sample_seed(self.seed, step, "mirror")).random() < 0.5:
            image, counts = image[::-1], counts[self.mirrored][:, ::-1]
        return {"image": torch.from_numpy(image.copy())[None], "fractions": torch.from_numpy(counts.astype(np.float32) / sample.samples)}


def train_and_test(settings: Settings, arm: Arm, train: list[Sample], tests: dict[str, list[Sample]], seed: int) -> dict[str, object]:
    """Steps, compute and mean Dice of one run."""
    recipe = Recipe(network=arm.network, config=arm.config, voxel_mm=settings.voxel_mm, seed=seed, average=0.98, stages=())
    network, steps, spent = None, 0, 0.0
    for part in arm.stages:
        stage = Stage(name=part.name, level=part.level, steps=1, learning_rate=part.learning_rate)
        previous, network = network, build_stage(recipe, stage)
        cost = step_macs(network, stage, settings.voxel_mm)
        stage = stage.model_copy(update={"steps": max(1, round(settings.tera_macs * 1e12 * part.share / cost))})
        if previous is not None:
            grow(network, previous)
        network = fit(network, stage, Scans(train, seed=seed, steps=stage.steps, stage=stage.name), recipe=recipe)
        steps, spent = steps + stage.steps, spent + stage.steps * cost / 1e12
    return {"steps": steps, "tera_macs": round(spent, 6)} | {role: round(mean_dice(network, samples), 4) for role, samples in tests.items()}


def step_macs(network: nn.Module, stage: Stage, voxel_mm: int) -> int:
    """Multiply-accumulates of one training step; the coarse level's are those at its own grid."""
    side = CUBE_MM // voxel_mm
    if stage.level == "fine":
        return BACKWARD * macs(network, side)
    pool = network.config.coarse_pool
    same = networks.build("lod_brain", network.config.to_dict() | {"coarse_pool": 1})
    return BACKWARD * macs(same, side // pool)


def mean_dice(network: nn.Module, samples: list[Sample]) -> float:
    """Mean over scans and foreground classes."""
    values = []
    with torch.inference_mode():
        for sample in samples:
            predicted = network(torch.from_numpy(zscored(sample.image))[None, None])[0].argmax(0).numpy()
            truth = sample.counts.argmax(0)
            values.append(np.nanmean(metrics.dice(truth.astype(np.uint8), predicted.astype(np.uint8), len(sample.counts))))
    return float(np.mean(values))


# ---------------------------------------------------------------------------------------------------------------------
# Results


def _read(table: Path, identity: str) -> list[dict]:
    if not table.is_file():
        return []
    with open(table, encoding="utf-8") as file:
        first = file.readline()
        if first.strip() != f"# {identity}":
            raise InputError(f"{table}: of other settings or label maps; another --out is wanted, or this file removed")
        return list(csv.DictReader(file, delimiter="\t"))


def _write(table: Path, identity: str, rows: list[dict]) -> None:
    with replacing(table) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        file.write(f"# {identity}\n")
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _track(tracker: Tracker, settings: Settings, identity: str, row: dict) -> None:
    key = functools.partial(fingerprint, identity, settings.arms[row["arm"]].model_dump(mode="json"))
    parent = tracker.run(key(), name=row["arm"])
    child = tracker.run(key(row["training_sites"], row["seed"]), name=f"{row['arm']}-{row['training_sites']}-{row['seed']}", parent=parent)
    tracker.params(child, {name: row[name] for name in ("arm", "training_sites", "seed", "steps", "tera_macs")})
    tracker.record(child, {}, {name: row[name] for name in ("seen", "unseen")})
    tracker.finish(parent)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; NaN width for one value.

    >>> mean, half = interval([0.5, 0.6, 0.7])
    >>> round(mean, 3), round(half, 3)
    (0.6, 0.248)
    """
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(half)


def draw(rows: list[dict], path: Path) -> None:
    """Dice over the number of training sites, an arm a line, with 95 % intervals over seeds; seen and unseen sites side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, role in zip(axes, ("seen", "unseen"), strict=True):
        for number, arm in enumerate(arms):
            sites = sorted({int(row["training_sites"]) for row in rows if row["arm"] == arm})
            found = [interval([float(r[role]) for r in rows if r["arm"] == arm and int(r["training_sites"]) == n]) for n in sites]
            at = np.array(sites) * 1.04 ** (number - (len(arms) - 1) / 2)         # side by side, so that the intervals do not hide each other
            axis.errorbar(at, [m for m, _ in found], [h for _, h in found], marker="o", capsize=3, label=arm.replace("_", " "))
        axis.set(xscale="log", xlabel="training sites", title=f"new anatomies, {role} sites")
        axis.set_xticks(sites, [str(n) for n in sites])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean Dice of 6 classes")
    axes[0].legend()
    with replacing(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run_stage(main)
