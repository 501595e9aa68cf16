"""Withdrawing: the bytes of never having been there, at whatever moment it is stopped, and for ever."""

import os
import shutil
import sys
from pathlib import Path
from subprocess import run as run_for_real

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_heads import CHECKOUT
from withdrawal import GONE, NEIGHBOURS, OTHER, PARAMS, SHARD, files

from data_registry.errors import InputError
from data_registry.files import sha256
from data_registry.ledgers import withdrawn
from data_registry.params import Resources, load_params
from data_registry.schema import read_table, write_table
from data_registry.shard_store import open_store
from lod_model.data import all_folds
from pipelines import harmonise, index, split, withdraw


def shards_of(never: dict[str, str]) -> dict[str, str]:
    return {path: digest for path, digest in never.items() if path.startswith("shards")}


def expected(never: dict[str, str]) -> dict[str, str]:
    """The split is frozen."""
    return never | {"tables/split.parquet": sha256("tables/split.parquet")}


def test_the_bytes_of_never_having_been_there(without_them, capsys):
    before = {path: (digest, Path(path).stat().st_ino) for path, digest in files("shards").items()}
    assert before[f"shards/{SHARD}"][0] != without_them[f"shards/{SHARD}"]
    withdraw.withdraw("alpha", [GONE], "asked for it")
    assert files("shards") | files("tables") == expected(without_them)
    assert [path for path, (_, inode) in before.items() if Path(path).stat().st_ino != inode] == [f"shards/{SHARD}"]
    (stone,) = withdrawn().tombstones
    assert stone[:2] == ("alpha", GONE) and stone.reason == "asked for it" and len(stone.date) == 10
    said = capsys.readouterr().out
    assert f"withdrawn: alpha, sub-{GONE} (withdrawn.tsv: 1 new line; git add and commit it)" in said
    assert "removed: 1 shards written again without them, 0 deleted" in said and "removed: tables/samples.parquet: 1 rows" in said
    assert "cannot be looked into: roots: no such folder" in said
    withdraw.withdraw("alpha", [GONE], "asked for it")  # known by its tombstone, and nothing to do
    assert files("shards") | files("tables") == expected(without_them) and len(withdrawn().tombstones) == 1


@pytest.mark.parametrize("step", ["_affected", "_write_without", "_drop_copies", "_clear_tables", "collect", "write_table", "left_elsewhere"])
def test_stopped_at_any_moment_it_goes_on(without_them, monkeypatch, step):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(withdraw, step, stopped)
        with pytest.raises(KeyboardInterrupt):
            withdraw.withdraw("alpha", [GONE], "asked for it")
    assert withdrawn().has("alpha", GONE)  # first of all
    withdraw.withdraw("alpha", [GONE], "asked for it")
    assert files("shards") | files("tables") == expected(without_them)


def test_stopped_because_nobody_reads_what_it_says(without_them):
    """As behind `| head -1`."""
    command = [sys.executable, "-m", "pipelines.withdraw", "alpha", "--subject", GONE, "--reason", "asked for it"]
    read, write = os.pipe()
    os.close(read)
    done = run_for_real(command, stdout=write, stderr=-1, text=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, check=False)
    os.close(write)
    told = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
    assert told == ["error: stopped, as who read the output is gone; what is complete is kept, run the same command again to go on"]
    assert done.returncode == 2 and withdrawn().has("alpha", GONE)
    withdraw.withdraw("alpha", [GONE], "asked for it")
    assert files("shards") | files("tables") == expected(without_them)


def test_index_and_harmonise_pass_over_the_raw_files_for_ever(with_them, without_them, caplog):
    Path("roots").symlink_to(with_them / "roots")
    old, samples = Path("tables/scans.parquet").read_bytes(), read_table("tables/samples.parquet", "samples").to_pylist()
    withdraw.withdraw("alpha", [GONE], "asked for it")
    with caplog.at_level("INFO", "lodbrain"):
        index.main()
    assert "withdrawn.tsv: 0 databases and 1 other scans are withdrawn and left out" in caplog.text
    assert sha256("tables/scans.parquet") == without_them["tables/scans.parquet"]
    Path("other").mkdir()
    (raw,) = with_them.glob(f"roots/alpha/sub-{GONE}")
    shutil.copytree(raw, f"other/again/{raw.name}".replace(GONE, "new"))
    for path in [*Path("other").rglob(f"*{GONE}*")]:
        path.rename(path.with_name(path.name.replace(GONE, "new")))
    rows = index.index([Path("roots"), Path("other")])
    assert f"again_sub-new: left out, its T1w is one of sub-{GONE} of alpha, withdrawn 2" in caplog.text
    assert "again" not in {row["database"] for row in rows} and len(rows) == read_table("tables/scans.parquet", "scans").num_rows
    Path("tables/scans.parquet").write_bytes(old)  # as `dvc checkout` of an old state would
    harmonise.harmonise()
    assert files("shards") == shards_of(without_them)
    write_table("tables/samples.parquet", "samples", samples)
    split.main()
    assert f"alpha_sub-{GONE}" not in {row["scan_id"] for row in read_table("tables/split.parquet", "split").to_pylist()}
    withdraw.withdraw("alpha", [], "agreement ended")
    caplog.clear()
    with caplog.at_level("INFO", "lodbrain"):
        index.main()
    assert "1 databases (alpha) and 0 other scans" in caplog.text
    assert {row["database"] for row in read_table("tables/scans.parquet", "scans").to_pylist()} == {"beta"}


def test_loaders_keep_everyone_elses_role(without_them):
    before = all_folds()
    withdraw.withdraw("alpha", [GONE], "asked for it")
    after = all_folds()
    for fold, roles in before.items():
        names = {role: [scan.scan_id for scan in scans if scan.scan_id != f"alpha_sub-{GONE}"] for role, scans in roles.items()}
        assert {role: [scan.scan_id for scan in scans] for role, scans in after[fold].items()} == {role: kept for role, kept in names.items() if kept}
    scan = next(scan for scans in after[0].values() for scan in scans if scan.scan_id == f"alpha_sub-{NEIGHBOURS[1]}")
    assert scan.t1w().shape == (16, 16, 16)


def test_a_database_goes_with_its_results_pictures_reports_and_copies(without_them, capsys):
    scan_ids = [f"alpha_sub-{GONE}", "beta_sub-00"]
    write_table("tables/results.parquet", "results", [{"scan_id": name, "metric": "dice"} for name in scan_ids], metadata={"identity": "x"})
    write_table("tables/split.parquet", "split", read_table("tables/split.parquet", "split").to_pylist(), metadata={"split_hash": "frozen"})
    for number, name in enumerate(scan_ids):
        Path("tables/cases").mkdir(exist_ok=True)
        np.savez(f"tables/cases/run-{number}.npz", scan_id=name, t1w=np.zeros(3))
        Path(f"tables/{number}.tsv").write_text(f"scan\n{name}\n")
    Path("reports").mkdir()
    Path("reports/report.html").write_text("pictures")
    Path("cache/shards").mkdir(parents=True)
    shutil.copy(f"shards/{SHARD}", "cache/shards/0.parquet")
    shutil.copy(min(Path("shards/grid=16mm/site=beta.beta").iterdir()), "cache/shards/1.parquet")
    withdraw.withdraw("alpha", [], "agreement ended")
    assert sorted(path.name for path in Path("shards/grid=16mm").iterdir()) == ["site=beta.beta"]
    assert [row["scan_id"] for row in read_table("tables/results.parquet", "results").to_pylist()] == ["beta_sub-00"]
    assert {row["database"] for row in read_table("tables/samples.parquet", "samples").to_pylist()} == {"beta"}
    left = {str(path) for folder in ("tables", "reports", "cache/shards") for path in Path(folder).rglob("*") if path.is_file()}
    tables = {f"tables/{name}" for name in ("results.parquet", "samples.parquet", "scans.parquet", "split.parquet", "split.json", "people.tsv")}
    assert left == {"tables/cases/run-1.npz", "tables/1.tsv", "cache/shards/1.parquet"} | tables
    assert "1 copies of shards in cache/shards" in capsys.readouterr().out
    assert {"/alpha/" in path for path in pq.read_table("cache/hashes.parquet")["path"].to_pylist()} == {False}


def test_a_shard_of_other_settings_is_deleted_whole(without_them, capsys):
    Path("params.yaml").write_text(PARAMS.replace("16mm, ", "16mm, intensity: n4, "))
    withdraw.withdraw("alpha", [GONE], "asked for it")
    assert not Path("shards", SHARD).exists() and Path("shards", OTHER).exists()
    assert "made under other settings, held others too; make them anew: python -m pipelines.harmonise" in capsys.readouterr().out
    samples = read_table("tables/samples.parquet", "samples").to_pylist()
    assert sorted(row["shard"] for row in samples if row["database"] == "alpha" and row["status"] == "ok") == [OTHER]


def test_in_an_object_store_and_its_cache(without_them, tmp_path, capsys):
    resources = Resources(shards=f"file://{tmp_path}/bucket", cache_folder="cache/shards")
    Path("params.yaml").write_text(PARAMS + f"resources: {resources.model_dump_json(include={'shards', 'cache_folder'})}\n")
    store = open_store(resources)
    for path in files("shards"):
        name = path.removeprefix("shards/")
        Path("bucket", name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, Path("bucket", name))
        Path("bucket", name + ".sha256").write_text(sha256(path))
    assert store.shards() == [path.removeprefix("shards/") for path in files("shards")]
    withdraw.withdraw("alpha", [GONE], "asked for it")
    assert {path.replace("bucket", "shards"): digest for path, digest in files("bucket").items()} == shards_of(without_them)
    assert list(Path("cache/shards").glob("*.parquet")) == [] and sha256("tables/samples.parquet") == without_them["tables/samples.parquet"]
    assert "on every other machine that has trained: rm -f cache/shards/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("database", "subjects", "words"),
    [
        ("gamma", [], "gamma: no such database; one of alpha, beta is wanted"),
        ("alpha", ["nobody"], "--subject nobody: alpha has 4, e.g. "),
    ],
)
def test_a_slip_of_the_pen_withdraws_nothing(without_them, database, subjects, words):
    with pytest.raises(InputError, match=words):
        withdraw.withdraw(database, subjects, "slip")
    assert not Path("withdrawn.tsv").exists()


def test_a_person_of_a_database_that_is_not_here_yet(without_them, caplog):
    with caplog.at_level("WARNING", "lodbrain"):
        withdraw.withdraw("ixi", ["IXI002Guys0828"], "asked for it")
    assert "nobody of ixi is in this project, so that labels cannot be checked: IXI002Guys0828" in caplog.text
    assert withdrawn().has("ixi", "IXI002Guys0828") and not withdrawn().has("ixi")


def test_a_person_without_a_scan(without_them):
    (Path("roots/alpha/sub-00/anat")).mkdir(parents=True)
    Path("roots/alpha/participants.tsv").write_text("age\tparticipant_id\n99\tsub-77\n")
    Path("tables/conflicts.tsv").write_text("kind\tdatabase\tsubject\nrow without scan\talpha\t77\n")
    withdraw.withdraw("alpha", ["77"], "asked for it")
    assert withdrawn().has("alpha", "77") and not Path("tables/conflicts.tsv").exists()
    with pytest.raises(InputError, match="--subject 99"):
        withdraw.withdraw("alpha", ["99"], "slip")


def test_a_database_of_the_catalogue_before_it_comes(without_them):
    withdraw.withdraw("ixi", [], "not allowed here")
    assert withdrawn().has("ixi", "IXI002Guys0828") and load_params().index.roots == ("roots",)
    Path("withdrawn.tsv").write_text("nonsense\n")
    with pytest.raises(InputError, match="column database is missing"):
        harmonise.harmonise()
