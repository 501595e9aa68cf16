"""What a project keeps beside ``params.yaml``, in git and for ever: which licences were accepted, and what was withdrawn.

``withdrawn.tsv`` holds tombstones, a line each: database, subject (empty: the whole database), date, reason, and the SHA-256 of a person's T1w,
by which they are known below other names too. No line is ever removed.
Every stage that reads scans consults it, so that withdrawn data do not come back with their files.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_registry.errors import InputError
from data_registry.files import replacing
from data_registry.tsv import read_tsv

LICENCES = Path("licences.tsv")
WITHDRAWN = Path("withdrawn.tsv")


class Tombstone(NamedTuple):
    """A person, or a database, that was withdrawn."""

    database: str
    subject: str
    """Without ``sub-``; empty: all of them."""
    date: str
    reason: str
    t1w_sha256: str = ""
    """Of each T1w that was known, with blanks between; empty for a whole database."""


class Withdrawn:
    """All that was withdrawn from a project."""

    def __init__(self, tombstones: Iterable[Tombstone] = ()) -> None:
        self.tombstones = list(tombstones)
        self._known = {(stone.database, stone.subject) for stone in self.tombstones}
        self._by_bytes = {digest: stone for stone in self.tombstones for digest in stone.t1w_sha256.split()}

    def has(self, database: str, subject: str = "") -> bool:
        """Whether this person, or the whole database, was withdrawn.

        >>> gone = Withdrawn([Tombstone("abide1", "0051456", "2026-01-31", "asked for it"), Tombstone("ixi", "", "2026-02-01", "")])
        >>> gone.has("abide1"), gone.has("abide1", "0051456"), gone.has("ixi", "IXI002Guys0828")
        (False, True, True)
        """
        return (database, "") in self._known or (database, subject) in self._known

    def has_scan(self, scan_id: str) -> bool:
        """The same of a scan by its name.

        >>> Withdrawn([Tombstone("db", "01", "", "")]).has_scan("db_sub-01_ses-2_run-1"), owner("db_sub-011")
        (True, ('db', '011'))
        """
        return self.has(*owner(scan_id))

    def whose(self, t1w_sha256: str | None) -> Tombstone | None:
        """The person whose T1w has these bytes, wherever it lies now."""
        return self._by_bytes.get(t1w_sha256)


def owner(scan_id: str) -> tuple[str, str]:
    """Database and subject of a scan, from ``<database>_sub-<label>[_…]``, the name that index gives it."""
    database, _, rest = scan_id.partition("_sub-")
    return database, rest.partition("@")[0].partition("_")[0]


def withdrawn(path: Path = WITHDRAWN) -> Withdrawn:
    """The tombstones of the project's file; none if there is no file. Raises :class:`InputError` for a file that cannot be read."""
    rows = read_rows(path, Tombstone._fields[:4], optional=Tombstone._fields[4:])
    for row in rows:
        if not row["database"]:
            raise InputError(f"{path}: a line without a database ({', '.join(filter(None, row.values())) or 'empty'}); its name is wanted")
    return Withdrawn(Tombstone(**row | {"subject": row["subject"].removeprefix("sub-")}) for row in rows)


def bury(tombstones: Iterable[Tombstone], path: Path = WITHDRAWN) -> list[Tombstone]:
    """Add the new ones to the file and return them; the lines that are already there stay, byte for byte."""
    known = {(stone.database, stone.subject) for stone in withdrawn(path).tombstones}
    new = [stone for stone in tombstones if (stone.database, stone.subject) not in known]
    if new:
        before = path.read_text(encoding="utf-8") if path.is_file() else "\t".join(Tombstone._fields) + "\n"
        columns, lines = before.lstrip("\ufeff").splitlines()[0].split("\t"), io.StringIO()
        cells = [[" ".join(getattr(stone, column, "").split()) for column in columns] for stone in new]
        csv.writer(lines, delimiter="\t", lineterminator="\n").writerows(cells)
        with replacing(path) as aside:
            aside.write_text(before + "\n" * (not before.endswith("\n")) + lines.getvalue(), encoding="utf-8")
    return new


def accepted_licences(path: Path = LICENCES) -> dict[str, dict[str, str]]:
    """database → {licence, date}, as last accepted in this project."""
    return {row["database"]: {"licence": row["licence"], "date": row["date"]} for row in read_rows(path, ("database", "licence", "date"))}


def read_rows(path: Path, columns: Sequence[str], *, optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a table with these columns, blanks stripped; no rows if there is no file. Raises :class:`InputError` for a missing column that is
    not ``optional``; one that is has empty cells."""
    if not path.exists():
        return []
    header, rows = read_tsv(path)
    if missing := [column for column in columns if column not in header]:
        raise InputError(f"{path}: column {missing[0]} is missing; {', '.join(columns)}, with tabs between, are wanted")
    return [{column: (row.get(column) or "").strip() for column in (*columns, *optional)} for row in rows]
