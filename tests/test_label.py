"""The labeller, with programs that stand in for the tools: they copy a prepared label map, fail, hang, are killed, or mirror the head."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from labelling_tools import unlabelled
from small_heads import CHECKOUT

from data_registry.errors import InputError
from data_registry.params import load_params
from data_registry.schema import read_table, write_table
from pipelines import index, label
from pipelines.labellers import TOOLS, check_installed


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of seven unlabelled scans, and stand-ins on PATH; what a stand-in does to a scan stands in ``stand_in/<name>.how``."""
    database, variables = tmp_path / "db", unlabelled(tmp_path, 7)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))  # for the processes that Ray starts
    settings = {"index": {"roots": [str(database)]}, "harmonise": {"grid": "16mm"}, "resources": {"workers": 2, "task_gb": 0.1, "tries": 1}}
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    write_table(index.SCANS_TABLE, "scans", index.index([database]))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FS_LICENSE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def run(*arguments: str) -> None:
    sys.argv = ["pipelines.label", *arguments]
    label.main()


def are(project: Path, **how: str) -> None:
    for number, what in how.items():
        (project / f"stand_in/sub-{number[1:]}.how").write_text(what)


def calls(project: Path) -> list[str]:
    return sorted((project / "stand_in/calls").read_text().split())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_fails_the_others_go_on_and_the_next_run_does_what_is_left(project, caplog):
    are(project, s02="crash", s03="hang", s04="killed", s05="mirrored", s06="nothing")
    with pytest.raises(InputError, match=r"^5 of 7 scans failed, e\.g\. db_sub-0"):
        run("--tool", "synthseg", "--launcher", "local", "--limit-hours", str(2 / 3600))
    anat = "derivatives/synthseg/sub-{0}/anat/sub-{0}_dseg.nii.gz"
    for number in range(1, 8):
        assert (project / "db" / anat.format(f"0{number}")).is_file() == (number in (1, 7))
    said = {line.partition(": ")[0].strip(): line for line in caplog.messages if line.startswith("db_")}
    words = {
        "2": "failed with exit status 3: ERROR: cannot find the brain (/",
        "3": "was stopped after 0.000556 hours (--limit-hours)",
        "4": "was ended by SIGKILL",
        "5": "fit the T1w better with its left-right axis reversed",
        "6": "ended well without sub-06_dseg",
    }
    assert set(said) == {f"db_sub-0{number}" for number in words}
    assert all(word in said[f"db_sub-0{number}"] for number, word in words.items()), said
    assert "mri_synthseg --i " in Path("logs/label/db_sub-02.log").read_text()
    assert not is_alive(int((project / "stand_in/sub-03.pid").read_text()))
    assert calls(project) == [f"sub-0{number}" for number in range(1, 8)]

    are(project, s02="well", s03="well", s04="well", s06="well")
    with pytest.raises(InputError, match=r"^1 of 2 scans failed, e\.g\. db_sub-05: .*once .*sub-05\.made is removed, the tool runs anew"):
        run("--tool", "synthseg", "--scan", "db_sub-02", "--scan", "db_sub-05")
    assert calls(project).count("sub-02") == 2 and len(calls(project)) == 8     # what was made of 05 is looked at, not made again
    shutil.rmtree(project / "db/derivatives/.labelling/synthseg/sub-05.made")
    are(project, s05="well")
    run("--tool", "synthseg", *(word for number in range(1, 8) for word in ("--scan", f"db_sub-0{number}")))
    assert len(calls(project)) == 8 + 4 and not any((project / "db/derivatives/.labelling/synthseg").iterdir())
    rows = index.index([project / "db"])
    assert [[source["source"] for source in row["labels"]] for row in rows] == [["synthseg"]] * 7


def test_a_subject_folder_comes_whole_with_a_licence_and_to_another_root(project, monkeypatch):
    (project / "license.txt").touch()
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["index"]["labels"] = str(project / "labels")
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    begun = project / "labels/db/derivatives/freesurfer/sub-02"
    begun.mkdir(parents=True)
    with pytest.raises(InputError, match=r"^1 of 2 scans failed, e\.g\. db_sub-02: .*/sub-02: begun by another hand, without aparc\+aseg\.mgz"):
        run("--tool", "recon-all", "--scan", "db_sub-01", "--scan", "db_sub-02")
    assert begun.is_dir() and calls(project) == ["sub-01"] and not list((project / "labels/db/derivatives/.labelling/recon-all").iterdir())
    run("--tool", "fastsurfer", "--scan", "db_sub-02")
    rows = index.index([project / "db"], labels=index.labels_folder(load_params().index))
    assert [[(label["source"], label["path"]) for label in row["labels"]] for row in rows[:3]] == [
        [("aparc_aseg", f"{project}/labels/db/derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz")],
        [("aparc_dkt_aseg", f"{project}/labels/db/derivatives/fastsurfer/sub-02/mri/aparc.DKTatlas+aseg.deep.mgz")],
        [],
    ]
    assert all(label["sha256"] for row in rows for label in row["labels"]) and not (project / "db/derivatives").exists()
    description = json.loads((project / "labels/db/derivatives/freesurfer/dataset_description.json").read_text())
    assert description["GeneratedBy"] == [{"Name": "recon-all"}]


def test_a_tool_ends_with_whoever_started_it(project):
    are(project, s01="hang")
    command = [sys.executable, "-m", "pipelines.label", "--tool", "synthseg", "--scan", "db_sub-01"]
    process, pid = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}), project / "stand_in/sub-01.pid"
    until = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text().strip()) and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(InputError, match=r"sub-01\.lock: another run is at this scan"):
        run("--tool", "synthseg", "--scan", "db_sub-01")
    process.send_signal(signal.SIGKILL)
    process.wait()
    while is_alive(int(pid.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(int(pid.read_text()))
    are(project, s01="well")
    run("--tool", "synthseg", "--scan", "db_sub-01")
    assert not list((project / "db/derivatives/.labelling/synthseg").iterdir())


def test_what_is_missing_is_one_line_before_anything_starts(project, monkeypatch):
    with pytest.raises(InputError, match=rf"^{project}/license\.txt: no such file; FreeSurfer's licence is wanted for recon-all"):
        run("--tool", "recon-all")
    monkeypatch.setenv("FS_LICENSE", str(project / "elsewhere"))
    with pytest.raises(InputError, match=r"elsewhere \(FS_LICENSE\): no such file"):
        check_installed("recon-all")
    (project / "elsewhere").touch()
    check_installed("recon-all")
    monkeypatch.delenv("FREESURFER_HOME")
    for tool in ("recon-all", "synthseg"):
        with pytest.raises(InputError, match=r"^FREESURFER_HOME is not set; FreeSurfer's folder is wanted"):
            run("--tool", tool)
    (project / "bin/run_fastsurfer.sh").unlink()
    with pytest.raises(InputError, match=r"^run_fastsurfer\.sh: no such program on PATH"):
        run("--tool", "fastsurfer")
    monkeypatch.setenv("FREESURFER_HOME", str(project))
    with pytest.raises(InputError, match=r"^--launcher ray: no cluster"):
        run("--tool", "synthseg", "--launcher", "ray")
    with pytest.raises(InputError, match=r"^database other is below no root of params\.yaml; one of db is wanted"):
        run("--tool", "synthseg", "--database", "other")
    with pytest.raises(InputError, match=r"no usable scan db_sub-99"):
        run("--tool", "synthseg", "--scan", "db_sub-99")
    shutil.rmtree(project / "db/derivatives")
    (project / "db/derivatives").touch()
    with pytest.raises(InputError, match=r"/db: Not a directory; a folder that can be written, or index\.labels in params\.yaml, is wanted"):
        run("--tool", "synthseg")
    assert not (project / "stand_in/calls").exists()


def test_slurm_gets_one_array_with_a_task_a_scan(project, monkeypatch):
    for name, body in {
        "sbatch": 'printf "%s\\n" "$@" > "$STAND_IN/sbatch"; echo 7',
        "squeue": 'for i in 0 1 2 3 4 5 6; do echo "7|$i|COMPLETED|label-synthseg|$PWD|None"; done',
    }.items():
        (project / "bin" / name).write_text(f"#!/bin/sh\n# Stands in for SLURM's.\n{body}\n")
        (project / "bin" / name).chmod(0o755)
    run("--tool", "synthseg", "--launcher", "slurm", "--limit-hours", "6", "--threads", "4")
    asked = (project / "stand_in/sbatch").read_text().splitlines()
    assert {"--job-name=label-synthseg", "--array=0-6%16", "--cpus-per-task=4", "--mem=16G", "--time=392"} <= set(asked)
    tasks = [line for line in asked if line.startswith("srun ")]
    assert tasks == [
        f"srun --kill-on-bad-exit=1 --cpus-per-task=4 env PYTHONPATH={CHECKOUT}:{CHECKOUT} {sys.executable} -m pipelines.label --tool synthseg "
        f"--limit-hours 6 --threads 4 --scan db_sub-0{number}" for number in range(1, 8)
    ]  # fmt: skip
    assert len(read_table(index.SCANS_TABLE, "scans")) == 7


def test_command_lines_are_those_that_the_tools_document(monkeypatch):
    def lines(user: int) -> dict[str, str]:
        monkeypatch.setattr(os, "geteuid", lambda: user)
        return {name: " ".join([tool.program, *tool.command("/t1.nii.gz", "sub-01", Path("/work"), 4)]) for name, tool in TOOLS.items()}

    assert lines(1000) == {
        "recon-all": "recon-all -s sub-01 -i /t1.nii.gz -sd /work -all -openmp 4",
        "fastsurfer": "run_fastsurfer.sh --t1 /t1.nii.gz --sid sub-01 --sd /work --seg_only --threads 4",
        "synthseg": "mri_synthseg --i /t1.nii.gz --o /work/sub-01_dseg.nii.gz --parc --robust --threads 4 --cpu",
    }
    assert lines(0) == lines(1000) | {"fastsurfer": lines(1000)["fastsurfer"] + " --allow_root"}


def test_a_tool_runs_with_its_own_python_and_home(project, monkeypatch):
    own = project / "environment/bin"
    own.mkdir(parents=True)
    (own / "python3").write_text("#!/bin/sh\nexit 1\n")
    (own / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{own}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "prefix", str(own.parent))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    run("--tool", "fastsurfer", "--scan", "db_sub-01", "--threads", "3")
    python, threads = (project / "stand_in/sub-01.ran_with").read_text().split()
    assert python != str(own / "python3") and threads == "3"


def test_a_t1w_that_cannot_be_used_costs_no_day_of_work(project):
    (project / "db/sub-01/anat/sub-01_T1w.nii.gz").write_bytes(b"no volume")
    with pytest.raises(InputError, match=r"^db_sub-01: .*/sub-01_T1w\.nii\.gz: "):
        run("--tool", "synthseg", "--scan", "db_sub-01")
    assert not (project / "stand_in/calls").exists()


@pytest.mark.parametrize(("option", "value"), [("--limit-hours", "nan"), ("--limit-hours", "inf"), ("--limit-hours", "-1"), ("--threads", "0")])
def test_numbers_that_are_none_are_refused(project, option, value):
    with pytest.raises(InputError, match=r"^--limit-hours \S+, --threads \S+; finite numbers above 0 are wanted"):
        run("--tool", "synthseg", option, value)


def test_the_stand_ins_refuse_what_the_tools_refuse(project):
    t1w = str(project / "db/sub-01/anat/sub-01_T1w.nii.gz")
    for program, *words in (
        ("recon-all", "-s", "a", "-i", t1w, "--threads", "2"), ("run_fastsurfer.sh", "--t1", t1w, "--sid", "a", "--segonly"),
        ("mri_synthseg", "--i", t1w, "--o", "a_dseg.nii.gz", "--device", "cpu"), ("mri_synthseg", "--i", "none.nii.gz"),
    ):  # fmt: skip
        done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
        assert done.returncode and done.stdout.startswith("ERROR: "), (program, words)
