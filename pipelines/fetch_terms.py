"""May it be fetched? State and access from the catalogue, who was withdrawn, and licences accepted, which ``licences.tsv`` of the project keeps."""

import csv
import fcntl
import getpass
import os
import re
import shlex
from datetime import UTC, datetime

from data_registry.catalogue import Database, catalogue
from data_registry.catalogue_sources import standing
from data_registry.errors import InputError
from data_registry.ledgers import LICENCES, WITHDRAWN, read_rows, withdrawn

LICENCE_COLUMNS = ("date", "user", "database", "licence", "route")
UNKNOWN = "unknown"
"""What one accepts where no document states the licence."""


def address_of(database: Database, route: str | None) -> str:
    """Where to fetch from: ``route`` if given, else the catalogue's.

    An :class:`InputError` if the database is withdrawn or embargoed, wants a registration or an agreement first, or has no address that can
    be read. Who gives a route has been let in, or has the files already.
    """
    if database.state in ("withdrawn", "embargoed"):
        raise InputError(f"{database.name} is {database.state}, says the catalogue; it is not fetched")
    if route:
        return route
    if not database.known:
        raise InputError(f"{database.name}: no such database; one of {', '.join(catalogue())} is wanted, or where yours is with --route")
    given = "give the folder of what you downloaded, or a mirror, with --route"
    if database.access != "open":
        wants = {"registration": "wants a registration", "agreement": "wants a signed agreement", None: "may want more than a download"}
        where = database.route or "its owners"
        raise InputError(f"{database.name} {wants[database.access]}, first go to {where}; then {given}")
    numbers = re.findall(r"\bds\d{6}\b", database.route or "") if (database.route or "").startswith("OpenNeuro") else []
    if len(numbers) == 1:
        return f"s3://openneuro.org/{numbers[0]}"
    if numbers:
        buckets = ", ".join(f"s3://openneuro.org/{number}" for number in numbers)
        raise InputError(f"{database.name} is {len(numbers)} databases; --route with one of {buckets} is wanted")
    if not re.fullmatch(r"(s3|https?)://\S+", database.route or ""):
        raise InputError(f"{database.name}: its route is {database.route or 'not known'}, which no program can read; {given}")
    return database.route


def licence_of(database: Database) -> tuple[str, str]:
    """What ``--accept-licence`` must name, and what is known of it in words."""
    how, where = standing(database, None, "licence")
    if how == "sourced":
        return database.licence, f"its licence is {database.licence!r}" + (f" ({where})" if where and "://" in where else "")
    if how == "unverified":
        return UNKNOWN, f"its licence is not verified: {database.licence!r} stands in the catalogue, and no document confirms it"
    return UNKNOWN, "its licence is not known"


def accept(database: Database, accepted: str | None, *, address: str) -> None:
    """Go on if the licence is accepted, now or once before in this project; record it. Else an :class:`InputError`."""
    licence, words = licence_of(database)
    option = f"--accept-licence {shlex.quote(licence)}"
    key = {"database": database.name, "licence": licence}
    if accepted is not None and accepted != licence:
        raise InputError(f"--accept-licence {accepted!r}: of {database.name}, {words}; read it, then {option} is wanted")
    if key in read_rows(LICENCES, tuple(key)):
        return
    if accepted is None:
        raise InputError(f"{database.name}: {words}; read it, then {option} is wanted, once in a project")
    with open(LICENCES, "a", encoding="utf-8", newline="") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        writer = csv.DictWriter(handle, LICENCE_COLUMNS, delimiter="\t", lineterminator="\n")
        if os.fstat(handle.fileno()).st_size == 0:
            writer.writeheader()
        writer.writerow({"date": datetime.now(UTC).strftime("%Y-%m-%d"), "user": _user(), "route": address} | key)
        handle.flush()
        os.fsync(handle.fileno())


def withdrawn_subjects(database: Database) -> frozenset[str]:
    """Subjects, without ``sub-``, that ``withdrawn.tsv`` of the project names; if it names the whole database, an :class:`InputError`."""
    stones = [stone for stone in withdrawn(WITHDRAWN).tombstones if stone.database == database.name]
    for stone in stones:
        if not stone.subject:
            why = f" ({', '.join(filter(None, (stone.date, stone.reason)))})"
            raise InputError(f"{database.name} is withdrawn from this project, says {WITHDRAWN}{why}; it is not fetched")
    return frozenset(stone.subject for stone in stones)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return str(os.getuid())
