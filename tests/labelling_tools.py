"""Programs that stand in for recon-all, run_fastsurfer.sh and mri_synthseg.

Each takes the options that the real one has in all its versions here meant, and refuses what the real one refuses: any other option, a T1w that
is not there, a subject that is there already, a missing home or licence, and (FastSurfer) to run as root unasked. Then it copies the label map
``$STAND_IN/<name>.well.…``, or crashes, hangs, is killed, or ends without one, as ``$STAND_IN/<name>.how`` says.
"""

import os
import shutil
from pathlib import Path

import numpy as np
from small_heads import add_subject

from data_registry.volume import load_image, load_labels, save_volume
from pipelines.labellers import TOOLS

PROGRAM = """#!/bin/sh
refuse() {{ echo "$1"; exit {status}; }}
name= t1= out= sd=$SUBJECTS_DIR root=
while [ $# -gt 0 ]; do
    key=$1; shift
    case $key in
        {with_value}) [ $# -gt 0 ] || refuse "ERROR: $key wants a value"; value=$1; shift ;;
        {alone}) ;;
        *) refuse "ERROR: Flag $key unrecognized." ;;
    esac
    case $key in
        -s|--sid) name=$value ;;
        -i|--i|--t1) t1=$value ;;
        -sd|--sd) sd=$value ;;
        --o) out=$value ;;
        --allow_root) root=yes ;;
    esac
done
[ -f "$t1" ] || refuse "ERROR: T1w '$t1' could not be found"
{checks}
echo "$name" >> "$STAND_IN/calls"
echo "$(command -v python3) $OMP_NUM_THREADS" > "$STAND_IN/$name.ran_with"
how=$(cat "$STAND_IN/$name.how" 2>/dev/null || echo well)
case $how in
    crash) echo "ERROR: cannot find the brain"; echo "To report a problem, see elsewhere"; exit 3 ;;
    killed) kill -KILL $$ ;;
    hang) sleep 600 & echo $! > "$STAND_IN/$name.pid"; wait ;;
    nothing) exit 0 ;;
esac
mkdir -p "$(dirname "$out")" && cp "$STAND_IN/$name.$how.{ending}" "$out"
"""
FREESURFER = '[ -d "$FREESURFER_HOME" ] || refuse "ERROR: FREESURFER_HOME is not set"\n'
SUBJECT = '[ -n "$name" ] && [ -d "$sd" ] || refuse "ERROR: must supply a subject and its folder"\n'
DETAILS = {
    "recon-all": {
        "with_value": "-s|-i|-sd|-openmp", "alone": "-all|-parallel|-no-isrunning|-hires|-qcache", "status": 1, "ending": "mgz",
        "checks": FREESURFER + SUBJECT + """[ -f "${FS_LICENSE:-$FREESURFER_HOME/license.txt}" ] || refuse "ERROR: FreeSurfer license file not found"
[ ! -e "$sd/$name" ] || refuse "ERROR: You are trying to re-run an existing subject with (possibly) new input data (-i)"
out=$sd/$name/mri/aparc+aseg.mgz; ln -s "$FREESURFER_HOME/subjects/fsaverage" "$sd/fsaverage" """,
    },
    "fastsurfer": {
        "with_value": "--t1|--sid|--sd|--threads|--device|--viewagg_device|--fs_license|--vox_size|--batch|--py",
        "alone": "--seg_only|--surf_only|--parallel|--3T|--no_cereb|--no_biasfield|--allow_root", "status": 1, "ending": "mgz",
        "checks": SUBJECT + """[ -d "$FASTSURFER_HOME/FastSurferCNN" ] || refuse "ERROR: no FastSurferCNN in '$FASTSURFER_HOME'"
[ "$root" ] || [ "$(id -u)" != 0 ] || refuse "You are trying to run '$0' as root. To force it, pass --allow_root"
out=$sd/$name/mri/aparc.DKTatlas+aseg.deep.mgz""",
    },
    "synthseg": {
        "with_value": "--i|--o|--vol|--qc|--post|--resample|--crop|--threads", "alone": "--parc|--robust|--fast|--ct|--cpu|--v1",
        "status": 2, "ending": "nii.gz",
        "checks": FREESURFER + """case $t1 in *.nii|*.nii.gz|*.mgz) ;; *) refuse "ERROR: Extension not supported for $t1" ;; esac
name=$(basename "$out" _dseg.nii.gz)""",
    },
}  # fmt: skip


def unlabelled(folder: Path, scans: int) -> dict[str, str]:
    """``folder/db``, a database without labels, and the stand-ins with the maps that they copy; the variables that make them known."""
    database, stand_in, programs = folder / "db", folder / "stand_in", folder / "bin"
    for subject in (f"{number:02d}" for number in range(1, scans + 1)):
        add_subject(database, subject, seed=int(subject))
        labels = load_labels(database / f"derivatives/freesurfer/sub-{subject}/mri/aparc+aseg.mgz")
        t1w = load_image(database / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz")
        labels.data[8:18, 10:20, 3:9], t1w.data[8:18, 10:20, 3:9] = 10, 190  # a bright part on one side alone
        save_volume(t1w.path, t1w.data, t1w.affine)
        for how, data in (("well", labels.data), ("mirrored", labels.data[..., ::-1])):
            save_volume(stand_in / f"sub-{subject}.{how}.nii.gz", data.astype(np.int32), labels.affine)
            save_volume(stand_in / f"sub-{subject}.{how}.mgz", data.astype(np.int32), labels.affine)
    shutil.rmtree(database / "derivatives")
    programs.mkdir()
    for tool, details in DETAILS.items():
        home = folder / tool
        (home / "FastSurferCNN").mkdir(parents=True)
        program = home / TOOLS[tool].program
        program.write_text(PROGRAM.format(**details))
        program.chmod(0o755)
        (programs / program.name).symlink_to(program)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "STAND_IN": str(stand_in), "FREESURFER_HOME": str(folder)}
