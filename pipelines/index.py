"""Stage *index*: BIDS databases → ``tables/scans.parquet``, a row a T1w: who, where, which scanner, which files, which bytes.

Conflicts with the catalogue (:mod:`pipelines.reconcile`) are listed in ``tables/conflicts.html`` and ``.tsv``, even if the run then fails because
no scan can be used.

Always runs and is cheap: hashes are cached by path, size and time, and the table is what every later stage depends on, so DVC never
hashes the raw data. A scan that cannot be used keeps its row, with the reason; what makes a whole database unusable stops the run.
"""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_registry.catalogue import find_database
from data_registry.catalogue_schema import NAME_PATTERN, Database
from data_registry.errors import InputError, run_stage
from data_registry.label_sources import find_labels
from data_registry.ledgers import WITHDRAWN, Withdrawn, owner, withdrawn
from data_registry.params import Index, load_params
from data_registry.people import merge_people, name_people, read_people
from data_registry.schema import write_table
from pipelines.bids_files import T1w, find_t1w
from pipelines.conflicts import CONFLICTS_TSV, write_conflicts
from pipelines.hashes import hash_files
from pipelines.participants import Participants
from pipelines.reconcile import Reconciliation
from pipelines.reconcile_scanners import merged

log = logging.getLogger("lodbrain.index")
SCANS_TABLE = Path("tables/scans.parquet")
MOST_NAMED = 20
"""Quarantined scans that are named on the terminal."""


def main() -> None:
    """Index the roots of ``params.yaml`` in the current folder."""
    params = load_params()
    people = [Path(table) for table in params.index.people]
    checks: list[Reconciliation] = []
    try:
        rows = index([Path(root) for root in params.index.roots], labels=labels_folder(params.index), people=people, checks=checks)
    finally:
        if checks and checks[-1].rows is not None:
            log.info(write_conflicts(checks))
    _tell_of_gone(rows)
    write_table(SCANS_TABLE, "scans", rows)
    usable = sum(row["reason"] is None for row in rows)
    log.info("%s: %d scans of %d sites, %d quarantined", SCANS_TABLE, len(rows), len({(r["database"], r["site"]) for r in rows}), len(rows) - usable)
    if not usable:
        raise InputError(f"{', '.join(params.index.roots)}: none of the {len(rows)} scans can be used; {SCANS_TABLE} has the reasons")


def labels_folder(settings: Index) -> Path | None:
    """``index.labels``, absolute."""
    return Path(settings.labels).absolute() if settings.labels else None


def index(
    roots: list[Path], *, labels: Path | None = None, people: list[Path] | None = None, checks: list[Reconciliation] | None = None
) -> list[dict]:
    """Rows of the scans table for all databases below ``roots``, sorted by ``scan_id``; ``checks`` is filled, one a database.

    ``labels`` holds label maps by database, ``people`` are tables of who is known.

    Raises :class:`InputError` for a folder that is missing, for two databases of one name, and, with all of them named and the ``checks`` of
    the others done but for their files' bytes, for databases without a T1w or without the declared site column.
    """
    databases = find_databases(roots)
    _tell_of_others(roots)
    checks = [] if checks is None else checks
    rows, unusable = _not_withdrawn(databases, labels, checks)
    _tell_apart(rows)
    if not unusable:
        hash_files(rows, databases)
        rows = list(_without_bytes_of_withdrawn(rows))
        _tell_of_shared(_judge_same_content(rows), checks)
    name_people(rows, {name: find_database(name) for name in databases}, read_people(people or []))
    by_database = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["scan_id"]):
        by_database[row["database"]].append(row)
    for check in checks:
        check.finish(by_database[check.database.name])
    _tell_of_quarantine(rows)
    if unusable:
        raise InputError("; ".join(unusable))
    return sorted(rows, key=lambda row: row["scan_id"])


def _not_withdrawn(databases: dict[str, Path], labels: Path | None, checks: list[Reconciliation]) -> tuple[list[dict], list[str]]:
    """Rows of all databases without what ``withdrawn.tsv`` names, whose files are not read and which causes no conflict; and why some databases
    cannot be used."""
    gone, rows, unusable = withdrawn(), [], []
    left_out = [name for name in databases if gone.has(name)]
    for name, root in databases.items():
        if name not in left_out:
            try:
                rows += index_database(find_database(name), root, checks, labels=labels / name if labels else None, gone=gone)
            except InputError as error:
                unusable.append(str(error))
            except OSError as error:
                checks[:] = [check for check in checks if check.database.name != name]
                unusable.append(f"{error.filename}: {error.strerror}; a readable folder is wanted")
    scans = sum(check.withdrawn for check in checks)
    if left_out or scans:
        log.info("%s: %d databases%s and %d other scans are withdrawn and left out", WITHDRAWN, len(left_out),
                 f" ({', '.join(left_out)})" * bool(left_out), scans)  # fmt: skip
    return rows, unusable


def _without_bytes_of_withdrawn(rows: list[dict]) -> Iterator[dict]:
    """The rows, but for scans of whoever was withdrawn that came back below another name."""
    gone = withdrawn()
    for row in rows:
        if (stone := gone.whose(row["t1w_sha256"])) is None:
            yield row
        else:
            log.warning("%s: left out, its T1w is one of sub-%s of %s, withdrawn %s", row["scan_id"], stone.subject, stone.database, stone.date)


def _tell_of_others(roots: list[Path]) -> None:
    for root in roots:
        for path in sorted(root.iterdir()) if not _is_database(root) else ():
            if (path.is_dir() or path.is_symlink()) and not path.name.startswith(".") and not _is_database(path):
                log.warning("%s: passed over, as it has neither dataset_description.json nor a folder sub-*", path)


def _tell_of_quarantine(rows: list[dict]) -> None:
    bad = [row for row in rows if row["reason"]]
    for row in bad[:MOST_NAMED]:
        log.warning("quarantined %s: %s", row["scan_id"], row["reason"])
    if len(bad) > MOST_NAMED:
        log.warning("quarantined: %d more, each with its reason in %s", len(bad) - MOST_NAMED, CONFLICTS_TSV)


def _tell_of_gone(rows: list[dict]) -> None:
    """Name what the last index had and this one has not, but for who was withdrawn: no table counts a scan that nobody expects."""
    try:
        before = pq.read_table(SCANS_TABLE)["scan_id"].to_pylist()
    except (OSError, pa.ArrowInvalid, KeyError):  # the first index, or one of another release
        return
    buried, by_database = withdrawn(), defaultdict(list)
    for name in sorted(set(before) - {row["scan_id"] for row in rows}):
        if not buried.has_scan(name):
            by_database[owner(name)[0]].append(name)
    for database, names in by_database.items():
        log.warning("%s: gone since the last index: %d scans, %s%s", database, len(names), ", ".join(names[:3]), " …" * (len(names) > 3))


def find_databases(roots: list[Path]) -> dict[str, Path]:
    """The databases below ``roots`` by name (their folders' names): a root is a BIDS database or a folder of them."""
    found: dict[str, Path] = {}
    if not roots:
        raise InputError("index.roots in params.yaml is empty; a BIDS database, or a folder of them, is wanted")
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; a BIDS database, or a folder of them, is wanted (index.roots in params.yaml)")
        inside = [root] if _is_database(root) else sorted(p for p in root.iterdir() if p.is_dir() and _is_database(p))
        if not inside:
            raise InputError(f"{root}: no BIDS database in it; a folder with sub-*/[ses-*/]anat/*_T1w.nii.gz, or a folder of such, is wanted")
        for path in inside:
            name = Path(os.path.abspath(path)).name  # a link's own name, not that of what it points to
            if not re.fullmatch(NAME_PATTERN, name):
                raise InputError(f"{path}: the folder's name becomes the database's; letters, digits, '-' and '_' are wanted (a link can rename it)")
            if name in found:
                raise InputError(f"{path}: a second database named {name}, beside {found[name]}; each folder needs a name of its own")
            found[name] = path
    return found


def _is_database(path: Path) -> bool:
    return (path / "dataset_description.json").is_file() or any(path.glob("sub-*"))


def index_database(
    database: Database, root: Path, checks: list[Reconciliation], *, labels: Path | None, gone: Withdrawn
) -> list[dict]:
    """Rows of one database, without hashes; its conflicts are added to ``checks``. ``labels``: a second root of its label maps; ``gone``: who
    was withdrawn, and is passed over."""
    files, without = find_t1w(root)
    if not files:
        raise InputError(f"{root}: no T1w in it; sub-*/[ses-*/]anat/*_T1w.nii.gz is wanted")
    if not database.known:
        log.info("%s is not in the catalogue: taken as one site, named after it", database.name)
    people = Participants(root, database)
    there = [t1w for t1w in files if not gone.has(database.name, t1w.subject)]
    without = {folder: why for folder, why in without.items() if not gone.has(database.name, folder.removeprefix("sub-"))}
    known = {subject: rows for subject, rows in people.rows.items() if not gone.has(database.name, subject)}
    check = Reconciliation(database, root, people.header, known, without=without, withdrawn=len(files) - len(there))
    checks.append(check)
    rows, given = [], set()
    for t1w in there:
        subject, session, name = t1w.subject, t1w.session, scan_name(t1w.path)
        sidecars, reason = check.sidecars(t1w)
        site, site_reason = people.site(subject, merged(sidecars))
        place = database.sites.get(site)
        row = {
            "scan_id": f"{database.name}_{name}",
            "database": database.name, "site": site, "place": place.place if place else site,
            "scanner": (place.scanner if place else None) or f"{database.name}.{site}",
            "subject": subject, "session": session, "person": f"{database.name}/{subject}", "family": people.family(subject),
            "t1w_path": t1w.path, "t1w_sha256": None, "labels": [],
            "reason": site_reason or reason or _misplaced(t1w),
        }  # fmt: skip
        row |= check.facts(row, sidecars)
        for base in (root, labels) if labels else (root,):
            for source, file in find_labels(base, subject, session, scan=name).items():
                if file in given:  # one label map fits one T1w: by the next, in this session or another, the head has moved
                    check.given_label(row, source)
                elif source not in {label["source"] for label in row["labels"]}:
                    given.add(file)
                    row["labels"].append({"source": source, "path": str(file.relative_to(base) if base is root else file), "sha256": None})
        rows.append(row)
    return rows


def scan_name(path: str) -> str:
    """What a T1w is called without its suffixes.

    >>> scan_name("sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w.nii.gz")
    'sub-01_ses-2_run-1'
    """
    return Path(path).name.split(".")[0].removesuffix("_T1w")


def _misplaced(t1w: T1w) -> str | None:
    """Why a T1w is quarantined if its name and its folders disagree on the subject or session; else None."""
    folders = t1w.path.split("/")[:-1]
    told = {"sub": t1w.subject, "ses": t1w.session}
    for folder in folders:
        entity, _, value = folder.partition("-")
        if told.get(entity, "") not in ("", value):
            return f"{t1w.path}: its name says {entity}-{told[entity]}, its folder {folder}; one of the two is wanted"
    return None


def _tell_apart(rows: list[dict]) -> None:
    """Quarantine two files that give one ``scan_id`` (``.nii`` beside ``.nii.gz``), as nobody knows which is meant."""
    first: dict[str, dict] = {}
    for row in rows:
        other = first.setdefault(row["scan_id"], row)
        if other is not row:
            row["scan_id"] = f"{row['scan_id']}@{row['t1w_path']}"
            row["reason"] = row["reason"] or f"{row['t1w_path']}: names the same scan as {other['t1w_path']}; one file for one scan is wanted"
            other["reason"] = other["reason"] or f"{other['t1w_path']}: names the same scan as {row['t1w_path']}; one file for one scan is wanted"


def _judge_same_content(rows: list[dict]) -> list[list[dict]]:
    """Files with the same bytes: within a database nobody knows whose they are, so all are quarantined; across databases they are one person's.
    Returns the scans of each file that several databases have."""
    by_content = defaultdict(list)
    for row in rows:
        if row["t1w_sha256"]:
            by_content[row["t1w_sha256"]].append(row)
    shared = []
    for same in by_content.values():
        if len(same) < 2:
            continue
        count = Counter(row["database"] for row in same)
        for row in same:
            if count[row["database"]] > 1:
                others = ", ".join([other["scan_id"] for other in same[:4] if other is not row][:3]) + (" …" if len(same) > 4 else "")
                row["reason"] = row["reason"] or f"{row['t1w_path']}: the same bytes as {others}; one file for one scan is wanted"
        if len(count) > 1:
            shared.append(same)
    merge_people(rows, [{row["person"] for row in same} for same in shared])
    return shared


def _tell_of_shared(shared: list[list[dict]], checks: list[Reconciliation]) -> None:
    of = {check.database.name: check for check in checks}
    for same in shared:
        for row in same:
            of[row["database"]].same_file(row, [other["scan_id"] for other in same if other["database"] != row["database"]])
    if shared:
        together = Counter(" and ".join(sorted({row["database"] for row in same})) for same in shared)
        for names, files in sorted(together.items()):
            log.warning("%d files lie in %s alike, and each is taken for one person's", files, names)


if __name__ == "__main__":
    run_stage(main, about=__doc__)
