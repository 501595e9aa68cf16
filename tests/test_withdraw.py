"""Withdrawing: the bytes of never having been there, at whatever moment it is stopped, and nothing left unsaid."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from subprocess import run as run_for_real

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_heads import CHECKOUT, add_subject

from data_registry import shards
from data_registry.errors import InputError
from data_registry.files import sha256
from data_registry.ledgers import withdrawn
from data_registry.params import Resources, load_params
from data_registry.schema import read_table, write_table
from data_registry.shard_store import open_store
from data_registry.split import data_hash
from lod_model.data import all_folds
from pipelines import harmonise, index, split, withdraw, withdraw_reach

PARAMS = "index: {roots: [roots]}\nharmonise: {grid: 16mm, shards_per_site: 2}\nsplit: {folds: 2}\n"
GONE = "10"
PART = shards.shard_of(GONE, 2)
SAME = [f"{number:02d}" for number in range(20) if shards.shard_of(f"{number:02d}", 2) == PART]
NEIGHBOURS = [max(name for name in SAME if name < GONE), min(name for name in SAME if name > GONE)]
APART = next(f"{number:02d}" for number in range(20) if shards.shard_of(f"{number:02d}", 2) != PART)
SHARD, OTHER = (f"grid=16mm/site=alpha.alpha/part-{part:03d}.parquet" for part in (PART, 1 - PART))


def make_in_turn(function, items, *, memory, again, workers, address):
    yield from ((number, function(*item)) for number, item in enumerate(items))


def run_stages() -> None:
    index.main()
    harmonise.harmonise()
    split.main()


def files(folder: str) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(Path(folder).rglob("*.parquet"))}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of two databases with a scan that cannot be used, and what it would be without ``GONE``: (folder, hashes of its files)."""
    folder = tmp_path_factory.mktemp("project")
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
    return folder, never


@pytest.fixture
def copy(project, tmp_path, monkeypatch):
    """A copy of the project, without its raw files."""
    shutil.copytree(project[0], tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("roots"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harmonise, "run_bounded", make_in_turn)
    monkeypatch.setattr(withdraw_reach.subprocess, "run", lambda *_, **__: pytest.fail("no other program is asked"))
    return project[1]


def shards_of(never: dict[str, str]) -> dict[str, str]:
    return {path: digest for path, digest in never.items() if path.startswith("shards")}


def expected(never: dict[str, str]) -> dict[str, str]:
    """The split is frozen."""
    return never | {"tables/split.parquet": sha256("tables/split.parquet")}


def test_the_bytes_of_never_having_been_there(copy, capsys):
    before = {path: (digest, Path(path).stat().st_ino) for path, digest in files("shards").items()}
    assert before[f"shards/{SHARD}"][0] != copy[f"shards/{SHARD}"]
    withdraw.withdraw("alpha", [GONE], "asked for it")
    assert files("shards") | files("tables") == expected(copy)
    assert [path for path, (_, inode) in before.items() if Path(path).stat().st_ino != inode] == [f"shards/{SHARD}"]
    (stone,) = withdrawn().tombstones
    assert stone[:2] == ("alpha", GONE) and stone.reason == "asked for it" and len(stone.date) == 10
    said = capsys.readouterr().out
    assert f"withdrawn: alpha, sub-{GONE} (withdrawn.tsv: 1 new line; git add and commit it)" in said
    assert "removed: 1 shards written again without them, 0 deleted" in said and "removed: tables/samples.parquet: 1 rows" in said
    assert "cannot be looked into: roots: no such folder" in said
    withdraw.withdraw("alpha", [GONE], "asked for it")  # known by its tombstone, and nothing to do
    assert files("shards") | files("tables") == expected(copy) and len(withdrawn().tombstones) == 1


@pytest.mark.parametrize("step", ["_affected", "_write_without", "_drop_copies", "_clear_tables", "collect", "write_table", "left_elsewhere"])
def test_stopped_at_any_moment_it_goes_on(copy, monkeypatch, step):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(withdraw, step, stopped)
        with pytest.raises(KeyboardInterrupt):
            withdraw.withdraw("alpha", [GONE], "asked for it")
    assert withdrawn().has("alpha", GONE)  # first of all
    withdraw.withdraw("alpha", [GONE], "asked for it")
    assert files("shards") | files("tables") == expected(copy)


def test_stopped_because_nobody_reads_what_it_says(copy):
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
    assert files("shards") | files("tables") == expected(copy)


def test_index_and_harmonise_pass_over_the_raw_files_for_ever(project, copy, caplog):
    Path("roots").symlink_to(project[0] / "roots")
    old, samples = Path("tables/scans.parquet").read_bytes(), read_table("tables/samples.parquet", "samples").to_pylist()
    withdraw.withdraw("alpha", [GONE], "asked for it")
    with caplog.at_level("INFO", "lodbrain"):
        index.main()
    assert "withdrawn.tsv: 0 databases and 1 other scans are withdrawn and left out" in caplog.text
    assert sha256("tables/scans.parquet") == copy["tables/scans.parquet"]
    Path("other").mkdir()
    (raw,) = project[0].glob(f"roots/alpha/sub-{GONE}")
    shutil.copytree(raw, f"other/again/{raw.name}".replace(GONE, "new"))
    for path in [*Path("other").rglob(f"*{GONE}*")]:
        path.rename(path.with_name(path.name.replace(GONE, "new")))
    rows = index.index([Path("roots"), Path("other")])
    assert f"again_sub-new: left out, its T1w is one of sub-{GONE} of alpha, withdrawn 2" in caplog.text
    assert "again" not in {row["database"] for row in rows} and len(rows) == read_table("tables/scans.parquet", "scans").num_rows
    Path("tables/scans.parquet").write_bytes(old)  # as `dvc checkout` of an old state would
    harmonise.harmonise()
    assert files("shards") == shards_of(copy)
    write_table("tables/samples.parquet", "samples", samples)
    split.main()
    assert f"alpha_sub-{GONE}" not in {row["scan_id"] for row in read_table("tables/split.parquet", "split").to_pylist()}
    withdraw.withdraw("alpha", [], "agreement ended")
    caplog.clear()
    with caplog.at_level("INFO", "lodbrain"):
        index.main()
    assert "1 databases (alpha) and 0 other scans" in caplog.text
    assert {row["database"] for row in read_table("tables/scans.parquet", "scans").to_pylist()} == {"beta"}


def test_loaders_keep_everyone_elses_role(copy):
    before = all_folds()
    withdraw.withdraw("alpha", [GONE], "asked for it")
    after = all_folds()
    for fold, roles in before.items():
        names = {role: [scan.scan_id for scan in scans if scan.scan_id != f"alpha_sub-{GONE}"] for role, scans in roles.items()}
        assert {role: [scan.scan_id for scan in scans] for role, scans in after[fold].items()} == {role: kept for role, kept in names.items() if kept}
    scan = next(scan for scans in after[0].values() for scan in scans if scan.scan_id == f"alpha_sub-{NEIGHBOURS[1]}")
    assert scan.t1w().shape == (16, 16, 16)


def test_a_database_goes_with_its_results_pictures_reports_and_copies(copy, capsys):
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


def test_a_shard_of_other_settings_is_deleted_whole(copy, capsys):
    Path("params.yaml").write_text(PARAMS.replace("16mm, ", "16mm, intensity: n4, "))
    withdraw.withdraw("alpha", [GONE], "asked for it")
    assert not Path("shards", SHARD).exists() and Path("shards", OTHER).exists()
    assert "made under other settings, held others too; make them anew: python -m pipelines.harmonise" in capsys.readouterr().out
    samples = read_table("tables/samples.parquet", "samples").to_pylist()
    assert sorted(row["shard"] for row in samples if row["database"] == "alpha" and row["status"] == "ok") == [OTHER]


def test_in_an_object_store_and_its_cache(copy, tmp_path, capsys):
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
    assert {path.replace("bucket", "shards"): digest for path, digest in files("bucket").items()} == shards_of(copy)
    assert list(Path("cache/shards").glob("*.parquet")) == [] and sha256("tables/samples.parquet") == copy["tables/samples.parquet"]
    assert "on every other machine that has trained: rm -f cache/shards/" in capsys.readouterr().out


def test_nothing_is_left_unsaid(copy, project, capsys, monkeypatch):
    """Checkpoints, MLflow, DVC, the object store, the same person elsewhere, raw files, other projects."""
    Path("roots").symlink_to(project[0] / "roots")
    run = Path("checkpoints/unet-base-0")
    for fold, seen in (("fold-0", f"alpha_sub-{GONE}"), ("fold-1", "beta_sub-00")):
        (run / fold).mkdir(parents=True)
        (run / fold / "seen.tsv").write_text(f"scan_id\tdatabase\tsite\trole\n{seen}\t{seen[:5]}\tx\tval\n")
        (run / fold / "fold.json").write_text(json.dumps({"data": {"data_hash": fold}}))
    (run / "fold-2").mkdir()
    (run / "fold-2/started-0123").touch()
    Path("old").mkdir()
    torch.save({"provenance": {"trained_on": ["alpha.alpha"]}}, "old/yes.pt")
    torch.save({"provenance": {"trained_on": ["alphabet.a", "beta.beta"], "data": [{"name": "beta"}]}}, "old/no.pt")
    torch.save({"provenance": {"data": [{"name": "alpha"}]}}, "old/chosen.pt")
    header = json.dumps({"__metadata__": {"provenance": '{"trained_on": ["alpha.alpha"]}'}}).encode()
    Path("old/given.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"beta.")
    rows = read_table("tables/scans.parquet", "scans").to_pylist()
    for row in rows:
        row["person"] = f"alpha/{GONE}" if row["scan_id"] == "beta_sub-01" else row["person"]
    write_table("tables/scans.parquet", "scans", rows)
    Path("tables/people.tsv").write_text(f"verdict\tlikeness\tscan_a\tscan_b\nreview\t0.750\talpha_sub-{GONE}\tbeta_sub-03\n")
    Path("runs/second/tables").mkdir(parents=True)
    Path("runs/second/params.yaml").touch()
    Path("mlflow").mkdir()
    Path("mlflow/mlflow.db").touch()
    asked = []

    def tracking(command, **_):
        asked.append(command)
        return type("Done", (), {"returncode": 2, "stdout": "", "stderr": "error: the server is away\n"})

    monkeypatch.setattr(withdraw_reach.subprocess, "run", tracking)
    write_table("tables/split.parquet", "split", [{"fold": 0, "scan_id": row["scan_id"], "person": row["person"]} for row in rows])
    samples, trained = sha256("tables/samples.parquet"), data_hash(Path("tables"))
    cached = lab_cache()
    withdraw.withdraw("alpha", [f"{GONE}"], "asked for it", dry_run=True)
    assert not Path("withdrawn.tsv").exists() and sha256("tables/samples.parquet") == samples
    dry = capsys.readouterr().out
    withdraw.withdraw("alpha", [GONE], "asked for it")
    said = capsys.readouterr().out
    assert said.split("\n\n", 1)[1] == dry.split("\n\n", 1)[1]  # a dry run says it all
    for line in (
        "beta_sub-01: python -m pipelines.withdraw beta --subject 01 --reason 'asked for it'",
        f"beta_sub-03 may be: a likeness of 0.750 to alpha_sub-{GONE}, which nobody has looked at",
        f"rm -r roots/alpha/sub-{GONE}",
        f"rm -r roots/alpha/derivatives/freesurfer/sub-{GONE}",
        "checkpoints/unet-base-0/fold-0 saw 0 scans for train, 1 scans for val: rm -r checkpoints/unet-base-0/fold-0",
        "checkpoints/unet-base-0/fold-2 is not finished and may have seen them",
        *(f"old/{name} names alpha and may have seen them: rm old/{name}" for name in ("yes.pt", "chosen.pt", "given.safetensors")),
        "mlflow/mlflow.db cannot be asked (error: the server is away); later: python -m lod_model.tracking runs --in",
        f"rm -f {cached['shard']}",
        f"remote lab: aws s3 rm s3://lab/dvc/files/md5/{cached['md5'][:2]}/{cached['md5'][2:]} --endpoint-url https://minio",
        "and in lab: dvc gc --workspace --cloud --remote lab --force",
        f"(cd runs/second && python -m pipelines.withdraw alpha --subject {GONE} --reason 'asked for it')",
        "other clones and projects: git pull, then",
        "runs in MLflow from before the data or the split last changed",
    ):
        assert line in said, line
    assert "old/no.pt" not in said and "fold-1" not in said and cached["other"] not in said
    assert {*asked[-1]} >= {trained, "fold-0", "--data-hash"} and "fold-1" not in asked[-1]


@pytest.mark.full
def test_the_commands_for_dvc_purge_the_bytes_of_a_real_project(copy, capsys):
    def dvc(*commands: str) -> None:
        for command in commands:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            run_for_real(["bash", "-euc", command], check=True, capture_output=True, env=os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"})

    def bytes_of(*folders: str) -> set[str]:
        return {hashlib.md5(path.read_bytes()).hexdigest() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}

    Path("remote a").mkdir()
    dvc("dvc init -q --no-scm", "dvc remote add -q -d lab 'remote a'", "dvc add -q shards tables", "dvc push -q")
    before, shard = bytes_of("shards", "tables"), hashlib.md5(Path("shards", SHARD).read_bytes()).hexdigest()
    assert before <= bytes_of(".dvc/cache") and before <= bytes_of("remote a")
    withdraw.withdraw("alpha", [GONE], "asked for it")
    said = capsys.readouterr().out
    purge = [line.split(": ", 1)[1] for line in said.splitlines() if re.match(r"  (the cache|remote lab): rm -f", line)]
    collect = [re.search(r"dvc gc [^(]*", line)[0] for line in said.splitlines() if "dvc gc" in line]
    assert len(purge) == len(collect) == 2
    dvc(*purge)
    withdrawn_bytes = before - bytes_of("shards", "tables")
    assert withdrawn_bytes - bytes_of(".dvc/cache", "remote a") == {shard} and len(withdrawn_bytes) > 1  # the images; tables later
    dvc("dvc add -q shards tables", *collect)
    assert not withdrawn_bytes & bytes_of(".dvc/cache", "remote a")


def lab_cache() -> dict[str, str]:
    """A DVC cache elsewhere, of settings that say so, with an object of each of two shards and their list."""
    Path(".dvc").mkdir()
    remote = "['remote \"lab\"']\n    url = s3://lab/dvc\n    endpointurl = https://minio\n"
    Path(".dvc/config").write_text(f"[core]\n    remote = lab\n{remote}[cache]\n    dir = ../elsewhere\n")
    entries, found = [], {}
    for kind, name, md5 in (("shard", SHARD, "ab" + "0" * 30), ("other", OTHER, "cd" + "0" * 30)):
        path = Path("elsewhere/files/md5", md5[:2], md5[2:])
        path.parent.mkdir(parents=True)
        shutil.copy(Path("shards", name), path)
        entries.append({"md5": md5, "relpath": name})
        found |= {kind: str(path.absolute()), "md5": found.get("md5", md5)}
    listing = Path("elsewhere/files/md5/ef/0.dir")
    listing.parent.mkdir()
    listing.write_text(json.dumps(entries))
    return found


def test_the_commands_for_raw_tables_take_their_lines_and_no_others(copy, capsys):
    tables = {
        "participants.tsv": "age\tparticipant_id\r\n10\tsub-100\r\n30\tsub-10\r\n9\tsub-1\r\n",  # an age is no label
        "sourcedata/a b/participants.tsv": "participant_id\tname\n10\tÄ\n010\tB\n",
        "fetched.tsv": "path\tbytes\nsub-100/x\t1\nsub-10/anat/sub-10_T1w.nii.gz\t2\n",
    }
    for name, content in tables.items():
        path = Path("roots/alpha", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    add_subject(Path("roots/alpha"), "00", seed=1)
    Path("roots/alpha/.fetching").mkdir()
    withdraw.withdraw("alpha", [GONE], "asked for it")
    said = capsys.readouterr().out
    assert "rm -r roots/alpha/.fetching (files on their way" in said
    commands = [line for line in said.splitlines() if line.strip().startswith(("awk", "grep"))]
    assert len(commands) == 3 and Path("roots/alpha/participants.tsv").read_text().count("sub-10\n") == 1
    for _ in range(2):
        run_for_real(["bash", "-euc", "\n".join(commands)], check=True)
        left = {name: Path("roots/alpha", name).read_bytes().decode() for name in tables}
        assert left == {
            "participants.tsv": "age\tparticipant_id\r\n10\tsub-100\r\n9\tsub-1\r\n",
            "sourcedata/a b/participants.tsv": "participant_id\tname\n010\tB\n", "fetched.tsv": "path\tbytes\nsub-100/x\t1\n",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("database", "subjects", "words"),
    [
        ("gamma", [], "gamma: no such database; one of alpha, beta is wanted"),
        ("alpha", ["nobody"], "--subject nobody: alpha has 4, e.g. "),
    ],
)
def test_a_slip_of_the_pen_withdraws_nothing(copy, database, subjects, words):
    with pytest.raises(InputError, match=words):
        withdraw.withdraw(database, subjects, "slip")
    assert not Path("withdrawn.tsv").exists()


def test_images_that_links_lead_to_go_too(copy, capsys):
    """A database that is a link, in it a subject of links to another disk, and one of DataLad's, of whom one image is not here."""
    for subject in (GONE, APART, "x"):
        add_subject(Path("disk/alpha"), subject, seed=1)
    t1w, annexed, own = (Path(f"disk/alpha/sub-{subject}/anat/sub-{subject}_T1w.nii.gz") for subject in (GONE, APART, "x"))
    Path("disk/alpha/.git/annex/objects/k").mkdir(parents=True)
    for path, target in ((t1w, Path("disk/far away.nii.gz")), (annexed, Path("disk/alpha/.git/annex/objects/k/k"))):
        path.rename(target)
        path.symlink_to(target.absolute())
    annexed.with_name(f"sub-{APART}_run-2_T1w.nii.gz").symlink_to("../../.git/annex/objects/gone")
    own.with_name("same.nii.gz").symlink_to(own.name)
    Path("roots").mkdir()
    Path("roots/alpha").symlink_to("../disk/alpha")
    withdraw.withdraw("alpha", [GONE, "x"], "asked for it")
    commands = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith(("  rm -r roots", "  find"))]
    assert len(commands) == 5 and f"as {Path('disk/far away.nii.gz').absolute()}" in commands[2]
    run_for_real(["bash", "-euc", "\n".join(commands)], check=True)
    assert not Path("disk/far away.nii.gz").exists() and not t1w.parent.exists() and not own.parent.exists() and annexed.exists()
    withdraw.withdraw("alpha", [APART], "asked for it")
    drop = f"  git -C {Path('disk/alpha').absolute()} annex drop --force sub-{APART}  #"
    said = capsys.readouterr().out.splitlines()
    (place,) = [number for number, line in enumerate(said) if line.startswith(drop)]
    assert said[place + 1] == f"  rm -r roots/alpha/sub-{APART}"
    withdraw.withdraw("alpha", [], "agreement ended")
    said = capsys.readouterr().out.splitlines()
    assert said[said.index("  rm roots/alpha") - 1] == f"  rm -r {Path('disk/alpha').absolute()}"


def test_what_was_fetched_and_is_not_indexed_is_told_too(copy, capsys):
    add_subject(Path("data/ixi"), "IXI002Guys0828", seed=1)
    withdraw.withdraw("ixi", ["IXI002Guys0828"], "asked for it")
    assert "  rm -r data/ixi/sub-IXI002Guys0828\n" in capsys.readouterr().out
    Path("params.yaml").write_text(PARAMS.replace("[roots]", "[data/ixi]"))
    withdraw.withdraw("ixi", [], "asked for it")
    assert capsys.readouterr().out.count("rm -r data/ixi\n") == 1


def test_a_person_of_a_database_that_is_not_here_yet(copy, caplog):
    with caplog.at_level("WARNING", "lodbrain"):
        withdraw.withdraw("ixi", ["IXI002Guys0828"], "asked for it")
    assert "nobody of ixi is in this project, so that labels cannot be checked: IXI002Guys0828" in caplog.text
    assert withdrawn().has("ixi", "IXI002Guys0828") and not withdrawn().has("ixi")


def test_a_person_without_a_scan(copy):
    (Path("roots/alpha/sub-00/anat")).mkdir(parents=True)
    Path("roots/alpha/participants.tsv").write_text("age\tparticipant_id\n99\tsub-77\n")
    Path("tables/conflicts.tsv").write_text("kind\tdatabase\tsubject\nrow without scan\talpha\t77\n")
    withdraw.withdraw("alpha", ["77"], "asked for it")
    assert withdrawn().has("alpha", "77") and not Path("tables/conflicts.tsv").exists()
    with pytest.raises(InputError, match="--subject 99"):
        withdraw.withdraw("alpha", ["99"], "slip")


def test_a_database_of_the_catalogue_before_it_comes(copy):
    withdraw.withdraw("ixi", [], "not allowed here")
    assert withdrawn().has("ixi", "IXI002Guys0828") and load_params().index.roots == ("roots",)
    Path("withdrawn.tsv").write_text("nonsense\n")
    with pytest.raises(InputError, match="column database is missing"):
        harmonise.harmonise()
