"""Where weights come from, by their own record: the databases that trained and chose them, the citations, and whether they may be shared.

A training notes it in its weights (:mod:`lod_model.provenance`): licences as the catalogue had them then and as they were accepted. The
strictest of those and today's counts. No import here needs a training's libraries, so the small image has it too.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_registry.catalogue import catalogue, find_database
from data_registry.catalogue_schema import Database
from data_registry.catalogue_sources import standing, weights_may_be_shared
from data_registry.ledgers import WITHDRAWN, Withdrawn, owner, read_rows, withdrawn
from data_registry.licences import NO_ADVICE, Verdict, in_words, judge, strictest
from lod_model.weights import AUTHORS

ROLES = ("train", "val")
"""Both have seen the data: one gave the gradients, the other chose the checkpoint."""


def terms(database: Database) -> dict[str, Any]:
    """What the catalogue says now; ``licence_confirmed``: a document says so."""
    may, _ = weights_may_be_shared(database)
    return {
        "name": database.name, "title": database.title, "licence": database.licence,
        "licence_confirmed": standing(database, None, "licence")[0] == "sourced", "weights_may_be_shared": may,
        "access": database.access, "citation": database.citation, "doi": database.doi,
    }  # fmt: skip


def lineage(provenance: dict[str, Any], seen: Path = Path("seen.tsv")) -> dict[str, Any]:
    """``databases``, as a training notes them, with the ``answer`` of each alone; the weights' own ``citation``; ``verdict`` of all together;
    ``notes`` on what is not known and what differs. ``seen`` is the list of scans beside the weights, if they still lie where they were
    trained: with it people are told who were withdrawn from the project in the current folder, without it databases alone."""
    notes: list[str] = []
    released = provenance.get("licence") if isinstance(provenance.get("licence"), str) else None
    if isinstance(provenance.get("data"), dict):
        databases = [dict(entry) for entry in provenance["data"]["databases"]]
        verdicts = [_noted_and_today(entry, notes) for entry in databases]
    elif isinstance(provenance.get("trained_on"), list):
        names = sorted({str(site).split(".")[0] for site in provenance["trained_on"]})
        notes.append("made before weights noted their licences: these are today's, scans were not counted")
        databases = [terms(find_database(name)) for name in names]
        verdicts = [_of(entry) for entry in databases]
    else:
        authors = provenance.get("source") == AUTHORS["source"]
        databases = [terms(database) for database in catalogue().values() if authors and "LOD-Brain" in database.used_by]
        verdicts = [_of(entry) for entry in databases]
        if authors:
            notes.append(f"databases: the authors' corpus as the catalogue has it; by these alone: {in_words(strictest(verdicts))}")
        if provenance.get("anatomies"):
            notes.append(f"trained on {provenance.get('trained_on')}, {len(provenance['anatomies'])} of them: no scan, and so no scan's licence")
        if released:
            notes.append(f"the answer is that of the licence they were released under, {released}")
    gone = withdrawn()
    scans = [row["scan_id"] for row in read_rows(seen, ("scan_id",))]
    verdicts = [strictest([verdict, *_withdrawn(entry["name"], scans, gone)]) for entry, verdict in zip(databases, verdicts, strict=True)]
    for entry, verdict in zip(databases, verdicts, strict=True):
        entry["answer"] = in_words(verdict)
        _, source = weights_may_be_shared(find_database(entry["name"]))
        if (source or "").startswith("letter "):
            notes.append(f"{entry['name']}: on weights, {source}")
    whole = judge("these weights", released) if released and not isinstance(provenance.get("data"), dict) else strictest(verdicts)
    said = {"answer": whole.answer, "words": in_words(whole), "reasons": list(whole.reasons)}
    return {"databases": databases, "citation": provenance.get("citation"), "notes": notes, "verdict": said}


def _of(entry: dict[str, Any]) -> Verdict:
    return judge(entry["name"], entry["licence"], confirmed=entry["licence_confirmed"], weights=entry["weights_may_be_shared"])


def _noted_and_today(entry: dict[str, Any], notes: list[str]) -> Verdict:
    """The strictest verdict on the licence as noted, as accepted, and as in today's catalogue, where these differ.

    If the answer was not known then, and the licence is the same or was not confirmed, today's answer replaces it.
    """
    verdicts, today = [_of(entry)], find_database(entry["name"])
    given = (entry.get("accepted") or {}).get("licence")
    if given and given not in (entry["licence"], "unknown"):
        notes.append(f"{entry['name']}: accepted as {given!r} on {entry['accepted']['date']}, in the catalogue {entry['licence']!r}")
        verdicts.append(judge(entry["name"], given))
    now = terms(today)
    if today.known and _of(now) != verdicts[0]:
        notes.append(f"{entry['name']}: {_said(entry)} when they were trained, {_said(now)} in today's catalogue")
        if verdicts[0].answer == "not known" and (not entry["licence_confirmed"] or entry["licence"] == today.licence):
            verdicts.pop(0)
        verdicts.append(_of(now))
    if today.state == "withdrawn":
        verdicts.append(Verdict("not known", reasons=(f"{entry['name']}: withdrawn by its owners since",)))
    return strictest(verdicts)


def _withdrawn(name: str, scans: list[str], gone: Withdrawn) -> Iterator[Verdict]:
    """What this project has withdrawn of a database, of the ``scans`` that the weights saw."""
    people = {scan for scan in map(owner, scans) if scan[0] == name and gone.has(*scan)}
    if gone.has(name) or people:
        who = f"{len(people)} of its people" if people and not gone.has(name) else "it"
        yield Verdict("not known", reasons=(f"{name}: these weights saw {who}, withdrawn from this project, says {WITHDRAWN}",))


def _said(entry: dict[str, Any]) -> str:
    may = {True: ", weights may be shared", False: ", weights may not be shared", None: ""}[entry["weights_may_be_shared"]]
    return f"{entry['licence'] or 'no licence'}{'' if entry['licence_confirmed'] or not entry['licence'] else ' (not confirmed)'}{may}"


def in_lines(found: dict[str, Any]) -> Iterator[str]:
    """The same as text: a table of databases, what to cite, notes, the verdict with its reasons."""
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
