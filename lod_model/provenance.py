"""What a training records about the data it has seen: in its weights by database, beside them by scan.

No person's name goes into a file that may be passed on; ``seen.tsv`` stays in the project. Shards carry no licence: their bytes depend on
scans alone, and the database's name leads to the catalogue. :mod:`lod_model.lineage` tells what the weights say.
"""

from pathlib import Path
from typing import Any

from data_registry.catalogue import find_database
from data_registry.ledgers import accepted_licences
from data_registry.tsv import write_tsv
from lod_model.data import Scan
from lod_model.lineage import ROLES, terms

SEEN = "seen.tsv"
"""Beside a fold's weights: scan_id, database, site, role of every scan that trained or chose them."""


def databases_seen(roles: dict[str, list[Scan]]) -> list[dict[str, Any]]:
    """What weights say of each database that these roles hold, as plain values; accepted licences from the current folder."""
    accepted, found = accepted_licences(), []
    for name in sorted({scan.database for role in ROLES for scan in roles.get(role, [])}):
        own = {role: [scan for scan in roles.get(role, []) if scan.database == name] for role in ROLES}
        found.append({
            **terms(find_database(name)),
            "accepted": accepted.get(name),
            "sites": sorted({scan.site for scans in own.values() for scan in scans}),
            "scans": {role: len(scans) for role, scans in own.items()},
            "people": {role: len({scan.person or scan.scan_id for scan in scans}) for role, scans in own.items()},
        })  # fmt: skip
    return found


def write_seen(folder: Path, roles: dict[str, list[Scan]]) -> None:
    """The scans of these roles beside a fold's weights."""
    seen = [vars(scan) | {"role": role} for role in ROLES for scan in roles.get(role, [])]
    write_tsv(folder / SEEN, ("scan_id", "database", "site", "role"), seen)
