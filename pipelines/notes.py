"""The conflicts of one database as they are found: rows of :data:`data_registry.schema.CONFLICTS`."""

import json
from pathlib import Path

from data_registry.catalogue import Database


class Notes:
    """Collects conflicts of one database; the rows stand in ``rows`` in the order in which they came."""

    def __init__(self, database: Database, root: Path) -> None:
        self.database, self.root, self.rows = database, root, []
        self._together: dict[tuple, dict] = {}

    def add(self, kind: str, field: str, *, done: str, together: bool = False, **about: object) -> None:
        """A conflict; with ``together``, scans of which the same is to be said share a row, which names the first."""
        row = {"database": self.database.name, "kind": kind, "field": field, "done": done, "scans": int("scan" in about), "file": None, **about}
        if together:
            key = (kind, field, done, *(str(about.get(part)) for part in ("site", "expected", "found")))
            first = self._together.setdefault(key, row)
            if first is not row:
                first["scans"] += 1
                return
        self.rows.append(row)

    def json(self, name: str) -> dict:
        """A description at the database's root; empty if there is none, or, with a conflict, if it cannot be read."""
        path = self.root / name
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            self.add("unreadable file", name, expected="JSON", found=error, done="passed over", file=name)
            return {}
        return content if isinstance(content, dict) else {}
