"""Where the label maps of a scan lie below its database: the one table of what each tool writes, and where.

Two kinds of places: FreeSurfer's subject folders, ``<FREESURFER_FOLDERS>/<subject>/mri/``, where the subject is the T1w's own name, or
``sub-*[_ses-*]``, or ``sub-*/ses-*``; and BIDS derivatives, ``derivatives/<tool>/sub-*/[ses-*/]anat/``, for files that begin with the subject's
name. There, or in ``derivatives/fsl*/``, stand folders of fsl_anat too, ``<subject>.anat``, whose files all have the same names. Which protocols
read a source stands in the first line of each table of ``protocols/`` (``sources …``).

Sources of the names: FreeSurfer's recon-all and SynthSeg's pages (surfer.nmr.mgh.harvard.edu/fswiki), FastSurfer's OUTPUT_FILES.md,
fMRIPrep's docs/outputs.rst, FSL's fast, run_first_all and fsl_anat, SPM12's segment, MALP-EM's bin/malpem.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

FREESURFER_FOLDERS = (
    "derivatives/freesurfer", "derivatives/fastsurfer", "derivatives/sourcedata/freesurfer", "derivatives/fmriprep/sourcedata/freesurfer",
)  # fmt: skip
FREESURFER_FILES = {
    "aparc_aseg": ("aparc+aseg.mgz",),
    "aparc_dkt_aseg": (
        "aparc.DKTatlas+aseg.mgz", "aparc.DKTatlas40+aseg.mgz",  # of FreeSurfer 5.3 (mri_aparc2aseg)
        "aparc.DKTatlas+aseg.deep.withCC.mgz", "aparc.DKTatlas+aseg.deep.mgz",  # FastSurfer's
    ),
    "aparc_a2009s_aseg": ("aparc.a2009s+aseg.mgz",),
    "wmparc": ("wmparc.mgz",),
    "aseg": ("aseg.mgz",),
    "synthseg": ("synthseg.mgz", "synthseg.rca.mgz"),  # as given by hand; as recon-all names it since 7.4
}
"""Source → names in ``mri/``, the preferred one first."""


@dataclass(frozen=True)
class Rule:
    """Files of a BIDS derivative's ``anat`` folder, without ``.nii`` or ``.nii.gz``, that are maps of one source."""

    source: str
    """{tool}: named by the derivative's folder; {desc}: by the file's entity of that name."""
    name: str
    tool: str = "*"
    beside: tuple[str, ...] = ()
    """Files that belong to it."""


DERIVATIVE_RULES = (
    Rule("aparc_aseg", "*_desc-aparcaseg_dseg"),  # fMRIPrep's and sMRIPrep's copies of FreeSurfer's maps, on the T1w's grid
    Rule("aseg", "*_desc-aseg_dseg"),
    Rule("synthseg", "*_synthseg"),  # mri_synthseg's own ending, where it is given folders
    Rule("{tool}_{desc}", "*_desc-*_dseg"),
    Rule("{tool}", "*_dseg"),  # of fmriprep: tissues in BIDS's order, 1 grey, 2 white matter, 3 CSF, which is not FAST's
    Rule("malp_em_tissue", "*_MALPEM_tissues"),
    Rule("malp_em", "*_MALPEM"),
    Rule("fsl_first", "*_firstseg", tool="fsl*"),  # run_first_all: <name>_all_fast_firstseg
    Rule("fsl_first", "*_subcort_seg", tool="fsl*"),  # fsl_anat's copy of it
    Rule("fsl_fast", "*_pveseg", tool="fsl*"),
    Rule("fsl_fast", "*_seg", tool="fsl*"),
    Rule("spm_tissue", "c1*", tool="spm*", beside=("c2*", "c3*")),  # probabilities, see data_registry/tissue_maps.py
    Rule("spm_tissue", "*_label-GM_probseg", tool="spm*", beside=("*_label-WM_probseg", "*_label-CSF_probseg")),
)
"""The first rule that matches a file decides its source; of two files of one source, the one whose rule stands first is taken."""
FSL_ANAT = {"fsl_fast": ("T1_fast_pveseg", "T1_fast_seg"), "fsl_first": ("T1_subcort_seg", "first_results/T1_first_all_fast_firstseg")}
"""Source → files in a folder of fsl_anat, the preferred one first."""
LABEL_GLOBS = tuple(
    f"{folder}/{subject}/mri/{name}"
    for folder in FREESURFER_FOLDERS for subject in ("sub-*", "sub-*/ses-*") for names in FREESURFER_FILES.values() for name in names
) + tuple(
    f"derivatives/{rule.tool}/sub-*/{between}anat/{name}.{suffix}"
    for rule in DERIVATIVE_RULES for name in (rule.name, *rule.beside) for between in ("", "ses-*/") for suffix in ("nii", "nii.gz")
) + tuple(
    f"derivatives/fsl*/{between}sub-*.anat/{name}.nii.gz"
    for between in ("", "sub-*/anat/", "sub-*/ses-*/anat/") for names in FSL_ANAT.values() for name in names
)  # fmt: skip
"""All of these places as patterns below a database, for fetching or copying it."""

_STAND_IN = ("aparc_aseg", "aparc_dkt_aseg", "aparc_a2009s_aseg", "wmparc", "aseg")  # the first that there is holds what the others tell of
_OWN_SPACE = ("T1w", "orig")


def find_labels(root: Path, subject: str, session: str, *, scan: str = "") -> dict[str, Path]:
    """Label files of one subject and session, by source; absolute paths if ``root`` is absolute.

    ``scan``: the T1w's name without ``_T1w``. With it, maps that name another acquisition or run are left out; maps in a standard space always
    are. The first of FreeSurfer's maps is used for the others too (aparc+aseg, with either parcels, holds aseg's ids), so that a scan
    carries its labels once; but a map that some protocol reads before all others, as DKT's parcels are, is taken as well.
    """
    found = _freesurfer(root, subject, session, scan)
    derivatives = root / "derivatives"
    for tool in sorted(entry.name for entry in os.scandir(derivatives) if entry.is_dir()) if derivatives.is_dir() else ():
        for source, path in _derivative(derivatives / tool, subject, session, scan):
            found.setdefault(source, path)
    both = [found[source] for source in ("aparc_dkt_aseg", "aparc_aseg") if source in found]
    if len(both) == 2 and os.path.samefile(*both):  # FastSurfer's aparc+aseg is a link to its map with DKT's parcels
        del found["aparc_aseg"]
    spare = [source for source in _STAND_IN if source in found][1:]
    return {source: path for source, path in found.items() if source not in spare or source in _first_choices()}


@functools.cache
def _first_choices() -> frozenset[str]:
    """Sources that some protocol reads before all others."""
    from data_registry import protocol  # NumPy and SciPy: not for who only asks for the patterns

    return frozenset(protocol.load(name).sources[0] for name in protocol.names())


def freesurfer_names(subject: str, session: str, scan: str = "") -> tuple[str, ...]:
    """Folders of ``SUBJECTS_DIR`` that may hold a scan, the most specific first.

    >>> freesurfer_names("01", "2", "sub-01_ses-2_run-1")
    ('sub-01_ses-2_run-1', 'sub-01_ses-2', 'sub-01/ses-2', 'sub-01')
    """
    name = f"sub-{subject}"
    folders = (f"{name}_ses-{session}", f"{name}/ses-{session}", name) if session else (name,)
    return tuple(dict.fromkeys((scan, *folders) if scan else folders))


def _freesurfer(root: Path, subject: str, session: str, scan: str) -> dict[str, Path]:
    """The maps of the first subject folder that has any, and what only a later ``SUBJECTS_DIR`` has, as FastSurfer's DKT beside FreeSurfer's."""
    found: dict[str, Path] = {}
    for folder in filter(os.path.isdir, (root / folder for folder in FREESURFER_FOLDERS)):
        for name in freesurfer_names(subject, session, scan):
            mri = folder / name / "mri"
            there = {entry.name for entry in os.scandir(mri) if entry.is_file()} if mri.is_dir() else set()
            maps = {source: next((mri / name for name in names if name in there), None) for source, names in FREESURFER_FILES.items()}
            if maps := {source: path for source, path in maps.items() if path}:
                found = maps | found
                break
    return found


def _derivative(tool: Path, subject: str, session: str, scan: str) -> Iterator[tuple[str, Path]]:
    """(source, file) of one tool, the preferred file of each source first."""
    anat = tool / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
    names = sorted(entry.name for entry in os.scandir(anat) if entry.is_file()) if anat.is_dir() else []
    ranked = []
    for name in names:
        stem = name.removesuffix(".gz").removesuffix(".nii")
        rank = next((i for i, rule in enumerate(DERIVATIVE_RULES) if fnmatchcase(tool.name, rule.tool) and fnmatchcase(stem, rule.name)), None)
        if stem == name or rank is None or not _is_of(stem.removeprefix("c1"), subject, scan):
            continue
        source = DERIVATIVE_RULES[rank].source.format(tool=tool.name, desc=_entities(stem).get("desc", ""))
        ranked.append((rank, name, source))
    for _, name, source in sorted(ranked):
        yield source, anat / name
    if fnmatchcase(tool.name, "fsl*"):
        names = [name for name in freesurfer_names(subject, session, scan) if "/" not in name]
        folders = (f"{base}/{name}.anat" for base in (anat, tool) for name in (f"{scan}_T1w", *names))
        for folder in filter(os.path.isdir, folders):
            for source, files in FSL_ANAT.items():
                yield from ((source, path) for file in files if (path := Path(folder, f"{file}.nii.gz")).is_file())


def _is_of(stem: str, subject: str, scan: str) -> bool:
    """Whether a map is of the subject, in the T1w's own space, and not of another T1w than ``scan``.

    >>> [_is_of(f"sub-01_{rest}_dseg", "01", "sub-01_run-1") for rest in ("desc-aseg", "run-1", "run-2", "space-MNI152NLin6Asym")]
    [True, True, False, False]
    """
    entities, own = _entities(stem), _entities(scan)
    if entities.get("sub") != subject or entities.get("space", "T1w") not in _OWN_SPACE:
        return False
    return not scan or all(own.get(key) == entities[key] for key in ("acq", "ce", "rec", "run") if key in entities)


def _entities(stem: str) -> dict[str, str]:
    return dict(part.split("-", 1) for part in stem.split("_") if "-" in part)
