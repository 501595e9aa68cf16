"""Withdrawing: what is left elsewhere is told, with commands that purge it."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from subprocess import run as run_for_real

import pytest
import torch
from small_heads import add_subject
from withdrawal import APART, GONE, OTHER, PARAMS, SHARD

from data_registry.files import sha256
from data_registry.schema import read_table, write_table
from data_registry.split import data_hash
from pipelines import withdraw, withdraw_reach


def test_nothing_is_left_unsaid(without_them, with_them, capsys, monkeypatch):
    """Checkpoints, MLflow, DVC, the object store, the same person elsewhere, raw files, other projects."""
    Path("roots").symlink_to(with_them / "roots")
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
def test_the_commands_for_dvc_purge_the_bytes_of_a_real_project(without_them, capsys):
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


def test_the_commands_for_raw_tables_take_their_lines_and_no_others(without_them, capsys):
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


def test_images_that_links_lead_to_go_too(without_them, capsys):
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


def test_what_was_fetched_and_is_not_indexed_is_told_too(without_them, capsys):
    add_subject(Path("data/ixi"), "IXI002Guys0828", seed=1)
    withdraw.withdraw("ixi", ["IXI002Guys0828"], "asked for it")
    assert "  rm -r data/ixi/sub-IXI002Guys0828\n" in capsys.readouterr().out
    Path("params.yaml").write_text(PARAMS.replace("[roots]", "[data/ixi]"))
    withdraw.withdraw("ixi", [], "asked for it")
    assert capsys.readouterr().out.count("rm -r data/ixi\n") == 1
