"""The labs' section on DVC, command by command, on tiny shards: a shared cache, an S3 remote on loopback, a clone with one site."""

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from loopback_s3 import BUCKET, s3_server
from small_heads import CHECKOUT, add_subject

from data_registry.schema import read_table
from data_registry.shards import read_row
from pipelines.project import data_project

pytestmark = pytest.mark.full
SECTION = re.search(r"^## 200 GB.*?(?=^## )", (CHECKOUT / "docs/labs.md").read_text(encoding="utf-8"), re.M | re.S)[0]
SET_UP, MORE_SCANS, ONE_SITE = re.findall(r"^```\n(.*?)^```", SECTION, re.M | re.S)
NYU, UM = (f"shards/grid=1mm/site=abide1.{site}/part-000.parquet" for site in ("NYU", "UM"))
HARMONISE = '''
"""Stands for the stage: a shard a site, replaced where its line of the scans has changed; notes what it found."""
import json, os
from pathlib import Path
import numpy as np
from data_registry.shards import read_metadata, write_shard

shards = sorted(Path("shards").rglob("*.parquet"))
Path("found.json").write_text(json.dumps({str(path): [os.stat(path).st_ino, os.stat(path).st_nlink] for path in shards}))
for line in Path("scans.txt").read_text().splitlines():
    site, value = line.split()
    path = Path(f"shards/grid=1mm/site=abide1.{site}/part-000.parquet")
    if (read_metadata(path) or {}).get("recipe") != line:
        write_shard(path, [{"scan_id": site, "t1w_x1": np.full((4, 4, 4), int(value), np.uint8)}], metadata={"recipe": line})
Path("tables").mkdir(exist_ok=True)
aside = Path("tables/.aside")
aside.write_text(Path("scans.txt").read_text())
aside.replace("tables/samples.parquet")
'''
STAGES = """
stages:
  harmonise:
    cmd: python -m pipelines.harmonise
    deps: [scans.txt]
    outs:
      - shards: {persist: true}
      - tables/samples.parquet: {persist: true}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder as the section's /lab and /scratch, with a project that is set up, run and pushed; and how to run commands there."""
    root = tmp_path_factory.mktemp("lab")
    project = root / "project"
    (project / "pipelines").mkdir(parents=True)
    (project / "pipelines/__init__.py").touch()
    (project / "pipelines/harmonise.py").write_text(HARMONISE)
    (project / "dvc.yaml").write_text(STAGES)
    (project / "scans.txt").write_text("NYU 1\nUM 1\n")
    with s3_server() as server:
        identity = {f"GIT_{who}_{what}": "lab@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | server | identity | {"PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(CHECKOUT)}

        def bash(commands: str, folder: Path = project) -> str:
            commands = re.sub("(?<!/)/lab/", f"{root}/", commands).replace("/scratch/", f"{root}/scratch-")
            done = subprocess.run(["bash", "-euc", commands], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        bash("git init -q && dvc init -q && git add -A && git commit -qm start")
        bash(SET_UP)
        yield root, bash, environment


def objects(cache: Path) -> dict[str, Path]:
    """hash → the cache's object, each whole: its bytes have the hash that it is named by."""
    found = {path.parent.name + path.name.removesuffix(".dir"): path for path in cache.glob("files/md5/*/*")}
    for name, path in found.items():
        assert hashlib.md5(path.read_bytes()).hexdigest() == name
    return found


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def in_bucket(environment: dict) -> set[str]:
    import boto3

    client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test", region_name="x")
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET, Prefix="dvc/files/md5/")["Contents"]]
    return {"".join(key.split("/")[-2:]).removesuffix(".dir") for key in keys}


def test_in_order(lab):
    """The cache is the group's, shards are protected links, a replaced shard leaves the cache alone, and all of it is in the bucket."""
    root, bash, environment = lab
    project, cache = root / "project", root / "dvc-cache"
    for path in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o2775, path
    before = objects(cache)
    for shard in (project / NYU, project / UM):
        assert before[md5(shard)].samefile(shard) and stat.S_IMODE(shard.stat().st_mode) == 0o444
    assert in_bucket(environment) == set(before)

    old, kept = md5(project / NYU), os.stat(project / UM).st_ino
    (project / "scans.txt").write_text("NYU 2\nUM 1\n")
    bash(MORE_SCANS.splitlines()[0])
    assert objects(cache) == before and read_row(before[old], 0, ["t1w_x1"])["t1w_x1"].max() == 1  # nothing was written through the link
    assert read_row(project / NYU, 0, ["t1w_x1"])["t1w_x1"].max() == 2
    assert os.stat(project / UM).st_ino == kept
    bash("\n".join(MORE_SCANS.splitlines()[1:]))
    after = objects(cache)
    assert set(before) < set(after) and after[md5(project / NYU)].samefile(project / NYU) and os.stat(project / UM).st_ino == kept
    assert in_bucket(environment) == set(after)
    assert "up to date" in bash("dvc repro")  # what was committed need not run again

    (project / "scans.txt").write_text("NYU 3\nUM 1\n")
    bash("dvc repro && dvc push && git add -A && git commit -qm more")
    found = json.loads((project / "found.json").read_text())
    assert found[UM][1] == 1 and found[UM][0] != kept  # the copies that the section warns of
    assert set(after) < set(objects(cache)) and objects(cache)[md5(project / UM)].samefile(project / UM)


def test_one_site_only(lab):
    root, bash, _ = lab
    (root / "elsewhere").mkdir(exist_ok=True)
    listed = bash(ONE_SITE, root / "elsewhere")
    mine, cache = root / "elsewhere/mine", root / "scratch-dvc-cache"
    assert listed.split().count("site=abide1.NYU") == listed.split().count("site=abide1.UM") == 1
    assert [str(path.relative_to(mine)) for path in (mine / "shards").rglob("*.parquet")] == [NYU]
    assert md5(mine / NYU) == md5(root / "project" / NYU) and (mine / "tables/samples.parquet").is_file()
    assert sum(not path.name.endswith(".dir") for path in objects(cache).values()) == 2  # the table and one shard crossed the wire
    assert re.search(r"changed outs:\s+not in cache:\s+shards", bash("dvc status", mine))
    lock = (mine / "dvc.lock").read_text()
    bash("dvc commit --force harmonise", mine)
    assert "nfiles: 1\n" in (mine / "dvc.lock").read_text() and "nfiles: 2\n" in lock  # what the section warns of
    (mine / "dvc.lock").write_text(lock)
    bash("dvc pull shards/grid=1mm/site=abide1.nowhere", mine)
    assert not (mine / UM).exists()
    bash("dvc pull", mine)
    assert md5(mine / UM) == md5(root / "project" / UM) and "up to date" in bash("dvc status", mine)


def test_shards_in_a_bucket_under_dvc(lab, tmp_path):
    """The project's own stages: DVC follows an empty folder and the samples' table, which names each shard by its hash."""
    _, bash, _ = lab
    for number, name in enumerate(("alpha", "beta", "gamma")):
        for subject in range(2):
            add_subject(tmp_path / "data" / name, f"{subject:02d}", seed=10 * number + subject)
    project = data_project(tmp_path / "data", tmp_path / "project")
    settings = yaml.safe_load((project / "params.yaml").read_text())
    settings |= {"harmonise": {"grid": "16mm"}, "split": {"folds": 3}, "resources": {"shards": "s3://lab/own/shards"}}
    (project / "params.yaml").write_text(yaml.safe_dump(settings))
    assert [line for line in bash("dvc repro split", project).splitlines() if line.startswith("Running")] == [
        f"Running stage '{stage}':" for stage in ("index", "harmonise", "quality", "split")
    ]  # fmt: skip
    assert list((project / "shards").iterdir()) == []
    assert "'harmonise' didn't change" in bash("dvc repro split", project)
    add_subject(tmp_path / "data/beta", "77", seed=77)
    assert "Running stage 'split'" in bash("dvc repro split", project)
    rows = read_table(project / "tables/samples.parquet", "samples").to_pylist()
    assert len(rows) == 7 and all(row["shard_sha256"] for row in rows)


def test_linked_shards_are_read_only(lab):
    root, *_ = lab
    if os.geteuid() == 0:
        pytest.skip("root may write anything")
    with pytest.raises(PermissionError), open(root / "project" / UM, "r+b"):
        pass
