"""The labeller on a real cluster whose nodes have the tools, through the death of a node."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from harmonised import WAIT_S
from labelling_tools import unlabelled
from real_cluster import Cluster, command, descendants
from small_heads import CHECKOUT

from data_registry.schema import write_table
from pipelines import index

pytestmark = pytest.mark.ray
SCANS = 6


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """(cluster, folder): scans without labels below the folder, and nodes that know the stand-ins."""
    monkeypatch.chdir(tmp_path)
    variables = unlabelled(tmp_path, SCANS)
    Path("params.yaml").write_text(yaml.safe_dump({"index": {"roots": [str(tmp_path / "db")]}, "resources": {"task_gb": 0.5}}))
    write_table(index.SCANS_TABLE, "scans", index.index([tmp_path / "db"]))
    cluster = Cluster()
    cluster.environment |= variables | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"}
    try:
        cluster.start()
        yield cluster, tmp_path
    finally:
        cluster.stop()


def test_a_node_dies_and_its_scan_begins_anew(lab):
    cluster, folder = lab
    (folder / "stand_in/sub-02.how").write_text("crash")
    (folder / "stand_in/sub-03.how").write_text("hang")
    words = ["--tool", "synthseg", "--launcher", "ray", "--project", str(folder), "--limit-hours", "0.1"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipelines.label", *words],
        cwd=CHECKOUT, env=cluster.environment | {"RAY_ADDRESS": cluster.address}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        pid, until = folder / "stand_in/sub-03.pid", time.monotonic() + WAIT_S
        while not (pid.is_file() and pid.read_text().strip()):
            assert driver.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        raylet = next(p for p in descendants() if command(p)[:1] and command(p)[0].endswith("/raylet") and int(pid.read_text()) in descendants(p))
        (folder / "stand_in/sub-03.how").write_text("well")
        cluster.kill_node(raylet, last=False)
        said = driver.communicate(timeout=WAIT_S)[1]
    finally:
        driver.kill()
    failure = "error: 1 of 6 scans failed, e.g. db_sub-02: mri_synthseg failed with exit status 3: ERROR: cannot find the brain"
    assert driver.returncode == 2 and failure in said, said
    anat = "db/derivatives/synthseg/sub-{0:02d}/anat/sub-{0:02d}_dseg.nii.gz"
    assert [number for number in range(1, SCANS + 1) if not (folder / anat.format(number)).is_file()] == [2]
    assert (folder / "stand_in/calls").read_text().split().count("sub-03") == 2
