"""Fetch a database's T1w and labels by its route: from a bucket that anyone may read, over HTTP with a manifest, or from a folder.

Stop it at any moment: the same command goes on. What is here already, with the size and version that the route lists, is not fetched again.
Exit status: 0 all is here, 1 some files could not be had (each is named), 2 nothing more could be done (the reason is the last line).
"""

import argparse
import logging
import re
import shutil
import sys
from collections.abc import Callable, Collection
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_registry.catalogue import find_database
from data_registry.catalogue_schema import NAME_PATTERN, Database
from data_registry.errors import InputError, run_stage
from pipelines import fetch_terms
from pipelines.fetch_choice import SITE_TABLES, File, Part, choose_subjects, find_files, find_freesurfer, find_parts, join_participants, warn_of_sites
from pipelines.fetch_joined import as_named_in, open_joined
from pipelines.fetch_people import drop_people
from pipelines.fetch_routes import Patient, Route, RouteError
from pipelines.fetch_transfer import Ledger, alone, aside_of, tidy, transfer

log = logging.getLogger("lodbrain.fetch")


@dataclass(frozen=True)
class Choice:
    """What of a database is wanted; empty: all of it."""

    sites: Collection[str] = ()
    subjects: Collection[str] = ()
    labels: bool = True


@dataclass(frozen=True)
class Network:
    """How connections are made."""

    endpoint_url: str | None = None
    """Of an S3 server; None: AWS_ENDPOINT_URL, else Amazon's."""
    workers: int = 8
    tries: int = 5
    """Further attempts, counted from the last byte that came."""
    timeout_s: float = 30


ALL, ORDINARY = Choice(), Network()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", help="as the catalogue names it (`lodbrain sites list`), or one of your own with --route")
    parser.add_argument("--site", action="append", default=[], metavar="S", help="only this site; may be given again")
    parser.add_argument("--subject", action="append", default=[], metavar="S", help="only this subject; may be given again")
    parser.add_argument("--to", type=Path, help="the database's folder (default: data/DATABASE); its name is the database's")
    parser.add_argument("--accept-licence", metavar="ID", help="the licence as `lodbrain sites show` has it; kept in licences.tsv, so wanted once")
    parser.add_argument("--route", help="s3://…, https://… or a folder, instead of the catalogue's: a mirror, or what you downloaded")
    parser.add_argument("--endpoint-url", help="of an S3 server that is not Amazon's (default: AWS_ENDPOINT_URL)")
    parser.add_argument("--labels", action=argparse.BooleanOptionalAction, default=True, help="label maps that come with the database")
    parser.add_argument("--dry-run", action="store_true", help="say how many files and bytes there are, and fetch nothing")
    parser.add_argument("--verify", action="store_true", help="hash what is here already, and fetch again what has been damaged")
    parser.add_argument("--workers", type=int, default=ORDINARY.workers, help="files at a time (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=ORDINARY.tries, help="times that a failed connection is tried again (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=ORDINARY.timeout_s, help="seconds in which something must come (default: %(default)g)")
    given = parser.parse_args()
    if given.workers < 1 or given.tries < 0 or given.timeout <= 0:
        raise InputError("--workers, --tries, --timeout: at least one worker, no fewer than 0 tries and more than 0 seconds are wanted")
    choice, network = Choice(given.site, given.subject, given.labels), Network(given.endpoint_url, given.workers, given.tries, given.timeout)
    faults = fetch(
        given.database, to=given.to, route=given.route, accepted=given.accept_licence, choice=choice, network=network,
        dry_run=given.dry_run, verify=given.verify,
    )  # fmt: skip
    for path, why in sorted(faults.items()):
        print(f"error: {path}: {why}", file=sys.stderr)
    if faults:
        print(f"error: {len(faults)} files could not be had; the same command tries them again", file=sys.stderr)
        sys.exit(1)


def fetch(
    name: str, *, to: Path | None = None, route: str | None = None, accepted: str | None = None, choice: Choice = ALL,
    network: Network = ORDINARY, dry_run: bool = False, verify: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Fetch into ``to``; why some files could not be had, by path.

    Raises :class:`InputError` if the database may not be fetched, its licence is not accepted, the route cannot be read, or its connection
    is gone.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise InputError(f"{name!r}: a database's name is letters, digits, '-' and '_'")
    database, to = find_database(name), to or Path("data", name)
    if to.absolute().name != name:
        raise InputError(f"--to {to}: the folder's name becomes the database's; …/{name} is wanted")
    withdrawn = fetch_terms.withdrawn_subjects(database)
    if gone := sorted(withdrawn & {subject.removeprefix("sub-") for subject in choice.subjects}):
        raise InputError(f"--subject {gone[0]}: is withdrawn from this project, says {fetch_terms.WITHDRAWN}; it is not fetched")
    address = fetch_terms.address_of(database, route)
    if not dry_run:
        fetch_terms.accept(database, accepted, address=address)
    with ThreadPoolExecutor(2 * network.workers) as pool:
        opened, parts, chosen, files = _listed(address, network, lambda there: _images(there, database, choice, withdrawn, pool))
        sources = [_Source(opened, files, Ledger(to, opened.address, read_only=dry_run))]
        if choice.labels and database.labels and database.labels.route and address in fetch_terms.addresses(database):
            people = {subject for subjects in chosen for subject in subjects}
            opened, maps = _listed(database.labels.route, network, lambda there: (find_freesurfer(there, database.labels.subject, people, pool),))
            sources.append(_Source(opened, maps, Ledger(to, opened.address, read_only=dry_run)))
    _refuse_another(to, sources)
    files = [file for source in sources for file in source.files]
    missing = [[file for file in source.files if not source.ledger.has(file, verify=verify)] for source in sources]
    all_missing = [file for files in missing for file in files]
    here = len(files) - len(all_missing)
    if dry_run:
        at = " and ".join(source.route.address for source in sources)
        print(f"{name}: {_size(files)} at {at}; {here} are here, {_size(all_missing)} to fetch")
        return {}
    faults: dict[str, str] = {}
    with alone(to):
        _check_room(to, all_missing)
        for source, wanted in zip(sources, missing, strict=True):
            faults |= transfer(source.route, wanted, source.ledger, tries=network.tries, workers=network.workers)
        _keep_tables(to, database, parts, withdrawn, sources[0].ledger)
        if not faults:
            tidy(to)
    print(f"{name}: {_size(files)} in {to}; {here} were here, {len(all_missing) - len(faults)} came, {len(faults)} could not be had")
    if not faults:
        print(f"next: `index: {{roots: [{to}]}}` in params.yaml, then python -m pipelines.index")
    return faults


class _Source(NamedTuple):
    """One address: its route, the files that are wanted of it, and the ledger of those that are here."""

    route: Route
    files: list[File]
    ledger: Ledger


def _refuse_another(to: Path, sources: list[_Source]) -> None:
    """Raise :class:`InputError` if the folder holds images of the same paths from elsewhere, of other sizes."""
    for source in sources:
        if another := next(filter(source.ledger.is_another, source.files), None):
            came = source.ledger.rows[another.path]
            sizes = f"{came['bytes']} bytes came from {came['route']}, {another.entry.bytes} are at {source.route.address}"
            raise InputError(f"{to / another.path}: {sizes}: two databases; another --to is wanted")


def _listed(address: str, network: Network, ask: Callable[[Route], tuple]) -> tuple:
    """The route at an address, and what it has of what is asked."""
    opened = open_joined(address, endpoint_url=network.endpoint_url, timeout_s=network.timeout_s, connections=network.workers)
    log.info("listing %s", address)
    try:
        return opened, *ask(Patient(opened, network.tries))
    except RouteError as error:
        raise InputError(f"{address}: {error}; a route that can be listed is wanted") from None


def _images(
    route: Route, database: Database, choice: Choice, withdrawn: Collection[str], pool: Executor
) -> tuple[list[Part], list[list[str]], list[File]]:
    parts = find_parts(route, database, pool)
    warn_of_sites(route, database, parts)
    gone = sorted(set(withdrawn) & {subject for part in parts for subject in part.subjects})
    if gone:
        log.info("%s: subjects left out because %s names them: %d", database.name, fetch_terms.WITHDRAWN, len(gone))
    chosen = choose_subjects(route, database, parts, sites=choice.sites, subjects=choice.subjects, withdrawn=withdrawn)
    files = find_files(route, parts, chosen, pool, labels=choice.labels)
    if not any(file.path.endswith(("_T1w.nii", "_T1w.nii.gz")) for file in files):
        raise InputError(f"{route.address}: no T1w of the {sum(map(len, chosen))} subjects chosen; sub-*/[ses-*/]anat/*_T1w.nii.gz is wanted")
    return parts, chosen, files


def _keep_tables(to: Path, database: Database, parts: list[Part], withdrawn: Collection[str], ledger: Ledger) -> None:
    """participants.tsv without lines of people who were withdrawn, whatever the route has; of the tables of sites one is made."""
    tables = [to / "participants.tsv", *sorted(to.glob(f"{SITE_TABLES}/*/participants.tsv"))]
    for table in (table for table in tables if table.is_file()):
        if drop_people(table, as_named_in(table.parent.name if table.parent != to else "", withdrawn)):
            ledger.add_made(str(table.relative_to(to)))
    if parts[0].folder:
        join_participants(to, database, parts, withdrawn)
        ledger.add_made("participants.tsv")


def _check_room(to: Path, missing: list[File]) -> None:
    """Refuse a disk that is too small before a long download rather than after it."""
    parts = (aside_of(to, file) for file in missing)
    wanted = sum(file.entry.bytes for file in missing) - sum(part.stat().st_size for part in parts if part.is_file())
    free = shutil.disk_usage(to).free
    if wanted > free:
        raise InputError(f"{to}: {free / 1e9:.2f} GB are free; {wanted / 1e9:.2f} GB are wanted")


def _size(files: list[File]) -> str:
    return f"{len(files)} files, {sum(file.entry.bytes for file in files) / 1e9:.3f} GB"


if __name__ == "__main__":
    run_stage(main)
