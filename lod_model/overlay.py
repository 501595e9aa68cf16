"""The picture that a person looks at before using a segmentation: three slices through the brain, plain and with its labels.

Radiological convention: the patient's left is on the picture's right, as if looking from the feet or from the front; every
slice carries its letters. Pixels have the proportions of the voxels. The slices go through the middle of the labels and end some way
outside them; those of a failed segmentation show the whole field of view. Slices only, never a rendering of the head.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from scipy import ndimage

from data_registry.files import replacing
from data_registry.protocol import Protocol
from data_registry.volume import Volume, axes_to_lia

_OPACITY = 0.45
_MARGIN_MM = 25.0
_VERDICT_COLOURS = {"pass": "#7fd18b", "review": "#ffc857", "fail": "#ff6b6b"}


def write_overlay(
    path: str | os.PathLike,
    scan: Volume,
    classes: np.ndarray,
    *,
    protocol: Protocol,
    volumes: Mapping[str, float],
    verdict: str,
    notes: Sequence[str] = (),
) -> None:
    """Write the PNG of ``classes`` (I, J, K) over ``scan``, both on the scan's own grid; whole or not at all.

    ``volumes`` (mL by class name) stand in the legend, ``notes`` (the verdict's reasons) below the slices.
    """
    figure = Figure(figsize=(12, 9.2), dpi=100, facecolor="black")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{scan.path.name}: {verdict}", color=_VERDICT_COLOURS[verdict], fontsize=13, parse_math=False)
    axes = figure.subplots(2, 3, gridspec_kw={"left": 0.02, "right": 0.98, "top": 0.93, "bottom": 0.14, "wspace": 0.03, "hspace": 0.03})
    colours = np.array([(*rgb, 255 * _OPACITY if index else 0) for index, rgb in enumerate(protocol.colours)]) / 255  # (C, 4) RGBA
    for column, (grey, labels, pixel_mm, letters) in enumerate(_slices(scan, classes, whole=verdict == "fail")):
        low, high = _window(grey)
        for axis, with_labels in ((axes[0, column], False), (axes[1, column], True)):
            axis.imshow(grey, cmap="gray", vmin=low, vmax=high, aspect=pixel_mm[0] / pixel_mm[1], interpolation="nearest")
            if with_labels:
                axis.imshow(colours[labels], aspect=pixel_mm[0] / pixel_mm[1], interpolation="nearest")
            axis.set_axis_off()
            _mark(axis, letters)
    patches = [
        Patch(color=np.array(protocol.colours[index]) / 255, label=f"{name} {volumes[name]:.0f} mL")
        for index, name in enumerate(protocol.class_names)
        if index and (protocol.classes <= 12 or volumes[name])
    ][:12]
    figure.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 0.085), ncols=min(6, max(1, len(patches))), fontsize=9,
                  labelcolor="white", frameon=False)  # fmt: skip
    lines = ["radiological convention: the patient's left (L) is on the right of axial and coronal slices"]
    lines += [line for note in notes for line in textwrap.wrap(note, 170)]
    figure.text(0.5, 0.08, "\n".join(lines[:6]), color="white", fontsize=8.5, ha="center", va="top", parse_math=False)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", facecolor="black", metadata={"Software": None})


def _slices(scan: Volume, classes: np.ndarray, *, whole: bool) -> list[tuple[np.ndarray, np.ndarray, tuple[float, float], str]]:
    """Axial, coronal and sagittal slice: (rows, columns) grey and labels, pixel size (row, column) in mm, and the letters at the left,
    right, top and bottom. Cut to the labels and a margin unless ``whole``.
    """
    source, flip = axes_to_lia(scan.affine)
    turn = tuple(slice(None, None, -1) if reverse else slice(None) for reverse in flip)
    grey, labels = scan.data.transpose(source)[turn], classes.transpose(source)[turn]  # views, (L, I, A)
    edge_mm = scan.voxel_mm[source]
    box = _box(labels)
    left, inferior, anterior = (box[axis].start + (box[axis].stop - box[axis].start) // 2 for axis in range(3))
    if not whole:
        more = np.ceil(_MARGIN_MM / edge_mm).astype(int)
        near = tuple(slice(max(0, part.start - n), part.stop + n) for part, n in zip(box, more, strict=True))
        left, inferior, anterior = (at - part.start for at, part in zip((left, inferior, anterior), near, strict=True))
        grey, labels = grey[near], labels[near]
    every, back = slice(None), slice(None, None, -1)
    # the first axis grows to the patient's left, so drawn along the columns it is radiological as it is
    axial = (every, inferior, back), True, (edge_mm[2], edge_mm[0]), "RLAP"
    coronal = (every, every, anterior), True, (edge_mm[1], edge_mm[0]), "RLSI"
    sagittal = (left, every, back), False, (edge_mm[1], edge_mm[2]), "APSI"
    return [
        (grey[cut].T, labels[cut].T, pixel_mm, letters) if turned else (grey[cut], labels[cut], pixel_mm, letters)
        for cut, turned, pixel_mm, letters in (axial, coronal, sagittal)
    ]


def _box(labels: np.ndarray) -> tuple[slice, ...]:
    """The bounding box of the labels, of the field of view if there are none."""
    found = ndimage.find_objects((labels > 0).view(np.uint8))
    return found[0] if found else tuple(slice(0, n) for n in labels.shape)


def _window(grey: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(grey, (0.01, 0.995))
    return float(low), float(high if high > low else low + 1)


def _mark(axis, letters: str) -> None:
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    rim = [withStroke(linewidth=3, foreground="black")]
    for letter, (x, y, ha, va) in zip(letters, places, strict=True):
        axis.text(x, y, letter, transform=axis.transAxes, color="#ffe45e", fontsize=13, fontweight="bold", ha=ha, va=va, path_effects=rim)
