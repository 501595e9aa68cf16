"""Who is left out after which deaths: by hand, with the journals that a task would have written."""

import pytest

from pipelines import attempts
from pipelines.attempts import Attempts


@pytest.fixture
def shard(tmp_path, monkeypatch) -> Attempts:
    monkeypatch.chdir(tmp_path)
    return Attempts("grid=8mm/site=a.b/part-000.parquet", tries=2)


def die(shard: Attempts, scan: str | None, death: str = "worker") -> bool:
    """A task that gets to ``scan`` and dies there; None: before it opened its journal."""
    if scan is not None:
        shard.journal.parent.mkdir(parents=True, exist_ok=True)
        shard.journal.write_text(scan)
    return shard.died(death)


def test_a_scan_is_left_out_after_its_own_deaths_only(shard):
    assert die(shard, "s1") and die(shard, "s2") and not shard.left_out
    assert die(shard, "s1") and shard.left_out == {"s1": "kills its worker (2 tries)"}
    assert die(shard, "s2", "memory") and shard.left_out["s2"] == "kills its worker (2 tries, the last out of memory)"


def test_a_dead_node_accuses_no_scan(shard):
    assert die(shard, "s1")
    assert all(die(shard, "s1", "node") for _ in range(attempts.NODE_DEATHS - 1)) and not shard.left_out
    assert not die(shard, "s1", "node") and shard.why == f"{attempts.NODE_DEATHS} nodes died on it, the last at s1" and not shard.left_out


@pytest.mark.parametrize("scan", [None, ""])
def test_deaths_at_no_scan_end_the_shard(shard, scan):
    assert die(shard, scan) and die(shard, "s1")
    assert not die(shard, scan) and shard.why == "its worker died in 2 tries, at no scan" and not shard.left_out


def test_no_journal_is_read_twice(shard):
    assert die(shard, "s1") and die(shard, None) and not shard.left_out
    other = Attempts("grid=8mm/site=a.c/part-000.parquet", tries=2)
    die(other, "s1")
    assert die(shard, None) is False and shard.why.endswith("at no scan")


def test_cleaning_takes_all_journals(shard):
    die(shard, "s1")
    attempts.clean()
    attempts.clean()
    assert not shard.journal.parent.exists()
