"""Who was scanned where: ``participants.tsv``, and the catalogue's rule that gives a scan its site."""

import re
from collections import defaultdict
from pathlib import Path

from data_registry.catalogue_schema import Database
from data_registry.errors import InputError
from data_registry.tsv import read_tsv


class Participants:
    """``participants.tsv`` of one database, and the site rule applied to it; ``rows`` by subject, ``header`` empty without a table."""

    def __init__(self, root: Path, database: Database) -> None:
        self.database, self.path, self.rows = database, root / "participants.tsv", defaultdict(list)
        self.header: list[str] = []
        if self.path.is_file():
            self.header, rows = read_tsv(self.path)
            for row in rows:
                self.rows[(row.get("participant_id") or "").removeprefix("sub-")].append(row)
        column = database.site_rule.participants
        for needed in ("participant_id", column) if column else ():
            if needed not in self.header or f"{needed} (2)" in self.header:
                has = f"it has {', '.join(self.header)}" if self.header else "there is no such file, or nothing in it"
                rule = f"database {database.name} takes its sites from column {column!r}"
                raise InputError(f"{self.path}: {rule}; column {needed!r} is wanted once, {has}")

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
            return "unknown", f"no site in {where}; a value is wanted"
        if values[0] not in self.database.sites:
            return values[0], f"site {values[0]!r} from {where} is not in the catalogue; one of {', '.join(self.database.sites)} is wanted"
        return values[0], None

    def family(self, subject: str) -> str | None:
        """The name that relatives share, from the first row that states it; None if there is none."""
        column = (self.database.family_column or "").lower()
        stated = [(value or "").strip() for row in self.rows.get(subject, []) for key, value in row.items() if key and key.lower() == column]
        return next((f"{self.database.name}/{family}" for family in stated if family not in ("", "n/a")), None)
