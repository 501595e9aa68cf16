"""Stage *evaluate*: every trained fold on its unseen people and held-out places → ``tables/results.parquet``.

Beside each network stand the majority-label atlas of the fold's training scans, as the floor that a network must beat, and any
reference weights of ``params.yaml``. Scores are on the shards' grid, prediction as ``lodbrain segment`` makes it. Rows whose weights,
split and data stand already are kept. The worst held-out cases go to ``tables/cases/`` for the report.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_registry import protocol as protocols
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.params import Params, fingerprint, load_params
from data_registry.schema import RESULTS, read_table, table_metadata, write_table
from data_registry.split import data_hash
from lod_model import metrics
from lod_model.data import Scan, all_folds, preparation
from lod_model.predict import best_device, output_protocol, predict_classes, with_engine
from lod_model.runs import TABLES, finished, fold_folder, run_key, tracking_tags, training_identity
from lod_model.tracking import Tracker

log = logging.getLogger("lodbrain.evaluate")
RESULTS_TABLE = TABLES / "results.parquet"
CASES = TABLES / "cases"
TEST_ROLES = ("internal_test", "external_test")
WORST_CASES = 6
FIGURES_OF_STRUCTURES = 30
"""At most, of a run in MLflow: with its losses and its machine's no more than 50. Of protocols with more, the tables tell."""
RECIPE_VERSION = 3
"""Part of the table's identity; raise it when a change of code changes a score."""


@dataclass(frozen=True)
class Contender:
    """One thing that predicts: a fold's weights, a fold's atlas, or reference weights under a fold's roles."""

    run: str
    network: str
    seed: int | None
    fold: int
    hash: str
    predict: Callable[[Scan], dict[str, np.ndarray]]
    """Scan → (D, H, W) uint8 classes on the shard's grid, by protocol."""
    protocols: tuple[str, ...]
    """Of its label maps, the one that the report shows first."""


def main() -> None:
    """Score all runs of ``params.yaml``."""
    params = load_params()
    folds = all_folds(params.resources)
    split_hash = table_metadata(TABLES / "split.parquet")["split_hash"]
    places = sorted((scan.scan_id, scan.place) for scan in (scan for roles in folds.values() for scans in roles.values() for scan in scans))
    versions = [(name, protocols.load(name).version) for name in params.train.protocols]
    identity = fingerprint(RECIPE_VERSION, params.evaluate.postprocess, versions, split_hash, data_hash(TABLES), places)
    kept = _kept_rows(identity)
    contenders = [contender for fold, roles in folds.items() for contender in _contenders(params, fold, roles)]
    rows: list[dict] = []
    columns = (TextColumn("evaluate {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=sum(len(folds[c.fold].get(role, [])) for c in contenders for role in TEST_ROLES))
        for contender in contenders:
            progress.update(bar, description=f"{contender.run} fold {contender.fold}")
            for role in TEST_ROLES:
                for scan in folds[contender.fold].get(role, []):
                    key = (contender.run, contender.fold, contender.hash, role, scan.scan_id)
                    rows += kept.get(key) or _score(contender, role, scan, split_hash)
                    progress.advance(bar)
    if not rows:
        raise InputError(f"{TABLES / 'split.parquet'}: no scan is held out; the split needs external_test or internal_test scans")
    _write_cases(rows, {(c.run, c.fold): c for c in contenders}, folds)
    write_table(RESULTS_TABLE, "results", rows, metadata={"identity": identity, "split_hash": split_hash})
    _track(rows, params)
    log.info("%s: %d rows", RESULTS_TABLE, len(rows))
    for run, role, score in summary(rows):
        log.info("%s: mean Dice %s %.3f", run, role, score)


def summary(rows: list[dict]) -> Iterator[tuple[str, str, float]]:
    """(run, role, mean Dice over scans and structures), for each run and test role that has scans."""
    for run in dict.fromkeys(row["run"] for row in rows):
        for role in TEST_ROLES:
            values = [row["value"] for row in rows if (row["run"], row["role"], row["metric"]) == (run, role, "dice") and row["value"] is not None]
            if values:
                yield run, role, float(np.mean(values))


def _kept_rows(identity: str) -> dict[tuple, list[dict]]:
    """Rows of the table that stands, by what they are of, if it was made under the same settings from the same data."""
    kept: dict[tuple, list[dict]] = {}
    if RESULTS_TABLE.is_file() and table_metadata(RESULTS_TABLE).get("identity") == identity:
        for row in read_table(RESULTS_TABLE, "results").to_pylist():
            run = row["run"].removesuffix(f"+{row['protocol']}")  # see run_of
            kept.setdefault((run, row["fold"], row["weights_hash"], row["role"], row["scan_id"]), []).append(row)
    return kept


def _contenders(params: Params, fold: int, roles: dict[str, list[Scan]]) -> Iterator[Contender]:
    from lod_model import networks, weights

    for network in params.networks:
        run = params.run_name(network)
        path = fold_folder(run, fold) / "weights.pt"
        if finished(run, fold) != training_identity(network, params):  # weights of another split may have seen what is held out now
            raise InputError(
                f"{path.parent}: fold {fold} of {run} is not trained on this split, data and settings; "
                f"run `python -m lod_model.train --network {network}`"
            )
        yield _network_contender(weights.load(path), run, params.train.seed, fold, params)
    learned = {name for network in params.networks for name in networks.outputs(network, params.train.protocols)}
    yield from _atlases([name for name in params.train.protocols if name in learned], params, fold, roles)
    for path in map(Path, params.evaluate.reference_weights):
        reference = weights.load(path)
        if reference.grid != params.harmonise.grid or not set(reference.protocols) <= set(params.train.protocols):
            raise InputError(
                f"{path}: weights for grid {reference.grid} and protocol {reference.protocol}; "
                f"this project's are {params.harmonise.grid} and {', '.join(params.train.protocols)} (evaluate.reference_weights)"
            )
        own, theirs = preparation(roles, standardise="none"), replace(reference.preparation, scale=None)  # a scale is applied on read
        if own != theirs:
            raise InputError(
                f"{path}: weights for intensity {theirs.intensity} and {theirs.interpolation} interpolation; "
                f"this project's shards are {own.intensity} and {own.interpolation} (evaluate.reference_weights)"
            )
        yield _network_contender(reference, f"reference-{path.stem}", None, fold, params)


def _atlases(names: list[str], params: Params, fold: int, roles: dict[str, list[Scan]]) -> Iterator[Contender]:
    """The majority atlas of the training scans, one run with a map for each protocol; none where the scans' grids differ in size."""
    made = {}
    for name in dict.fromkeys(map(output_protocol, names)):
        table = protocols.load(name)
        maps = (scan.classes(table) for scan in roles["train"] if scan.has(table))
        try:
            made[name] = metrics.majority_atlas(maps)
        except ValueError as error:
            log.warning("fold %d: no majority atlas of %s: %s", fold, name, error)
    if made:
        digest = fingerprint(*(atlas.tobytes().hex() for atlas in made.values()))
        yield Contender(f"atlas-{params.experiment}-{params.train.seed}", "atlas", None, fold, digest, lambda _scan: made, tuple(made))


def _network_contender(loaded, run: str, seed: int | None, fold: int, params: Params) -> Contender:
    network, _ = with_engine(loaded.network, "fast" if best_device().type == "cpu" else "plain")

    def classes(scan: Scan) -> dict[str, np.ndarray]:
        scan = scan.standardised(loaded.preparation.scale)
        return predict_classes(
            network, scan.t1w(), protocols=loaded.protocols, voxel_mm=scan.voxel_mm, mean=scan.mean, deviation=scan.deviation,
            method=params.evaluate.postprocess, threads=params.resources.threads,
        )  # fmt: skip

    return Contender(run, loaded.name, seed, fold, loaded.hash, classes, tuple(map(output_protocol, loaded.protocols)))


def run_of(run: str, protocol: str, contender_protocols: tuple[str, ...]) -> str:
    """The run's name in tables: of several label maps, all but the first carry their protocol.

    >>> run_of("neuronet-base-0", "spm_tissue", ("fsl_fast", "spm_tissue"))
    'neuronet-base-0+spm_tissue'
    """
    return run if protocol == contender_protocols[0] else f"{run}+{protocol}"


def _score(contender: Contender, role: str, scan: Scan, split_hash: str) -> list[dict]:
    """The rows of one scan: Dice, HD95, ASD (mm), predicted and reference volume (mL) of every structure of each protocol that it has labels of."""
    rows = []
    found = contender.predict(scan)
    for name in contender.protocols:
        table = protocols.load(name)
        if not scan.has(table):
            continue
        common = {
            "run": run_of(contender.run, name, contender.protocols), "network": contender.network, "protocol": name, "seed": contender.seed,
            "fold": contender.fold, "role": role, "scan_id": scan.scan_id, "database": scan.database, "site": scan.site, "place": scan.place,
            "split_hash": split_hash, "weights_hash": contender.hash,
        }  # fmt: skip
        assert set(common) | {"structure", "metric", "value", "unit"} == set(RESULTS.names)
        reference, predicted = scan.classes(table), found[name]
        if predicted.shape != reference.shape:  # an atlas of a grid of another size
            continue
        reference, predicted = metrics.without_ignored(reference, predicted)
        for (metric, unit), values in _compared(reference, predicted, table, scan.voxel_mm).items():
            rows += [
                {**common, "structure": structure, "metric": metric, "value": None if np.isnan(value) else float(value), "unit": unit}
                for structure, value in zip(table.foreground, values, strict=True)
            ]
    return rows


def _compared(reference: np.ndarray, predicted: np.ndarray, table: protocols.Protocol, voxel_mm: float) -> dict[tuple[str, str], np.ndarray]:
    """(metric, unit) → its value for each foreground class."""
    hd95, asd = metrics.surface_distances(reference, predicted, table.classes, voxel_mm=voxel_mm)
    return {
        ("dice", "1"): metrics.dice(reference, predicted, table.classes),
        ("hd95", "mm"): hd95,
        ("asd", "mm"): asd,
        ("volume", "mL"): metrics.volumes_ml(predicted, table.classes, voxel_ml=voxel_mm**3 / 1000),
        ("reference_volume", "mL"): metrics.volumes_ml(reference, table.classes, voxel_ml=voxel_mm**3 / 1000),
    }


def _write_cases(rows: list[dict], contenders: dict[tuple[str, int], Contender], folds: dict) -> None:
    """Arrays of the worst held-out scans of each trained run, predicted once more; the folder holds these and nothing else."""
    shutil.rmtree(CASES, ignore_errors=True)
    CASES.mkdir(parents=True)
    scores: dict[tuple, list[float]] = {}
    for row in rows:
        contender = contenders.get((row["run"], row["fold"]))  # None: a run's further label maps
        if contender and row["metric"] == "dice" and row["role"] == "external_test" and row["network"] != "atlas" and row["value"] is not None:
            scores.setdefault((row["run"], row["fold"], row["scan_id"]), []).append(row["value"])
    for run in dict.fromkeys(key[0] for key in scores):
        worst = sorted((float(np.mean(values)), key) for key, values in scores.items() if key[0] == run)[:WORST_CASES]
        for rank, (score, (_, fold, scan_id)) in enumerate(worst):
            scan = next(scan for scan in folds[fold]["external_test"] if scan.scan_id == scan_id)
            contender = contenders[run, fold]
            name = contender.protocols[0]
            reference, predicted = metrics.without_ignored(scan.classes(protocols.load(name)), contender.predict(scan)[name])
            with replacing(CASES / f"{run}-{rank}.npz") as aside, open(aside, "wb") as handle:
                np.savez_compressed(
                    handle, t1w=scan.t1w(), reference=reference, predicted=predicted, scan_id=scan_id, run=run, fold=fold, place=scan.place,
                    dice=score, voxel_mm=scan.voxel_mm,
                )  # fmt: skip


def _track(rows: list[dict], params: Params) -> None:
    """Mean Dice and HD95 into MLflow, a score a role and one a structure for held-out places: every run, baselines too, and its folds."""
    tracker = Tracker(params.experiment, uri=params.resources.mlflow_uri)
    identities = {params.run_name(network): training_identity(network, params) for network in params.networks}
    settings = {f"evaluate.{key}": str(value) for key, value in params.evaluate.model_dump(mode="json").items()}
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        identity, tags = identities.get(run, own[0]["split_hash"]), tracking_tags() | settings | {"network": own[0]["network"]}
        parent = tracker.run(run_key(run, identity), name=run)
        tracker.record(parent, tags, _figures(own))
        for fold in sorted({row["fold"] for row in own}):
            child = tracker.run(run_key(run, identity, fold), name=f"{run}-fold-{fold}", parent=parent)
            tracker.record(child, tags | {"fold": str(fold)}, _figures([row for row in own if row["fold"] == fold]))


def _figures(rows: list[dict]) -> dict[str, float]:
    """Names and values of the scalars that MLflow compares."""
    figures: dict[str, list[float]] = {}
    of_structures: dict[str, list[float]] = {}
    for row in rows:
        if row["metric"] in ("dice", "hd95") and row["value"] is not None:
            role = row["role"].removesuffix("_test")
            figures.setdefault(f"{role}_{row['metric']}", []).append(row["value"])
            if role == "external":
                of_structures.setdefault(f"{role}_{row['metric']}_{row['structure'].replace(' ', '_')}", []).append(row["value"])
    if len(of_structures) <= FIGURES_OF_STRUCTURES:
        figures |= of_structures
    return {name: float(np.mean(values)) for name, values in figures.items()}


if __name__ == "__main__":
    run_stage(main, about=__doc__)
