"""Conflicts between databases and the catalogue as ``tables/conflicts.tsv``, which lists all, and ``tables/conflicts.html``, which sums up.

Both lie beside the scans' table, not in ``reports/``: DVC empties that folder whenever the report stage runs. Same input, same bytes.
"""

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_registry.files import replacing
from data_registry.ledgers import owner
from data_registry.schema import CONFLICTS
from pipelines.reconcile import SHARE_OF_COUNT, Reconciliation
from pipelines.reconcile_people import YEARS_OF_RANGE

CONFLICTS_TSV = Path("tables/conflicts.tsv")
CONFLICTS_HTML = Path("tables/conflicts.html")
EXAMPLES = 12
"""Lines of one kind and database that the page shows: those that concern most scans."""
SITES_NAMED = 2
"""Sites that a line of the page names."""
DECIDE, MISSING, BY_RULE = "To decide", "Missing", "Changed or chosen by rule"
KINDS = {
    "unknown site": (DECIDE, "The site is not in the catalogue, or the rule gives none. The scans are left out; name the site in the catalogue."),
    "quarantined": (DECIDE, "Scans of a known site that cannot be used, each with its reason."),
    "mixed sites": (DECIDE, "What is taken for one site looks like several. A rule in the catalogue parts them; until then they stay together."),
    "contradicting sidecars": (DECIDE, "Sidecars of one site, or of one scan, that do not agree: two scanners, an upgrade, or a wrong sidecar."),
    "contradicting rows": (DECIDE, "participants.tsv says two things of one subject."),
    "sidecar against catalogue": (DECIDE, "The sidecar and the catalogue do not agree. The sidecar, nearer to the scan, is taken."),
    "fewer than expected": (DECIDE, f"By more than {SHARE_OF_COUNT:.0%} (below 50 by any): a download may be incomplete."),
    "more than expected": (DECIDE, f"By more than {SHARE_OF_COUNT:.0%} (below 50 by any): repeats, later releases, or another database's scans."),
    "absent site": (DECIDE, "The catalogue has this site, but no scan of it is here."),
    "unknown database": (DECIDE, "Not in the catalogue: one site named after the folder, of which nothing is expected."),
    "age impossible": (DECIDE, "Below 0 or above 110 years; often months or days, or a code for missing. Declare Units in participants.json."),
    "age out of range": (DECIDE, f"More than {YEARS_OF_RANGE:g} year outside what is published of the site. Kept."),
    "age unclear": (DECIDE, "A range, a bound or several ages where one number is wanted."),
    "sex unclear": (DECIDE, "Neither F, M nor a word for them. Codes are read as participants.json (Levels) or the catalogue (sex_codes) declares."),
    "field strength unclear": (DECIDE, "Near no nominal value, or not in tesla. The catalogue's stands, if the site has one."),
    "unknown manufacturer": (DECIDE, "The manufacturer is not among the known names."),
    "licence": (DECIDE, "dataset_description.json and the catalogue do not agree, or the catalogue names none."),
    "uneven row": (DECIDE, "Rows of participants.tsv with more or fewer cells than the header, or without a participant."),
    "unreadable file": (DECIDE, "Descriptions that cannot be read. A scan's own sidecar that cannot be read stands under quarantined."),
    "missing table": (MISSING, "No participants.tsv, or nothing in it."),
    "missing column": (MISSING, "participants.tsv has no column that is read for it."),
    "missing row": (MISSING, "Scanned subjects that participants.tsv does not name."),
    "row without scan": (MISSING, "Subjects of participants.tsv without a T1w."),
    "folder without scan": (MISSING, "Folders sub-* without a T1w that participants.tsv does not name, or whose name is no subject's."),
    "missing value": (MISSING, "Neither the files nor the catalogue state a value."),
    "same file elsewhere": (BY_RULE, "The same bytes in another database: one person to the split, two scans to a training. "
                            "Of a database that came twice, leave one out of index.roots; two people need two files."),
    "label of another scan": (BY_RULE, "Several T1w of a subject have one label map. It belongs to the first; for the next, the head has moved."),
    "from the catalogue": (BY_RULE, "The sidecars state no clear value; the catalogue's value for the site is taken."),
    "column taken": (BY_RULE, "A column of another name was read."),
    "rounded": (BY_RULE, "A field strength near a nominal one: 2.89 T is sold as 3 T."),
    "unit": (BY_RULE, "Written in another unit."),
    "spelling": (BY_RULE, "Clear, but in another spelling than the tables use."),
}
_FACTS = {"age_years": "age", "sex": "sex", "manufacturer": "maker", "field_strength_tesla": "field"}


def write_conflicts(checks: list[Reconciliation]) -> str:
    """Write both files from finished reconciliations; returns a line that says how many conflicts there are and where they are listed."""
    rows = conflict_rows(checks)
    with replacing(CONFLICTS_TSV) as aside, open(aside, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerow(CONFLICTS.names)
        writer.writerows([row[name] for name in CONFLICTS.names] for row in rows)
    with replacing(CONFLICTS_HTML) as aside:
        aside.write_text(_page(checks, rows), encoding="utf-8")
    kinds, databases = {row["kind"] for row in rows}, {row["database"] for row in rows}
    counts = f"conflicts: {len(rows)}, kinds: {len(kinds)}, databases: {len(databases)}"
    return f"{CONFLICTS_HTML}: {counts}; {CONFLICTS_TSV.name} lists each"


def conflict_rows(checks: Iterable[Reconciliation]) -> list[dict]:
    """All conflicts as text, null as n/a, by kind as in :data:`KINDS`, then database, site, subject and the rest."""
    rows = [{name: _cell(row.get(name)) for name in CONFLICTS.names} for check in checks for row in check.conflicts]
    unknown = {row["kind"] for row in rows} - set(KINDS)
    assert not unknown, f"no kinds of conflict: {sorted(unknown)}"
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(rows, key=lambda row: (order[row["kind"]], *(row[name] for name in CONFLICTS.names[1:])))


def summary(check: Reconciliation) -> dict:
    """Of one database: expected and found counts, and of how many scans age, sex, maker and field strength are known."""
    database, rows = check.database, check.rows or []
    sites = {row["site"] for row in rows} & set(database.sites)
    found = {"scans": len(rows), "subjects": len({row["subject"] for row in rows}), "sites": len(sites)}
    expected = {field: _expected(database, field) for field in ("scans", "subjects")} | {"sites": len(database.sites) if database.known else None}
    return {
        "name": database.name, "title": database.title, "found": found, "expected": expected,
        "off": {name for name, count in expected.items() if count is not None and abs(found[name] - count) > int(SHARE_OF_COUNT * count)},
        "known": {short: _share(row[field] is not None for row in rows) for field, short in _FACTS.items()},
        "quarantined": sum(row["reason"] is not None for row in rows), "conflicts": len(check.conflicts), "sites": _sites(check),
    }  # fmt: skip


def _sites(check: Reconciliation) -> list[dict]:
    scans = Counter(row["site"] for row in check.rows or [])
    people = Counter(site for site, _ in {(row["site"], row["subject"]) for row in check.rows or []})
    known = [(name, site.place, site.scans, site.subjects) for name, site in check.database.sites.items()]
    known += [(name, "not in the catalogue", None, None) for name in sorted(set(scans) - set(check.database.sites))]
    return [
        {"name": name, "place": place, "scans": scans[name], "expected": expected, "subjects": people[name], "expected_subjects": expected_people}
        for name, place, expected, expected_people in known
    ]


def _expected(database, field: str) -> int | None:
    """The database's own number, else that of its sites if all have one."""
    parts = [getattr(site, field) for site in database.sites.values()]
    whole = getattr(database, field)
    return whole if whole is not None else sum(parts) if parts and None not in parts else None


def _share(known: Iterable[bool]) -> str:
    known = list(known)
    part = 100 * sum(known) / max(1, len(known))
    return f"{part:.0f} %" if part in (0, 100) else f"{min(max(part, 1), 99):.0f} %"  # 100 % is all of them


def _cell(value: object) -> str:
    """One line without tabs and double quotes, which some programs take for a cell's ends; at most 500 characters."""
    text = f"{value:g}" if isinstance(value, float) else "" if value is None else " ".join(str(value).split()).replace('"', "'")
    return "n/a" if text == "" else text if len(text) <= 500 else text[:499] + "…"


def _page(checks: list[Reconciliation], rows: list[dict]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    sections = []
    for kind, (group, meaning) in KINDS.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            lines, place = sorted(_alike(of_kind), key=lambda line: (line["database"], -line["of"])), Counter()
            for line in lines:
                place[line["database"]] += 1
                line["place"] = place[line["database"]]
            shown = [line for line in lines if line["place"] <= EXAMPLES]
            section = {"kind": kind, "group": group, "meaning": meaning, "count": len(of_kind)}
            sections.append(section | {"lines": shown, "hidden": len(lines) - len(shown)})
    return environment.get_template("conflicts.html.j2").render(
        summaries=sorted((summary(check) for check in checks), key=lambda one: one["name"]), sections=sections, groups=(DECIDE, MISSING, BY_RULE),
        conflicts=len(rows), decide=sum(KINDS[row["kind"]][0] == DECIDE for row in rows), tsv=CONFLICTS_TSV.name, tolerance=SHARE_OF_COUNT,
    )  # fmt: skip


def _alike(rows: list[dict]) -> list[dict]:
    """Merge rows that differ only in site, scan and person into one line, with the number of scans and the first of them."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        if row["kind"] == "same file elsewhere":  # in which databases; the table says which scans
            row = row | {"found": ", ".join(sorted({owner(scan)[0] for scan in row["found"].split(", ")}))}
        key = (*(row[name] for name in ("database", "field", "expected", "found", "done")), row["site"] if row["field"] == "site" else None)
        line = lines.setdefault(key, row | {"of": 0, "sites": {}, "names": {}})
        line["of"] += int(row["scans"])
        line["sites"][row["site"]] = None
        names = row["scan"], "n/a" if row["subject"] == "n/a" else f"sub-{row['subject']}", row["file"], ""
        line["names"][next(name for name in names if name != "n/a")] = None
    for line in lines.values():
        sites = [site for site in line["sites"] if site != "n/a"]
        line["site"] = ", ".join(sites[:SITES_NAMED]) + _and_more(len(sites) - SITES_NAMED)
        line["first"] = next(iter(line["names"])) + ("" if line["of"] else _and_more(len(line["names"]) - 1))
    return list(lines.values())


def _and_more(number: int) -> str:
    return f" and {number} more" if number > 0 else ""
