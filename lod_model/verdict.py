"""Can this segmentation be used without a look? Plain rules on figures that a reader can check, no learned score.

Every rule that speaks gives one sentence with the figure and the bound. ``fail``: this cannot be the segmentation of a whole head's
T1w. ``review``: look before use. ``pass``: no rule has spoken, which is no proof of a good segmentation.

Bounds (those on volumes and contrast hold for protocol lod7):

- Missing classes: more than a tenth of a protocol's fail, so one of lod7's six or of three tissues; fewer are looked at: of FastSurfer's 95 the
  hypointensities of white matter are missing in many a healthy head.
- Brain volume (grey and white matter, basal ganglia, cerebellum, brainstem) 750–1900 mL. Healthy adults have 975–1500 mL on MRI (Allen,
  Damasio & Grabowski, Am J Phys Anthropol 118:347, 2002); the rest is room for old age, childhood and another delineation.
- Classes: half to twice the mean volumes of adults (AOMIC) and elders (OASIS3) by FreeSurfer: GM 422–511, basal ganglia 44–47, WM
  409–466, cerebellum 121–151, brainstem 24–25 mL. Ventricles 2–250 mL, a child's slits to marked hydrocephalus (means 8 and 56 mL).
- Contrast: (mean of WM − mean of GM) / mean of their standard deviations.
- Cut: area of brain that lies on one face of the field of view. Whole heads have none: more than 2 cm² is looked at,
  more than 50 cm² fails (a mid-sagittal cut has 143 cm² in the test data's half head).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_registry.protocol import Protocol
from data_registry.quality_rules import ADULT_ML, FAIL_CUT_CM2, MAX_CUT_CM2, MIN_CNR
from data_registry.volume import Volume
from lod_model import metrics

NOT_BRAIN = ("ventricles",)
CLASS_ML: Mapping[str, tuple[float, float]] = {
    "grey matter": (211.0, 1022.0),
    "basal ganglia": (22.0, 94.0),
    "white matter": (205.0, 932.0),
    "ventricles": (2.0, 250.0),
    "cerebellum": (60.0, 302.0),
    "brainstem": (12.0, 50.0),
}
MAX_MISSING = 0.1
_OPPOSITE = {"L": "R", "R": "L", "P": "A", "A": "P", "I": "S", "S": "I"}
_FACE = {"L": "left", "R": "right", "P": "posterior", "A": "anterior", "I": "inferior", "S": "superior"}


@dataclass(frozen=True)
class Verdict:
    """What the rules say, and why."""

    verdict: Literal["pass", "review", "fail"]
    reasons: tuple[str, ...]
    """A sentence each, with the figure and the bound; empty for pass."""


def judge(classes: np.ndarray, scan: Volume, protocol: Protocol, *, warnings: Sequence[str] = ()) -> Verdict:
    """The verdict on ``classes`` (I, J, K), the segmentation of ``scan`` on its own grid.

    ``warnings`` are those of reading and conforming; each asks for a review.
    """
    volumes = volumes_ml(classes, scan, protocol)
    missing = [name for name, ml in volumes.items() if ml == 0]
    failures: list[str] = []
    doubts: list[str] = []
    if missing:
        sentence = f"no voxel of {', '.join(missing)} was found; every class of {protocol.name} is wanted"
        (failures if len(missing) > MAX_MISSING * len(volumes) else doubts).append(sentence)
    if protocol.name == "lod7":
        failures += _brain_volume(volumes)
        doubts += _class_volumes(volumes) + _contrast(classes, scan, protocol)
    for face, area in cut_cm2(classes, scan).items():
        sentence = f"the {face} face of the field of view cuts {area:.0f} cm² of brain; at most {MAX_CUT_CM2:g} cm² is expected of a whole head"
        if area > MAX_CUT_CM2:
            (failures if area > FAIL_CUT_CM2 else doubts).append(sentence)
    doubts += warnings
    return Verdict("fail" if failures else "review" if doubts else "pass", tuple(failures + doubts))


def volumes_ml(classes: np.ndarray, scan: Volume, protocol: Protocol) -> dict[str, float]:
    """Volume in mL of each foreground class, by name, of ``classes`` (I, J, K) on the scan's own grid."""
    voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
    return dict(zip(protocol.foreground, metrics.volumes_ml(classes, protocol.classes, voxel_ml=voxel_ml).tolist(), strict=True))


def cut_cm2(classes: np.ndarray, scan: Volume) -> dict[str, float]:
    """Labelled area on each face of the field of view, cm², by the face's name.

    >>> scan = Volume(np.zeros((3, 4, 5)), np.diag([10.0, 10, 20, 1]))     # RAS, voxels of 10 × 10 × 20 mm
    >>> classes = np.zeros((3, 4, 5), dtype=np.uint8); classes[0, 1, 2] = 1
    >>> {face: area for face, area in cut_cm2(classes, scan).items() if area}
    {'left': 2.0}
    """
    cell_mm2 = np.prod(scan.voxel_mm) / scan.voxel_mm  # (3,) area of a voxel's face across each axis
    areas = {}
    for axis, letter in enumerate(scan.orientation):
        for index, towards in ((0, _OPPOSITE[letter]), (-1, letter)):
            areas[_FACE[towards]] = float((classes.take(index, axis=axis) > 0).sum() * cell_mm2[axis] / 100)
    return areas


def contrast(classes: np.ndarray, scan: Volume, protocol: Protocol) -> float:
    """(mean of WM − mean of GM) / mean of their standard deviations; NaN where one is missing, 0 where both are flat and equal."""
    grey, white = (scan.data[classes == protocol.class_names.index(name)].astype(np.float64) for name in ("grey matter", "white matter"))
    if not grey.size or not white.size:
        return float("nan")
    difference, spread = white.mean() - grey.mean(), (white.std() + grey.std()) / 2
    return float(difference / spread) if spread else float(np.sign(difference) * np.inf if difference else 0)


def _brain_volume(volumes: Mapping[str, float]) -> list[str]:
    total = sum(ml for name, ml in volumes.items() if name not in NOT_BRAIN)
    low, high = ADULT_ML
    return [] if low <= total <= high else [f"the brain has {total:.0f} mL; {low:.0f} to {high:.0f} mL are expected of a whole human brain"]


def _class_volumes(volumes: Mapping[str, float]) -> list[str]:
    return [
        f"{name} has {volumes[name]:.3g} mL; {low:.0f} to {high:.0f} mL are expected"
        for name, (low, high) in CLASS_ML.items()
        if volumes[name] and not low <= volumes[name] <= high
    ]


def _contrast(classes: np.ndarray, scan: Volume, protocol: Protocol) -> list[str]:
    figure = contrast(classes, scan, protocol)
    if np.isnan(figure) or figure >= MIN_CNR:  # a missing class has its own sentence
        return []
    return [
        f"white matter is {figure:.2f} standard deviations brighter than grey matter; "
        f"at least {MIN_CNR} is expected of a T1w (another contrast, or strong noise?)"
    ]
