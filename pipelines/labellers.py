"""The tools that label a T1w: what each is called with, what it needs, what it leaves behind and where that belongs.

Command lines as their authors document and parse them: recon-all of FreeSurfer 5.3 to 8 (surfer.nmr.mgh.harvard.edu/fswiki/recon-all;
scripts/recon-all), run_fastsurfer.sh of FastSurfer 2 (its doc/scripts/RUN_FASTSURFER.md), mri_synthseg of FreeSurfer 7.3 and 8
(surfer.nmr.mgh.harvard.edu/fswiki/SynthSeg; mri_synthseg/mri_synthseg). None of them comes with the project.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_registry.errors import InputError


@dataclass(frozen=True)
class Tool:
    """An installed program that makes a label map of a T1w."""

    program: str
    memory_gb: float
    """That one scan asks for, in 10⁹ bytes."""
    command: Callable[[str, str, Path, int], list[str]]
    """(T1w, subject's name, folder to write to, threads) → its arguments."""
    made: Callable[[str], str]
    """Subject's name → its label map, below the folder it writes to; without it the tool has not finished."""
    home: str
    """Of its results, below the database."""
    needs_home: bool = True
    """FREESURFER_HOME must be set."""
    needs_licence: bool = False


def _recon_all(t1w: str, name: str, folder: Path, threads: int) -> list[str]:
    return ["-s", name, "-i", t1w, "-sd", str(folder), "-all", "-openmp", str(threads)]


def _fastsurfer(t1w: str, name: str, folder: Path, threads: int) -> list[str]:
    root = ["--allow_root"] * (os.geteuid() == 0)  # else it refuses; in a container there may be nobody else
    return ["--t1", t1w, "--sid", name, "--sd", str(folder), "--seg_only", "--threads", str(threads), *root]


def _synthseg(t1w: str, name: str, folder: Path, threads: int) -> list[str]:
    return ["--i", t1w, "--o", str(folder / f"{name}_dseg.nii.gz"), "--parc", "--robust", "--threads", str(threads), "--cpu"]


TOOLS = {
    "recon-all": Tool("recon-all", 16, _recon_all, "{}/mri/aparc+aseg.mgz".format, "derivatives/freesurfer", needs_licence=True),
    "fastsurfer": Tool(
        "run_fastsurfer.sh", 16, _fastsurfer, "{}/mri/aparc.DKTatlas+aseg.deep.mgz".format, "derivatives/fastsurfer", needs_home=False
    ),
    "synthseg": Tool("mri_synthseg", 16, _synthseg, "{}_dseg.nii.gz".format, "derivatives/synthseg"),
}


def check_installed(name: str) -> None:
    """Refuse, in a line that says what is missing, a tool that cannot run here."""
    tool, home, licence = TOOLS[name], os.environ.get("FREESURFER_HOME"), os.environ.get("FS_LICENSE")
    if not shutil.which(tool.program):
        raise InputError(f"{tool.program}: no such program on PATH; {name}, installed, is wanted")
    if tool.needs_home and not (home and Path(home).is_dir()):
        came = f"is {home}, which is no folder" if home else "is not set"
        raise InputError(f"FREESURFER_HOME {came}; FreeSurfer's folder is wanted for {name} (source SetUpFreeSurfer.sh)")
    if not tool.needs_licence:
        return
    places = [Path(licence)] if licence else [Path(home or "") / file for file in ("license.txt", ".license")]
    if not any(place.is_file() for place in places):
        where = f"{licence} (FS_LICENSE)" if licence else f"{home}/license.txt"
        raise InputError(f"{where}: no such file; FreeSurfer's licence is wanted for {name} (surfer.nmr.mgh.harvard.edu/registration.html)")


def environment(name: str, folder: Path, threads: int) -> dict[str, str]:
    """The variables that a tool runs with: this process's, without the project's own Python, which FastSurfer would take for its own."""
    own = Path(sys.prefix, "bin").resolve() if sys.prefix != sys.base_prefix else None
    path = [part for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if not own or Path(part).resolve() != own]
    variables = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    variables |= {"PATH": os.pathsep.join(path), "SUBJECTS_DIR": str(folder), "OMP_NUM_THREADS": str(threads)}
    home = Path(shutil.which(TOOLS[name].program) or "").resolve().parent
    if (home / "FastSurferCNN").is_dir():  # its script looks for itself in the current folder, or beside a link to it
        variables.setdefault("FASTSURFER_HOME", str(home))
    return variables


def place(tool: Tool, base: Path, scan: dict, name: str) -> tuple[Path, Path]:
    """Where the result of a scan belongs below ``base``, the folder or file that is renamed there, and the label map in it."""
    home = base / tool.home
    first = Path(tool.made(name)).parts[0]
    if first != name:  # a file of a BIDS derivative, no subject folder
        home = home / f"sub-{scan['subject']}" / (f"ses-{scan['session']}" if scan["session"] else "") / "anat"
    return home / first, home / tool.made(name)
