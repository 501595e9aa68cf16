"""Where the label maps of a scan lie below its database: FreeSurfer's subject folders and BIDS derivatives."""

from pathlib import Path

FREESURFER_FILES = {
    "aparc_aseg": "aparc+aseg.mgz",
    "aparc_dkt_aseg": "aparc.DKTatlas+aseg.mgz",
    "aparc_a2009s_aseg": "aparc.a2009s+aseg.mgz",
    "wmparc": "wmparc.mgz",
    "aseg": "aseg.mgz",
}
FREESURFER_FOLDERS = ("derivatives/freesurfer", "derivatives/fastsurfer", "derivatives/sourcedata/freesurfer")


def find_labels(root: Path, subject: str, session: str) -> dict[str, Path]:
    """Label files of one subject and session, by source; absolute paths.

    FreeSurfer's sources are named by their file; ``derivatives/<tool>/sub-*/[ses-*/]anat/*_dseg.nii.gz`` is named by its tool. Of
    FreeSurfer's maps the first that there is stands for the others (aparc+aseg holds aseg's ids), so that a scan carries its labels once; but
    one with DKT's parcels is taken as well, which no other can stand for.
    """
    subject_name = f"sub-{subject}"
    folders = [f"{subject_name}_ses-{session}", f"{subject_name}/ses-{session}", subject_name] if session else [subject_name]
    found: dict[str, Path] = {}
    for freesurfer in FREESURFER_FOLDERS:
        candidates = ((source, root / freesurfer / folder / "mri" / name) for folder in folders for source, name in FREESURFER_FILES.items())
        there = [(source, path) for source, path in candidates if path.is_file()]
        found |= {} if found else dict(there[:1] + [item for item in there[1:] if item[0] == "aparc_dkt_aseg"])
    derivatives = root / "derivatives"
    for tool in sorted(derivatives.iterdir()) if derivatives.is_dir() else ():
        anat = tool / subject_name / f"ses-{session}" / "anat" if session else tool / subject_name / "anat"
        for path in sorted(anat.glob(f"{subject_name}*_dseg.nii*"))[:1]:
            found[tool.name] = path
    return found
