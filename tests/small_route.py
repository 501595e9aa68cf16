"""A small database on a route, and what fetching it leaves in a project."""

import csv
import gzip
import hashlib
import random
from pathlib import Path

from data_registry.catalogue import find_database
from data_registry.catalogue_schema import Database, Site, SiteRule
from pipelines import fetch as fetching
from pipelines import fetch_routes, fetch_sources
from pipelines import index as indexing
from pipelines.fetch import Network, fetch

NETWORK = Network(workers=2, tries=1, timeout_s=10)
NAME = "small"
SITES = {"Ash": "ash", "Oak": "oak"}
T1W = "sub-01/anat/sub-01_T1w.nii.gz"


def scan(seed: int, size: int = 200_000) -> bytes:
    """Begins as gzip does."""
    return gzip.compress(random.Random(seed).randbytes(size), 0, mtime=0)


WANTED = {
    "dataset_description.json": b'{"Name": "small"}', "README": b"read me", "T1w.json": b'{"MagneticFieldStrength": 3}',
    "participants.tsv": "participant_id\tsite\tname\nsub-01\tAsh\tÄ\nsub-02\tOak\tB\nsub-03\tOak\tC\n".encode(),
    T1W: scan(1, 900_000), "sub-01/anat/sub-01_T1w.json": b"{}", "sub-02/anat/sub-02_T1w.nii.gz": scan(2),
    "sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz": scan(3), "sub-02/anat/sub-02_acq-100% #ä+&?[x]_T1w.nii.gz": scan(14),
    "derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz": scan(4), "derivatives/hand/sub-02/anat/sub-02_desc-a_dseg.nii.gz": scan(5),
    "derivatives/freesurfer/sub-03_ses-1/mri/aseg.mgz": scan(6),
}  # fmt: skip
UNWANTED = {
    "sub-01/func/sub-01_task-rest_bold.nii.gz": scan(7), "sub-01/anat/sub-01_T2w.nii.gz": scan(8),
    "derivatives/freesurfer/sub-01/mri/T1.mgz": scan(9),
    "derivatives/freesurfer/fsaverage/mri/aseg.mgz": scan(10), "sub-01/anat/sub-01_T1w.nii.gz.bak": b"x", "code/run.sh": b"x",
}  # fmt: skip


def project(tmp_path: Path, monkeypatch) -> Path:
    """An empty project, a catalogue with a database of two sites, small pieces and short waits."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fetch_sources, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(fetch_routes, "BACKOFF_S", 0.01)
    known(monkeypatch)
    return folder


def known(monkeypatch, **fields) -> None:
    """The catalogue has the database, as these fields say."""
    found = database(**fields)
    for user in (fetching, indexing):
        monkeypatch.setattr(user, "find_database", lambda name: found if name == NAME else find_database(name))


def database(**fields) -> Database:
    sites = {site: Site(place=place) for site, place in SITES.items()}
    given = {"licence": "CC0", "access": "open", "site_rule": SiteRule(participants="site"), "source": "made for tests", "sites": sites} | fields
    return Database(name=NAME, title=NAME, **given)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def get(route: str | Path, **settings) -> dict[str, str]:
    return fetch(NAME, route=str(route), accepted="CC0", **{"network": NETWORK} | settings)


def there(root: Path = Path("data", NAME)) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "fetched.tsv"}


def ledger() -> dict[str, dict]:
    with open(Path("data", NAME, "fetched.tsv"), encoding="utf-8", newline="") as handle:
        return {row["path"]: row for row in csv.DictReader(handle, delimiter="\t")}


def manifest(folder: Path, *, odd: str = "", **changed: str) -> None:
    """Write ``manifest.tsv`` of a folder; ``odd`` is a line more, ``changed`` the checksums of files by name."""
    lines = [
        f"{path.relative_to(folder)}\t{path.stat().st_size}\t{changed.get(path.name.split('.')[0]) or hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.tsv"
    ]  # fmt: skip
    (folder / "manifest.tsv").write_text("\n".join(["path\tsize\tsha256", *lines, odd]), encoding="utf-8")
