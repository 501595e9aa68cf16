"""One database read against the catalogue: values that were changed, dropped, preferred or missing, and counts that do not fit.

The index asks :class:`Reconciliation` for each scan's age, sex, maker, model and field strength; whatever is not simply what was
written leaves a conflict. Nothing is guessed: an unclear value is null.
"""

import os
from collections import Counter
from pathlib import Path

from data_registry.catalogue_schema import Database
from data_registry.readings import canonical_licence, is_empty
from pipelines.bids_files import T1w, read_object
from pipelines.notes import Notes
from pipelines.reconcile_people import People
from pipelines.reconcile_scanners import Scanners

SHARE_OF_COUNT = 0.02
"""Counts of scans and people may differ by this share of the expected count, rounded down; below 50 they must be equal."""


class Reconciliation:
    """What one database's files say, scan by scan; after :meth:`finish` all of ``conflicts`` and ``rows`` are there."""

    def __init__(
        self, database: Database, root: Path, header: list[str], participants: dict[str, list[dict]], *,
        without: dict[str, str] | None = None, withdrawn: int = 0,
    ) -> None:  # fmt: skip
        """``header`` and ``participants``, rows by subject, are those of participants.tsv, empty without one; ``without`` are the folders
        ``sub-*`` that give no scan, with the reason; so many scans are ``withdrawn``."""
        self.database, self.participants, self.without, self.withdrawn = database, participants, without or {}, withdrawn
        self.rows: list[dict] | None = None
        self._notes = Notes(database, root)
        if not database.known:
            wanted = {"expected": "an entry of the catalogue", "done": "taken as one site, named after it"}
            self._notes.add("unknown database", "database", found=database.name, **wanted)
        self._people, self._scanners = People(header, participants, self._notes), Scanners(self._notes)

    @property
    def conflicts(self) -> list[dict]:
        return self._notes.rows

    def sidecars(self, t1w: T1w) -> tuple[dict[str, dict], str | None]:
        """The fields of a scan's sidecars, by file, and why the scan is quarantined if its own sidecar cannot be read. An inherited one that
        cannot be read is a conflict."""
        own, told = t1w.path.split(".nii")[0] + ".json", {}
        for name in t1w.sidecars:
            try:
                told[name] = read_object(self._notes.root / name) if name == own else self._notes.json(name)
            except (OSError, ValueError) as error:
                return {}, f"{self._notes.root / name}: not valid JSON ({error}); a sidecar or none is wanted"
        return told, None

    def facts(self, row: dict, sidecars: dict[str, dict]) -> dict:
        """Age, sex, maker, model and field strength of a scan, from its ``row`` of the scans table as far as it is filled in, and what its
        sidecars say."""
        return self._people.facts(row) | self._scanners.facts(row, sidecars)

    def given_label(self, row: dict, source: str) -> None:
        """Note a label map that ``row``, of the scans table, does not get because an earlier T1w of the subject has it."""
        self._notes.add("label of another scan", "labels", found=source, done="an earlier T1w of the subject has it alone", together=True,
                        **_of_scan(row))  # fmt: skip

    def same_file(self, row: dict, others: list[str]) -> None:
        """Note scans of other databases, by ``scan_id``, whose files have the same bytes."""
        self._notes.add("same file elsewhere", "person", found=", ".join(others), done="one person in all of them", **_of_scan(row))

    def finish(self, rows: list[dict]) -> None:
        """Compare the database as a whole, its ``rows`` of the scans table, with the catalogue."""
        self.rows, root = rows, self._notes.root
        for row in rows:
            about = _of_scan(row)
            if row["site"] not in self.database.sites:
                done = f"quarantined: {row['reason']}"
                self._notes.add("unknown site", "site", expected="a site of the catalogue", found=row["site"], done=done, **about)
            elif row["reason"]:
                file, _, why = row["reason"].removeprefix(f"{root}/").partition(": ")
                told = {"file": file, "found": why} if why and os.path.lexists(root / file) else {"found": row["reason"]}
                self._notes.add("quarantined", "t1w", done="left out of every later stage", **about | told)
        self._scanners.finish()
        self._count(rows)
        self._check_licence()
        for subject in sorted(set(self.participants) - {row["subject"] for row in rows} - {""}):
            about = {"subject": subject, "file": "participants.tsv"}
            self._notes.add("row without scan", "subject", expected="a T1w", found="none", done="no row in the scans table", **about)
        for folder, why in self.without.items():
            if folder.removeprefix("sub-") not in self.participants:
                self._notes.add("folder without scan", "subject", expected="a T1w below sub-<letters and digits>", found=why,
                                done="no row in the scans table", file=folder)  # fmt: skip

    def _count(self, rows: list[dict]) -> None:
        scans = Counter(row["site"] for row in rows)
        people = Counter(site for site, _ in {(row["site"], row["subject"]) for row in rows})
        file = f"catalogue/{self.database.name}.yaml"
        for site, content in self.database.sites.items():
            if scans[site]:
                self._compare("scans", site, content.scans, scans[site])
                self._compare("subjects", site, content.subjects, people[site])
            else:
                expected = f"{content.scans} scans" if content.scans else "scans"
                self._notes.add("absent site", "site", site=site, expected=expected, found=0, done="no row in the scans table", file=file)
        self._compare("scans", None, self.database.scans, len(rows))
        self._compare("subjects", None, self.database.subjects, len({row["subject"] for row in rows}))

    def _compare(self, field: str, site: str | None, expected: int | None, found: int) -> None:
        if expected is not None and abs(found - expected) > int(SHARE_OF_COUNT * expected):
            kind = "fewer than expected" if found < expected else "more than expected"
            about = {"site": site, "file": f"catalogue/{self.database.name}.yaml"}
            self._notes.add(kind, field, expected=expected, found=found, done="what is there is taken", **about)

    def _check_licence(self) -> None:
        description, known = self._notes.json("dataset_description.json"), self.database.licence
        about = {"field": "licence", "expected": known, "file": "dataset_description.json"}
        name = next((name for name in ("License", "Licence", "license", "licence") if not is_empty(description.get(name))), None)
        if name is None:
            self._notes.add("missing value", found="no License", done="the catalogue's stands" if known else "no licence is known", **about)
            return
        written, licence = " ".join(str(description[name]).split()), canonical_licence(str(description[name]))
        if name != "License":
            self._notes.add("spelling", found=f"field {name}", done="read as License", **about)
        if licence != written:
            self._notes.add("spelling", found=written, done=f"read as {licence}", **about)
        if self.database.known and licence != canonical_licence(known):
            done = "the catalogue's stands" if known else "listed here alone; the catalogue names none"
            self._notes.add("licence", found=licence, done=done, **about)


def _of_scan(row: dict) -> dict:
    return {"site": row["site"], "scan": row["scan_id"], "subject": row["subject"], "file": row["t1w_path"]}
