"""Where weights come from: the databases that trained and chose them, their licences and citations, and may they be shared.

A training notes it in its weights (:func:`record`), database by database; no person's name goes into a file that may be given on. Who was
seen stands beside the weights in ``seen.tsv``, which stays in the project. Shards carry no licence: their bytes depend on scans alone, and
the database's name leads to the catalogue. Licences are noted as the catalogue had them at training and as ``licences.tsv`` says they were
accepted; of those and today's the strictest counts.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_registry.catalogue import Database, catalogue, find_database
from data_registry.catalogue_sources import standing
from data_registry.files import replacing
from data_registry.ledgers import accepted_licences
from data_registry.licences import NO_ADVICE, Verdict, in_words, judge, strictest
from data_registry.schema import read_table
from lod_model.data import TABLES, Scan
from lod_model.weights import AUTHORS

SEEN = "seen.tsv"
"""Beside a fold's weights: scan_id, database, site, role of every scan that trained or chose them."""
ROLES = ("train", "val")
"""Both have seen the data: one gave the gradients, the other chose the checkpoint."""


def record(roles: dict[str, list[Scan]]) -> list[dict[str, Any]]:
    """What weights say of each database that these roles hold, as plain values; from the tables and ledgers below the current folder."""
    person = {row["scan_id"]: row["person"] for row in read_table(TABLES / "scans.parquet", "scans").select(["scan_id", "person"]).to_pylist()}
    accepted, found = accepted_licences(), []
    for name in sorted({scan.database for role in ROLES for scan in roles.get(role, [])}):
        own = {role: [scan for scan in roles.get(role, []) if scan.database == name] for role in ROLES}
        found.append({
            **_terms(find_database(name)),
            "accepted": accepted.get(name),
            "sites": sorted({scan.site for scans in own.values() for scan in scans}),
            "scans": {role: len(scans) for role, scans in own.items()},
            "people": {role: len({person[scan.scan_id] for scan in scans}) for role, scans in own.items()},
        })  # fmt: skip
    return found


def write_seen(folder: Path, roles: dict[str, list[Scan]]) -> None:
    """The scans of these roles beside a fold's weights."""
    with replacing(folder / SEEN) as aside, open(aside, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(("scan_id", "database", "site", "role"))
        writer.writerows((scan.scan_id, scan.database, scan.site, role) for role in ROLES for scan in roles.get(role, []))


def _terms(database: Database) -> dict[str, Any]:
    """What the catalogue says now; ``licence_confirmed``: a document says so."""
    may = database.redistribute.weights if standing(database, None, "redistribute")[0] == "sourced" else None
    return {
        "name": database.name, "title": database.title, "licence": database.licence,
        "licence_confirmed": standing(database, None, "licence")[0] == "sourced", "weights_may_be_shared": may,
        "access": database.access, "citation": database.citation, "doi": database.doi,
    }  # fmt: skip


def lineage(provenance: dict[str, Any]) -> dict[str, Any]:
    """``databases``, as :func:`record` gives them, with the ``answer`` of each alone; the weights' own ``citation``; ``verdict`` of all together;
    ``notes`` on what is not known and what differs."""
    notes: list[str] = []
    released = provenance.get("licence") if isinstance(provenance.get("licence"), str) else None
    if isinstance(provenance.get("data"), dict):
        databases = [dict(entry) for entry in provenance["data"]["databases"]]
        verdicts = [_noted_and_today(entry, notes) for entry in databases]
    elif isinstance(provenance.get("trained_on"), list):
        names = sorted({str(site).split(".")[0] for site in provenance["trained_on"]})
        notes.append("made before weights noted their licences: these are today's, scans were not counted")
        databases = [_terms(find_database(name)) for name in names]
        verdicts = [_of(entry) for entry in databases]
    else:
        authors = provenance.get("source") == AUTHORS["source"]
        databases = [_terms(database) for database in catalogue().values() if authors and "LOD-Brain" in database.used_by]
        verdicts = [_of(entry) for entry in databases]
        if authors:
            notes.append(f"databases: the authors' corpus as the catalogue has it; by these alone: {in_words(strictest(verdicts))}")
        if provenance.get("anatomies"):
            notes.append(f"trained on {provenance.get('trained_on')}, {len(provenance['anatomies'])} of them: no scan, and so no scan's licence")
        if released:
            notes.append(f"the answer is that of the licence they were released under, {released}")
    for entry, verdict in zip(databases, verdicts, strict=True):
        entry["answer"] = in_words(verdict)
    whole = judge("these weights", released) if released and not isinstance(provenance.get("data"), dict) else strictest(verdicts)
    said = {"answer": whole.answer, "words": in_words(whole), "reasons": list(whole.reasons)}
    return {"databases": databases, "citation": provenance.get("citation"), "notes": notes, "verdict": said}


def _of(entry: dict[str, Any]) -> Verdict:
    return judge(entry["name"], entry["licence"], confirmed=entry["licence_confirmed"], weights=entry["weights_may_be_shared"])


def _noted_and_today(entry: dict[str, Any], notes: list[str]) -> Verdict:
    """Of the licence as it was noted, as it was accepted, and as the catalogue has it now, where these differ: the strictest."""
    verdicts, today = [_of(entry)], find_database(entry["name"])
    given = (entry.get("accepted") or {}).get("licence")
    if given and given not in (entry["licence"], "unknown"):
        notes.append(f"{entry['name']}: accepted as {given!r} on {entry['accepted']['date']}, in the catalogue {entry['licence']!r}")
        verdicts.append(judge(entry["name"], given))
    if today.known and _of(_terms(today)) != verdicts[0]:
        notes.append(f"{entry['name']}: {_said(entry)} when they were trained, {_said(_terms(today))} in today's catalogue")
        verdicts.append(_of(_terms(today)))
    if today.state == "withdrawn":
        verdicts.append(Verdict("not known", reasons=(f"{entry['name']}: withdrawn by its owners since",)))
    return strictest(verdicts)


def _said(entry: dict[str, Any]) -> str:
    may = {True: ", weights may be shared", False: ", weights may not be shared", None: ""}[entry["weights_may_be_shared"]]
    return f"{entry['licence'] or 'no licence'}{'' if entry['licence_confirmed'] or not entry['licence'] else ' (not confirmed)'}{may}"


def in_lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for people: a table of databases, what to cite, what is not known, the verdict with its reasons."""
    if found["databases"]:
        yield "database\ttraining\tvalidation\tlicence\tweights"
    for entry in found["databases"]:
        seen = [f"{entry['scans'][role]} scans of {entry['people'][role]} people" if "scans" in entry else "not noted" for role in ROLES]
        doubt = "" if entry["licence_confirmed"] or not entry["licence"] else " (not confirmed)"
        yield "\t".join([entry["name"], *seen, f"{entry['licence'] or 'not known'}{doubt}", entry["answer"]])
    if found["citation"]:
        yield f"cite\tthese weights: {found['citation']}"
    for entry in found["databases"]:
        cited = ", doi:".join(filter(None, (entry["citation"], entry["doi"])))
        yield f"cite\t{entry['name']}: {cited or 'no citation is known'}"
    for note in found["notes"]:
        yield f"note\t{note}"
    yield f"may they be shared?\t{found['verdict']['words']}"
    for reason in found["verdict"]["reasons"]:
        yield f"because\t{reason}"
    yield NO_ADVICE


def bibtex(found: dict[str, Any]) -> Iterator[str]:
    """An entry a database that has a citation; a comment for one that has none; the weights' own, where they were published."""
    if found["citation"]:
        yield _entry("weights", {"note": found["citation"]})
    for entry in found["databases"]:
        fields = {"title": entry["title"], "note": entry["citation"], "doi": entry["doi"]}
        yield _entry(entry["name"], fields) if entry["citation"] or entry["doi"] else f"% {entry['name']}: no citation is known"


def _entry(key: str, fields: dict[str, str | None]) -> str:
    written = {name: value if name == "doi" else re.sub(r"([&%])", r"\\\1", value) for name, value in fields.items() if value}
    return "\n".join([f"@misc{{{key},", *(f"  {name} = {{{value}}}," for name, value in written.items()), "}"])
