"""The tools that label a T1w: what each is called with, what it needs, what it leaves behind and where that belongs.

Command lines as their authors document them: recon-all (surfer.nmr.mgh.harvard.edu/fswiki/recon-all), run_fastsurfer.sh
(FastSurfer's doc/scripts/RUN_FASTSURFER.md), mri_synthseg (surfer.nmr.mgh.harvard.edu/fswiki/SynthSeg). None of them comes with the project.
"""

import os
import shutil
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
    return ["-s", name, "-i", t1w, "-sd", str(folder), "-all", "-threads", str(threads)]


def _fastsurfer(t1w: str, name: str, folder: Path, threads: int) -> list[str]:
    return ["--t1", t1w, "--sid", name, "--sd", str(folder), "--seg_only", "--threads", str(threads)]


def _synthseg(t1w: str, name: str, folder: Path, threads: int) -> list[str]:
    return ["--i", t1w, "--o", str(folder / f"{name}_dseg.nii.gz"), "--parc", "--robust", "--threads", str(threads), "--cpu"]


TOOLS = {
    "recon-all": Tool("recon-all", 8, _recon_all, "{}/mri/aparc+aseg.mgz".format, "derivatives/freesurfer", needs_licence=True),
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


def place(tool: Tool, base: Path, scan: dict, name: str) -> tuple[Path, Path]:
    """Where the result of a scan belongs below ``base``, the folder or file that is renamed there, and the label map in it."""
    home = base / tool.home
    first = Path(tool.made(name)).parts[0]
    if first != name:  # a file of a BIDS derivative, no subject folder
        home = home / f"sub-{scan['subject']}" / (f"ses-{scan['session']}" if scan["session"] else "") / "anat"
    return home / first, home / tool.made(name)
