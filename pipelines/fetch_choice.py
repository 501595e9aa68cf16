"""Which files of a route are a database's T1w and labels, and where each stands below its folder; nothing else is fetched.

A route is a BIDS database, or a folder of them, one a site, as FCP-INDI's releases are. Those become one database: ``sub-*`` stand side by
side, a site's inherited sidecar goes into each of its subjects' folders, and its participants.tsv below ``sourcedata/<folder>/``, from where
:func:`join_participants` makes one table with the site as a column.
"""

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from data_registry.catalogue_schema import Database
from data_registry.errors import InputError
from data_registry.label_sources import FREESURFER_FILES, LABEL_GLOBS
from data_registry.tsv import write_tsv
from pipelines.fetch_joined import as_named_in
from pipelines.fetch_people import rows_by_subject, subject_of
from pipelines.fetch_routes import Entry, Route, safe

log = logging.getLogger("lodbrain.fetch")
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
        return [subject_of(_name(entry)) for entry in self.top if entry.is_folder and _name(entry).startswith("sub-")]

    @property
    def described(self) -> bool:
        """Whether it says of itself that it is a database."""
        return any(_name(entry) in ("dataset_description.json", "participants.tsv") for entry in self.top)


def find_parts(route: Route, database: Database, pool: Executor) -> list[Part]:
    """The route as one BIDS database or as one a site; an :class:`InputError` if it is neither."""
    top = tuple(route.ls(""))
    whole = Part("", None, top)
    if whole.subjects:
        return [whole]
    folders = [entry.path for entry in top if entry.is_folder and safe(entry.path)]
    parts = [Part(folder, _site(folder, database), tuple(there)) for folder, there in zip(folders, pool.map(route.ls, folders), strict=True)]
    parts = _without_seconds([part for part in parts if part.subjects])
    if database.site_rule.participants and any(part.site in database.sites for part in parts):
        return parts
    held = f"it has {', '.join(folders[:8])}{' …' * (len(folders) > 8)}" if folders else "nothing can be listed there"
    within = f"; {', '.join(part.folder for part in parts[:8])} have some: choose one with --route" if parts else ""
    raise InputError(f"{route.address}: no sub-* in it, {held}{within}; the folder of a BIDS database, or of one a site of it, is wanted")


def _without_seconds(parts: list[Part]) -> list[Part]:
    """Drop folders that are no database but hold people of one, such as ABIDE I's ``sidecards``, which has JSON files and no image."""
    held = {subject for part in parts if part.described for subject in part.subjects}
    seconds = [part for part in parts if not part.described and held & set(part.subjects)]
    if seconds:
        log.info("passed over, since its people stand in the other folders: %s", ", ".join(part.folder for part in seconds))
    return [part for part in parts if part not in seconds]


def _site(folder: str, database: Database) -> str:
    """``Site-RU`` is RU, ``Caltech`` is CALTECH, and what ``folders`` of a site lists is that site; any other name stays as it came."""
    names = {folder.casefold(), folder.casefold().removeprefix("site-")}
    return next((name for name, site in database.sites.items() if names & {one.casefold() for one in (name, *site.folders)}), folder)


def _site_of(part: Part, row: dict, database: Database) -> str | None:
    """The site of a subject: from its row, if the catalogue has that site or the folder implies none; else from the folder."""
    said = row.get(database.site_rule.participants)
    return said if said not in (None, "", "n/a") and (said in database.sites or part.site not in database.sites) else part.site


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
        like = min(there - set(withdrawn), default="none")
        raise InputError(f"--subject {missing[0]}: is not among the {len(there)} at {route.address}; one as {like} is wanted")
    wanted = {subject.removeprefix("sub-") for subject in subjects} or there
    chosen, owner = [], {}
    for part in parts:
        for subject in part.subjects:
            if owner.setdefault(subject, part.folder) != part.folder:
                raise InputError(f"{route.address}: sub-{subject} stands in {owner[subject]} and in {part.folder}; choose one with --route")
        of_sites = _of_sites(route, database, part, sites) if sites else part.subjects
        chosen.append(sorted((wanted & set(of_sites)) - set(withdrawn)))
    return chosen


def warn_of_sites(route: Route, database: Database, parts: list[Part]) -> None:
    """Warn before a long download that index will miss the column from which sites are read."""
    column = database.site_rule.participants
    if column and not parts[0].folder:
        table = next((entry for entry in parts[0].top if _name(entry) == "participants.tsv"), None)
        head = b"".join(route.read(table, 0)).decode("utf-8-sig", errors="replace").split("\n")[0].split("\t") if table else []
        if column not in [name.strip() for name in head]:
            log.warning("%s: participants.tsv has no column %r, from which %s takes sites; index will want it", route.address, column, database.name)


def _of_sites(route: Route, database: Database, part: Part, sites: Collection[str]) -> set[str]:
    rule = database.site_rule
    if rule.sidecar:
        raise InputError(f"--site: {database.name} tells a site from {rule.sidecar!r} of the sidecar, so after fetching; --subject is wanted")
    if rule.single:
        return set(part.subjects)
    if rule.prefix:
        return {subject for subject in part.subjects if (match := re.match(rule.prefix, subject)) and match.group(1) in sites}
    table = next((entry for entry in part.top if _name(entry) == "participants.tsv"), None)
    rows = _rows(part, b"".join(route.read(table, 0)), f"{route.address}/{table.path}") if table else {}
    told = {subject: _site_of(part, rows.get(subject, {}), database) for subject in part.subjects}
    if set(told.values()) <= {None}:
        column = f"column {rule.participants!r} of participants.tsv"
        raise InputError(f"--site: {database.name} takes its sites from {column}, which is not at {route.address}; --subject is wanted")
    return {subject for subject, site in told.items() if site in sites}


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


def find_freesurfer(route: Route, pattern: str, subjects: Collection[str], pool: Executor) -> list[File]:
    """Label maps of these subjects in a folder of FreeSurfer's; ``pattern`` matches a subject's folder there, and its first group the label."""
    owners: dict[str, str] = {}
    folders = [entry.path for entry in route.ls("") if entry.is_folder and safe(entry.path)]
    for folder in sorted(folders):
        match = re.fullmatch(pattern, folder)
        if match and match[1] in subjects and owners.setdefault(match[1], folder) != folder:
            raise InputError(f"{route.address}: {owners[match[1]]} and {folder} are both of sub-{match[1]}; one is wanted, or --no-labels")
    if not owners:
        none = f"none of its {len(folders)} folders is, by labels.subject {pattern!r}, of the {len(subjects)} subjects chosen"
        raise InputError(f"{route.address}: {none}; one is wanted, or --no-labels")
    names = {name for names in FREESURFER_FILES.values() for name in names}
    listed = pool.map(lambda folder: route.ls(f"{folder}/mri"), owners.values())
    return [
        File(entry, f"derivatives/freesurfer/sub-{subject}/mri/{_name(entry)}")
        for subject, there in zip(owners, listed, strict=True) for entry in there if _name(entry) in names and not entry.is_folder
    ]  # fmt: skip


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
            elif entry.is_folder and rest - {()} and not (name.startswith("sub-") and subject_of(name) not in subjects):
                folders.append((entry.path, rest - {()}))
        listed = pool.map(route.ls, [path for path, _ in folders])
        level = [(entry, rest) for (_, rest), there in zip(folders, listed, strict=True) for entry in there]
    return found


def join_participants(root: Path, database: Database, parts: Iterable[Part], withdrawn: Collection[str]) -> None:
    """Write participants.tsv of the parts' tables, without whom was withdrawn, with the column that the site rule reads: :func:`_site_of`."""
    column, joined, header = database.site_rule.participants, {}, {"participant_id": None, database.site_rule.participants: None}
    for part in parts:
        table = root / SITE_TABLES / part.folder / "participants.tsv"
        told = _rows(part, table.read_bytes(), str(table)) if table.is_file() else {}
        for subject in set(part.subjects) - set(withdrawn):
            row = told.get(subject, {}) | {"participant_id": f"sub-{subject}"}
            header |= dict.fromkeys(row)
            joined[subject] = row | {column: _site_of(part, row, database)}
    write_tsv(root / "participants.tsv", list(header), [joined[subject] for subject in sorted(joined)], missing="n/a")


def _rows(part: Part, content: bytes, where: str) -> dict[str, dict]:
    names = as_named_in(part.folder, part.subjects)
    return {names[name]: row for name, row in rows_by_subject(content, where, names).items()}


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _name(entry: Entry) -> str:
    return entry.path.rsplit("/", 1)[-1]


def _below(part: Part, entry: Entry) -> str:
    return entry.path.removeprefix(f"{part.folder}/") if part.folder else entry.path
