"""Which files of a route are a database's T1w and labels, and where each stands below its folder; nothing else is fetched.

A route is a BIDS database, or a folder of them, one a site, as FCP-INDI's releases are. Those become one database: ``sub-*`` stand side by
side, a site's inherited sidecar goes into each of its subjects' folders, and its participants.tsv below ``sourcedata/<folder>/``, from where
:func:`join_participants` makes one table with the site as a column.
"""

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from data_registry.catalogue import Database
from data_registry.errors import InputError
from data_registry.files import replacing
from data_registry.label_sources import LABEL_GLOBS
from pipelines.fetch_routes import Entry, Route, safe

ABOUT = ("participants.tsv", "participants.json", "dataset_description.json", "README*", "LICENSE*", "LICENCE*", "CHANGES*")
INHERITED = ("T1w.json", "*_T1w.json")
IMAGES = tuple(
    f"sub-*/{between}{name}"
    for between in ("", "ses-*/")
    for name in ("*_T1w.json", "anat/sub-*_T1w.json", "anat/sub-*_T1w.nii", "anat/sub-*_T1w.nii.gz")
)
SITE_TABLES = "sourcedata"


@dataclass(frozen=True)
class File:
    """A file that is wanted."""

    entry: Entry
    path: str
    """Below the database's folder."""


@dataclass(frozen=True)
class Part:
    """A BIDS database on a route: the route itself, or one site's folder of it."""

    folder: str
    site: str | None
    """As the catalogue names it; None where the folder says nothing of the site."""
    top: tuple[Entry, ...]

    @property
    def subjects(self) -> list[str]:
        """Labels, without ``sub-``."""
        return [_subject(_name(entry)) for entry in self.top if entry.is_folder and _name(entry).startswith("sub-")]


def find_parts(route: Route, database: Database, pool: Executor) -> list[Part]:
    """The route as one BIDS database or as one a site; an :class:`InputError` if it is neither."""
    top = tuple(route.ls(""))
    whole = Part("", None, top)
    if whole.subjects:
        return [whole]
    folders = [entry.path for entry in top if entry.is_folder and safe(entry.path)]
    parts = [Part(folder, _site(folder, database), tuple(there)) for folder, there in zip(folders, pool.map(route.ls, folders), strict=True)]
    parts = [part for part in parts if part.subjects]
    if database.site_rule.participants and any(part.site in database.sites for part in parts):
        return parts
    held = f"it has {', '.join(folders[:8])}{' …' * (len(folders) > 8)}" if folders else "nothing can be listed there"
    within = f"; {', '.join(part.folder for part in parts[:8])} have some: choose one with --route" if parts else ""
    raise InputError(f"{route.address}: no sub-* in it, {held}{within}; the folder of a BIDS database, or of one a site of it, is wanted")


def _site(folder: str, database: Database) -> str:
    """``Site-RU`` is RU, ``Caltech`` is CALTECH; a name that the catalogue has not stays as it came."""
    bare = folder.casefold().removeprefix("site-")
    return next((site for site in database.sites if site.casefold() in (folder.casefold(), bare)), folder)


def choose_subjects(
    route: Route, database: Database, parts: list[Part], *, sites: Collection[str], subjects: Collection[str], withdrawn: Collection[str]
) -> list[list[str]]:
    """For each part the subjects that are wanted: all, or those of the sites and of the names given, without those withdrawn.

    An :class:`InputError` names a site or subject that there is not, and a rule that tells no sites before the scans are here.
    """
    unknown = sorted(set(sites) - set(database.sites))
    if unknown:
        raise InputError(f"--site {unknown[0]}: {database.name} has no such site; one of {', '.join(database.sites)} is wanted")
    there = {subject for part in parts for subject in part.subjects}
    missing = sorted({subject.removeprefix("sub-") for subject in subjects} - there)
    if missing:
        raise InputError(f"--subject {missing[0]}: is not among the {len(there)} at {route.address}; one as {min(there)} is wanted")
    wanted = {subject.removeprefix("sub-") for subject in subjects} or there
    chosen, owner = [], {}
    for part in parts:
        for subject in part.subjects:
            if owner.setdefault(subject, part.folder) != part.folder:
                raise InputError(f"{route.address}: sub-{subject} stands in {owner[subject]} and in {part.folder}; choose one with --route")
        of_sites = _of_sites(route, database, part, sites) if sites else part.subjects
        chosen.append(sorted((wanted & set(of_sites)) - set(withdrawn)))
    return chosen


def _of_sites(route: Route, database: Database, part: Part, sites: Collection[str]) -> set[str]:
    rule = database.site_rule
    if rule.sidecar:
        raise InputError(f"--site: {database.name} tells a site from {rule.sidecar!r} of the sidecar, so after fetching; --subject is wanted")
    if rule.single:
        return set(part.subjects)
    if rule.prefix:
        return {subject for subject in part.subjects if (match := re.match(rule.prefix, subject)) and match.group(1) in sites}
    table = next((entry for entry in part.top if _name(entry) == "participants.tsv"), None)
    rows = _rows(b"".join(route.read(table, 0)), f"{route.address}/{table.path}") if table else []
    told = {_subject(row.get("participant_id") or ""): row[rule.participants] for row in rows if row.get(rule.participants) not in (None, "", "n/a")}
    if not told and part.site is None:
        column = f"column {rule.participants!r} of participants.tsv"
        raise InputError(f"--site: {database.name} takes its sites from {column}, which is not at {route.address}; --subject is wanted")
    return {subject for subject in part.subjects if told.get(subject, part.site) in sites}


def find_files(route: Route, parts: list[Part], chosen: list[list[str]], pool: Executor, *, labels: bool) -> list[File]:
    """The files that are wanted of these subjects, with what describes the database; sorted by path."""
    files = []
    for part, subjects in zip(parts, chosen, strict=True):
        if not subjects:
            continue
        top = [entry for entry in part.top if not entry.is_folder]
        about = [entry for entry in top if _fits(_name(entry), ABOUT)]
        inherited = [entry for entry in top if _fits(_name(entry), INHERITED)]
        own = [File(entry, _below(part, entry)) for entry in _walk(route, part, IMAGES + LABEL_GLOBS * labels, frozenset(subjects), pool)]
        if part.folder:
            files += [File(entry, f"{SITE_TABLES}/{entry.path}") for entry in about]
            imaged = sorted({file.path.split("/")[0] for file in own if file.path.startswith("sub-")})
            files += [File(entry, f"{subject}/{subject}_{_name(entry)}") for entry in inherited for subject in imaged]
        else:
            files += [File(entry, entry.path) for entry in about + inherited]
        files += own
    return sorted(files, key=lambda file: file.path)


def _walk(route: Route, part: Part, patterns: Sequence[str], subjects: frozenset[str], pool: Executor) -> list[Entry]:
    """Files below a part that fit, of these subjects; only folders that lead to some are listed."""
    found, level = [], [(entry, {tuple(pattern.split("/")) for pattern in patterns}) for entry in part.top]
    while level:
        folders = []
        for entry, fitting in level:
            name = _name(entry)
            rest = {pattern[1:] for pattern in fitting if fnmatchcase(name, pattern[0])} if safe(entry.path) else set()
            if not entry.is_folder and () in rest:
                found.append(entry)
            elif entry.is_folder and rest - {()} and not (name.startswith("sub-") and _subject(name) not in subjects):
                folders.append((entry.path, rest - {()}))
        listed = pool.map(route.ls, [path for path, _ in folders])
        level = [(entry, rest) for (_, rest), there in zip(folders, listed, strict=True) for entry in there]
    return found


def join_participants(root: Path, database: Database, parts: Iterable[Part]) -> None:
    """Write participants.tsv of the parts' tables, with the column that the site rule reads: as a table has it, else the folder's site."""
    column, joined, header = database.site_rule.participants, {}, {"participant_id": None, database.site_rule.participants: None}
    for part in parts:
        table = root / SITE_TABLES / part.folder / "participants.tsv"
        rows = _rows(table.read_bytes(), str(table)) if table.is_file() else []
        told = {_subject(row["participant_id"]): row for row in rows if row.get("participant_id")}
        for subject in part.subjects:
            row = told.get(subject, {}) | {"participant_id": f"sub-{subject}"}
            header |= dict.fromkeys(row)
            joined[subject] = row | {column: part.site if row.get(column) in (None, "", "n/a") else row[column]}
    with replacing(root / "participants.tsv") as aside, open(aside, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(header), restval="n/a", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(joined[subject] for subject in sorted(joined))


def _rows(content: bytes, where: str) -> list[dict]:
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: cannot be read ({error}); a table in UTF-8 with tabs is wanted") from None
    return [{key: value for key, value in row.items() if key is not None} for row in rows]


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _name(entry: Entry) -> str:
    return entry.path.rsplit("/", 1)[-1]


def _below(part: Part, entry: Entry) -> str:
    return entry.path.removeprefix(f"{part.folder}/") if part.folder else entry.path


def _subject(name: str) -> str:
    """Of a folder's name: ``sub-01_ses-2``, as FreeSurfer's may be, or fsl_anat's ``sub-01.anat``, is 01."""
    return name.removeprefix("sub-").removesuffix(".anat").split("_")[0]
