"""Stage *index*: BIDS databases → ``tables/scans.parquet``, a row a T1w: who, where, which scanner, which files, which bytes.

What is read against the catalogue (:mod:`pipelines.reconcile`) stands in ``tables/conflicts.html`` and ``.tsv``, also of a run that stops for
want of a single usable scan.

Always runs and is cheap: hashes are cached by path, size and time, and the table is what every later stage depends on, so DVC never
hashes the raw data. A scan that cannot be used keeps its row, with the reason; what makes a whole database unusable stops the run.
"""

import csv
import json
import logging
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from data_registry.catalogue import NAME_PATTERN, Database, find_database
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing, sha256
from data_registry.label_sources import find_labels
from data_registry.ledgers import WITHDRAWN, Withdrawn, withdrawn
from data_registry.params import Index, load_params
from data_registry.people import merge_people, name_people, read_people
from data_registry.schema import write_table
from pipelines.conflicts import write_conflicts
from pipelines.reconcile import Reconciliation

log = logging.getLogger("lodbrain.index")
HASH_CACHE = Path("cache/hashes.parquet")
SCANS_TABLE = Path("tables/scans.parquet")


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
    write_table(SCANS_TABLE, "scans", rows)
    usable = sum(row["reason"] is None for row in rows)
    log.info("%s: %d scans of %d sites, %d quarantined", SCANS_TABLE, len(rows), len({(r["database"], r["site"]) for r in rows}), len(rows) - usable)


def labels_folder(settings: Index) -> Path | None:
    """``index.labels``, absolute."""
    return Path(settings.labels).absolute() if settings.labels else None


def index(
    roots: list[Path], *, labels: Path | None = None, people: list[Path] | None = None, checks: list[Reconciliation] | None = None
) -> list[dict]:
    """Rows of the scans table for all databases below ``roots``, sorted by ``scan_id``; ``checks`` is filled, one a database.

    ``labels`` holds label maps by database, ``people`` are tables of who is known.

    Raises :class:`InputError` for a folder that is missing or holds no T1w, for two databases of one name, and for a declared site
    column that a database lacks.
    """
    databases = find_databases(roots)
    checks = [] if checks is None else checks
    rows = _not_withdrawn(databases, labels, checks)
    _tell_apart(rows)
    _hash_files(rows, databases)
    _judge_same_content(rows)
    name_people(rows, {name: find_database(name) for name in databases}, read_people(people or []))
    by_database = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["scan_id"]):
        by_database[row["database"]].append(row)
    for check in checks:
        check.finish(by_database[check.database.name])
    for row in rows:
        if row["reason"]:
            log.warning("quarantined %s: %s", row["scan_id"], row["reason"])
    if not any(row["reason"] is None for row in rows):
        raise InputError(f"{', '.join(map(str, roots))}: none of the {len(rows)} scans can be used; the reasons stand above")
    return sorted(rows, key=lambda row: row["scan_id"])


def _not_withdrawn(databases: dict[str, Path], labels: Path | None, checks: list[Reconciliation]) -> list[dict]:
    """Rows of all databases, but of whom and what ``withdrawn.tsv`` names, whose files are not read and who are in no conflict."""
    gone, rows = withdrawn(), []
    left_out = [name for name in databases if gone.has(name)]
    for name, root in databases.items():
        if name not in left_out:
            rows += index_database(find_database(name), root, checks, labels=labels / name if labels else None, gone=gone)
    scans = sum(check.withdrawn for check in checks)
    if left_out or scans:
        log.info("%s: %d databases%s and %d other scans are withdrawn and left out", WITHDRAWN, len(left_out),
                 f" ({', '.join(left_out)})" * bool(left_out), scans)  # fmt: skip
    return rows


def find_databases(roots: list[Path]) -> dict[str, Path]:
    """The databases below ``roots`` by name (their folders' names): a root is a BIDS database or a folder of them."""
    found: dict[str, Path] = {}
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
    import bids2table  # 0.1 s, and its schema files: not for --help

    files = [entry for entry in bids2table.index_dataset(root).to_pylist() if entry["suffix"] == "T1w" and entry["ext"] in (".nii.gz", ".nii")]
    if not files:
        raise InputError(f"{root}: no T1w in it; sub-*/[ses-*/]anat/*_T1w.nii.gz is wanted")
    if not database.known:
        log.info("%s is not in the catalogue: taken as one site, named after it", database.name)
    people = _Participants(root, database)
    there = [entry for entry in files if not gone.has(database.name, entry["sub"])]
    known = {subject: rows for subject, rows in people.rows.items() if not gone.has(database.name, subject)}
    check = Reconciliation(database, root, people.header, known, withdrawn=len(files) - len(there))
    checks.append(check)
    rows, given = [], set()
    for entry in sorted(there, key=lambda entry: entry["path"]):
        subject, session, name = entry["sub"], entry["ses"] or "", scan_name(entry["path"])
        sidecar, reason = _sidecar(root / entry["path"])
        site, site_reason = people.site(subject, sidecar)
        place = database.sites.get(site)
        row = {
            "scan_id": f"{database.name}_{name}",
            "database": database.name, "site": site, "place": place.place if place else site,
            "scanner": (place.scanner if place else None) or f"{database.name}.{site}",
            "subject": subject, "session": session, "person": f"{database.name}/{subject}", "family": people.family(subject),
            "t1w_path": entry["path"], "t1w_sha256": None, "labels": [],
            "reason": site_reason or reason,
        }  # fmt: skip
        row |= check.facts(row, sidecar)
        for base in (root, labels) if labels else (root,):
            for source, file in find_labels(base, subject, session, scan=name).items():
                if file in given:  # one label map fits one T1w: by the next, in this session or another, the head has moved
                    log.info("%s: %s belongs to an earlier T1w of the subject", row["scan_id"], file)
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


class _Participants:
    """``participants.tsv`` of one database, and the site rule applied to it."""

    def __init__(self, root: Path, database: Database) -> None:
        self.database, self.path, self.rows = database, root / "participants.tsv", defaultdict(list)
        self.header: list[str] = []
        if self.path.is_file():
            try:
                with open(self.path, encoding="utf-8-sig", newline="") as handle:
                    reader = csv.DictReader(handle, delimiter="\t")
                    self.header = list(reader.fieldnames or [])
                    for row in reader:
                        self.rows[(row.get("participant_id") or "").removeprefix("sub-")].append(row)
            except (OSError, UnicodeError, csv.Error) as error:
                raise InputError(f"{self.path}: cannot be read ({error}); a table in UTF-8 with tabs is wanted") from None
        column = database.site_rule.participants
        if column and column not in self.header:
            raise InputError(
                f"{self.path}: database {database.name} takes its sites from column {column!r}, "
                f"{'which is missing; it has ' + ', '.join(self.header) if self.header else 'but there is no such file'}"
            )

    def site(self, subject: str, sidecar: dict) -> tuple[str, str | None]:
        """The site of a scan, and why it is quarantined if the rule gives none."""
        rule = self.database.site_rule
        if rule.participants:
            values = sorted({row[rule.participants] for row in self.rows.get(subject, []) if row[rule.participants] not in (None, "", "n/a")})
            where = f"column {rule.participants!r} of {self.path}"
            if len(values) > 1:
                return "unknown", f"sub-{subject} stands in two sites ({' and '.join(values)}) in {where}; one is wanted"
        elif rule.sidecar:
            values, where = [str(sidecar[rule.sidecar])] if sidecar.get(rule.sidecar) else [], f"field {rule.sidecar!r} of the sidecar"
        elif rule.prefix:
            match = re.match(rule.prefix, subject)
            values, where = [match.group(1)] if match else [], f"the label of sub-{subject} (rule {rule.prefix!r})"
        else:
            values, where = [str(rule.single)], "the catalogue"
        if not values:
            return "unknown", f"no site for sub-{subject} in {where}; a value is wanted"
        if values[0] not in self.database.sites:
            return values[0], f"site {values[0]!r} from {where} is not in the catalogue; one of {', '.join(self.database.sites)} is wanted"
        return values[0], None

    def family(self, subject: str) -> str | None:
        """What relatives share, by the first row that states it, else null."""
        column = (self.database.family_column or "").lower()
        stated = [(value or "").strip() for row in self.rows.get(subject, []) for key, value in row.items() if key and key.lower() == column]
        return next((f"{self.database.name}/{family}" for family in stated if family not in ("", "n/a")), None)


def _sidecar(path: Path) -> tuple[dict, str | None]:
    """A T1w's JSON metadata, BIDS's inheritance included, and why the scan is quarantined if its own sidecar cannot be read."""
    from bids2table import load_bids_metadata

    sidecar = path.with_name(path.name.split(".")[0] + ".json")
    try:
        if sidecar.is_file():
            json.loads(sidecar.read_text(encoding="utf-8"))  # bids2table passes over what it cannot read
        return load_bids_metadata(path), None
    except (OSError, ValueError) as error:
        return {}, f"{sidecar}: not valid JSON ({error}); a sidecar or none is wanted"


def _tell_apart(rows: list[dict]) -> None:
    """Two files that give one ``scan_id`` (``.nii`` beside ``.nii.gz``): which is meant is not known."""
    first: dict[str, dict] = {}
    for row in rows:
        other = first.setdefault(row["scan_id"], row)
        if other is not row:
            row["scan_id"] = f"{row['scan_id']}@{row['t1w_path']}"
            row["reason"] = row["reason"] or f"{row['t1w_path']}: names the same scan as {other['t1w_path']}; one file for one scan is wanted"
            other["reason"] = other["reason"] or f"{other['t1w_path']}: names the same scan as {row['t1w_path']}; one file for one scan is wanted"


def _hash_files(rows: list[dict], databases: dict[str, Path]) -> None:
    """Fill in the SHA-256 of every T1w and label map; a file that cannot be read quarantines its scan."""
    try:
        known = {(r["path"], r["bytes"], r["mtime_ns"]): r["sha256"] for r in pq.read_table(HASH_CACHE).to_pylist()}
    except (OSError, pa.ArrowInvalid):  # none yet, or damaged: it is a cache
        known = {}
    wanted = [(row, row, "t1w", row["t1w_path"]) for row in rows] + [(row, label, "", label["path"]) for row in rows for label in row["labels"]]

    def one(item: tuple) -> tuple | None:
        row, _, _, path = item
        file = (databases[row["database"]] / path).resolve()
        try:
            status = file.stat()
            if not status.st_size:  # all empty files have the same bytes
                return None, f"{databases[row['database']] / path}: an empty file; a volume is wanted"
            key = (str(file), status.st_size, status.st_mtime_ns)
            return key, known.get(key) or sha256(file)
        except OSError as error:
            return None, f"{databases[row['database']] / path}: {error.strerror}; a readable file is wanted"

    cache = {}
    with ThreadPoolExecutor(8) as pool:
        results = track(pool.map(one, wanted), "index: hashing", total=len(wanted), console=Console(stderr=True), transient=True)
        for (row, target, kind, _), (key, value) in zip(wanted, results, strict=True):
            if key is None:
                row["reason"] = row["reason"] or value
                continue
            target["t1w_sha256" if kind else "sha256"] = cache[key] = value
    table = pa.Table.from_pylist([{"path": p, "bytes": b, "mtime_ns": t, "sha256": h} for (p, b, t), h in sorted(cache.items())])
    with replacing(HASH_CACHE) as aside:
        pq.write_table(table, aside)


def _judge_same_content(rows: list[dict]) -> None:
    """The same bytes twice: in one database nobody knows whose they are, so both are quarantined; across databases it is one person."""
    by_content = defaultdict(list)
    for row in rows:
        if row["t1w_sha256"]:
            by_content[row["t1w_sha256"]].append(row)
    for same in by_content.values():
        if len(same) < 2:
            continue
        count = Counter(row["database"] for row in same)
        for row in same:
            if count[row["database"]] > 1:
                others = ", ".join([other["scan_id"] for other in same[:4] if other is not row][:3]) + (" …" if len(same) > 4 else "")
                row["reason"] = row["reason"] or f"{row['t1w_path']}: the same bytes as {others}; one file for one scan is wanted"
        if len(count) > 1:
            log.warning("%s: one file in %d databases, taken as one person", ", ".join(row["scan_id"] for row in same), len(count))
            merge_people(rows, [{row["person"] for row in same}])


if __name__ == "__main__":
    run_stage(main, about=__doc__)
