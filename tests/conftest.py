"""Shared by all tests: the optional folder of real scans, and the environment that keeps everything on this machine."""

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of so little work threads make more; some tests change their number, after which renderings crawl
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real scans, labels and weights: ``LODBRAIN_TEST_DATA``, by default ``../shared/data``."""
    folder = Path(os.environ.get("LODBRAIN_TEST_DATA", CHECKOUT / "../shared/data")).resolve()
    if not (folder / "README.md").is_file():
        pytest.skip(f"no test data at {folder} (set LODBRAIN_TEST_DATA)")
    return folder
