"""The whole path under `dvc repro` in a project of its own: what is run again and what is not, and that nothing else is touched."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_heads import CHECKOUT, add_subject

from data_registry.errors import InputError
from data_registry.files import sha256
from data_registry.schema import read_table
from pipelines.project import data_project, stage_environment

STAGE = {"epochs": 1, "learning_rate": 0.01}
TRAIN = {"protocol": "lod7", "seed": 0, "coarse": STAGE, "fine": STAGE, "network": {"widths": [2, 4, 8]}}


def repro(folder: Path) -> list[str]:
    """Run `dvc repro`; the stages that ran."""
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder, env=stage_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


def change(folder: Path, edit) -> None:
    settings = yaml.safe_load((folder / "params.yaml").read_text())
    edit(settings)
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project on three small databases, run once."""
    data = tmp_path_factory.mktemp("databases")
    for number, name in enumerate(("alpha", "beta", "gamma")):
        for subject in range(3):
            add_subject(data / name, f"{subject:02d}", seed=10 * number + subject)
    folder = data_project(data, tmp_path_factory.mktemp("project"))
    change(folder, lambda s: s.update(harmonise={"grid": "16mm"}, train=TRAIN))
    assert repro(folder) == ["index", "harmonise", "quality", "split", "train@lod_brain", "evaluate", "report"]
    return folder


def test_everything_is_there(project):
    results = read_table(project / "tables/results.parquet", "results").to_pandas()
    assert set(results.run) == {"lod_brain-base-0", "atlas-base-0"}
    assert set(results[results.role == "external_test"].place) == {"alpha", "beta", "gamma"}
    assert set(results.metric) == {"dice", "hd95", "asd", "volume", "reference_volume"}
    page = (project / "reports/report.html").read_text()
    assert "data:image" in page and results.split_hash[0][:12] in page
    assert (project / "mlflow/mlflow.db").is_file()


def test_it_is_a_project_of_its_own(project):
    settings = yaml.safe_load((project / "params.yaml").read_text())
    assert data_project(Path(settings["index"]["roots"][0]), project) == project
    assert yaml.safe_load((project / "params.yaml").read_text()) == settings  # a second call keeps what the user set
    assert not (CHECKOUT / "tables/results.parquet").is_file() or (CHECKOUT / "tables/results.parquet").stat().st_ino != (
        project / "tables/results.parquet").stat().st_ino  # fmt: skip
    assert (project / "dvc.lock").is_file() and not (project / "dvc.lock").is_symlink()


def test_what_runs_again(project):
    """In order: nothing, from train on, everything but with one shard."""
    assert repro(project) == ["index"]
    change(project, lambda s: s["train"].update(fine={"epochs": 1, "learning_rate": 0.02}))
    assert repro(project) == ["index", "train@lod_brain", "evaluate", "report"]
    before = {path: sha256(path) for path in (project / "shards").rglob("*.parquet")}
    roots = yaml.safe_load((project / "params.yaml").read_text())["index"]["roots"]
    add_subject(Path(roots[0]) / "beta", "77", seed=77)
    assert repro(project) == ["index", "harmonise", "quality", "split", "train@lod_brain", "evaluate", "report"]
    after = {path: sha256(path) for path in (project / "shards").rglob("*.parquet")}
    changed = [path for path, digest in after.items() if before.get(path) != digest]
    assert len(changed) == 1 and changed[0].parent.name == "site=beta.beta" and set(before) <= set(after)
    change(project, lambda s: s.update(resources={"workers": 1}))
    assert repro(project) == ["index"]  # where things run is no part of a result


def test_nothing_to_work_on(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        data_project(tmp_path / "none", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_in_git_and_on_another_machine(tmp_path):
    """Git is given what a project decides and what it must remember, nobody's data and no link; a clone is set up by the same command."""
    add_subject(tmp_path / "data/alpha", "01", seed=1)
    folder = data_project(tmp_path / "data", tmp_path / "project")
    rules = [line for line in (CHECKOUT / ".gitignore").read_text().splitlines() if line.startswith("/")]
    for rule in (*rules, "/.dvc/cache/", "/.dvc/tmp/"):
        (folder / rule[1:]).mkdir(parents=True, exist_ok=True)
        (folder / rule[1:] / "sub-01.nii.gz").touch()
    (folder / "withdrawn.tsv").touch()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    kept = subprocess.run(["git", "ls-files"], cwd=folder, check=True, capture_output=True, text=True).stdout.split()
    assert kept == [".dvc/config", ".dvcignore", ".gitignore", "params.yaml", "withdrawn.tsv"]
    (folder / "pipelines").unlink()
    (folder / "pipelines").symlink_to("/nowhere/pipelines")
    (folder / ".gitignore").write_text("own\n")
    assert data_project(tmp_path / "data", folder) == folder and (folder / "pipelines").resolve() == CHECKOUT / "pipelines"
    assert (folder / ".gitignore").read_text() == "own\n"
