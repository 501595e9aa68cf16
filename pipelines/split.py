"""Stage *split*: the frozen table fold × scan → role, its hash and its leakage proof; before it, who is who by voxels and likeness."""

import json
import logging
from collections import Counter
from pathlib import Path

from data_registry import protocol, split
from data_registry.catalogue import find_database
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.ledgers import withdrawn
from data_registry.params import Params, Split, load_params
from data_registry.people import merge_families
from data_registry.schema import read_table, write_table
from pipelines.harmonise import SAMPLES_TABLE
from pipelines.index import SCANS_TABLE
from pipelines.people import PEOPLE_TABLE, find_people, write_findings
from pipelines.quality import QUALITY_TABLE

log = logging.getLogger("lodbrain.split")
SPLIT_TABLE = Path("tables/split.parquet")
SPLIT_PROOF = Path("tables/split.json")


def main() -> None:
    """Split the harmonised scans that have labels of the trained protocol."""
    params = load_params()
    usable, everybody, samples, notes = _chosen(params)
    findings, people = find_people(everybody, samples, {name: find_database(name) for name in {row["database"] for row in everybody}})
    merge_families(everybody)
    write_findings(findings)  # also for who must look at them since the split is refused
    notes += _notes_on_people(people, samples, params.split)
    for note in notes:  # before a refusal, which they may explain
        log.warning(note)
    rows, fold_notes = split.compile_split(usable, params.split)
    proof = split.prove(rows, usable, params.split)
    assert not any(entry["overlaps"] for entry in proof), f"the split leaks: {[e for e in proof if e['overlaps']]}"
    folds, digest = len(fold_notes), split.split_hash(rows)
    if not params.split.holdout and folds < params.split.folds:
        notes.append(f"{folds} folds instead of {params.split.folds}: there are {folds} groups of key {params.split.key}")
        log.warning(notes[-1])
    content = {
        "split_hash": digest,
        "key": params.split.key,
        "settings": params.split.model_dump(mode="json"),
        "folds": [_summary(fold, [row for row in rows if row["fold"] == fold], these) for fold, these in enumerate(fold_notes)],
        "proof": proof,
        "people": people,
        "notes": notes,
    }
    write_table(SPLIT_TABLE, "split", rows, metadata={"split_hash": digest})
    with replacing(SPLIT_PROOF) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in (f"fold {fold}: {note}" for fold, these in enumerate(fold_notes) for note in these):
        log.warning(line)
    log.info("%s: %d folds over %d scans, hash %s, no leak in %d checks", SPLIT_TABLE, folds, len(usable), digest[:12], len(proof))


def _chosen(params: Params) -> tuple[list[dict], list[dict], list[dict], list[str]]:
    """Rows of the scans table to split, each with its ``resolution``, and of everybody, as ties reach through scans that get no role, too; rows
    of the samples table; a note on each scan that is left out. Raises :class:`InputError` if there is none to split."""
    scans = {row["scan_id"]: row for row in read_table(SCANS_TABLE, "scans").to_pylist()}
    gone = withdrawn()  # index and harmonise leave these out; tables from before, as `dvc checkout` brings back, have them
    samples = [row for row in read_table(SAMPLES_TABLE, "samples").to_pylist() if row["status"] == "ok" and not gone.has_scan(row["scan_id"])]
    asked = " or ".join(params.train.protocols)
    wanted = list(dict.fromkeys(source for name in params.train.protocols for source in protocol.load(name).sources))
    labelled = [row for row in samples if set(row["label_sources"]) & set(wanted)]
    unlabelled = [row for row in samples if not set(row["label_sources"]) & set(wanted)]
    failed = _failed(labelled) if params.split.quality == "exclude_fail" else {}
    labelled = [row for row in labelled if row["scan_id"] not in failed]
    if failed and not labelled:
        raise InputError(f"{QUALITY_TABLE}: the verdict on all {len(failed)} labelled scans is fail; a scan is wanted (or split.quality: report)")
    if not labelled:
        raise InputError(f"{SAMPLES_TABLE}: no scan has labels of protocol {asked} (sources {', '.join(wanted)})")
    usable = [scans[row["scan_id"]] for row in labelled]
    for scan, row in zip(usable, labelled, strict=True):
        scan["resolution"] = split.resolution(row["native_affine"])
    everybody = [row for row in scans.values() if not gone.has_scan(row["scan_id"])]
    notes = [f"{row['scan_id']}: left out, no labels of protocol {asked} (has {_has(row)})" for row in unlabelled]
    notes += [f"{scan_id}: left out, its quality fails: {reason}" for scan_id, reason in failed.items()]
    return usable, everybody, samples, notes


def _notes_on_people(people: dict, samples: list[dict], settings: Split) -> list[str]:
    """What :func:`find_people` left for somebody to look at, and how many scans it could not compare."""
    notes = []
    if people["review"]:
        done = "get one role" if "suspected" in settings.guards else "are not kept apart"
        notes.append(f"{PEOPLE_TABLE}: {people['review']} pairs of scans may be one person's and {done}; somebody's look is wanted")
    if missing := people["scans_not_described"]:
        why = "no brain was found in them" if any(row["likeness"] for row in samples) else "likeness off, grid too coarse, or no brain found"
        notes.append(f"{PEOPLE_TABLE}: {missing} of {len(samples)} scans are compared with none by their heads ({why})")
    return notes


def _summary(fold: int, rows: list[dict], notes: list[str]) -> dict:
    """What is held out in a fold, and its scans by role."""
    counts = Counter(row["role"] for row in rows)
    held_out = sorted({row["group"] for row in rows if row["role"] == "external_test"})
    return {"fold": fold, "held_out": held_out, "counts": {role: counts[role] for role in split.ROLES}, "notes": notes}


def _failed(samples: list[dict]) -> dict[str, str]:
    """Scans whose verdict is fail, with the first reason; InputError where the table is not about these samples."""
    known = {row["scan_id"]: row for row in read_table(QUALITY_TABLE, "quality").to_pylist()}
    for row in samples:
        if row["scan_id"] not in known or known[row["scan_id"]]["shard_sha256"] != row["shard_sha256"]:
            raise InputError(f"{QUALITY_TABLE}: not about {row['scan_id']} as it stands in {SAMPLES_TABLE}; run `python -m pipelines.quality` again")
    return {row["scan_id"]: known[row["scan_id"]]["reasons"][0] for row in samples if known[row["scan_id"]]["verdict"] == "fail"}


def _has(sample: dict) -> str:
    return ", ".join(sample["label_sources"]) or "none"


if __name__ == "__main__":
    run_stage(main, about=__doc__)
