"""One cluster and one reference for all tests of this folder."""

import shutil
from pathlib import Path

import pytest
from harmonised import build_reference
from real_cluster import Cluster


@pytest.fixture(scope="session")
def cluster():
    loopback = Cluster()
    try:
        loopback.start()
        yield loopback
    finally:
        loopback.stop()


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """The project, harmonised."""
    return build_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def project(reference, tmp_path) -> Path:
    """The reference's project with nothing harmonised."""
    (tmp_path / "tables").mkdir()
    shutil.copy(reference / "tables/scans.parquet", tmp_path / "tables")
    shutil.copy(reference / "params.yaml", tmp_path)
    return tmp_path
