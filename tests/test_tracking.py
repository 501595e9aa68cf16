"""MLflow's runs without a server: a file a job, what is kept while a server is away, files merged into one, figures of the machine."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from small_heads import CHECKOUT

from data_registry.errors import InputError
from lod_model import evaluate, machine_figures, tracking
from lod_model.tracking import Tracker, sync
from lod_model.tracking_store import Store, StoreError

JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "MLFLOW_TRACKING_URI", tracking.OFFLINE)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An SQLite file with MLflow's tables: making them takes longer than a test."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    Store(f"sqlite:///{path}").experiments()
    return path


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, empty_store):
    """In a folder of the test's own, as no job; new stores begin as a copy of an empty one, none waits for other jobs."""
    monkeypatch.chdir(tmp_path)
    for name in JOBS:
        monkeypatch.delenv(name, raising=False)
    begin = Store.__init__

    def copied(self, uri):
        file = tracking.sqlite_file(uri)
        if file and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with sqlite3.connect(empty_store) as source, sqlite3.connect(file) as target:
                source.backup(target)
        begin(self, uri)

    monkeypatch.setattr(Store, "__init__", copied)
    monkeypatch.setattr("lod_model.tracking_store.SETTLE_S", 0)


class Server(Store):
    """Stands for a server: an SQLite file that can be away."""

    is_away = False

    def __init__(self, _uri: str) -> None:
        super().__init__(f"sqlite:///{Path('server.db').absolute()}")
        self.file, self.uri = None, "http://user:secret@lab:5000"

    @property
    def _client(self):
        if Server.is_away:
            raise StoreError("Connection refused")
        return self.client

    @_client.setter
    def _client(self, client) -> None:
        self.client = client


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Server, "is_away", False)
    monkeypatch.setattr(tracking, "Store", lambda uri: Server(uri) if uri.startswith("http") else Store(uri))
    monkeypatch.setattr(tracking, "PAUSE_S", 0.0)
    monkeypatch.setattr(tracking, "LAST_TRIES_S", 0.0)
    return Server


def contents(file: str = "server.db") -> dict:
    """All that a store has, runs by key: name, status, end, parent's key, params, own tags, histories, files."""
    client, found = MlflowClient(f"sqlite:///{Path(file).absolute()}"), {}
    for experiment in client.search_experiments():
        runs = client.search_runs([experiment.experiment_id])
        keys = {run.info.run_id: run.data.tags["lodbrain.key"] for run in runs}
        assert len(set(keys.values())) == len(runs), "two runs of one key"
        for run in runs:
            tags = {name: value for name, value in run.data.tags.items() if not name.startswith(("mlflow.", "lodbrain."))}
            histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
            histories = {name: sorted((m.step, m.timestamp, m.value) for m in history) for name, history in histories.items()}
            root = Path(run.info.artifact_uri.removeprefix("file://"))
            files = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
            found[experiment.name, keys[run.info.run_id]] = {
                "name": run.info.run_name, "status": run.info.status, "end": run.info.end_time, "params": run.data.params, "tags": tags,
                "parent": keys.get(run.data.tags.get("mlflow.parentRunId")), "metrics": histories, "files": files,
            }  # fmt: skip
    return found


def steps(run: dict, name: str = "loss") -> list[int]:
    return [step for step, *_ in run["metrics"][name]]


def test_an_outage_loses_nothing_and_doubles_nothing(server, caplog):
    tracker = Tracker("base", uri="http://lab")
    parent = tracker.run("run", name="run")
    child = tracker.run("run/0", name="run-fold-0", parent=parent)
    tracker.metrics(child, {"loss": 1.0}, step=0)
    tracker.params(child, {"seed": 0})
    server.is_away = True
    tracker.metrics(child, {"loss": 0.5, "dice": float("nan")}, step=1)
    other = tracker.run("run/1", name="run-fold-1", parent=parent)  # begun while it is away
    tracker.metrics(other, {"loss": 0.7}, step=0)
    tracker.params(other, {"seed": 0})
    Path("note.txt").write_text("a note")
    tracker.artifacts(child, [Path("note.txt")])
    assert ("base", "run/1") not in contents()
    server.is_away = False
    tracker.metrics(child, {"loss": 0.25}, step=2)  # the first call after it: all that was kept goes before
    tracker.finish(child)
    tracker.finish(other)
    tracker.finish(parent)
    tracker.close()
    found = contents()
    assert [run["status"] for run in found.values()] == ["FINISHED"] * 3
    assert steps(found["base", "run/0"]) == [0, 1, 2] and steps(found["base", "run/1"]) == [0]
    assert found["base", "run/0"]["files"] == {"note.txt": "a note"} and set(found["base", "run/0"]["metrics"]) == {"loss"}
    assert found["base", "run/1"]["parent"] == found["base", "run/0"]["parent"] == "run" and found["base", "run/1"]["params"] == {"seed": "0"}
    lost, back = [record.getMessage() for record in caplog.records if record.name == "lodbrain.tracking"]
    assert lost.startswith("MLflow server http://lab:5000: Connection refused; what is logged goes to") and "is back" in lost
    assert back == "MLflow server http://lab:5000: back, and has what was kept" and "secret" not in caplog.text


@pytest.mark.parametrize("from_the_start", [False, True])
def test_a_server_that_stays_away_is_said_with_the_command_that_sends_later(server, caplog, capsys, from_the_start):
    server.is_away = from_the_start
    tracker = Tracker("base", uri="http://lab")
    run = tracker.run("run", name="run", tags={"fold": "0"})
    tracker.metrics(run, {"loss": 1.0}, step=0)
    server.is_away = True
    tracker.metrics(run, {"loss": 0.5}, step=1)
    tracker.finish(run)
    tracker.close()
    words = caplog.records[-1].getMessage().split()
    file = words[words.index("--from") + 1]
    assert "still away; send what is in" in caplog.text and words[words.index("--to") + 1] == "http://user:secret@lab:5000"
    with pytest.raises(InputError, match="Connection refused; nothing is lost, run the same command again"):
        sync([Path(file)], "http://lab")
    server.is_away = False
    sync([Path(file)], "http://lab")
    assert capsys.readouterr().out.startswith(f"{file}: 1 runs, {int(from_the_start)} new; {1 + from_the_start} figures")
    (found,) = contents().values()
    assert steps(found) == [0, 1] and found["status"] == "FINISHED" and found["tags"]["fold"] == "0"


def test_a_deleted_run_stays_deleted_until_its_training_goes_on(server):
    tracker = Tracker("base", uri="http://lab")
    run = tracker.run("run", name="run")
    runs = MlflowClient(f"sqlite:///{Path('server.db').absolute()}")
    runs.delete_run(runs.search_runs(["1"])[0].info.run_id)  # refuses figures from now on
    tracker.metrics(run, {"loss": 1.0}, step=0)
    tracker.close()
    (kept,) = Path("mlflow/jobs").glob("*.db")
    assert steps(contents(kept)["base", "run"]) == [0]
    sync([kept], "http://lab")
    assert contents() == {}
    tracker.metrics(run, {"loss": 0.5}, step=1)
    assert steps(contents()["base", "run"]) == [1]
    sync([kept], "http://lab")
    assert steps(contents()["base", "run"]) == [0, 1]


def job(number: int, monkeypatch, *, array: int | None = None) -> Path:
    """This process is a SLURM job from now on; where its runs go."""
    monkeypatch.setenv("SLURM_JOB_ID", str(number))
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", str(array))
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number - array))
    return Path(f"mlflow/jobs/slurm-{number}.db")


def fold(number: int, losses: list[float]) -> None:
    """One fold of a run as training logs it."""
    tracker = Tracker("base")
    parent = tracker.run("run", name="run", tags={"split_hash": "s"})
    tracker.params(parent, {"train.seed": 0})
    child = tracker.run(f"run/{number}", name=f"run-fold-{number}", parent=parent, tags={"split_hash": "s", "fold": str(number)})
    for step, loss in enumerate(losses):
        tracker.metrics(child, {"loss": loss}, step=step)
    Path(f"{number}.txt").write_text(str(losses))
    tracker.artifacts(parent, [Path(f"{number}.txt")])
    tracker.finish(child)
    tracker.finish(parent)


def test_jobs_of_an_array_merge_into_one_parent(monkeypatch, capsys):
    files = []
    for number in (0, 1):
        files.append(job(70 + number, monkeypatch, array=70))
        fold(number, [1.0, 0.5, float(number)])
    assert not Path("mlflow/mlflow.db").exists() and all(file.is_file() for file in files)
    sync([Path("mlflow")], "sqlite:///server.db")
    first = contents()
    assert capsys.readouterr().out.splitlines() == [
        "mlflow/jobs/slurm-70.db: 2 runs, 2 new; 3 figures, 1 params, 1 files, 2 ends",
        "mlflow/jobs/slurm-71.db: 2 runs, 1 new; 3 figures, 1 files, 2 ends",
    ]
    assert set(first) == {("base", key) for key in ("run", "run/0", "run/1")}
    assert [first["base", f"run/{n}"]["parent"] for n in (0, 1)] == ["run", "run"]
    assert [first["base", key]["tags"]["slurm_job"] for key in ("run", "run/0", "run/1")] == ["70", "70_0", "70_1"]
    assert set(first["base", "run"]["files"]) == {"0.txt", "1.txt"} and first["base", "run"]["params"] == {"train.seed": "0"}
    assert {run["status"] for run in first.values()} == {"FINISHED"} and first["base", "run/1"]["tags"]["split_hash"] == "s"
    assert [value for *_, value in first["base", "run/1"]["metrics"]["loss"]] == [1.0, 0.5, 1.0]
    assert first["base", "run"]["end"] == contents(files[1])["base", "run"]["end"]  # the later one's

    sync([*files, files[0]], "sqlite:///server.db")
    assert contents() == first and capsys.readouterr().out.count("nothing to send") == 2
    sync(reversed(files), "sqlite:///other.db")
    assert contents("other.db") == first  # whichever comes first


def test_a_run_that_went_on_sends_what_is_new(monkeypatch, capsys):
    file = job(7, monkeypatch)
    fold(0, [1.0])
    sync([file], "sqlite:///server.db")
    capsys.readouterr()
    tracker = Tracker("base")  # requeued: the same job, the same file
    run = tracker.run("run/0", name="another name", tags={"fold": "another"})
    with pytest.raises(RuntimeError), tracker.underway(run):
        assert contents(file)["base", "run/0"]["status"] == "RUNNING"
        tracker.metrics(run, {"loss": 0.5, "dice": 0.1}, step=1)
        sync([file], "sqlite:///server.db")
        assert contents()["base", "run/0"]["status"] == "RUNNING" and "2 figures, 1 ends" in capsys.readouterr().out
        raise RuntimeError
    Path("0.txt").write_text("other")
    tracker.artifacts(tracker.run("run", name="run"), [Path("0.txt")])
    sync([file], "sqlite:///server.db")
    assert capsys.readouterr().out == f"{file}: 2 runs, 0 new; 1 files, 1 ends\n"
    found = contents()
    assert steps(found["base", "run/0"]) == [0, 1] and steps(found["base", "run/0"], "dice") == [1]
    assert found["base", "run/0"]["status"] == "FAILED" and found["base", "run/0"]["tags"]["fold"] == "0"
    assert found["base", "run"]["files"] == {"0.txt": "other"} and found["base", "run/0"]["name"] == "run-fold-0"


def test_what_differs_is_the_later_ones(monkeypatch):
    """Two jobs record one run: in any order, both figures come and the later outcome stays; the job that made it is named."""
    files = []
    for number, outcome in enumerate(("none", "components")):
        files.append(job(number, monkeypatch))
        tracker = Tracker("base")
        tracker.record(tracker.run("run", name="run"), {"evaluate.postprocess": outcome}, {"dice": number})
        time.sleep(0.002)
    for target, order, maker in (("server.db", (1, 0), "1"), ("other.db", (0, 1), "0")):
        for number in order:
            sync([files[number]], f"sqlite:///{target}")
        (found,) = contents(target).values()
        assert found["tags"]["evaluate.postprocess"] == "components" and found["end"] == contents(files[1])["base", "run"]["end"]
        assert [value for *_, value in found["metrics"]["dice"]] == [0, 1] and found["tags"]["slurm_job"] == maker


def test_files_may_be_merged_at_another_place(monkeypatch, tmp_path):
    job(7, monkeypatch)
    fold(0, [1.0])
    Path("mlflow").rename("copied")
    sync([Path("copied")], "sqlite:///server.db")
    assert set(contents()["base", "run"]["files"]) == {"0.txt"}


def test_where_runs_go(monkeypatch):
    Tracker("base").run("run", name="run")
    assert Path("mlflow/mlflow.db").is_file()
    monkeypatch.setenv(tracking.OFFLINE, "1")
    Tracker("base", uri="http://127.0.0.1:9").run("run", name="run")
    (own,) = Path("mlflow/jobs").iterdir()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    Tracker("base", uri="http://127.0.0.1:9").run("run", name="run")
    assert {path.name for path in Path("mlflow/jobs").iterdir()} == {own.name, "slurm-8.0.db"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.unlink(), "no such file, or a folder without one"),
        (lambda path: path.write_text("nothing of MLflow"), "a file of MLflow runs is wanted"),
    ],
)
def test_what_cannot_be_merged_is_refused(make, words):
    path = Path("runs.db")
    path.touch()
    make(path)
    with pytest.raises(InputError, match=words):
        sync([path], "sqlite:///server.db")


def test_a_server_that_is_away_is_one_line_and_a_status(monkeypatch):
    file = job(7, monkeypatch)
    fold(0, [1.0])
    command = [sys.executable, "-m", "lod_model.tracking", "sync", "--from", str(file), "--to", "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: http://127.0.0.1:9: Connection refused; nothing is lost, run the same command again once it answers\n"


def test_figures_of_the_machine_come_with_a_run(monkeypatch):
    monkeypatch.setattr(machine_figures, "EVERY_S", 0.05)
    monkeypatch.setattr(machine_figures, "SAMPLES", 2)
    tracker = Tracker("base")
    run = tracker.run("run", name="run")
    with tracker.underway(run, machine=True):
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
    found = contents("mlflow/mlflow.db")["base", "run"]["metrics"]
    assert len(found) <= 5 and all(name.startswith("system/") for name in found)
    assert len(found["system/cpu_utilization_percentage"]) >= 2
    assert max(value for *_, value in found["system/cpu_utilization_percentage"]) > 20  # of a busy core
    assert 50 < found["system/memory_usage_megabytes"][0][-1] < 50_000


def test_gpus_are_asked_for_where_there_are_some(monkeypatch, tmp_path):
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" > asked\necho "50, 1000"\necho "100, 2000"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert machine_figures._gpus() == {"system/gpu_utilization_percentage": 75.0, "system/gpu_memory_usage_megabytes": pytest.approx(3145.728)}
    assert Path("asked").read_text().endswith("-i 2,3\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine_figures._gpus() == {}


@pytest.mark.parametrize(("structures", "number"), [(6, 4 + 12), (15, 4 + 30), (95, 4)])
def test_a_run_has_fifty_figures_at_most(structures, number):
    rows = [
        {"metric": metric, "role": role, "structure": f"structure {i}", "value": i / 100}
        for metric in ("dice", "hd95", "volume") for role in ("external_test", "internal_test") for i in range(structures)
    ]  # fmt: skip
    figures = evaluate._figures(rows)
    assert len(figures) == number and len(figures) + 16 <= 50  # five of the machine, the losses and Dice of two levels
    assert figures["external_dice"] == pytest.approx(sum(range(structures)) / structures / 100) and json.dumps(figures)


def test_runs_of_some_data_are_found_with_what_deletes_them(capsys):
    tracker = Tracker("base")
    parent = tracker.run("run", name="run", tags={"data_hash": "abc"})
    tracker.run("run/0", name="run-fold-0", parent=parent, tags={"data_hash": "abc"})
    tracker.run("other", name="other", tags={"data_hash": "abcd"})
    Path("report.html").write_text("pictures")
    tracker.artifacts(parent, [Path("report.html")])
    store = Store("sqlite:///mlflow/mlflow.db")
    MlflowClient(store.uri).delete_run(store.find("base", "run/0").info.run_id)
    tracking.runs("sqlite:///mlflow/mlflow.db", ["abc", "none"])
    lines = sorted(capsys.readouterr().out.splitlines())
    assert len(lines) == 2
    assert lines[0].startswith("base/run, 1 files: MLFLOW_TRACKING_URI=sqlite:////") and " && mlflow gc --tracking-uri sqlite:////" in lines[0]
    assert lines[1].startswith("base/run-fold-0 (deleted, its files stand), 0 files: mlflow gc --tracking-uri ")
    assert store.find("base", "run").info.run_id in lines[0] and not Path("none.db").exists()
    with pytest.raises(InputError, match=r"none\.db: no such file"):
        tracking.runs("sqlite:///none.db", ["abc"])
