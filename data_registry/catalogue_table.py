"""The catalogue as a table, a row a site, and the choice of rows.

pyarrow, and the schema that is written in it, are imported where a file is written: most questions to the catalogue need neither.
"""

import csv
import difflib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

from data_registry.catalogue_schema import Database
from data_registry.catalogue_sources import standing
from data_registry.errors import InputError
from data_registry.files import replacing
from data_registry.readings import folded

SHORT = {"United States": "USA", "United Kingdom": "UK", "registration": "register", "agreement": "agree"}
"""Short forms in the table for a terminal."""
NAMED = 40
"""Values that an error lists."""
_OF_THE_DATABASE = ("access", "licence", "route", "state")
_OF_THE_SITE = {
    "place": ["place"], "manufacturer": ["manufacturer"], "model": ["model"], "field_strength_tesla": ["field_strength_tesla"],
    "voxel_mm": ["voxel_mm"], "subjects": ["subjects"], "scans": ["scans"], "age_years": ["age_mean_years", "age_min_years", "age_max_years"],
    "sexes": ["female", "male"],
}  # fmt: skip
"""Field → columns that are filled from it."""


def site_rows(databases: Iterable[Database]) -> list[dict]:
    """Rows with the columns of :data:`data_registry.schema.SITES`.

    A database of one site lends it its own ages, sexes and counts where the site has none.
    """
    return [_row(database, name) for database in databases for name in database.sites]


def _row(database: Database, name: str) -> dict:
    site, alone = database.sites[name], len(database.sites) == 1
    known = {field: getattr(site, field) or (getattr(database, field) if alone else None) for field in ("subjects", "scans", "age_years", "sexes")}
    age, sexes = known["age_years"], known["sexes"]
    unverified = [field for field in _OF_THE_DATABASE if standing(database, None, field)[0] == "unverified"]
    for field, columns in _OF_THE_SITE.items():
        lent = field in known and not getattr(site, field)
        unverified += columns if standing(database, None if lent and alone else name, field)[0] == "unverified" else []
    return {
        "database": database.name, "site": name, "place": site.place, "country": database.country_of(name), "scanner": site.scanner,
        "manufacturer": site.manufacturer, "model": site.model, "field_strength_tesla": site.field_strength_tesla, "voxel_mm": site.voxel_mm,
        "subjects": known["subjects"], "scans": known["scans"],
        "age_mean_years": age and age.mean, "age_min_years": age and age.min, "age_max_years": age and age.max,
        "female": sexes and sexes.F, "male": sexes and sexes.M,
        **{field: getattr(database, field) for field in _OF_THE_DATABASE},
        "used_by": list(database.used_by), "lod_brain_rows": database.lod_brain_rows_of(name), "unverified": unverified,
    }  # fmt: skip


def select(rows: list[dict], **wanted: str | float | None) -> list[dict]:
    """Rows whose columns have the wanted values, whatever case and accents, also in the forms of :data:`SHORT`; None means any value.

    A value that no row has is an :class:`InputError` that lists the existing ones, or, if they are many, the most similar.

    >>> rows = [{"country": "China", "access": "open"}, {"country": "United States", "access": "open"}]
    >>> select(rows, country="usa", access="open")
    [{'country': 'United States', 'access': 'open'}]
    """
    chosen = rows
    for column, value in wanted.items():
        if value is None:
            continue
        if not any(_same(row[column], value) for row in rows):
            option = column.removesuffix("_tesla").replace("_", "-")
            called = sorted({row[column] for row in rows if column == "place" and folded(str(value)) in re.split(r"[\W_]", folded(row["site"]))})
            offered = f"sites of that name are at {'; '.join(called)}" if called else _offer([row[column] for row in rows], str(value))
            raise InputError(f"--{option} {value}: no site has it; {offered}")
        chosen = [row for row in chosen if _same(row[column], value)]
    return chosen


def _offer(cells: list, value: str) -> str:
    """What is wanted instead.

    >>> _offer(["Université de Montréal", *map(str, range(50))], "montreal")
    'one of 51 is wanted, as in Université de Montréal'
    """
    there = sorted({one for cell in cells for one in _values(cell)}, key=str)
    if len(there) <= NAMED:
        return f"one of {', '.join(map(str, there))} is wanted"
    plain = {str(one): folded(str(one)) for one in there}
    alike = [one for one, of in plain.items() if folded(value) in of]
    alike = alike or [one for of in difflib.get_close_matches(folded(value), plain.values()) for one in plain if plain[one] == of]
    return f"one of {len(there)} is wanted" + f", as in {'; '.join(alike[:NAMED])}" * bool(alike)


def _values(cell: object) -> list:
    return cell if isinstance(cell, list) else [] if cell is None else [cell]


def _same(cell: object, value: str | float) -> bool:
    return any(folded(str(value)) in (folded(str(one)), folded(str(SHORT.get(one, one)))) for one in _values(cell))


def as_tsv(rows: list[dict]) -> str:
    """With a header; null is n/a, as in BIDS, and the items of a list are separated by commas."""
    from data_registry import schema

    handle = io.StringIO()
    writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
    writer.writerow(schema.SITES.names)
    writer.writerows([_cell(row[name]) for name in schema.SITES.names] for row in rows)
    return handle.getvalue()


def _cell(value: object) -> str:
    return "n/a" if value is None or value == [] else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def as_json(rows: list[dict]) -> str:
    """A list of objects."""
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def write(path: Path, rows: list[dict], form: str) -> None:
    """``tsv``, ``json`` or ``parquet``; the file exists only when complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_registry import schema

    with replacing(path) as aside:
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows, schema=schema.SITES), aside)
        else:
            aside.write_text(as_tsv(rows) if form == "tsv" else as_json(rows), encoding="utf-8")
