"""The launchers on a real SLURM of this machine, through failures, pre-emption and Ctrl-C. Where SLURM cannot start, they fail."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from labelling_tools import unlabelled
from small_heads import CHECKOUT, add_subject

from data_registry import slurm
from data_registry.errors import InputError
from data_registry.files import sha256
from data_registry.jobs import Job, Slurm
from data_registry.params import Resources, load_params
from data_registry.schema import read_table, write_table
from lod_model import launch, weights
from lod_model.data import all_folds
from lod_model.runs import finished, fold_folder, training_identity
from lod_model.train import train
from pipelines import index
from pipelines.project import data_project

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parent
WAIT_S = 240
RUN = "lod_brain-base-0"
REPRO = [sys.executable, "-m", "dvc", "repro", "--single-item", "train@lod_brain"]
SETTINGS = {
    "experiment": "base", "networks": ["lod_brain"], "harmonise": {"grid": "16mm", "shards_per_site": 2}, "split": {"folds": 3}, "evaluate": {},
    "train": {
        "protocol": "lod7", "seed": 0, "coarse": {"epochs": 2, "learning_rate": 0.01}, "fine": {"epochs": 10, "learning_rate": 0.01},
        "network": {"widths": [2, 4, 8], "dropout": 0.0}, "stop_patience": 99, "reduce_patience": 1,
    },
    "resources": {"launcher": "slurm", "threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """Two nodes; SLURM_CONF names them to every command of SLURM."""
    folder, script = tmp_path_factory.mktemp("cluster"), CHECKOUT / "infra/slurm/test-cluster.sh"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PYTHONPATH", f"{CHECKOUT}{os.pathsep}{HERE.parent / 'ray'}")
        for name, value in (("OMP_NUM_THREADS", "1"), ("MASTER_ADDR", "127.0.0.1"), ("GLOO_SOCKET_IFNAME", "lo")):
            patch.setenv(name, value)
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        up = subprocess.run([script, "up", folder], capture_output=True, text=True, timeout=WAIT_S)
        assert up.returncode == 0, up.stderr
        again = subprocess.run([script, "up", folder], capture_output=True, text=True, timeout=WAIT_S)
        assert again.returncode == 0 and again.stdout.startswith("already up")
        daemons = [int(path.read_text()) for path in folder.glob("run/*.pid")]
        assert len(daemons) == 4
        try:
            yield folder
        finally:
            subprocess.run([script, "down", folder], check=True, timeout=WAIT_S)
        assert not [pid for pid in daemons if is_alive(pid)]


@pytest.fixture(scope="module")
def harmonised(tmp_path_factory, cluster) -> Path:
    """A project of three places, with DVC, up to the split."""
    folder = tmp_path_factory.mktemp("lab")
    for number, name in enumerate(("alpha", "beta", "gamma")):
        for subject in range(4):
            add_subject(folder / "data" / name, f"{subject:02d}", seed=10 * number + subject)
    project = data_project(folder / "data", folder / "project")
    (project / "params.yaml").write_text(yaml.safe_dump({"index": {"roots": [str(folder / "data")]}} | SETTINGS, sort_keys=False))
    dvc(project, "repro", "split")
    return project


@pytest.fixture
def project(harmonised, monkeypatch) -> Path:
    """The current folder; with no fold trained."""
    shutil.rmtree(harmonised / "checkpoints", ignore_errors=True)
    shutil.rmtree(harmonised / "mlflow", ignore_errors=True)
    monkeypatch.chdir(harmonised)
    monkeypatch.setattr(slurm, "POLL_S", 1.0)
    return harmonised


def dvc(project: Path, *words: str) -> str:
    """Run DVC; what it says."""
    done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=project, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def until(what, *, hurry: bool = False) -> None:
    """Wait for it; a requeued job waits two minutes by itself, but three seconds where the test is in a hurry."""
    end, since = time.monotonic() + WAIT_S, {}
    while not what():
        assert time.monotonic() < end, ask("squeue", "--all")
        for line in ask("squeue", "--noheader", "--array", "--states=PENDING", "--format=%i %r").splitlines() if hurry else ():
            job, _, reason = line.partition(" ")
            if reason == "BeginTime" and time.monotonic() > since.setdefault(job, time.monotonic()) + 3:  # sooner, and its node refuses it
                with contextlib.suppress(subprocess.CalledProcessError):  # it has begun
                    ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def weights_of(fold: int) -> Path:
    return fold_folder(RUN, fold) / "weights.pt"


def newest_job() -> str:
    return max((path.stem for path in slurm.LOGS.glob("*.json")), key=int)


def active_jobs() -> str:
    return ask("squeue", "--noheader")


def active_numbers() -> list[str]:
    return ask("squeue", "--noheader", "--format=%A").split()


def hashes(project: Path) -> dict[str, str]:
    return {str(path.relative_to(project)): sha256(path) for path in sorted(project.glob("shards/**/*.parquet"))}


def metric_steps(project: Path, fold: int) -> tuple[list[int], str]:
    """Epochs of the one MLflow run of a fold, as they were logged, and its status."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'mlflow/mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "base"]
    (run,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == f"{RUN}-fold-{fold}"]
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "fine_val_loss")], run.info.status


def test_folds_are_an_array_that_dvc_waits_for(project, tmp_path, monkeypatch):
    """Two folds need a shard that is not there: the stage fails with their last lines, and the third stands. Then one is pre-empted."""
    folds = all_folds()
    good = next(fold for fold, roles in folds.items() if roles["external_test"][0].place == "gamma")
    first, second = bad = [fold for fold in folds if fold != good]
    lost = next(project.glob("shards/grid=16mm/site=gamma.gamma"))
    lost.rename(project / "away")
    try:
        done = subprocess.run(REPRO, capture_output=True, text=True, timeout=WAIT_S)
    finally:
        (project / "away").rename(lost)
    job = newest_job()
    assert done.returncode != 0 and f"job {job}, an array of 3" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for fold in bad:
        assert re.search(rf"{RUN}/fold-{fold} failed: .*site=gamma.gamma/.*: no such shard.* \(logs/slurm/{job}_{fold}.log\)", line), line
    params = load_params()
    identity = training_identity("lod_brain", params)
    assert {fold: finished(RUN, fold) == identity for fold in folds} == {fold: fold == good for fold in folds}
    stands = weights_of(good).stat().st_mtime_ns

    (project / "params.yaml").write_text((project / "params.yaml").read_text() + "  loader_workers: 1\n")  # who hears the signals too
    with open(project / "said", "w") as output:
        stage = subprocess.Popen(REPRO, stdout=output, stderr=output)
        until(lambda: newest_job() != job and (weights_of(first).parent / "fine/best.ckpt").is_file())
        job = newest_job()
        ask("scancel", "--signal=USR1", f"{job}_0")
        until(lambda: stage.poll() is not None, hurry=True)
    assert stage.returncode == 0 and f"job {job}, an array of 2" in (project / "said").read_text(), (project / "said").read_text()
    assert all(finished(RUN, fold) == identity for fold in folds) and weights_of(good).stat().st_mtime_ns == stands
    assert re.search(r"asked to stop: epoch \d+, \d+ of its \d+ samples", (slurm.LOGS / f"{job}_0.log").read_text())
    for fold in bad:
        steps, status = metric_steps(project, fold)
        assert steps == list(range(SETTINGS["train"]["fine"]["epochs"])) and status == "FINISHED"
    places = launch.submit_stage("sync", params)
    assert slurm.wait_for(places, cancel=set()) == {} and "nothing to send" in next(iter(places)).log.read_text()
    assert slurm.wait_for(launch.submit_stage("evaluate", params), cancel=set()) == {}
    results = read_table(project / "tables/results.parquet", "results").to_pylist()
    assert {row["fold"] for row in results if row["run"] == RUN} == set(folds)

    for name in ("tables", "shards"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    train("lod_brain", params.model_copy(update={"resources": Resources(threads=1)}), {first: folds[first]})
    assert weights.load(weights_of(first)).hash == weights.load(project / weights_of(first)).hash


def test_who_starts_again_waits_for_what_is_at_work(project, monkeypatch, caplog):
    """Ctrl-C cancels what was submitted by it, and nothing else; other settings do not get in."""
    monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupted))
    params = load_params()
    held = params.resources.slurm.model_copy(update={"options": ("--hold",)})
    params = params.model_copy(update={"resources": params.resources.model_copy(update={"slurm": held})})
    with caplog.at_level("INFO", "lodbrain"):
        with pytest.raises(KeyboardInterrupt):
            launch.train_folds({"lod_brain": [0, 1]}, params)
        assert not active_jobs() and "cancelled job" in caplog.text
        launch.train_folds({"lod_brain": [0, 1]}, params, wait=False)
        job = newest_job()
        with pytest.raises(KeyboardInterrupt):
            launch.train_folds({"lod_brain": [1, 2]}, params)
        assert f"still at work, and waited for: {RUN}/fold-1 (job {job}_1)" in caplog.text
    assert set(re.findall(r"\d+", ask("squeue", "--noheader", "--format=%F"))) == {job}
    other = params.model_copy(update={"train": params.train.model_copy(update={"stop_patience": 7})})
    with pytest.raises(InputError, match=rf"fold-1: job {job}_1 trains it with other settings or data; its end, or `scancel {job}_1`, is wanted"):
        launch.train_folds({"lod_brain": [1]}, other)
    ask("scancel", job)


def interrupted(_seconds: float) -> None:
    raise KeyboardInterrupt


def test_what_slurm_does_not_take_is_one_line(project):
    why = r"^sbatch: Batch job submission failed: Invalid partition name specified; resources.slurm of params.yaml, for x$"
    with pytest.raises(InputError, match=why):
        slurm.submit("x", [slurm.Task("x", "true")], Job(partition="nowhere"), Slurm())


def test_ends_are_told_apart(project):
    """A command's own failure, a cancelled job, and one that SLURM has forgotten."""
    commands = {"good": "true", "bad": "echo the reason >&2; false", "long": "srun sleep 99"}
    places = slurm.submit("ends", [slurm.Task(name, command) for name, command in commands.items()], Job(), Slurm())
    good, bad, long = places
    until(lambda: good.status == 0 and bad.status == 1 and " R " in active_jobs())
    ask("scancel", str(long))
    failed = slurm.wait_for(places, cancel=set())
    assert failed["bad"] == f"the reason ({bad.log})" and failed["long"].startswith("CANCELLED, ") and set(failed) == {"bad", "long"}
    forgotten = slurm.Place("999", 0)
    (slurm.LOGS / "999_0.status").write_text("0\n")
    assert slurm.wait_for({forgotten: "forgotten"}, cancel=set()) == {}


def test_harmonise_on_ray(project, monkeypatch):
    """On both nodes; pre-empted in the middle of it; in the end, the shards that one machine makes."""
    before, trace = hashes(project), project / "trace"
    shutil.rmtree(project / "shards/grid=16mm")
    monkeypatch.setenv("TEST_TRACE", str(trace))
    monkeypatch.setitem(launch.MODULES, "harmonise", ["disturbed_harmonise"])  # scans that take half a second, and tell of their node
    params = load_params()
    two = params.resources.slurm.model_copy(update={"harmonise": Job(nodes=2)})
    places = launch.submit_stage("harmonise", params.model_copy(update={"resources": params.resources.model_copy(update={"slurm": two})}))
    (place,) = places
    until(lambda: hashes(project))
    ask("scancel", "--signal=USR1", place.job)
    until(lambda: not active_jobs(), hurry=True)
    assert slurm.wait_for(places, cancel=set()) == {}, place.log.read_text()
    assert hashes(project) == before and place.log.read_text().count("shards, ") == 2
    assert len({line.split()[2] for line in trace.read_text().splitlines()}) > 2, "one node did it all"
    assert not Path(f"/tmp/ray-{place.job}").exists()


def test_labels_are_an_array_with_a_task_a_scan(tmp_path, monkeypatch):
    """One scan fails, one is pre-empted and begins anew, one takes too long; the same command does what is left, from another folder too."""
    for name, value in unlabelled(tmp_path, 4).items():
        monkeypatch.setenv(name, value)
    project, stand_in = tmp_path / "project", tmp_path / "stand_in"
    project.mkdir()
    monkeypatch.chdir(project)
    settings = {"index": {"roots": [str(tmp_path / "db")]}, "resources": {"launcher": "slurm", "slurm": {"at_once": 2, "label": {"mem_gb": 1}}}}
    (project / "params.yaml").write_text(yaml.safe_dump(settings))
    write_table(index.SCANS_TABLE, "scans", index.index([tmp_path / "db"]))
    (stand_in / "sub-02.how").write_text("crash")
    (stand_in / "sub-03.how").write_text("hang")
    (stand_in / "license.txt").touch()
    monkeypatch.setenv("FS_LICENSE", str(stand_in / "license.txt"))

    def start(*options: str) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # what the jobs run must be found without
        command = [sys.executable, "-m", "pipelines.label", "--tool", "recon-all", "--project", str(project), *options]
        return subprocess.Popen(command, cwd=CHECKOUT, env=environment, stderr=subprocess.PIPE, text=True)

    mri = [tmp_path / f"db/derivatives/freesurfer/sub-0{number}/mri/aparc+aseg.mgz" for number in range(1, 5)]
    first = start("--threads", "2")
    pid = stand_in / "sub-03.pid"
    until(lambda: pid.is_file() and pid.read_text().strip() and mri[0].is_file() and mri[3].is_file())
    job = newest_job()
    ask("scancel", "--signal=USR1", f"{job}_2")
    until(lambda: not is_alive(int(pid.read_text())))
    (stand_in / "sub-03.how").write_text("well")
    until(lambda: mri[2].is_file(), hurry=True)
    _, said = first.communicate(timeout=WAIT_S)
    failure = f"recon-all failed with exit status 3: ERROR: cannot find the brain ({project}/logs/label/db_sub-02.log) (logs/slurm/{job}_1.log)"
    assert first.returncode == 2 and said.splitlines()[-1].startswith("error: 1 of 4 scans failed, e.g. db_sub-02: "), said
    assert failure in said.splitlines()[-1] and not mri[1].exists()
    assert sorted((stand_in / "calls").read_text().split()) == ["sub-01", "sub-02", "sub-03", "sub-03", "sub-04"]
    assert (stand_in / "sub-01.ran_with").read_text().split()[1] == "2"

    (stand_in / "sub-02.how").write_text("hang")
    again = start("--limit-hours", str(3 / 3600))
    _, said = again.communicate(timeout=WAIT_S)
    assert again.returncode == 2 and re.search(r"error: .*db_sub-02: .*recon-all was stopped after 0\.000833 hours \(--limit-hours\)", said), said
    assert not is_alive(int((stand_in / "sub-02.pid").read_text()))
    (stand_in / "sub-02.how").write_text("well")
    last = start()
    _, said = last.communicate(timeout=WAIT_S)
    assert last.returncode == 0 and "1 of 1 scans labelled" in said and all(path.is_file() for path in mri), said
    rows = index.index([tmp_path / "db"])
    assert [[label["source"] for label in row["labels"]] for row in rows] == [["aparc_aseg"]] * 4


def test_two_nodes_are_preempted(project):
    """By a job of a higher partition, then requeued by hand: every sample once, in order, by the node whose turn it is."""
    (project / "line").mkdir()
    job = Job(nodes=2, cpus=4)
    places = slurm.submit("line", [slurm.Task("line", slurm.step([sys.executable, str(HERE / "line_on_nodes.py"), "line"], job))], job, Slurm())
    (place,) = places
    seen = project / "line/seen-0"
    until(lambda: seen.is_file() and len(seen.read_text().splitlines()) > 5)
    high = ask("sbatch", "--parsable", "--partition=high", "--nodes=2", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1").strip()
    until(lambda: high not in active_numbers())
    first = len(seen.read_text().splitlines())
    until(lambda: len(seen.read_text().splitlines()) > first + 5, hurry=True)
    ask("scontrol", "requeue", place.job)
    until(lambda: not active_jobs(), hurry=True)
    assert slurm.wait_for(places, cancel=set()) == {}, place.log.read_text()
    check_line(project / "line", place.log.read_text())


def test_a_fold_on_two_nodes_is_preempted(project, tmp_path, monkeypatch):
    """By a job of a higher partition: it is requeued, and ends after the right number of steps with the weights of two undisturbed processes."""
    before = (project / "params.yaml").read_text()
    settings = yaml.safe_load(before)
    settings["resources"] = {"threads": 1, "slurm": {"train": {"nodes": 2, "cpus": 4}}}
    (project / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    params = load_params()
    try:
        launch.train_folds({"lod_brain": [0]}, params, wait=False)
        ((place, _),) = slurm.at_work().values()
        until(lambda: (weights_of(0).parent / "fine/best.ckpt").is_file())
        high = ask("sbatch", "--parsable", "--partition=high", "--nodes=2", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1").strip()
        until(lambda: high not in active_numbers())
        until(lambda: not active_jobs(), hurry=True)
        launch.train_folds({"lod_brain": [0]}, params)  # which waits for what is at work, and has nothing to do
    finally:
        (project / "params.yaml").write_text(before)
    said = place.log.read_text()
    assert place.status == 0 and said.count("asked to stop: epoch ") == 1 and "Traceback" not in said, said
    number = len(all_folds()[0]["train"])
    found = json.loads((weights_of(0).parent / "fold.json").read_text())
    steps = {level: stage["steps"] for level, stage in found["stages"].items()}
    assert found["batch_factor"] == 2 and steps == {"coarse": 2 * number, "fine": 10 * number}, steps  # as many as with the recipe's batch
    assert metric_steps(project, 0) == (list(range(10)), "FINISHED")

    for name in ("tables", "shards"):
        (tmp_path / name).symlink_to(project / name)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "lod_model.train", "--network=lod_brain", "--fold=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert weights.load(weights_of(0)).hash == weights.load(project / weights_of(0)).hash


def check_line(folder: Path, log: str) -> None:
    from line_on_nodes import EPOCHS, SAMPLES, order

    assert log.count("asked to stop") >= 2
    whole = order()
    for rank in range(2):
        wanted = []
        for epoch in range(EPOCHS):
            whole.set_epoch(epoch)
            wanted += [f"{epoch} {number} {index}" for number, index in list(whole)[rank::2]]
        assert (folder / f"seen-{rank}").read_text().splitlines() == [f"{step} {sample}" for step, sample in enumerate(wanted)]
    ends = {(folder / f"weight-{rank}").read_text() for rank in range(2)}
    assert len(ends) == 1 and ends.pop().split()[0] == str(EPOCHS * SAMPLES // 2)
