"""The conflicts of one database as they are found: rows of :data:`data_registry.schema.CONFLICTS`."""

from pathlib import Path

from data_registry.catalogue_schema import Database
from pipelines.bids_files import read_object


class Notes:
    """Collects conflicts of one database; the rows stand in ``rows`` in the order in which they came."""

    def __init__(self, database: Database, root: Path) -> None:
        self.database, self.root, self.rows = database, root, []
        self._read: dict[str, dict] = {}
        self._together: dict[tuple, dict] = {}

    def add(self, kind: str, field: str, *, done: str, together: bool = False, **about: object) -> None:
        """Add a conflict; with ``together``, scans with the same conflict share a row, which names the first of them."""
        row = {"database": self.database.name, "kind": kind, "field": field, "done": done, "scans": int("scan" in about), "file": None, **about}
        if together:
            key = (kind, field, done, *(str(about.get(part)) for part in ("site", "expected", "found")))
            first = self._together.setdefault(key, row)
            if first is not row:
                first["scans"] += 1
                return
        self.rows.append(row)

    def json(self, name: str) -> dict:
        """A description, by its path below the database's root; empty if there is none, or, with a conflict, if it cannot be read."""
        if name not in self._read:
            self._read[name] = {}
            try:
                if (self.root / name).is_file():
                    self._read[name] = read_object(self.root / name)
            except (OSError, ValueError) as error:
                self.add("unreadable file", name, expected="JSON", found=error, done="passed over", file=name)
        return self._read[name]
