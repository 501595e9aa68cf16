"""Demo data: six small BIDS databases of synthetic heads, each one site with a scanner of its own.

    python -m pipelines.demo OUT [--seed 0] [--subjects 4] [--workers 2]
    python -m pipelines.demo OUT --add alder

The T1w lie on the scanners' grids, the labels (FreeSurfer ids) on FreeSurfer's own: 256³, 1 mm, LIA, in the same world space. What a
subject looks like follows from (seed, database, number) alone, so the same command gives the same bytes and one more subject leaves
the others as they are. A database is written aside and renamed when it is complete; ``participants.tsv`` names the complete subjects.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from operator import itemgetter
from pathlib import Path

from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.tsv import read_tsv, write_tsv
from pipelines.demo_sites import SITES, Site

_COLUMNS = ("participant_id", "site", "age", "sex")
_LABELS = Path("derivatives", "freesurfer")
_NOTICE = (
    "Shapes derive from the ICBM 152 nonlinear symmetric 2009a atlas. Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging "
    "Centre, Montreal Neurological Institute, McGill University. Permission to use, copy, modify, and distribute it for any purpose "
    "and without fee is hereby granted, provided that the above copyright notice appear in all copies."
)


def build_sites(
    out: Path, *, seed: int = 0, subjects: int = 4, workers: int = 2, databases: Sequence[str] = tuple(SITES)
) -> list[Path]:
    """Build what is missing of the demo below ``out`` and return the databases' folders, in the order of ``databases``.

    A database that has at least so many subjects of this seed is left alone; one that was made otherwise is refused.
    """
    out = Path(out)
    for name, value, least in (("--seed", seed, 0), ("--subjects", subjects, 1), ("--workers", workers, 1)):
        if value < least:
            raise InputError(f"{name} is {value}; at least {least} is wanted")
    sites = [_site(name) for name in databases]
    jobs = [(site, index) for site in sites for index in range(len(_participants(out / site.database, seed=seed)), subjects)]
    _make(out, jobs, seed=seed, workers=workers)
    return [out / site.database for site in sites]


def add_subject(out: Path, database: str, *, seed: int | None = None) -> Path:
    """Add the next subject to a database below ``out`` and return the folder ``sub-XX``; the others are not touched."""
    folder, site = Path(out) / _site(database).database, _site(database)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such database; build the demo before adding to it")
    seed = _seed_of(folder) if seed is None else seed
    index = len(_participants(folder, seed=seed))
    _make(Path(out), [(site, index)], seed=seed, workers=1)
    return folder / _subject(index)


def _site(database: str) -> Site:
    if database not in SITES:
        raise InputError(f"database {database!r} is not one of the demo's; one of {', '.join(SITES)} is wanted")
    return SITES[database]


def _subject(index: int) -> str:
    return f"sub-{index + 1:02d}"


def _seed_of(folder: Path) -> int:
    """The seed with which a database was made; a folder that is not the demo's is refused."""
    try:
        return int(json.loads((folder / "dataset_description.json").read_text(encoding="utf-8"))["DemoSeed"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder}: exists but was not made by this command; choose another folder or remove it") from None


def _participants(folder: Path, *, seed: int) -> list[dict]:
    """Rows of the database's complete subjects; none if it does not exist yet."""
    if not folder.exists():
        return []
    made_with = _seed_of(folder)
    if made_with != seed:
        raise InputError(f"{folder}: was made with --seed {made_with}, --seed {seed} is asked for; choose another folder or remove it")
    return read_tsv(folder / "participants.tsv")[1]


def _make(out: Path, jobs: list[tuple[Site, int]], *, seed: int, workers: int) -> None:
    """Make the scans of ``jobs`` aside and move each database's into place once all of its scans are there."""
    if not jobs:
        return
    out.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".demo-", dir=out))
    try:
        rows: dict[str, list[dict]] = {site.database: [] for site, _ in jobs}
        arguments = [(aside / site.database, site.database, index, seed) for site, index in jobs]
        for row in _with_progress(_mapped(arguments, workers=min(workers, len(jobs))), total=len(jobs)):
            database = row.pop("database")
            rows[database].append(row)
            if len(rows[database]) == sum(site.database == database for site, _ in jobs):
                _publish(aside / database, out / database, rows[database], seed=seed)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _mapped(arguments: list[tuple], *, workers: int) -> Iterator[dict]:
    """Rows of :func:`_write_scan` as they come; in this process if one worker is enough."""
    if workers == 1:
        yield from (_write_scan(*each) for each in arguments)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield from (done.result() for done in as_completed([pool.submit(_write_scan, *each) for each in arguments]))
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import torch  # here and below: --help loads no heavy library

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once; the parent tidies up
    torch.set_num_threads(1)


def _with_progress(rows: Iterable[dict], *, total: int) -> Iterator[dict]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("demo scans"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(rows, total=total)


def _write_scan(folder: Path, database: str, index: int, seed: int) -> dict:
    """Write one subject's files into the database ``folder`` and return its row of ``participants.tsv``, with the database."""
    from data_registry.volume import save_volume
    from pipelines.demo_scan import make_scan

    site, subject = SITES[database], _subject(index)
    scan = make_scan(site, index, seed=seed)
    t1w = folder / subject / "anat" / f"{subject}_T1w.nii.gz"
    save_volume(t1w, scan.t1w, scan.t1w_affine)
    _write_json(t1w.with_name(f"{subject}_T1w.json"), _sidecar(site))
    save_volume(folder / _LABELS / subject / "mri" / "aparc+aseg.mgz", scan.labels, scan.labels_affine)
    return {"database": database, "participant_id": subject, "site": site.site, "age": scan.person.age_years, "sex": scan.person.sex}


def _sidecar(site: Site) -> dict:
    repetition, echo, inversion = site.timing_s
    return {
        "Manufacturer": site.manufacturer,
        "ManufacturersModelName": site.model,
        "MagneticFieldStrength": site.field_tesla,
        "SliceThickness": site.voxel_mm[site.slice_axis],
        "RepetitionTime": repetition,
        "EchoTime": echo,
        "InversionTime": inversion,
        "SeriesDescription": "Synthetic T1w; nobody was scanned",
    }


def _publish(aside: Path, folder: Path, rows: list[dict], *, seed: int) -> None:
    """Move the scans in ``aside`` to their database ``folder``; a new one in one rename, an old one with its table last."""
    if not folder.exists():
        _write_json(aside / "dataset_description.json", _description(folder.name, seed=seed))
        _write_json(aside / _LABELS / "dataset_description.json", _labels_description(folder.name))
        write_tsv(aside / "participants.tsv", _COLUMNS, sorted(rows, key=itemgetter("participant_id")))
        aside.rename(folder)
        return
    old = _participants(folder, seed=seed)
    for part in (_LABELS, Path()):
        for row in rows:
            target = folder / part / row["participant_id"]
            shutil.rmtree(target, ignore_errors=True)  # what an interrupted run left, not yet in the table
            (aside / part / row["participant_id"]).rename(target)
    write_tsv(folder / "participants.tsv", _COLUMNS, sorted(old + rows, key=itemgetter("participant_id")))


def _description(database: str, *, seed: int) -> dict:
    return {
        "Name": f"LOD-Brain demo: {database} (synthetic)",
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "GeneratedBy": [{"Name": "pipelines.demo", "Description": "Synthetic T1w rendered from a deformed template; nobody was scanned."}],
        "Acknowledgements": _NOTICE,
        "DemoSeed": seed,
    }


def _labels_description(database: str) -> dict:
    made_by = {"Name": "pipelines.demo", "Description": "Synthetic labels in FreeSurfer's ids and grid; FreeSurfer was not run."}
    return {
        "Name": f"LOD-Brain demo: {database}, labels (synthetic)",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [made_by],
        "Acknowledgements": _NOTICE,
    }


def _write_json(path: Path, content: dict) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see --help)\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; prints the folders that are there when it ends."""
    parser = _Parser(prog="python -m pipelines.demo", description="Build six small BIDS databases of synthetic heads, one site each.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that holds the databases")
    parser.add_argument("--seed", type=int, help="what the heads follow from (0; with --add that of the database)")
    parser.add_argument("--subjects", type=int, help="of each database (4)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes, about 1.5 GB each (2)")
    parser.add_argument("--add", metavar="DATABASE", help=f"only add the next subject to one of {', '.join(SITES)}")
    args = parser.parse_args(argv)
    if args.add and args.subjects is not None:
        parser.error("--subjects cannot be given with --add, which adds one")
    try:
        if args.add:
            print(add_subject(args.out, args.add, seed=args.seed))
        else:
            seed, subjects = args.seed or 0, 4 if args.subjects is None else args.subjects
            print(*build_sites(args.out, seed=seed, subjects=subjects, workers=args.workers), sep="\n")
    except OSError as error:
        raise InputError(f"{error.filename or args.out}: {error.strerror or error}; a folder that can be written is wanted") from None


if __name__ == "__main__":
    run_stage(main)
