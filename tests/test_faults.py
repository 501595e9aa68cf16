"""Faults on the data side: a reader that is killed, a shard that is missing, cut or altered, while training and while evaluating.

Each ends in one line and a status that is not 0, leaves no half checkpoint and no run of MLflow that seems to go on; once the fault is
mended the same command ends in the weights and scores of a run that nobody disturbed.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_heads import add_subject

from data_registry.errors import run_stage
from data_registry.params import load_params
from data_registry.schema import read_table
from lod_model import evaluate, weights
from lod_model import train as training
from lod_model.data import SampleDataset, all_folds
from lod_model.tracking_store import Store
from pipelines import harmonise, index, split

PARAMS = """
index: {roots: [roots]}
harmonise: {grid: 16mm, shards_per_site: 1}
split: {folds: 2}
train:
  coarse: {epochs: 1, learning_rate: 0.01}
  fine: {epochs: 2, learning_rate: 0.01}
  network: {widths: [2, 4, 8], dropout: 0.0}
resources: {loader_workers: WORKERS}
"""
RUN = "lod_brain-base-0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two places of four people, harmonised, split, trained and scored; and MLflow's store as it was before, empty."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "mlflow").mkdir()
    Store(f"sqlite:///{folder / 'mlflow/mlflow.db'}").experiments()
    shutil.copy(folder / "mlflow/mlflow.db", folder / "empty.db")
    (folder / "params.yaml").write_text(PARAMS.replace("WORKERS", "0"))
    for number, name in enumerate(("alpha", "beta")):
        for subject in range(4):
            add_subject(folder / "roots" / name, f"{subject:02d}", seed=10 * number + subject)

    def one_by_one(function, items, **_):
        return ((number, function(*item)) for number, item in enumerate(items))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(harmonise, "run_bounded", one_by_one)
        patch.setattr(sys, "argv", ["a stage"])
        for stage in (index, harmonise, split):
            stage.main()
        training.train("lod_brain", load_params(), all_folds())
        evaluate.main()
    return folder


@pytest.fixture
def project(whole, tmp_path, monkeypatch) -> Path:
    """The same, with nothing trained; its shards are its own."""
    (tmp_path / "mlflow").mkdir()
    shutil.copy(whole / "empty.db", tmp_path / "mlflow/mlflow.db")
    for name in ("tables", "shards", "roots"):
        shutil.copytree(whole / name, tmp_path / name)
    (tmp_path / "tables/results.parquet").unlink()
    shutil.copy(whole / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(capsys, main, *arguments: str) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr that begin with ``error``; nothing there is a traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *arguments])
        try:
            run_stage(main)
            status = 0
        except SystemExit as ended:
            status = ended.code
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return status, [line for line in lines if line.startswith("error: ")] if status else []


def runs() -> dict[str, str]:
    """Name → status in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Path('mlflow/mlflow.db').absolute()}")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {run.info.run_name: run.info.status for run in found}


def hash_of(project: Path) -> str:
    return weights.load(project / f"checkpoints/{RUN}/fold-0/weights.pt").hash


def goes_on_to_the_same(whole: Path, capsys) -> None:
    status, lines = command(capsys, training.main, "--network", "lod_brain", "--fold", "0")
    assert status == 0, lines
    assert hash_of(Path()) == hash_of(whole)
    assert runs() == {RUN: "FINISHED", f"{RUN}-fold-0": "FINISHED"}


def test_a_reader_is_killed(whole, project, capsys, monkeypatch):
    """SIGKILL, as of the kernel when memory is short, in the second epoch of the second stage."""
    (project / "params.yaml").write_text(PARAMS.replace("WORKERS", "1"))
    undisturbed = SampleDataset.__getitem__

    def killed(self, key):
        if self.level == "fine" and key[0] == 1 and len(self) > 1 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return undisturbed(self, key)

    monkeypatch.setattr(SampleDataset, "__getitem__", killed)
    status, (line,) = command(capsys, training.main, "--network", "lod_brain", "--fold", "0")
    assert status == 2 and line.startswith("error: a process that reads samples (") and ") has died, " in line
    last = torch.load(f"checkpoints/{RUN}/fold-0/fine/last.ckpt", weights_only=True)
    assert last["epoch"] == 0 and not list(project.rglob(".aside-*"))
    assert runs() == {RUN: "FAILED", f"{RUN}-fold-0": "FAILED"}
    goes_on_to_the_same(whole, capsys)


def missing(path: Path, _row: int) -> None:
    path.unlink()


def cut(path: Path, _row: int) -> None:
    os.truncate(path, path.stat().st_size // 2)


def altered(path: Path, row_group: int) -> None:
    """One byte of the row's T1w."""
    content = bytearray(path.read_bytes())
    row = pq.read_metadata(path).row_group(row_group)
    (cell,) = [row.column(k) for k in range(row.num_columns) if row.column(k).path_in_schema == "t1w_x1"]
    content[cell.data_page_offset + cell.total_compressed_size // 2] ^= 0x10
    path.write_bytes(content)


FAULTS = {missing: "no such shard; ", cut: "is damaged (", altered: "is damaged (column t1w_x1: the checksum is wrong)"}


@pytest.mark.parametrize(("fault", "workers"), [(missing, 1), (cut, 0), (altered, 0), (altered, 1)])
def test_a_shard_is_lost_while_training(whole, project, capsys, monkeypatch, fault, workers):
    """At the beginning of the fine stage: what its readers meet is not what the coarse stage has seen."""
    (project / "params.yaml").write_text(PARAMS.replace("WORKERS", str(workers)))
    scan = all_folds()[0]["train"][-1]
    shard = project / "shards" / scan.shard
    undisturbed = SampleDataset.__init__

    def lost(self, scans, **settings):
        undisturbed(self, scans, **settings)
        if self.level == "fine" and len(scans) > 1:
            fault(shard, scan.row_group)

    with monkeypatch.context() as patch:
        patch.setattr(SampleDataset, "__init__", lost)
        status, (line,) = command(capsys, training.main, "--network", "lod_brain", "--fold", "0")
    assert status == 2 and line.startswith(f"error: {shard}: ") and FAULTS[fault] in line
    assert line.endswith("run `python -m pipelines.harmonise` again")
    assert fault is not altered or f": row group {scan.row_group} is damaged" in line
    assert runs() == {RUN: "FAILED", f"{RUN}-fold-0": "FAILED"}
    if fault is altered and workers:
        shutil.copy(whole / shard.relative_to(project), shard)
        goes_on_to_the_same(whole, capsys)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_shard_is_lost_while_evaluating(whole, project, capsys, fault):
    shutil.copytree(whole / "checkpoints", project / "checkpoints")
    scan = all_folds()[1]["external_test"][-1]
    shard = project / "shards" / scan.shard
    fault(shard, scan.row_group)
    status, (line,) = command(capsys, evaluate.main)
    assert status == 2 and line.startswith(f"error: {shard}: ") and FAULTS[fault] in line
    assert not (project / "tables/results.parquet").exists() and runs() == {}
    if fault is altered:
        shutil.copy(whole / shard.relative_to(project), shard)
        status, lines = command(capsys, evaluate.main)
        assert status == 0, lines
        tables = [read_table(folder / "tables/results.parquet", "results").to_pandas() for folder in (whole, project)]
        assert tables[0].equals(tables[1]) and np.isfinite(tables[0].value).any()
