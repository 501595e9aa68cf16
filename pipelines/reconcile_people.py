"""Ages and sexes from ``participants.tsv``, by the units and codes that ``participants.json`` or the catalogue declares."""

import functools
import re

from data_registry.readings import age_unit, is_empty, read_age, read_sex, sex_codes
from pipelines.notes import Notes

AGE_COLUMNS = ("age", "age_years", "age_in_years", "age_at_scan")
SEX_COLUMNS = ("sex", "gender")
SITE_COLUMNS = ("site", "site_id", "center", "centre", "center_id", "institution", "institution_id", "hospital")
YEARS_OF_RANGE = 1.0
"""Ages may lie this far outside a site's range, as published ranges are rounded."""


class People:
    """One database's subjects; conflicts go to ``notes``."""

    def __init__(self, header: list[str], participants: dict[str, list[dict]], notes: Notes) -> None:
        self.header, self.participants, self.notes, self.database = header, participants, notes, notes.database
        self._described = notes.json("participants.json") if header else {}
        self._age, self._sex = self._columns(AGE_COLUMNS), self._columns(SEX_COLUMNS)
        self._known: dict[tuple[str, str], dict] = {}
        if header:
            self._check_columns()
            self._check_rows()
        else:
            found = "nothing in it" if (notes.root / "participants.tsv").exists() else "no table"
            notes.add("missing table", "participants.tsv", expected="a row a subject", found=found, done="ages and sexes are null")

    def facts(self, row: dict) -> dict:
        """``age_years`` and ``sex`` of a scan's subject at its session; null where the table does not state them plainly."""
        key = (row["subject"], row["session"])
        if key not in self._known:
            self._known[key] = self._read(row)
        return self._known[key]

    def _columns(self, names: tuple[str, ...]) -> list[str]:
        """The columns with these names, in the order of ``names``."""
        return sorted((column for column in self.header if _plain(column) in names), key=lambda column: (names.index(_plain(column)), column))

    def _check_columns(self) -> None:
        about = {"file": "participants.tsv"}
        if "participant_id" not in self.header:
            self.notes.add("missing column", "participant_id", found=", ".join(self.header), done="no row is read", **about)
        for field, columns, names, hint in (("age_years", self._age, AGE_COLUMNS, "age|birth"), ("sex", self._sex, SEX_COLUMNS, "sex|gender")):
            if not columns:
                alike = [column for column in self.header if re.search(hint, column, re.IGNORECASE)]
                found = f"only {', '.join(alike)}" if alike else ", ".join(self.header)
                done = "null, but for sessions with a column as age_ses-1" if field == "age_years" else "null"
                self.notes.add("missing column", field, expected=" or ".join(names), found=found, done=done, **about)
            elif columns[0].strip().casefold() not in ("age", "sex", "gender"):
                self.notes.add("column taken", field, expected=names[0], found=columns[0], done="read", **about)
        family = self.database.family_column
        if family and family.lower() not in map(str.lower, self.header):
            done = "null: the split cannot keep relatives apart"
            self.notes.add("missing column", "family", expected=family, found=", ".join(self.header), done=done, **about)
        site = self.database.site_rule.single
        for column in self.header if site else ():
            values = sorted({row[column] for rows in self.participants.values() for row in rows if not is_empty(row.get(column))})
            if _plain(column) in SITE_COLUMNS and len(values) > 1:
                found = f"{len(values)} values: {', '.join(values[:5])}{' …' if len(values) > 5 else ''}"
                done = f"all stay one site; site_rule: {{participants: {column}}} would part them"
                self.notes.add("mixed sites", column, site=site, expected="one site, as the rule says", found=found, done=done, **about)

    def _check_rows(self) -> None:
        about = {"file": "participants.tsv"}
        for subject, rows in self.participants.items():
            for row in rows:
                if None in row or None in row.values():
                    found = "more cells" if None in row else "fewer cells"
                    wanted = {"expected": f"{len(self.header)} cells", "done": "cells are read from the left"}
                    self.notes.add("uneven row", "participants.tsv", subject=subject, found=found, **wanted, **about)
        if "" in self.participants and "participant_id" in self.header:
            found = f"{len(self.participants[''])} rows without it"
            self.notes.add("uneven row", "participant_id", expected="sub-<label>", found=found, done="passed over", **about)

    def _read(self, scan: dict) -> dict:
        subject, session = scan["subject"], scan["session"]
        rows = self.participants.get(subject, [])
        about = {"site": scan["site"], "scan": scan["scan_id"], "subject": subject, "file": "participants.tsv"}
        if not rows:
            if self.header:
                self.notes.add("missing row", "participants.tsv", expected="a row a subject", found="no row", done="age and sex are null", **about)
            return {"age_years": None, "sex": None}
        rows = [row for row in rows if session and (row.get("session_id") or "").removeprefix("ses-") == session] or rows
        pattern = rf"age_ses[-_]?{re.escape(session)}"
        of_session = [column for column in self.header if session and re.fullmatch(pattern, _plain(column), re.IGNORECASE)]
        if of_session:
            done = f"read for session {session}"
            self.notes.add("column taken", "age_years", found=of_session[0], done=done, together=True, **about | {"site": None})
        age_column, age = self._written("age_years", of_session or self._age, rows, about)
        sex_column, sex = self._written("sex", self._sex, rows, about)
        return {
            "age_years": self._age_of(age, self._about_column(age_column), about) if age_column else None,
            "sex": self._sex_of(sex, self._about_column(sex_column), about) if sex_column else None,
        }

    def _written(self, field: str, columns: list[str], rows: list[dict], about: dict) -> tuple[str | None, str | None]:
        """The column that states the field, and its text there; (None, None) if columns or rows disagree."""
        said = [(column, row[column].strip()) for column in columns for row in rows if not is_empty(row.get(column))]
        read = read_age if field == "age_years" else functools.partial(read_sex, codes={})
        if len({read(text).value or text.casefold() for _, text in said}) > 1:  # 30 is 30.0, M is male
            found = ", ".join(dict.fromkeys(f"{column} {text}" for column, text in said))
            self.notes.add("contradicting rows", field, expected="one value", found=found, done="null", **about)
            return None, None
        return said[0] if said else (columns[0], rows[0].get(columns[0])) if columns else (None, None)

    def _about_column(self, column: str) -> dict:
        found = next((self._described[key] for key in self._described if key.strip().casefold() == column.strip().casefold()), {})
        return found if isinstance(found, dict) else {}

    def _age_of(self, written: str | None, column: dict, about: dict) -> float | None:
        declared = column.get("Units")
        unit = age_unit(declared)
        if unit is None and not is_empty(declared):
            wanted = {"expected": "years, months, weeks or days", "done": "taken as years"}
            self.notes.add("unit", "age_years", found=declared, together=True, **wanted, **about | {"site": None, "file": "participants.json"})
        reading = read_age(written, unit or "year")
        if reading.kind == "unit" and not written.strip()[-1].isalpha():  # of the whole column, as its description declares; 006M has its own
            whole = {"site": None, "file": "participants.json"}
            self.notes.add("unit", "age_years", expected="years", found=declared, done=f"{unit}s made years", together=True, **about | whole)
        elif reading.kind:
            self.notes.add(reading.kind, "age_years", expected="years", found=written, done=reading.done, **about)
        site = self.database.sites.get(about["site"])
        published = (site and site.age_years) or self.database.age_years
        if reading.value is not None and published:
            low, high = published.min, published.max
            if (low is not None and reading.value < low - YEARS_OF_RANGE) or (high is not None and reading.value > high + YEARS_OF_RANGE):
                expected = " to ".join("?" if end is None else f"{end:g}" for end in (low, high))
                self.notes.add("age out of range", "age_years", expected=expected, found=f"{reading.value:g}", done="kept", **about)
        return reading.value

    def _sex_of(self, written: str | None, column: dict, about: dict) -> str | None:
        reading = read_sex(written, sex_codes(column.get("Levels")) | self.database.sex_codes)
        if reading.kind == "spelling":
            self.notes.add("spelling", "sex", found=written, done=reading.done, together=True, **about | {"site": None})
        elif reading.kind:
            self.notes.add(reading.kind, "sex", expected="F or M", found=written, done=reading.done, **about)
        return reading.value


def _plain(column: str) -> str:
    """``" Age (5-year bins)"`` → ``"age"``."""
    return re.sub(r"\W+", "_", re.split(r"[(\[]", column)[0].strip().casefold()).strip("_")
