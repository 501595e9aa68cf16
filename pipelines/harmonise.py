"""Stage *harmonise*: scans → shards on the standard grid, and ``tables/samples.parquet``, their manifest.

*Harmonise* means geometry, intensity, labels and metadata; it is not ComBat. Ray tasks, one a shard: a shard holds a few dozen scans
of one site, is written aside and renamed, and carries its recipe, so a run that was stopped redoes only what is unfinished and a new
subject rewrites one shard. A scan that fails is quarantined with its reason; the run goes on. So is one that kills its worker again and
again (``resources.tries``); its neighbours are kept, and deleting its shard has it tried anew. The manifest is written last; shards that
it does not name are deleted.

On a Ray cluster the project and the databases stand on a file system that all nodes share, at the same path. From a node of the
cluster, or as a job, whose own folder is a copy of the code: hence ``--project``::

    ray job submit --address http://127.0.0.1:8265 --runtime-env infra/ray/job.yaml -- python -m pipelines.harmonise --project /shared/project
    ray job submit --address http://127.0.0.1:8265 --runtime-env infra/ray/job.yaml -- dvc --cd /shared/project repro harmonise
"""

import argparse
import json
import logging
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_registry import conform, protocol, shards
from data_registry.errors import InputError, run_stage
from data_registry.intensity import ROBUST, Preparation, above_air, histogram_of, moments, prepare, voxels_sha256
from data_registry.label_fit import check_fit
from data_registry.ledgers import withdrawn
from data_registry.likeness import describe
from data_registry.params import Harmonise, Resources, fingerprint, load_params
from data_registry.schema import read_table, write_table
from data_registry.shard_store import FolderStore, ShardStore, open_store
from data_registry.tissue_maps import load_label_map
from data_registry.volume import load_image
from pipelines.attempts import JOURNALS, Attempts, clean
from pipelines.index import SCANS_TABLE, find_databases
from pipelines.parallel import Death, run_bounded
from pipelines.progress import Scans

log = logging.getLogger("lodbrain.harmonise")
SAMPLES_TABLE = Path("tables/samples.parquet")
SHARD_FOLDER = Path("shards")
RECIPE_VERSION = 6
"""Part of every shard's recipe; raise it when a change of code changes the bytes of a shard."""


def main() -> None:
    """Harmonise the scans of ``tables/scans.parquet`` into ``shards/``."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.harmonise", description="Scans to shards on the standard grid.")
    parser.add_argument("--project", type=Path, default=Path(), help="the folder of params.yaml (default: the current one)")
    project = parser.parse_args().project
    if not project.is_dir():
        raise InputError(f"{project}: no such folder; the one that holds params.yaml is wanted (--project)")
    os.chdir(project)
    harmonise()


def harmonise() -> None:
    """The stage, in the current folder."""
    params = load_params()
    gone = withdrawn()  # index leaves these out; a table from before, as `dvc checkout` brings back, has them
    rows = read_table(SCANS_TABLE, "scans").to_pylist()
    scans = [row for row in rows if row["reason"] is None and not gone.has(row["database"], row["subject"])]
    databases = find_databases([Path(root) for root in params.index.roots])
    plan = plan_shards(scans, params.harmonise)
    store = open_store(params.resources)
    SHARD_FOLDER.mkdir(exist_ok=True)  # DVC's output also where resources.shards is elsewhere; the samples table then tells by its hashes
    todo = [item for item in plan if (store.metadata(item["shard"]) or {}).get("recipe") != item["recipe"]]
    log.info("%d scans in %d shards, %d to make", len(scans), len(plan), len(todo))
    _make(todo, store, databases, params.harmonise, params.resources)
    samples = [row for item in plan for row in collect(store, item["shard"])]
    bad = [row for row in samples if row["status"] != "ok"]
    for row in bad:
        log.warning("quarantined %s: %s", row["scan_id"], row["reason"])
    if len(bad) == len(samples):
        raise InputError(f"all {len(samples)} scans are quarantined; the reasons stand above")
    preparation = _preparation(params.harmonise)
    note = {} if preparation == ROBUST else {"preparation": json.dumps(asdict(preparation))}  # who trains reads what the shards are
    write_table(SAMPLES_TABLE, "samples", sorted(samples, key=lambda row: row["scan_id"]), metadata=note)
    store.keep_only({item["shard"] for item in plan})
    clean()
    for leftover in SAMPLES_TABLE.parent.glob(".aside-*"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    log.info("%s: %d scans, %d quarantined", SAMPLES_TABLE, len(samples), len(bad))


def plan_shards(scans: list[dict], settings: Harmonise) -> list[dict]:
    """Which scans stand in which shard, and each shard's recipe: all that its bytes depend on, no path, no order, no history."""
    members = defaultdict(list)
    for scan in sorted(scans, key=lambda row: row["scan_id"]):
        part = shards.shard_of(scan["subject"], settings.shards_per_site)
        members[shards.shard_name(settings.grid, scan["database"], scan["site"], part)].append(scan)
    tables = {name: protocol.load(name).version for name in settings.stored_protocols}
    plan = []
    for name, rows in sorted(members.items()):
        files = [[row["scan_id"], row["t1w_sha256"], [[label["source"], label["sha256"]] for label in row["labels"]]] for row in rows]
        chosen = settings.model_dump(mode="json", exclude={"shards_per_site"})
        plan.append({"shard": name, "scans": rows, "recipe": fingerprint(RECIPE_VERSION, chosen, tables, files)})
    return plan


def _make(todo: list[dict], store: ShardStore, databases: dict[str, Path], settings: Harmonise, resources: Resources) -> None:
    """Make the unfinished shards, showing how far they are."""
    if not todo:
        return
    for row in (row for item in todo for row in item["scans"]):
        if row["database"] not in databases:
            raise InputError(f"database {row['database']} of {SCANS_TABLE} is below no root of params.yaml; run `python -m pipelines.index` again")
    roots = {name: str(root.absolute()) for name, root in databases.items()}
    attempts = [Attempts(item["shard"], resources.tries) for item in todo]
    memory = [int(resources.task_gb * 1e9) if resources.task_gb else task_bytes(item["scans"], settings) for item in todo]
    for folder in (JOURNALS, *_folders(store)):
        folder.mkdir(parents=True, exist_ok=True)

    def work(index: int) -> tuple:
        item, attempt = todo[index], attempts[index]
        own = {row["database"]: roots[row["database"]] for row in item["scans"]}
        return store, item, own, settings, str(attempt.journal), dict(attempt.left_out)

    failed = []
    with Scans("harmonise", sum(len(item["scans"]) for item in todo)) as progress:

        def again(index: int, death: Death) -> tuple | None:
            progress.retries += 1
            return work(index) if attempts[index].died(death) else None

        items = [work(index) for index in range(len(todo))]
        for index, result in run_bounded(make_shard, items, memory=memory, again=again, workers=resources.workers, address=resources.ray_address):
            progress.done += len(todo[index]["scans"])
            if isinstance(result, Exception):
                why = attempts[index].why or str(result).strip() or type(result).__name__
                failed.append(f"{todo[index]['shard']}: {why.splitlines()[-1]}")
            else:
                progress.quarantined += result
    if failed:
        raise InputError(f"{len(failed)} shards could not be made, e.g. {failed[0]}; run the stage again, finished shards are kept")


def task_bytes(scans: list[dict], settings: Harmonise) -> int:
    """Memory of a shard's task: process, one scan as read (up to 320³ voxels), work on the grid, and its arrays, until written.

    Measured on 256³ and 384³ scans: 17 bytes a voxel as read, 10 a voxel of the grid.
    """
    edge = conform.parse_grid(settings.grid)
    side = 320 if np.isnan(edge) else conform.FIELD_OF_VIEW_MM / edge
    levels = sum(factor**-3 for factor in shards.FACTORS)
    classes = len(settings.stored_protocols) + sum(protocol.load(name).classes * (levels - 1) for name in settings.block_protocols)
    stored = levels + 2 * max(len(scan["labels"]) for scan in scans) + classes
    return int(0.4e9 + 17 * 320**3 + side**3 * (10 + stored))


def make_shard(
    store: ShardStore, item: dict, roots: dict[str, str], settings: Harmonise, journal: str = os.devnull, left_out: Mapping[str, str] | None = None
) -> int:
    """One Ray task: read, conform and write the scans of one shard. Returns how many are quarantined.

    ``journal`` is a file that names the scan at work, in case it ends the process; ``left_out`` are those that did, with the reason.
    """
    for path in (*roots.values(), os.path.dirname(journal), *_folders(store)):
        if not os.path.isdir(path):  # else a node without the shared file system would quarantine all it is given
            raise InputError(f"{path}: no such folder on {platform.node()}; a file system shared by all nodes is wanted")
    samples: list[dict] = []
    metadata = {"recipe": item["recipe"], "samples": samples}
    rows = _rows(item, roots, settings, journal, left_out or {}, samples)
    store.write(item["shard"], rows, metadata=metadata, columns=shard_columns(item["scans"], settings))
    return sum(sample["status"] != "ok" for sample in samples)


def _rows(item: dict, roots: dict[str, str], settings: Harmonise, journal: str, left_out: Mapping[str, str], samples: list[dict]) -> Iterator[dict]:
    """The rows of a shard, one scan in memory at a time; what became of each scan is added to ``samples``."""
    written = 0
    for scan in item["scans"]:
        where = f"{roots[scan['database']]}/{scan['t1w_path']}"
        Path(journal).write_text(scan["scan_id"], encoding="utf-8")
        try:
            if scan["scan_id"] in left_out:
                raise InputError(f"{where}: {left_out[scan['scan_id']]}")
            arrays, sample = harmonise_scan(scan, Path(roots[scan["database"]]), settings)
        except InputError as error:
            samples.append(_identity(scan, settings) | {"status": "quarantined", "reason": str(error)})
            continue
        except Exception as error:  # whatever one scan does, its neighbours go on
            reason = f"{where}: {type(error).__name__} ({' '.join(str(error).split())})"
            samples.append(_identity(scan, settings) | {"status": "quarantined", "reason": reason})
            continue
        samples.append({**sample, "status": "ok", "shard": item["shard"], "row_group": written})
        yield {"scan_id": scan["scan_id"], **arrays}
        del arrays   # before the next is made
        written += 1
    Path(journal).write_text("", encoding="utf-8")


def shard_columns(scans: list[dict], settings: Harmonise) -> list[str]:
    """All that the rows of a shard may have; a scan without a label map has none in its columns."""
    sources = {label["source"] for scan in scans for label in scan["labels"]}
    stored = [name for name in settings.stored_protocols if sources & set(protocol.load(name).sources)]
    counted = [name for name in stored if name in settings.block_protocols]
    names = [f"t1w_x{factor}" for factor in shards.FACTORS] + [f"{source}_x1" for source in sources]
    names += [f"{name}_classes_x1" for name in stored] + [f"{name}_x{factor}" for name in counted for factor in shards.BLOCK_FACTORS]
    return sorted(names)


def harmonise_scan(scan: dict, root: Path, settings: Harmonise) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of one scan by column name, and its row of the samples table (without its place in a shard).

    Raises :class:`InputError` for whatever keeps the scan out.
    """
    volume = load_image(root / scan["t1w_path"])
    conformed = prepare(volume, grid=settings.grid, preparation=_preparation(settings))
    placement, t1w = conformed.placement, conformed.data
    arrays = {f"t1w_x{factor}": shards.pooled(t1w, factor) for factor in shards.FACTORS}
    warnings, coarse_mm = list(conformed.warnings), []
    given = {label["source"] for label in scan["labels"]}
    needed = {next((source for source in protocol.load(name).sources if source in given), None) for name in settings.stored_protocols}
    for label in scan["labels"]:
        try:
            labels = load_label_map(root / label["path"])
            on_grid = conform.labels_to_grid(labels, placement, method=settings.labels)
            check_fit(labels, t1w, placement)
        except InputError as error:
            if label["source"] in needed:
                raise
            warnings.append(str(error))  # a map that no chosen protocol reads, or prefers to those that are here, costs only itself
            continue
        arrays[f"{label['source']}_x1"] = on_grid
        warnings += [f"{label['source']}: {warning}" for warning in labels.warnings]
        if edge := conform.coarser_than_grid_mm(labels, placement):
            coarse_mm.append(edge)
            warnings.append(f"{label['source']}: labels of {edge:.3g} mm voxels on a grid of {placement.voxel_mm:.3g} mm, no truth at its resolution")
    volumes = []
    for name in settings.stored_protocols:
        table = protocol.load(name)
        source = next((source for source in table.sources if f"{source}_x1" in arrays), None)
        if source is None:
            continue
        path = next(label["path"] for label in scan["labels"] if label["source"] == source)
        classes = shards.classes_of(arrays[f"{source}_x1"], table, where=str(root / path))
        arrays[f"{name}_classes_x1"] = classes
        if name not in settings.block_protocols:
            continue
        arrays |= {f"{name}_x{factor}": shards.block_counts(classes, factor, table.classes) for factor in shards.BLOCK_FACTORS}
        voxels = arrays[f"{name}_x{shards.BLOCK_FACTORS[-1]}"].sum((1, 2, 3), dtype=np.int64)
        volumes += [{"class_name": n, "ml": float(v * placement.voxel_ml)} for n, v in zip(table.foreground, voxels[1:], strict=True)]
    histogram = histogram_of(t1w)
    mean, deviation = moments(histogram)
    sample = _identity(scan, settings) | {
        "warnings": warnings,
        "label_sources": [label["source"] for label in scan["labels"] if f"{label['source']}_x1" in arrays],
        "voxel_mm": placement.voxel_mm,
        "shape": list(placement.shape),
        "affine": placement.affine.ravel().tolist(),
        "native_shape": list(placement.native_shape),
        "native_affine": placement.native_affine.ravel().tolist(),
        "mean": mean,
        "deviation": deviation,
        "histogram": histogram.tolist(),
        "label_volumes_ml": volumes,
        "voxels_sha256": voxels_sha256(t1w, histogram),
    }
    if settings.likeness and (described := describe(above_air(t1w, _preparation(settings)), placement.voxel_mm)) is not None:
        sample["likeness"] = described.tobytes().hex()
    if coarse_mm:
        sample["label_voxel_mm"] = max(coarse_mm)
    return arrays, sample


def _folders(store: ShardStore) -> list[Path]:
    """Where the store is folders of a file system, that every node must see."""
    return [store.root] if isinstance(store, FolderStore) else []


def _preparation(settings: Harmonise) -> Preparation:
    return Preparation(settings.intensity, settings.interpolation)


def _identity(scan: dict, settings: Harmonise) -> dict:
    return {key: scan[key] for key in ("scan_id", "database", "site")} | {"grid": settings.grid}


def collect(store: ShardStore, shard: str) -> list[dict]:
    """The samples rows of a finished shard, with its hash."""
    metadata = store.metadata(shard)
    if metadata is None:
        raise InputError(f"{store.where(shard)}: no complete shard; run `python -m pipelines.harmonise` again")
    digest = store.sha256(shard)
    return [row | ({"shard_sha256": digest} if row["status"] == "ok" else {}) for row in metadata["samples"]]


if __name__ == "__main__":
    run_stage(main)
