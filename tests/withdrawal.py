"""A project of two databases with somebody, ``GONE``, who is to be withdrawn, and what it would be without them."""

import shutil
from pathlib import Path

import pytest
from small_heads import add_subject

from data_registry import shards
from data_registry.files import sha256
from pipelines import harmonise, index, split, withdraw_reach

PARAMS = "index: {roots: [roots]}\nharmonise: {grid: 16mm, shards_per_site: 2}\nsplit: {folds: 2}\n"
GONE = "10"
PART = shards.shard_of(GONE, 2)
SAME = [f"{number:02d}" for number in range(20) if shards.shard_of(f"{number:02d}", 2) == PART]
NEIGHBOURS = [max(name for name in SAME if name < GONE), min(name for name in SAME if name > GONE)]
APART = next(f"{number:02d}" for number in range(20) if shards.shard_of(f"{number:02d}", 2) != PART)
SHARD, OTHER = (f"grid=16mm/site=alpha.alpha/part-{part:03d}.parquet" for part in (PART, 1 - PART))


def build(folder: Path) -> dict[str, str]:
    """Make the project, with a scan that cannot be used; returns the hashes of its files from before ``GONE`` came."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(harmonise, "run_bounded", make_in_turn)
        Path("params.yaml").write_text(PARAMS)
        for subject in (*NEIGHBOURS, APART):
            add_subject(Path("roots/alpha"), subject, seed=int(subject))
        for subject in ("00", "01", "03"):
            add_subject(Path("roots/beta"), subject, seed=50 + int(subject))
        cut = Path(f"roots/alpha/sub-{NEIGHBOURS[0]}/anat/sub-{NEIGHBOURS[0]}_ses-2_T1w.nii.gz")  # quarantined, in the shard that is written again
        cut.write_bytes(b"x")
        run_stages()
        never = files("shards") | files("tables")
        add_subject(Path("roots/alpha"), GONE, seed=99)
        run_stages()
    return never


def copy_to(folder: Path, project: Path, monkeypatch) -> None:
    """Copy the project without its raw files and go there; other programs are not to be started."""
    shutil.copytree(project, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("roots"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(harmonise, "run_bounded", make_in_turn)
    monkeypatch.setattr(withdraw_reach.subprocess, "run", lambda *_, **__: pytest.fail("no other program is asked"))


def make_in_turn(function, items, *, memory, again, workers, address):
    yield from ((number, function(*item)) for number, item in enumerate(items))


def run_stages() -> None:
    index.main()
    harmonise.harmonise()
    split.main()


def files(folder: str) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(Path(folder).rglob("*.parquet"))}
