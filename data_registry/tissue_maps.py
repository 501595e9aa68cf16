"""Label maps as tools write them: one file of ids, or a file of probabilities for each tissue, of which the largest wins."""

import os
from pathlib import Path

import numpy as np

from data_registry.volume import Volume, VolumeError, load_image, load_labels

SPM = ("c3", "c1", "c2")  # CSF, grey, white matter: classes 1, 2, 3 of the protocol spm_tissue
BIDS = ("_label-CSF_probseg", "_label-GM_probseg", "_label-WM_probseg")


def load_label_map(path: str | os.PathLike) -> Volume:
    """Label ids (I, J, K) uint16. For SPM's ``c1<name>``, or ``*_label-GM_probseg``, the file and its two neighbours become one map.

    Its ids are 1 CSF, 2 grey, 3 white matter, and 0 where what is left of 1 is larger than each. A :class:`VolumeError` where a neighbour is
    missing or lies elsewhere. Whoever keeps a hash of such a map has that of the grey matter's file, which no run of the tool leaves alone.
    """
    files = _tissues(Path(path))
    if not files:
        return load_labels(path)
    volumes = [load_image(file) for file in files]
    first = volumes[0]
    for other in volumes[1:]:
        if other.data.shape != first.data.shape or not np.allclose(other.affine, first.affine, atol=1e-3):
            raise VolumeError(f"{other.path}: another grid than {first.path.name}; the tissues of one run are wanted")
    winner, best = np.zeros(first.data.shape, np.uint16), 1 - sum(volume.data for volume in volumes)
    for index, volume in enumerate(volumes, start=1):
        if not (volume.data.min() >= -0.01 and volume.data.max() <= 1.01):
            raise VolumeError(f"{volume.path}: values from {volume.data.min():g} to {volume.data.max():g}; probabilities from 0 to 1 are wanted")
        larger = volume.data > best
        winner[larger] = index
        best = np.maximum(best, volume.data)
    return Volume(winner, first.affine, Path(path), "uint16", first.warnings)


def _tissues(path: Path) -> list[Path]:
    """The files of CSF, grey and white matter, if ``path`` is that of grey matter.

    >>> [file.name for file in _tissues(Path("c1sub-01_T1w.nii"))], _tissues(Path("sub-01_dseg.nii.gz"))
    (['c3sub-01_T1w.nii', 'c1sub-01_T1w.nii', 'c2sub-01_T1w.nii'], [])
    """
    if path.name.startswith("c1"):
        return [path.with_name(part + path.name[2:]) for part in SPM]
    return [path.with_name(path.name.replace(BIDS[1], part)) for part in BIDS] if BIDS[1] in path.name else []
