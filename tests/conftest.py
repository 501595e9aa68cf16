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


@pytest.fixture
def route_project(tmp_path, monkeypatch) -> Path:
    """An empty project that knows the small database of a route, and is the current folder."""
    import small_route  # with all of fetch: not for every test

    return small_route.project(tmp_path, monkeypatch)


@pytest.fixture
def mirror(tmp_path) -> Path:
    """A folder with the small database of a route, and with files that nobody wants."""
    from small_route import UNWANTED, WANTED, write

    return write(tmp_path / "mirror", WANTED | UNWANTED)


@pytest.fixture(scope="module")
def withdrawal_project(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A project with somebody to be withdrawn, and the hashes of its files from before they came."""
    import withdrawal

    folder = tmp_path_factory.mktemp("project")
    return folder, withdrawal.build(folder)


@pytest.fixture
def with_them(withdrawal_project) -> Path:
    """The project's folder, with raw files."""
    return withdrawal_project[0]


@pytest.fixture
def without_them(withdrawal_project, tmp_path, monkeypatch) -> dict[str, str]:
    """The current folder is a copy of the project without raw files; its files' hashes as if they had never been there."""
    import withdrawal

    withdrawal.copy_to(tmp_path, withdrawal_project[0], monkeypatch)
    return withdrawal_project[1]
