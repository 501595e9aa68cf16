"""The stage harmonise on a real cluster, through the deaths of a node, of the driver and of a scan's workers.

Every way ends in the bytes of an undisturbed run on one machine.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harmonised import WAIT_S, hashes
from real_cluster import Cluster
from small_heads import CHECKOUT

from data_registry.schema import read_table

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """The stage's code, and a driver that disturbs it."""
    folder = tmp_path_factory.mktemp("code")
    for room in ("pipelines", "data_registry"):
        shutil.copytree(CHECKOUT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("disturbed_harmonise.py"), folder)
    return folder


def start_driver(cluster: Cluster, code: Path, project: Path, **environment: str) -> subprocess.Popen:
    """The disturbed stage as a driver of its own, on the cluster."""
    own = cluster.environment | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(code), "TEST_TRACE": str(project / "trace")} | environment
    command = [sys.executable, str(code / "disturbed_harmonise.py"), "--project", str(project)]
    return subprocess.Popen(command, cwd=code, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_shards(project: Path, number: int) -> list[Path]:
    until = time.monotonic() + WAIT_S
    while len(found := sorted(project.rglob("shards/**/part-*.parquet"))) < number:
        assert time.monotonic() < until, "no shards are made"
        time.sleep(0.05)
    return found


def trace_of(project: Path) -> list[tuple[str, str, int]]:
    """(begin or end, scan, process id of the node) in the order in which they happened."""
    lines = [line.split() for line in (project / "trace").read_text().splitlines()] if (project / "trace").exists() else []
    return [(what, scan, int(node)) for what, scan, node in lines]


@pytest.mark.parametrize("raylet", ["first", "last"])
def test_a_node_dies(cluster, code, reference, project, raylet):
    settings = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(settings.replace("resources: {", "resources: {tries: 1, "))  # who is accused once is out
    driver = start_driver(cluster, code, project)
    wait_for_shards(project, 2)
    while not (trace := trace_of(project)) or trace[-1][0] == "end" or len({node for *_, node in trace}) < 2:
        assert driver.poll() is None, "one node did it all"
    dead = trace[-1][-1]  # it has just begun a scan
    address = cluster.kill_node(dead, last=raylet == "last")
    output = driver.communicate(timeout=WAIT_S)[0]
    cluster.start_node(address)
    assert driver.returncode == 0, output
    assert hashes(project) == hashes(reference)
    assert re.search(r", 0 quarantined, [1-9]\d* retries", output), output
    trace = trace_of(project)
    for node in {node for *_, node in trace} - {dead, os.getpid()}:  # an orphan's parent is this process
        lane = [what for what, _, own in trace if own == node]
        wanted = itertools.cycle(("begin", "end"))
        assert all(what == next(wanted) for what in lane), "two tasks at once where the memory holds one"


def test_the_driver_dies(cluster, code, reference, project):
    driver = start_driver(cluster, code, project)
    wait_for_shards(project, 3)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    finished = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in wait_for_shards(project, 3)}
    assert len(finished) < len(hashes(reference)) - 1
    for leftover in (next(iter(finished)).with_name(".aside-x.parquet"), project / "tables/.aside-y.parquet"):
        leftover.write_bytes(b"half")
    assert list((project / "cache/harmonise").iterdir())
    driver = start_driver(cluster, code, project)
    output = driver.communicate(timeout=WAIT_S)[0]
    assert driver.returncode == 0, output
    assert hashes(project) == hashes(reference)  # of all files: nothing is left over
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished} == finished
    assert not (project / "cache/harmonise").exists() and not list(project.rglob(".aside-*"))


def test_a_scan_kills_its_workers(cluster, code, reference, project):
    before = {row["scan_id"]: row for row in read_table(reference / "tables/samples.parquet", "samples").to_pylist()}
    shards = sorted(before, key=lambda scan: (before[scan]["shard"], scan))
    poison = next(b for a, b, c in zip(shards, shards[1:], shards[2:], strict=False) if len({before[s]["shard"] for s in (a, b, c)}) == 1)
    driver = start_driver(cluster, code, project, TEST_POISON=poison)
    output = driver.communicate(timeout=WAIT_S)[0]
    assert driver.returncode == 0, output
    assert [scan for _, scan, _ in trace_of(project)].count(poison) == 3  # begun, never ended
    rows = {row["scan_id"]: row for row in read_table(project / "tables/samples.parquet", "samples").to_pylist()}
    assert rows[poison]["status"] == "quarantined" and rows[poison]["reason"].endswith("_T1w.nii.gz: kills its worker (3 tries)")
    assert rows[poison]["reason"] in output
    assert [scan for scan, row in rows.items() if row["status"] != "ok"] == [poison]
    assert {scan: row["histogram"] for scan, row in rows.items() if scan != poison} == {
        scan: row["histogram"] for scan, row in before.items() if scan != poison
    }
    same = {shard: digest for shard, digest in hashes(reference).items() if before[poison]["shard"] not in shard and "tables" not in shard}
    assert same.items() <= hashes(project).items()


def test_what_fits_no_node_is_one_line(cluster, code, project):
    settings = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(settings.replace("task_gb: null", "task_gb: 50"))
    driver = start_driver(cluster, code, project)
    output = driver.communicate(timeout=WAIT_S)[0]
    assert driver.returncode == 2 and "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: a task needs 50.00 GB and the largest node offers 1.50; ")
