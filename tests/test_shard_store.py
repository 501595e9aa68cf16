"""Where shards stand: a folder and a real S3 server on loopback behave alike; the cache is capped, shared, and heals; readers stay small."""

import fcntl
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from loopback_s3 import s3_server
from small_heads import CHECKOUT, add_subject, run

from data_registry import shards
from data_registry.errors import InputError
from data_registry.params import Resources
from data_registry.schema import read_table
from data_registry.shard_store import FolderStore, RemoteStore, open_store
from lod_model.data import SampleDataset, all_folds

SIDE = 16
NAMES = [f"grid=1mm/site=db.{site}/part-000.parquet" for site in "abc"]


@pytest.fixture(scope="module", autouse=True)
def server():
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        yield


@pytest.fixture
def remote(tmp_path, request) -> RemoteStore:
    """A store of its own with three shards of three rows, of about 12.6 kB each, and a cache without limits."""
    name = re.sub(r"\W+", "-", request.node.name)
    store = open_store(Resources(shards=f"s3://lab/{name}", cache_folder=str(tmp_path / "copies"), cache_gb=1))
    for shard in NAMES:
        store.write(shard, rows_of(shard), metadata={"recipe": shard})
    return store


def rows_of(shard: str) -> list[dict]:
    generator = np.random.default_rng(NAMES.index(shard))
    return [{"scan_id": f"{shard}:{row}", "t1w_x1": generator.integers(0, 256, (SIDE,) * 3).astype(np.uint8)} for row in range(3)]


def read(store, shard: str, row: int) -> np.ndarray:
    return store.read_row(shard, row, ["t1w_x1"], scan_id=f"{shard}:{row}", sha256=store.sha256(shard))["t1w_x1"]


def copies(store: RemoteStore) -> set[str]:
    return {path.name for path in store.cache.folder.iterdir()}


def copy_of(store: RemoteStore, shard: str) -> Path:
    return store.cache.folder / f"{store.sha256(shard)}.parquet"


def damage_object(store: RemoteStore, shard: str) -> None:
    """Another byte in the middle of the middle row, as a store that rots."""
    with store._asked(shard) as (files, path):
        content = bytearray(files.cat_file(path))
        content[len(content) // 2] ^= 0xFF
        files.pipe_file(path, bytes(content))


def test_a_folder_and_a_bucket_behave_alike(remote, tmp_path):
    folder = open_store(Resources(shards=str(tmp_path / "shards")))
    assert isinstance(folder, FolderStore) and isinstance(remote, RemoteStore)
    for store in (folder, remote):
        assert store.metadata("grid=1mm/site=db.a/part-009.parquet") is None
        for shard in NAMES:
            store.write(shard, rows_of(shard), metadata={"recipe": shard})
            assert store.metadata(shard) == {"recipe": shard}
            for number, row in enumerate(rows_of(shard)):
                assert np.array_equal(read(store, shard, number), row["t1w_x1"])
        assert store.where(NAMES[0]).endswith("/" + NAMES[0])
        with pytest.raises(shards.ShardError, match="row group 1 holds .*c/part-000.parquet:1; else is wanted") as caught:
            store.read_row(NAMES[2], 1, ["t1w_x1"], scan_id="else", sha256=store.sha256(NAMES[2]))
        assert str(caught.value).startswith(store.where(NAMES[2]))
    assert [folder.sha256(shard) for shard in NAMES] == [remote.sha256(shard) for shard in NAMES]


def test_what_is_not_named_goes_and_foreign_files_stay(remote, tmp_path):
    folder = open_store(Resources(shards=str(tmp_path / "shards")))
    folder.write(NAMES[0], rows_of(NAMES[0]), metadata={})
    folder.write(NAMES[1], rows_of(NAMES[1]), metadata={})
    (folder.root / "notes.txt").write_text("mine")
    with remote._asked() as (files, root):
        files.pipe_file(f"{root}/notes.txt", b"mine")
    for store in (folder, remote):
        store.keep_only({NAMES[1]})
        assert store.metadata(NAMES[0]) is None and store.metadata(NAMES[1]) is not None
    assert sorted(path.name for path in folder.root.rglob("*")) == ["grid=1mm", "notes.txt", "part-000.parquet", "site=db.b"]
    with remote._asked() as (files, root):
        assert [path.removeprefix(root) for path in files.find(root)] == [f"/{NAMES[1]}", f"/{NAMES[1]}.sha256", "/notes.txt"]


def test_a_shard_without_its_hash_is_none_to_writers(remote):
    """As when writing is stopped between the two. Who knows the hash from the table reads it: so a bucket may be filled by any tool."""
    digest = remote.sha256(NAMES[0])
    with remote._asked(NAMES[0]) as (files, path):
        files.rm_file(path + ".sha256")
    assert remote.metadata(NAMES[0]) is None
    row = remote.read_row(NAMES[0], 2, ["t1w_x1"], scan_id=f"{NAMES[0]}:2", sha256=digest)
    assert np.array_equal(row["t1w_x1"], rows_of(NAMES[0])[2]["t1w_x1"])
    remote.write(NAMES[0], rows_of(NAMES[0]), metadata={"recipe": "again"})
    assert remote.metadata(NAMES[0]) == {"recipe": "again"} and read(remote, NAMES[0], 0).shape == (SIDE,) * 3


def test_the_least_recently_used_goes_first(remote):
    size = len(shard_bytes(remote, NAMES[0]))
    remote = replace(remote, cache=replace(remote.cache, max_bytes=int(2.5 * size)))
    for shard in (NAMES[0], NAMES[1], NAMES[0], NAMES[2]):
        read(remote, shard, 1)
    assert copies(remote) == {copy_of(remote, NAMES[0]).name, copy_of(remote, NAMES[2]).name}
    assert sum(path.stat().st_size for path in remote.cache.folder.iterdir()) <= remote.cache.max_bytes
    with open(copy_of(remote, NAMES[0]), "rb") as held:
        read(remote, NAMES[2], 0)
        read(remote, NAMES[1], 0)
        assert not copy_of(remote, NAMES[0]).exists()
        assert held.read() == shard_bytes(remote, NAMES[0])  # who has it open reads on


def shard_bytes(store: RemoteStore, shard: str) -> bytes:
    with store._asked(shard) as (files, path):
        return files.cat_file(path)


def test_a_cache_too_small_for_one_shard_is_said(remote):
    remote = replace(remote, cache=replace(remote.cache, max_bytes=5000))
    with pytest.raises(InputError, match=r"resources.cache_gb is 5e-06: s3://lab/.*/site=db.a/part-000.parquet alone has .* GB; more is wanted"):
        read(remote, NAMES[0], 0)
    assert copies(remote) == set()


def test_a_damaged_copy_is_fetched_again_once(remote):
    read(remote, NAMES[0], 1)
    copy = copy_of(remote, NAMES[0])
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 0xFF
    copy.write_bytes(content)
    with pytest.raises(shards.DamagedShard, match="row group 1 is damaged"):
        shards.read_row(copy, 1, ["t1w_x1"])
    assert np.array_equal(read(remote, NAMES[0], 1), rows_of(NAMES[0])[1]["t1w_x1"])
    assert copy.read_bytes() == shard_bytes(remote, NAMES[0])


def test_a_damaged_object_is_named_with_its_row_group(remote):
    read(remote, NAMES[0], 1)
    damage_object(remote, NAMES[0])
    assert np.array_equal(read(remote, NAMES[0], 1), rows_of(NAMES[0])[1]["t1w_x1"])  # the copy is whole
    copy_of(remote, NAMES[0]).write_bytes(b"lost")
    with pytest.raises(shards.ShardError) as caught:
        read(remote, NAMES[0], 1)
    assert str(caught.value).startswith(f"{remote.where(NAMES[0])}: row group 1 is damaged (") and "\n" not in str(caught.value)
    assert copies(remote) == set()
    with pytest.raises(shards.ShardError, match="site=db.a/part-000.parquet: row group 1 is damaged"):
        read(remote, NAMES[0], 0)  # a copy is whole or none


def test_bytes_that_stay_damaged_on_this_disk_are_named(remote, monkeypatch):
    """A disk that loses what it was given, also the second time."""
    seen = []

    def rotten(path, row_group, columns, *, scan_id):
        seen.append(path)
        raise shards.DamagedShard(f"{path}: row group {row_group} is damaged (crc)")

    monkeypatch.setattr("data_registry.shard_store.read_row", rotten)
    with pytest.raises(shards.DamagedShard, match=r"^s3://lab/.*/site=db.a/part-000.parquet: row group 2 is damaged"):
        read(remote, NAMES[0], 2)
    assert len(seen) == 2


def test_another_shard_than_the_table_names_is_refused(remote):
    with pytest.raises(shards.ShardError, match="not the shard that tables/samples.parquet names"):
        remote.read_row(NAMES[0], 0, ["t1w_x1"], scan_id="x", sha256=remote.sha256(NAMES[1]))


@pytest.mark.parametrize(
    ("url", "words"),
    [("s3://none/shards", "no such shard, or no such bucket"), ("nope://x", "Protocol not known: nope"), ("s3://lab/empty", "no such shard")],
)
def test_a_store_that_is_not_there_is_one_line(tmp_path, url, words):
    store = open_store(Resources(shards=url, cache_folder=str(tmp_path)))
    with pytest.raises(InputError, match=words) as caught:
        store.read_row(NAMES[0], 0, ["t1w_x1"], scan_id="x", sha256="0" * 64)
    assert f"{url}/{NAMES[0]}" in str(caught.value) and "\n" not in str(caught.value)


def test_what_died_on_its_way_in_is_removed_and_what_lives_is_not(remote):
    remote.cache.folder.mkdir()
    dead, living = (remote.cache.folder / f".fetching-{letter * 64}" for letter in "ab")
    own = remote.cache.folder / f".fetching-{remote.sha256(NAMES[0])}"
    for path in (dead, living, own):
        path.write_bytes(b"half of a shard")
    with open(living, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert np.array_equal(read(remote, NAMES[0], 0), rows_of(NAMES[0])[0]["t1w_x1"])
        assert copies(remote) == {living.name, copy_of(remote, NAMES[0]).name}


def test_a_reader_waits_for_anothers_download(remote):
    """Two want one shard: it is downloaded once, and the second sees nothing of it before it is whole."""
    started, go, downloads = threading.Event(), threading.Event(), []
    digest = remote.sha256(NAMES[0])

    def slow():
        downloads.append(1)
        started.set()
        assert go.wait(30)
        return remote._opened(NAMES[0])

    def wanted():
        remote.cache.copy(digest, slow, where="here")

    readers = [threading.Thread(target=wanted) for _ in range(2)]
    readers[0].start()
    assert started.wait(30)
    readers[1].start()
    assert not copy_of(remote, NAMES[0]).exists()
    go.set()
    for reader in readers:
        reader.join(30)
    assert len(downloads) == 1 and copy_of(remote, NAMES[0]).read_bytes() == shard_bytes(remote, NAMES[0])


def _reader(store, seed: int, answers) -> None:
    """Many rows in an order of its own; the wrong ones are counted."""
    generator = np.random.default_rng(seed)
    wrong = 0
    for shard, row in ((NAMES[generator.integers(3)], int(generator.integers(3))) for _ in range(12)):
        wrong += not np.array_equal(read(store, shard, row), rows_of(shard)[row]["t1w_x1"])
    answers.put(wrong)


def test_many_processes_share_a_cache_that_is_too_small(remote):
    """Forked after this process has asked the store itself; the cache holds two of three shards, so they evict each other's all the time."""
    size = len(shard_bytes(remote, NAMES[0]))
    store = replace(remote, cache=replace(remote.cache, max_bytes=int(2.5 * size)))
    assert read(store, NAMES[0], 0).shape == (SIDE,) * 3
    forked = multiprocessing.get_context("fork")
    answers = forked.Queue()
    readers = [forked.Process(target=_reader, args=(store, seed, answers)) for seed in range(6)]
    for reader in readers:
        reader.start()
    assert [answers.get(timeout=120) for _ in readers] == [0] * 6
    for reader in readers:
        reader.join(30)
        assert reader.exitcode == 0
    assert all(name.endswith(".parquet") for name in copies(store)) and 1 <= len(copies(store)) <= 2


def _grown(path: Path, answers) -> None:
    """(anonymous memory that 40 more rows of 2 MB leave behind, files that are open besides)."""

    def memory() -> int:
        return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    def reads(number: int) -> None:
        for index in range(number):
            shards.read_row(path, index % 3, ["t1w_x1"])

    reads(6)
    before, files = memory(), len(os.listdir("/proc/self/fd"))
    reads(40)
    answers.put((memory() - before, len(os.listdir("/proc/self/fd")) - files))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_sixteen_readers_stays_flat(tmp_path):
    """If a reader kept what it reads, it would grow by 84 MB."""
    path = tmp_path / "part-000.parquet"
    generator = np.random.default_rng(0)
    rows = [{"scan_id": str(i), "t1w_x1": generator.integers(0, 256, (128,) * 3).astype(np.uint8)} for i in range(3)]
    shards.write_shard(path, rows, metadata={})
    forked = multiprocessing.get_context("fork")
    answers = forked.Queue()
    readers = [forked.Process(target=_grown, args=(path, answers)) for _ in range(16)]
    for reader in readers:
        reader.start()
    grown = [answers.get(timeout=120) for _ in readers]
    for reader in readers:
        reader.join(30)
    assert max(extra for extra, _ in grown) < 25e6 and {files for _, files in grown} == {0}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Three databases of two people, harmonised into a folder, split, then harmonised into a bucket."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pipelines").symlink_to(CHECKOUT / "pipelines")
    for number, name in enumerate(("alpha", "beta", "gamma")):
        for subject in range(2):
            add_subject(folder / "roots" / name, f"{subject:02d}", seed=10 * number + subject)
    settings = {"index": {"roots": ["roots"]}, "harmonise": {"grid": "16mm", "shards_per_site": 1}, "split": {"folds": 3}}
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))
    for stage in ("index", "harmonise", "split"):
        done = run(folder, f"pipelines.{stage}")
        assert done.returncode == 0, done.stderr
    settings["resources"] = {"shards": "s3://lab/project/shards", "cache_gb": 0.1}
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_harmonise_writes_to_a_bucket_and_training_reads_the_same(project, monkeypatch):
    table = (project / "tables/samples.parquet").read_bytes()
    done = run(project, "pipelines.harmonise")
    assert done.returncode == 0 and "3 to make" in done.stderr, done.stderr
    assert (project / "tables/samples.parquet").read_bytes() == table  # the same shards, to the byte
    subprocess.run(["mv", "shards", "away"], cwd=project, check=True)
    done = run(project, "pipelines.harmonise")
    assert done.returncode == 0 and "0 to make" in done.stderr and list((project / "shards").iterdir()) == []
    monkeypatch.chdir(project)
    bucket = all_folds(Resources(shards="s3://lab/project/shards", cache_gb=0.1))[0]["external_test"]
    folder = all_folds(Resources(shards="away"))[0]["external_test"]
    for level in ("coarse", "fine"):
        ours, theirs = (SampleDataset(scans, level=level, protocol="lod7", augmentation="light") for scans in (bucket, folder))
        assert len(ours) == len(theirs) == 2
        for index in range(2):
            one, other = ours[0, index], theirs[0, index]
            assert all(one[key].equal(other[key]) for key in ("image", "target"))
    hashes = {row["shard_sha256"] for row in read_table("tables/samples.parquet", "samples").to_pylist()}
    assert {path.stem for path in Path("cache/shards").iterdir()} == {scan.shard_sha256 for scan in bucket} < hashes


def test_forked_loaders_read_a_bucket(project, monkeypatch):
    """Workers of torch's DataLoader, forked from a process that has read the bucket already."""
    from torch.utils.data import DataLoader

    monkeypatch.chdir(project)
    assert run(project, "pipelines.harmonise").returncode == 0
    roles = all_folds(Resources(shards="s3://lab/project/shards", cache_gb=0.1))[0]
    scans = [scan for scans in roles.values() for scan in scans]
    data = SampleDataset(scans, level="coarse", protocol="lod7")
    here = [data[0, index]["image"] for index in range(len(scans))]
    loader = DataLoader(data, sampler=[(0, index) for index in range(len(scans))], batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert all(sample["image"].equal(image) for sample, image in zip(loader, here, strict=True)) and len(here) == 6
