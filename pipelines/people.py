"""Who is who by what harmonising saw: the same voxels in other files, and heads that are alike. Part of the stage *split*.

Equal voxels mean one person. Similar heads do only if no pair of strangers is expected to be that similar, and something else agrees. Every
other suspicion goes to ``tables/people.tsv`` for somebody to look at; until then the two keep their names, and the split gives them one role
(guard ``suspected``). To answer, add a line for each of the two to a table of ``index.people``, with the same name or with two different ones.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_registry.catalogue_schema import Database
from data_registry.likeness import STRANGERS, pairs_above, sure_above
from data_registry.people import known_apart, merge_people, share_people
from data_registry.tsv import write_tsv

log = logging.getLogger("lodbrain.people")
PEOPLE_TABLE = Path("tables/people.tsv")
REVIEW = 0.70
SAME = 0.85
"""The least likeness at which scans are merged; among many pairs more is wanted, see :func:`sure_above`."""
MANY = 100  # scans, from which on a run's own strangers are measured
YEARS = 3.0
COLUMNS = ("verdict", "likeness", "why", "scan_a", "scan_b", "person_a", "person_b", "sex_a", "sex_b", "age_a", "age_b")


def find_people(scans: list[dict], samples: list[dict], databases: Mapping[str, Database]) -> tuple[list[dict], dict]:
    """Merge people in ``scans`` (rows of the scans table) whose ``samples`` (rows of the samples table) show that they are one. Those who may be
    one get the same ``suspected``; for all others it is None.

    Returns a finding for each pair of scans that was merged or needs a review, the most similar first, and a summary of what was compared.
    """
    by_id = {scan["scan_id"]: scan for scan in scans}
    rows = [row for row in samples if row["scan_id"] in by_id]
    findings = _same_voxels(rows, by_id)
    described = [row for row in rows if row["likeness"] is not None]
    numbers = [np.frombuffer(bytes.fromhex(row["likeness"]), np.int8) for row in described]
    pairs, measured = pairs_above(np.stack(numbers), REVIEW) if described else ([], STRANGERS)
    strangers = tuple(np.maximum(measured, STRANGERS).tolist()) if len(described) >= MANY else STRANGERS
    compared = len(described) * (len(described) - 1) // 2
    sure = max(SAME, sure_above(compared, strangers))
    for i, j, value in pairs:
        one, two = (by_id[described[k]["scan_id"]] for k in (i, j))
        if one["person"] == two["person"] or known_apart(one["person"], two["person"]):
            continue
        if described[i]["voxels_sha256"] == described[j]["voxels_sha256"]:
            continue  # said already
        agreed, why = agreement(one, two, databases)
        merged = value >= sure and agreed
        findings.append(_finding("merged" if merged else "review", value, why if value >= sure else f"below {sure:.2f}; {why}", one, two))
    merge_people(scans, [{finding["person_a"], finding["person_b"]} for finding in findings if finding["verdict"] == "merged"])
    _suspect(scans, [{by_id[finding[scan]]["person"] for scan in ("scan_a", "scan_b")} for finding in findings if finding["verdict"] == "review"])
    findings.sort(key=lambda finding: (-finding["likeness"], finding["scan_a"], finding["scan_b"]))
    summary = {verdict: sum(finding["verdict"] == verdict for finding in findings) for verdict in ("merged", "review")}
    summary |= {"scans_compared": len(described), "scans_not_described": len(rows) - len(described), "pairs": compared}
    return findings, summary | {"merged_above": round(sure, 3), "strangers": [round(value, 3) for value in strangers]}


def agreement(one: dict, two: dict, databases: Mapping[str, Database]) -> tuple[bool, str]:
    """Whether what else is known of two scans says that they are one person's, and in words.

    >>> agreement({"database": "a", "sex": "F", "age_years": 30.0}, {"database": "b", "sex": "F", "age_years": 31.5}, {})
    (True, 'same sex, ages within 3 years')
    >>> agreement({"database": "a", "sex": "F", "age_years": 30.0}, {"database": "b", "sex": None, "age_years": 31.5}, {})
    (False, 'nothing else is known of both')
    """
    if one["database"] == two["database"]:
        return False, "two subjects of one database"
    if one["sex"] and two["sex"] and one["sex"] != two["sex"]:
        return False, "sexes differ"
    ages = [row["age_years"] for row in (one, two)]
    if None not in ages and abs(ages[0] - ages[1]) > YEARS:
        return False, f"ages differ by more than {YEARS:.0f} years"
    if share_people(one["database"], two["database"], databases):
        return True, "the catalogue says that their databases share people"
    if one["sex"] and two["sex"] and None not in ages:
        return True, f"same sex, ages within {YEARS:.0f} years"
    return False, "nothing else is known of both"


def write_findings(findings: list[dict]) -> None:
    """Write ``tables/people.tsv``, only a header if nothing was found; merged people are named in the log, too."""
    write_tsv(PEOPLE_TABLE, COLUMNS, findings)
    for finding in findings:
        if finding["verdict"] == "merged":
            log.warning("%s and %s: taken as one person (%s)", finding["scan_a"], finding["scan_b"], finding["why"])


def _suspect(scans: list[dict], ties: list[set[str]]) -> None:
    """Give all scans of people who are tied by a suspicion, also through others, one ``suspected``."""
    names = [{"scan": scan, "person": scan["person"]} for scan in scans]
    merge_people(names, ties)
    tied = set().union(*ties)
    for row in names:
        row["scan"]["suspected"] = row["person"] if row["scan"]["person"] in tied else None


def _same_voxels(rows: list[dict], by_id: dict[str, dict]) -> list[dict]:
    """A finding for each scan whose voxels are those of an earlier one of another person."""
    same = defaultdict(list)
    for row in rows:
        if row["voxels_sha256"]:
            same[row["voxels_sha256"]].append(by_id[row["scan_id"]])
    findings = []
    for first, *others in same.values():
        for other in others:
            if other["person"] == first["person"]:
                continue
            apart = known_apart(first["person"], other["person"])
            why = "the same voxels, though index.people has two names for them" if apart else "the same voxels"
            findings.append(_finding("review" if apart else "merged", 1.0, why, first, other))
    return findings


def _finding(verdict: str, value: float, why: str, one: dict, two: dict) -> dict:
    sides = {f"{short}_{side}": row[key] for side, row in (("a", one), ("b", two)) for short, key in _SIDES.items()}
    return {"verdict": verdict, "likeness": round(value, 3), "why": why} | sides


_SIDES = {"scan": "scan_id", "person": "person", "sex": "sex", "age": "age_years"}
