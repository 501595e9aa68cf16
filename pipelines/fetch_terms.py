"""May it be fetched? State and access from the catalogue, who was withdrawn, and licences accepted, which ``licences.tsv`` of the project keeps."""

import csv
import fcntl
import getpass
import os
import re
import shlex
from datetime import UTC, datetime

from data_registry.catalogue import catalogue
from data_registry.catalogue_schema import Database
from data_registry.catalogue_sources import standing
from data_registry.errors import InputError
from data_registry.ledgers import LICENCES, WITHDRAWN, read_rows, withdrawn

LICENCE_COLUMNS = ("date", "user", "database", "licence", "route")
UNKNOWN = "unknown"
"""What is accepted if no document states the licence."""


def address_of(database: Database, route: str | None) -> str:
    """Where to fetch from: ``route`` if given, else the catalogue's.

    An :class:`InputError` if the database is withdrawn or embargoed, wants a registration or an agreement first, or has no address that can
    be read. Whoever gives a route has been let in, or has the files already.
    """
    if database.state in ("withdrawn", "embargoed"):
        raise InputError(f"{database.name} is {database.state}, says the catalogue; it is not fetched")
    if route:
        return route
    if not database.known:
        raise InputError(f"{database.name}: no such database; one of {', '.join(catalogue())} is wanted, or where yours is with --route")
    readable, where = addresses(database), database.route or "its owners"
    by_hand = "lay out what you download as sub-*/[ses-*/]anat/*_T1w.nii.gz and name its folder with --route"
    if database.access != "open":
        wants = {"registration": "wants a registration", "agreement": "wants a signed agreement", None: "may want more than a download"}
        steps = f"first go to {where}; then {by_hand}"
        if readable:  # nobody asks there who reads, so it is asked here
            steps = f"see `lodbrain sites show {database.name}`; once you have it, give --route {shlex.quote(' '.join(readable))}"
        raise InputError(f"{database.name} {wants[database.access]}, {steps}")
    if not readable:
        unread = f"its route is {where}, which is for people: go there, then" if database.route else "its route is not known:"
        raise InputError(f"{database.name}: {unread} {by_hand}")
    return " ".join(readable)


def addresses(database: Database) -> list[str]:
    """What of the catalogue's route a program can read: a bucket, the buckets of OpenNeuro's numbers, a manifest; a web page is for people.

    >>> from data_registry.catalogue import find_database
    >>> addresses(find_database("mbb")), addresses(find_database("ixi"))
    (['s3://openneuro.org/ds000221'], [])
    """
    route = database.route or ""
    if route.startswith("OpenNeuro"):
        return [f"s3://openneuro.org/{number}" for number in re.findall(r"\bds\d{6}\b", route)]
    return [route] if re.fullmatch(r"s3://\S+|https?://\S+\.tsv", route) else []


def licence_of(database: Database) -> tuple[str, str]:
    """What ``--accept-licence`` must name, and what is known of it in words."""
    how, where = standing(database, None, "licence")
    if how == "sourced":
        return database.licence, f"its licence is {database.licence!r}" + (f" ({where})" if where and "://" in where else "")
    if how == "unverified":
        return UNKNOWN, f"its licence is not verified: {database.licence!r} stands in the catalogue, and no document confirms it"
    return UNKNOWN, "its licence is not known"


def accept(database: Database, accepted: str | None, *, address: str) -> None:
    """Record that the licence is accepted, now or earlier in this project. Raises :class:`InputError` if it is not."""
    licence, words = licence_of(database)
    option = f"--accept-licence {shlex.quote(licence)}"
    key = {"database": database.name, "licence": licence}
    if accepted is not None and accepted != licence:
        raise InputError(f"--accept-licence {accepted!r}: of {database.name}, {words}; read it, then {option} is wanted")
    if key in read_rows(LICENCES, tuple(key)):
        return
    if accepted is None:
        raise InputError(f"{database.name}: {words}; read it, then {option} is wanted, once in a project")
    with open(LICENCES, "a+", encoding="utf-8", newline="") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        if not (handle.read() or "\n").endswith("\n"):  # an editor's last line
            handle.write("\n")
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
