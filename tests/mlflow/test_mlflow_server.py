"""MLflow on a real server: the script that runs it, jobs of an array, a training through the server's death, the page that compares runs."""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from loopback_s3 import BUCKET, s3_server
from mlflow import MlflowClient
from real_server import RealServer
from small_heads import CHECKOUT, add_subject
from small_heads import run as run_stage

from data_registry.errors import InputError
from data_registry.params import load_params
from lod_model import evaluate, tracking
from lod_model.data import all_folds
from lod_model.tracking import Tracker, sync
from lod_model.train import train

pytestmark = pytest.mark.mlflow
TABLES = ("runs", "metrics", "latest_metrics", "params", "tags", "experiments")
NETWORKS = ("lod_brain", "unet")
PARAMS = """
experiment: base
networks: [lod_brain, unet]
index: {{roots: [roots]}}
harmonise: {{grid: 16mm, shards_per_site: 1}}
split: {{folds: 2}}
train:
  coarse: {{epochs: 2, learning_rate: 0.01}}
  fine: {{epochs: 3, learning_rate: 0.01}}
  network: {{lod_brain: {{widths: [2, 4, 8]}}, unet: {{widths: [2, 4]}}}}
resources: {{mlflow_uri: "{uri}"}}
"""


@pytest.fixture(scope="module")
def server():
    """With its artifacts in a bucket."""
    real = RealServer()
    with s3_server() as credentials:
        real.environment |= credentials | {"MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow"}
        try:
            real.up()
            yield real
        finally:
            real.remove()


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "MLFLOW_TRACKING_URI", tracking.OFFLINE):
        monkeypatch.delenv(name, raising=False)


def runs_of(server: RealServer, experiment: str) -> dict:
    """Runs by their key, which is unique."""
    client = MlflowClient(server.uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    by_key = {run.data.tags["lodbrain.key"]: run for run in found}
    assert len(by_key) == len(found), "two runs of one key"
    return by_key


def steps(server: RealServer, run, name: str) -> list[int]:
    return [metric.step for metric in MlflowClient(server.uri).get_metric_history(run.info.run_id, name)]


def shown_figure(value: float) -> str:
    """As the page writes it: three decimals below 10, two below 100."""
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}".rstrip("0").rstrip(".")


def start_job(uri: str, fold: int, *, array: int, folder: Path) -> subprocess.Popen:
    slurm = {"SLURM_JOB_ID": str(array + fold), "SLURM_ARRAY_JOB_ID": str(array), "SLURM_ARRAY_TASK_ID": str(fold)}
    environment = os.environ | slurm | {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(Path(__file__).with_name("one_job.py")), uri, str(fold)]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(*jobs: subprocess.Popen) -> None:
    for job in jobs:
        output = job.communicate(timeout=120)[0]
        assert job.returncode == 0, output


def test_it_listens_on_loopback_to_its_own_names_and_shows_no_password(server):
    assert server.script("status").returncode == 0 and "runs already" in server.script("up").stdout
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    postmaster = psutil.Process(int((server.home / "postgres/postmaster.pid").read_text().split()[0]))
    processes += [postmaster, *postmaster.children()]
    heard = {c.laddr for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in heard} == {"127.0.0.1"} and {address.port for address in heard} == {server.port, server.pg_port}
    secret = (server.home / "pgpass").read_text().strip().rpartition(":")[2]
    assert len(secret) == 48 and (server.home / "pgpass").stat().st_mode & 0o77 == 0
    assert not [p for p in psutil.process_iter() if secret in " ".join(p.cmdline())]
    for name, wanted in ((f"localhost:{server.port + 1}", 200), ("attacker.example", 403)):
        request = urllib.request.Request(f"{server.uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default", headers={"Host": name})
        try:
            status = urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            status = error.code
        assert status == wanted, name


def test_jobs_of_an_array_that_begin_together_share_one_parent(server, tmp_path):
    wait_for(*[start_job(server.uri, fold, array=100, folder=tmp_path) for fold in (0, 1)])
    found = runs_of(server, "array")
    assert set(found) == {"run", "run/0", "run/1"}
    for fold in (0, 1):
        child = found[f"run/{fold}"]
        assert child.data.tags["mlflow.parentRunId"] == found["run"].info.run_id and child.info.status == "FINISHED"
        assert child.data.tags["slurm_job"] == f"100_{fold}" and steps(server, child, "loss") == list(range(5))
        assert child.data.metrics["system/memory_usage_megabytes"] > 10 and len(child.data.metrics) <= 50
        assert child.info.artifact_uri.startswith("mlflow-artifacts:")  # served: jobs need no way to the store
        kept = MlflowClient(server.uri).download_artifacts(child.info.run_id, f"note-{fold}.txt", str(tmp_path))
        assert Path(kept).read_text() == f"fold {fold}"
    assert found["run"].data.tags["slurm_job"] == "100"


def test_offline_jobs_merge_once(server, tmp_path, capsys):
    """Jobs offline, merged with each other and with what the same array has logged online; then nothing changes however often it is done."""
    jobs = [start_job("none", fold, array=200, folder=tmp_path) for fold in (1, 2)]
    wait_for(*jobs)
    before = runs_of(server, "array")
    sync([Path("mlflow")], server.uri)
    assert capsys.readouterr().out.count("figures") == 2
    found = runs_of(server, "array")
    assert set(found) == {"run", "run/0", "run/1", "run/2"} and found["run"].info.run_id == before["run"].info.run_id
    assert found["run/2"].data.tags["mlflow.parentRunId"] == found["run"].info.run_id and steps(server, found["run/2"], "loss") == list(range(5))
    assert len(steps(server, found["run/1"], "loss")) == 10  # the same fold, trained online and offline
    counts = {table: server.count(table) for table in TABLES}
    state = {key: run.to_dictionary() for key, run in found.items()}
    for _ in range(2):
        sync([Path("mlflow")], server.uri)
        assert {table: server.count(table) for table in TABLES} == counts
        assert {key: run.to_dictionary() for key, run in runs_of(server, "array").items()} == state
    assert capsys.readouterr().out.count("nothing to send") == 4


def test_a_server_that_comes_no_more_is_made_up_for_later(server, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "LAST_TRIES_S", 1.0)
    tracker = Tracker("away", uri=server.uri)
    run = tracker.run("run", name="run")
    tracker.metrics(run, {"loss": 1.0}, step=0)
    server.kill()
    try:
        tracker.metrics(run, {"loss": 0.5}, step=1)
        tracker.finish(run)
        tracker.close()
        words = caplog.records[-1].getMessage().split()
        file, uri = words[words.index("--from") + 1], words[words.index("--to") + 1]
        with pytest.raises(InputError, match=f"{server.uri}: Connection refused; nothing is lost"):
            sync([Path(file)], uri)
        server.be_dead_unwaited()
    finally:
        server.up()
    assert steps(server, runs_of(server, "away")["run"], "loss") == [0]
    sync([Path(file)], uri)
    found = runs_of(server, "away")["run"]
    assert steps(server, found, "loss") == [0, 1] and found.info.status == "FINISHED"


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory) -> Path:
    """Two networks trained and scored; amid the first the server is killed, and three epochs later there again."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "params.yaml").write_text(PARAMS.format(uri=server.uri))
    (folder / "pipelines").symlink_to(CHECKOUT / "pipelines")
    for number, name in enumerate(("alpha", "beta")):
        for subject in range(4):
            add_subject(folder / "roots" / name, f"{subject:02d}", seed=10 * number + subject)
    for stage in ("index", "harmonise", "split"):
        done = run_stage(folder, f"pipelines.{stage}")
        assert done.returncode == 0, done.stderr
    calls, logged = [], Tracker.metrics

    def disturbed(self, *arguments, **settings) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            server.kill()
        if len(calls) == 6:
            server.up()
        logged(self, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tracking, "PAUSE_S", 0.5)
        patch.setattr(Tracker, "metrics", disturbed)
        params = load_params()
        for network in NETWORKS:
            train(network, params, all_folds())
        evaluate.main()
    return folder


def test_a_training_survives_the_death_of_the_server(server, trained):
    runs = {run.info.run_name: run for run in runs_of(server, "base").values()}
    for fold in (0, 1):
        child = runs[f"lod_brain-base-0-fold-{fold}"]
        assert child.data.tags["mlflow.parentRunId"] == runs["lod_brain-base-0"].info.run_id and child.info.status == "FINISHED"
        assert steps(server, child, "coarse_val_loss") == [0, 1] and steps(server, child, "fine_val_loss") == [0, 1, 2]
        assert child.data.metrics["system/memory_usage_megabytes"] > 100 and "external_dice" in child.data.metrics
        assert child.data.tags.keys() >= {"git", "split_hash", "data_hash", "network", "fold"}
    assert all(len(run.data.metrics) <= 50 for run in runs.values()) and runs["lod_brain-base-0"].info.status == "FINISHED"
    assert list((trained / "mlflow/jobs").glob("*.db"))  # where it went meanwhile


def test_two_networks_stand_side_by_side_in_a_browser(server, trained, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "chromium is not here (Debian: apt-get install chromium)"
    runs = {run.info.run_name: run for run in runs_of(server, "base").values()}
    pair = [runs[f"{network}-base-0"] for network in NETWORKS]
    ids, experiments = (quote(json.dumps(some)) for some in ([run.info.run_id for run in pair], [pair[0].info.experiment_id]))
    page = f"{server.uri}/#/compare-runs?runs={ids}&experiments={experiments}"
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={tmp_path}/browser"]
    quiet += ["--disable-background-networking", "--window-size=1400,2600", "--virtual-time-budget=30000"]
    dom = subprocess.run([browser, *quiet, "--dump-dom", page], capture_output=True, text=True, timeout=120).stdout
    picture = tmp_path / "compare.png"
    subprocess.run([browser, *quiet, f"--screenshot={picture}", page], capture_output=True, timeout=120, check=True)
    for shown in [*(run.info.run_id for run in pair), "train.fine.epochs", "external_dice", "lod_brain-base-0", "unet-base-0"]:
        assert shown in dom, f"the page does not show {shown}"
    for run in pair:
        assert shown_figure(run.data.metrics["external_hd95"]) in dom
        assert run.data.params["network"] in dom
    assert picture.stat().st_size > 50_000


def test_what_is_down_says_so(server, tmp_path):
    assert server.script("down").returncode == 0 and server.script("status").returncode == 3
    for port in (server.port, server.pg_port):
        with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            pass
    assert not (server.home / "artifacts").exists()
    del server.environment["MLFLOW_ARTIFACTS_DESTINATION"]
    server.up()  # what was there still is; artifacts of new experiments go to a folder now
    assert "run/2" in runs_of(server, "array")
    wait_for(start_job(server.uri, 3, array=300, folder=tmp_path))
    assert [path.read_text() for path in (server.home / "artifacts").rglob("note-3.txt")] == ["fold 3"]
