"""Jobs on a real cluster, by the lines of docs/labs.md: the same shards, no data shipped, nobody without the token."""

import os
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from harmonised import WAIT_S, hashes
from real_cluster import Cluster
from small_heads import CHECKOUT

pytestmark = pytest.mark.ray
DATA_BYTES = 600_000_000  # more than Ray takes in a package at all
CODE = ("data_registry", "lod_model", "pipelines")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The code as git has it, amid what a project accumulates: in folders that git ignores and in one that nobody foresaw."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in CODE:
        shutil.copytree(CHECKOUT / name, folder / name)
    (folder / "infra/ray").mkdir(parents=True)
    shutil.copy(CHECKOUT / "infra/ray/job.yaml", folder / "infra/ray")
    for name in ("README.md", "dvc.yaml", ".gitignore"):
        shutil.copy(CHECKOUT / name, folder)
    for name in ("shards/grid=1mm/site=a.b/part-000.parquet", "checkpoints/last.ckpt", ".git/objects/pack/all.pack", "our_scans/sub-01_T1w.nii.gz"):
        (folder / name).parent.mkdir(parents=True)
        with open(folder / name, "wb") as file:
            file.truncate(DATA_BYTES)
    return folder


def documented(*words: str) -> str:
    """The one line of docs/labs.md that holds these words."""
    (line,) = [line for line in (CHECKOUT / "docs/labs.md").read_text().splitlines() if all(word in line for word in words)]
    return line


def submit(cluster: Cluster, checkout: Path, line: str, project: Path, **environment: str) -> subprocess.CompletedProcess:
    """A line of it with this cluster's dashboard and this project, as the shell runs it in the checkout."""
    assert line.startswith("ray job submit --address http://127.0.0.1:8265 ") and "/shared/project" in line
    line = line.replace("http://127.0.0.1:8265", cluster.dashboard).replace("/shared/project", shlex.quote(str(project)))
    own = {name: value for name, value in cluster.environment.items() if environment.get(name, value)} | {k: v for k, v in environment.items() if v}
    return subprocess.run(line, shell=True, env=own, cwd=checkout, capture_output=True, text=True, timeout=WAIT_S)


def test_a_job_takes_the_code_alone_and_makes_the_same_shards(cluster, checkout, reference, project):
    done = submit(cluster, checkout, documented("ray job submit", "python -m pipelines.harmonise --project"), project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hashes(project) == hashes(reference) and len(hashes(project)) > 4
    folders = [path for path in Path(cluster.folder.name).glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*") if path.is_dir()]
    assert folders, "the job's folder is not where Ray keeps them"
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.name for path in folder.iterdir()} == set(CODE)
        assert sum(path.stat().st_size for path in files) < 10_000_000 and not any("__pycache__" in path.parts for path in files)


def test_a_job_of_dvc_makes_the_same_shards(cluster, checkout, reference, project):
    for name in ("pipelines", "data_registry", "dvc.yaml"):
        (project / name).symlink_to(CHECKOUT / name)
    quiet = cluster.environment | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=project, env=quiet, check=True)
    settings = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(settings + "experiment: base\nnetworks: [lod_brain]\ntrain: {seed: 0, protocol: lod7}\n")
    line = documented("ray job submit", "repro harmonise").replace("repro harmonise", "repro --single-item harmonise")
    done = submit(cluster, checkout, line, project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hashes(project) == hashes(reference)


@pytest.mark.parametrize(
    ("token", "mode", "status", "words"),
    [("0" * 64, "token", 403, "Invalid authentication token"), ("", "disabled", 401, "Missing authentication token"), ("", "", 401, "Missing")],
    ids=["another", "none", "nothing set"],
)
def test_without_the_token_nothing_runs(cluster, checkout, project, tmp_path, token, mode, status, words):
    """Ray's own program ends with a traceback whose last lines say why."""
    own = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": mode, "HOME": str(tmp_path)}
    done = submit(cluster, checkout, documented("ray job submit", "python -m pipelines.harmonise --project"), project, **own)
    assert done.returncode != 0 and not (project / "shards").exists()
    assert words in done.stderr
    request = urllib.request.Request(cluster.dashboard + "/api/jobs/", headers={"Authorization": f"Bearer {token}"} if token else {})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=WAIT_S)
    assert refused.value.code == status


def test_a_driver_without_the_token_gets_one_line(cluster, project):
    own = cluster.environment | {"RAY_ADDRESS": cluster.address, "RAY_AUTH_TOKEN": "0" * 64, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "pipelines.harmonise", "--project", str(project)]
    done = subprocess.run(command, env=own, cwd=project, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: Ray cluster {cluster.address} cannot be joined (")


def test_a_cluster_of_this_machine_alone_has_a_token_and_leaves_none(project, tmp_path):
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    script = (
        "import os\nfrom pipelines.parallel import run_bounded\n"
        "print(dict(run_bounded(lambda x: (x, os.environ['RAY_AUTH_MODE']), [(1,)], memory=[0], again=None, workers=1, address=None)))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=own, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout == "{0: (1, 'token')}\n", done.stdout + done.stderr
    assert not (tmp_path / ".ray").exists()
