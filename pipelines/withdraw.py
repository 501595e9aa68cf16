"""Take a person or a database out of a project, for ever, and say what is left elsewhere.

    python -m pipelines.withdraw abide1 --subject 0051456 --reason "asked for it"

The tombstone in ``withdrawn.tsv`` comes first: from then on index, harmonise, split, fetch and the loaders pass over what it names, whatever
lies on disk. Then go, in this project: the scans' rows of all tables, their shards, copies of those, pictures and reports. A shard
that holds others too is written again without them, to the bytes it would have if they had never been there; its scans are taken from the
shard as it stands, so the raw files are not needed. All other shards stay as they are. The tables that say what there was are changed
last: stopped at any moment, the same command goes on. The frozen split is left, so that all others keep their roles; who trains passes
over the names in it that are gone. What no command of this project reaches is listed, each with what purges it (:mod:`pipelines.withdraw_reach`).
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_registry import shards
from data_registry.catalogue import catalogue
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.ledgers import WITHDRAWN, Tombstone, Withdrawn, bury, withdrawn
from data_registry.params import Harmonise, Params, load_params
from data_registry.schema import read_table, table_metadata, write_table
from data_registry.shard_store import ShardStore, open_store
from data_registry.split import data_hash
from pipelines.attempts import clean
from pipelines.fetch_people import cells_of
from pipelines.harmonise import SAMPLES_TABLE, collect, plan_shards, shard_columns
from pipelines.hashes import forget_hashes
from pipelines.index import SCANS_TABLE, find_databases
from pipelines.quality import PAGES, forget
from pipelines.split import SPLIT_TABLE
from pipelines.withdraw_reach import Gone, left_elsewhere, same_people

log = logging.getLogger("lodbrain.withdraw")
FROZEN = ("split.parquet", "split.json")
CASES = "cases/*.npz"
CONFLICTS = "conflicts"
REPORTS = Path("reports")


def main() -> None:
    """Withdraw what the command line names from the project in the current folder."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.withdraw", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", help="as its folder, and the catalogue, name it")
    parser.add_argument("--subject", nargs="+", action="extend", default=[], help="these people only, with or without sub-")
    parser.add_argument("--reason", required=True, help="kept with the date in withdrawn.tsv, which belongs into git: no names")
    parser.add_argument("--dry-run", action="store_true", help="say what would go and what is elsewhere; change nothing")
    arguments = parser.parse_args()
    if not arguments.reason.strip():
        raise InputError("--reason is empty; a few words, which stay in withdrawn.tsv, are wanted")
    subjects = sorted({subject.removeprefix("sub-") for subject in arguments.subject})
    withdraw(arguments.database, subjects, arguments.reason, dry_run=arguments.dry_run)


def withdraw(database: str, subjects: list[str], reason: str, *, dry_run: bool = False) -> None:
    """Write the tombstones, remove the data, and print what is left elsewhere. No ``subjects``: the whole database."""
    params = load_params()
    scans = read_table(SCANS_TABLE, "scans").to_pylist() if SCANS_TABLE.is_file() else []
    _refuse_unknown(database, subjects, scans, params)
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    stones = [Tombstone(database, subject, today, reason, _digests(scans, database, subject)) for subject in subjects or [""]]
    these, gone = Withdrawn(stones), Withdrawn([*withdrawn().tombstones, *stones])
    what = f"{database}{', ' * bool(subjects)}{', '.join(f'sub-{subject}' for subject in subjects)}"
    if not dry_run:  # before anything that may fail, such as a store that is away
        new = bury(stones)
        print(f"withdrawn: {what} ({WITHDRAWN}: {len(new)} new line{'s' * (len(new) != 1)}; git add and commit it)", flush=True)
    own = [row for row in scans if these.has(row["database"], row["subject"])]
    others = [row for row in scans if not gone.has(row["database"], row["subject"])]
    store = open_store(params.resources)
    affected = _affected(store, own, these, params.harmonise)
    trained = data_hash(SPLIT_TABLE.parent) if SPLIT_TABLE.is_file() and SAMPLES_TABLE.is_file() else None
    found = Gone(database, tuple(subjects), reason, these, tuple(own), tuple(others), affected, _hashes(affected), trained)
    found = replace(found, same_people=same_people(found))
    if dry_run:
        print(f"would withdraw {what}: {len(own)} scans in {len(affected)} shards; nothing is changed")
    else:
        for line in _removed(found, gone, store, scans, params):
            print(f"removed: {line}", flush=True)
    for line in left_elsewhere(found, params):
        print(line)


def _digests(scans: list[dict], database: str, subject: str) -> str:
    """SHA-256 of a person's T1w, as a tombstone has them."""
    return " ".join(sorted({row["t1w_sha256"] for row in scans if (row["database"], row["subject"]) == (database, subject) and row["t1w_sha256"]}))


def _refuse_unknown(database: str, subjects: list[str], scans: list[dict], params: Params) -> None:
    """Raise :class:`InputError` for a name that neither tables, roots, catalogue nor an earlier withdrawal know: it is a typing error."""
    here, buried = {row["database"] for row in scans}, withdrawn()
    roots = _roots(params)
    if database not in here | set(roots) | set(catalogue()) | {stone.database for stone in buried.tombstones}:
        raise InputError(f"{database}: no such database; one of {', '.join(sorted(here | set(roots))) or 'the catalogue'} is wanted")
    people = {row["subject"] for row in scans if row["database"] == database}
    if subjects and not people and database not in roots:
        log.warning("nobody of %s is in this project, so that labels cannot be checked: %s", database, ", ".join(subjects))
        return
    for subject in subjects:
        on_disk = database in roots and (any(roots[database].glob(f"sub-{subject}")) or _in_participants(roots[database], subject))
        if subject not in people and not on_disk and (database, subject) not in {stone[:2] for stone in buried.tombstones}:
            has = f"has {len(people)}, e.g. {min(people)}" if people else "has nobody in this project"
            raise InputError(f"--subject {subject}: {database} {has}; the label of one of its people is wanted")


def _in_participants(root: Path, subject: str) -> bool:
    """Whether the database's table names somebody, with a scan or without."""
    table = root / "participants.tsv"
    return table.is_file() and bool(cells_of(table.read_bytes(), {subject})[1])


def _roots(params: Params) -> dict[str, Path]:
    """Databases whose raw files are at hand; a root that is away is no reason to keep what was withdrawn."""
    found = {}
    for root in params.index.roots:
        try:
            found |= find_databases([Path(root)])
        except InputError as error:
            log.warning("%s", error)
    return found


def _affected(store: ShardStore, own: list[dict], these: Withdrawn, settings: Harmonise) -> tuple[str, ...]:
    """Shards that hold these scans, or may: those that list them, those that should, and incomplete ones of the database."""
    databases = {stone.database for stone in these.tombstones}
    wanted = {item["shard"] for item in plan_shards([row for row in own if row["reason"] is None], settings)}
    found = []
    for shard in store.shards():
        if shard.split("site=")[1].split(".")[0] in databases:
            notes = store.metadata(shard)
            if notes is None or shard in wanted or any(these.has_scan(row["scan_id"]) for row in notes["samples"]):
                found.append(shard)
    return tuple(found)


def _hashes(affected: tuple[str, ...]) -> frozenset[str]:
    """Of these shards' bytes as the samples table has them, by which copies are named."""
    if not SAMPLES_TABLE.is_file():
        return frozenset()
    rows = read_table(SAMPLES_TABLE, "samples").select(["shard", "shard_sha256"]).to_pylist()
    return frozenset(row["shard_sha256"] for row in rows if row["shard"] in affected)


def _removed(found: Gone, gone: Withdrawn, store: ShardStore, scans: list[dict], params: Params) -> Iterator[str]:
    """Remove, step by step; a line for each step that found something. The scans table, from which all else is known, comes last."""
    rewritten, dropped = _clear_shards(found.shards, store, scans, gone, params.harmonise)
    if found.shards:
        yield f"{len(rewritten)} shards written again without them, {len(dropped)} deleted"
    if stale := [shard for shard in dropped if any(row["shard"] == shard for row in _samples(gone))]:
        yield f"{len(stale)} of these, made under other settings, held others too; make them anew: python -m pipelines.harmonise"
    if copies := _drop_copies(Path(params.resources.cache_folder), gone):
        yield f"{copies} copies of shards in {params.resources.cache_folder}"
    clean()
    forget_hashes(found.scans)
    for path, number in _clear_tables(SCANS_TABLE.parent, gone, [row["scan_id"] for row in found.scans]):
        yield f"{path}: {f'{number} rows' if number else 'the file, which its stage makes again'}"
    if looks := forget(gone):
        yield f"{looks} files of what the stage quality keeps of a shard"
    for folder in (folder for folder in (REPORTS, PAGES) if found.scans and folder.is_dir()):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in files:
            path.unlink()
        yield f"{folder}: {len(files)} files, whose figures and pictures hold them; the stages make them again"
    if SAMPLES_TABLE.is_file():
        before = read_table(SAMPLES_TABLE, "samples").num_rows
        standing = {None, *store.shards()}
        rows = {row["scan_id"]: row for row in _samples(gone) if row["shard"] in standing}
        rows |= {row["scan_id"]: row for shard in rewritten for row in collect(store, shard)}
        write_table(SAMPLES_TABLE, "samples", [rows[name] for name in sorted(rows)], metadata=_notes(SAMPLES_TABLE))
        yield f"{SAMPLES_TABLE}: {before - len(rows)} rows"
    if found.scans:
        kept = [row for row in scans if not gone.has(row["database"], row["subject"])]
        write_table(SCANS_TABLE, "scans", kept, metadata=_notes(SCANS_TABLE))
        yield f"{SCANS_TABLE}: {len(scans) - len(kept)} rows"


def _clear_shards(affected: tuple[str, ...], store: ShardStore, scans: list[dict], gone: Withdrawn, settings: Harmonise) -> tuple[list, list]:
    """(shards that were written again, shards that were deleted); those that no longer hold anybody withdrawn count as written."""
    usable = [row for row in scans if row["reason"] is None]
    before = {item["shard"]: item["recipe"] for item in plan_shards(usable, settings)}
    after = {item["shard"]: item for item in plan_shards([row for row in usable if not gone.has(row["database"], row["subject"])], settings)}
    rewritten, dropped = [], []
    for shard in affected:
        notes, item = store.metadata(shard), after.get(shard)
        if notes is None or item is None or notes["recipe"] not in (before.get(shard), item["recipe"]):
            dropped.append(shard)
            continue
        if notes["recipe"] != item["recipe"]:
            _write_without(store, item, notes["samples"], gone, settings)
        rewritten.append(shard)
    store.keep_only(set(store.shards()) - set(dropped))
    return rewritten, dropped


def _write_without(store: ShardStore, item: dict, samples: list[dict], gone: Withdrawn, settings: Harmonise) -> None:
    """One shard again, as harmonise would write it, its arrays from the one that stands there."""
    shard, columns, written = item["shard"], shard_columns(item["scans"], settings), []
    digest = store.sha256(shard)

    def rows() -> Iterator[dict]:
        group = 0
        for sample in samples:
            if gone.has_scan(sample["scan_id"]):
                continue
            written.append(sample if sample["status"] != "ok" else sample | {"row_group": group})
            if sample["status"] == "ok":
                group += 1
                yield {"scan_id": sample["scan_id"], **store.read_row(shard, sample["row_group"], columns, scan_id=sample["scan_id"], sha256=digest)}

    store.write(shard, rows(), metadata={"recipe": item["recipe"], "samples": written}, columns=columns)


def _drop_copies(folder: Path, gone: Withdrawn) -> int:
    """Delete copies of shards on this machine's disk that hold them, of whatever age, and what cannot be read; how many."""
    number = 0
    for copy in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
        notes = shards.read_metadata(copy)
        if notes is None or any(gone.has_scan(row["scan_id"]) for row in notes.get("samples", ())):
            copy.unlink(missing_ok=True)
            number += 1
    return number


def _clear_tables(folder: Path, gone: Withdrawn, scan_ids: list[str]) -> Iterator[tuple[Path, int]]:
    """Remove their rows of all other tables, arrays for pictures and text; yields (file, rows; 0: all of it). The frozen split stays."""
    for path in sorted(folder.glob("*.parquet")):
        if path in (SAMPLES_TABLE, SCANS_TABLE) or path.name in FROZEN:
            continue
        table = pq.read_table(path)
        keep = pa.array([True] * table.num_rows, pa.bool_())
        for name in (field.name for field in table.schema if field.type == pa.string()):
            named = [value for value in pc.unique(table[name]).to_pylist() if value and "_sub-" in value and gone.has_scan(value)]
            keep = pc.and_(keep, pc.invert(pc.is_in(table[name], pa.array(named, pa.string()))).combine_chunks())
        if number := table.num_rows - keep.true_count:
            with replacing(path) as aside:
                pq.write_table(table.filter(keep), aside, compression="zstd")
            yield path, number
    for path in sorted(folder.glob(CASES)):
        with np.load(path) as case:
            holds = gone.has_scan(str(case["scan_id"]))
        if holds:
            path.unlink()
            yield path, 0
    for path in sorted(path for kind in ("tsv", "json", "html", "csv") for path in folder.glob(f"*.{kind}")):
        named = path.stem == CONFLICTS or any(name.encode() in path.read_bytes() for name in scan_ids)  # conflicts name people without scans too
        if named and path.name not in FROZEN:
            path.unlink()
            yield path, 0


def _samples(gone: Withdrawn) -> list[dict]:
    """Rows of the samples table, as it stands, of those who stay."""
    rows = read_table(SAMPLES_TABLE, "samples").to_pylist() if SAMPLES_TABLE.is_file() else []
    return [row for row in rows if not gone.has_scan(row["scan_id"])]


def _notes(path: Path) -> dict[str, str]:
    return {key: value for key, value in table_metadata(path).items() if key != "table"}


if __name__ == "__main__":
    run_stage(main)
