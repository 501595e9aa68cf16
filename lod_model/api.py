"""Three lines of Python: load, segment, volumes.

    from lod_model import load

    result = load("weights.pt").segment("scan.nii.gz")
    print(result.volumes)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from data_registry import protocol as protocols
from data_registry.errors import InputError
from data_registry.volume import Volume, load_image, save_volume
from lod_model import postprocess as cleaning
from lod_model.predict import with_engine
from lod_model.segment import labels_of, usable_weights
from lod_model.verdict import judge, volumes_ml
from lod_model.weights import Weights, default


@dataclass(frozen=True, eq=False)
class Result:
    """A segmented scan.

    labels    (I, J, K) uint8, class indices on the scan's own grid, in the file's axis order
    affine    (4, 4) voxel index → RAS+ mm, the scan's own
    volumes   mL of each class but the background, by name
    verdict   pass, review or fail, as of `lodbrain segment`
    reasons   a sentence each; empty for pass
    classes   names by class index, the background first
    """

    labels: np.ndarray
    affine: np.ndarray
    volumes: dict[str, float]
    verdict: str
    reasons: tuple[str, ...]
    classes: tuple[str, ...]
    maps: dict[str, np.ndarray]
    """Label maps by protocol; the first is ``labels``, and what is said of volumes and verdict is said of it."""

    def save(self, path: str | os.PathLike) -> Path:
        """Write the label map as one file, NIfTI or MGH by its suffix, in the values that `lodbrain segment` writes, with all that belongs to it."""
        path = Path(path)
        save_volume(path, protocols.load(next(iter(self.maps))).written[self.labels], self.affine)
        return path


class Model:
    """Weights ready to segment; ``weights`` says what they are."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def segment(self, scan: str | os.PathLike | Volume, *, postprocess: str = "components", threads: int | None = None) -> Result:
        """Segment a whole-head T1w of any orientation and voxel size: a file, or a :class:`Volume` already read.

        ``postprocess`` is none, components or release; ``threads`` those of the CPU, by default torch's choice. InputError, one line,
        where the scan cannot be used.
        """
        if postprocess not in cleaning.METHODS:
            raise InputError(f"postprocess {postprocess!r} is not known; one of {', '.join(cleaning.METHODS)} is wanted")
        volume = scan if isinstance(scan, Volume) else load_image(scan)
        maps, _, grave = labels_of(volume, weights=self.weights, postprocess=postprocess, threads=threads)
        name, labels = next(iter(maps.items()))
        protocol = protocols.load(name)
        verdict = judge(labels, volume, protocol, warnings=grave)
        volumes = volumes_ml(labels, volume, protocol)
        return Result(labels, volume.affine, volumes, verdict.verdict, verdict.reasons, protocol.class_names, maps)


def load(weights: str | os.PathLike | None = None, *, engine: Literal["fast", "fast-bf16", "plain"] = "fast") -> Model:
    """The model of a weights file of any kind that `lodbrain segment` takes; by default the packaged one.

    ``engine`` is as in :func:`lod_model.predict.with_engine`. InputError where the file cannot be used, or none is named and none packaged.
    """
    found = usable_weights(default() if weights is None else weights)
    return Model(replace(found, network=with_engine(found.network, engine)[0]))
