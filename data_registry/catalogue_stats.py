"""The catalogue in figures: how much it lists, and how much of that is known and confirmed by a document."""

from collections import Counter
from collections.abc import Iterable

from data_registry.catalogue_schema import Database
from data_registry.catalogue_sources import DATABASE_FIELDS, SITE_FIELDS, standing
from data_registry.catalogue_table import site_rows


def expected_scans(database: Database) -> int:
    """T1w scans that a database holds: as published, else the sum over its sites, else those that LOD-Brain used; 0 if nobody says."""
    of_sites = [site.scans for site in database.sites.values()]
    if database.scans is not None:
        return database.scans
    if all(scans is not None for scans in of_sites):
        return sum(of_sites)
    return max(sum(scans or 0 for scans in of_sites), sum(row.scans for row in database.lod_brain.values()))


def stats(databases: Iterable[Database]) -> dict:
    """Counts, and for each field how many databases or sites have it with a source, unverified, or not at all."""
    databases = list(databases)
    rows = site_rows(databases)
    return {
        "databases": len(databases),
        "sites": len(rows),
        "places": len({row["place"] for row in rows}),
        "scanners": len({row["scanner"] or f"{row['database']}.{row['site']}" for row in rows}),
        "countries": len({row["country"] for row in rows} - {None}),
        "scans": sum(map(expected_scans, databases)),
        "lod_brain_rows": len({row for database in databases for row in database.lod_brain}),
        "lod_brain_sites": sum(bool(row["lod_brain_rows"]) for row in rows),
        "lod_brain_scans": sum(row.scans for database in databases for row in database.lod_brain.values()),
        "by": {column: _counted(rows, column) for column in ("field_strength_tesla", "manufacturer", "country", "access")},
        "filled": {
            "databases": {field: _filled((database, None, field) for database in databases) for field in DATABASE_FIELDS},
            "sites": {field: _filled((database, site, field) for database in databases for site in database.sites) for field in SITE_FIELDS},
        },
    }


def _counted(rows: list[dict], column: str) -> dict[str, int]:
    """Sites by a column, most first; null is "unknown"."""
    return dict(Counter("unknown" if row[column] is None else str(row[column]) for row in rows).most_common())


def _filled(fields: Iterable[tuple[Database, str | None, str]]) -> dict[str, int | float]:
    """``share`` is of the values with a source: an unverified one counts as missing."""
    count = Counter(standing(*field)[0] for field in fields)
    return {name: count[name] for name in ("sourced", "unverified", "missing")} | {"share": round(count["sourced"] / max(count.total(), 1), 3)}
