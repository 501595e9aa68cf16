"""The demo's template head: a map of structures on the MNI152 grid, and the smooth change of shape that makes a person of it.

The brain comes from the ICBM 152 nonlinear symmetric 2009a T1, grey- and white-matter maps that nilearn ships (Fonov et al.,
NeuroImage 54:313–327, 2011). Structures are cut out of them by tissue and by ellipsoids at their known MNI places; cortex goes to
the nearest Desikan–Killiany parcel (Desikan et al., NeuroImage 31:968–980, 2006). Skull, scalp, face and neck are invented.
Arrays are in RAS axis order; positions are MNI millimetres unless said otherwise.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

TISSUES = ("air", "csf", "grey", "white", "striatum", "thalamus", "brainstem", "bone", "marrow", "fat", "muscle")
"""What has an intensity of its own; position = index into a site's means."""

ORIGIN_MM = np.array([-96.0, -128.0, -140.0])
"""MNI place of voxel (0, 0, 0) of the template grid; voxels are 1 mm."""
SHAPE = (193, 245, 241)
_WHOLE = tuple(slice(0, n) for n in SHAPE)
_BRAIN = (slice(20, 173), slice(16, 208), slice(66, 226))
"""Box of the template grid with all of the brain: what is cut at 1 mm is cut here only."""
Axes = tuple[np.ndarray, np.ndarray, np.ndarray]
CENTRE_MM = np.array([0.0, -18.0, 5.0])
"""Middle of the brain: heads turn, scale and are positioned about it."""

# Outside the brain: id 0, as in FreeSurfer's aparc+aseg.
_EXTRACEREBRAL = ("air", "csf", "bone", "marrow", "fat", "muscle", "white")  # the last one is the spinal cord
_SIDED = {  # structure: (left id, right id, tissue)
    "white": (2, 41, "white"), "ventricle": (4, 43, "csf"), "cerebellum white": (7, 46, "white"),
    "cerebellum cortex": (8, 47, "grey"), "thalamus": (10, 49, "thalamus"), "caudate": (11, 50, "striatum"),
    "putamen": (12, 51, "striatum"), "pallidum": (13, 52, "thalamus"), "hippocampus": (17, 53, "grey"),
    "amygdala": (18, 54, "grey"), "accumbens": (26, 58, "striatum"), "ventral dc": (28, 60, "thalamus"),
}
_MIDLINE = {"third ventricle": (14, "csf"), "fourth ventricle": (15, "csf"), "brainstem": (16, "brainstem"), "csf": (24, "csf")}
_CALLOSUM = (251, 252, 253, 254, 255)  # posterior to anterior
_PARCELS_MM = {  # Desikan–Killiany parcel: rough centre on the right side
    1: (53, -44, 5), 2: (6, 18, 28), 3: (36, 12, 46), 5: (8, -80, 20), 6: (24, -8, -34), 7: (36, -48, -20), 8: (42, -68, 30),
    9: (50, -32, -26), 10: (8, -46, 16), 11: (32, -88, 0), 12: (24, 28, -16), 13: (14, -68, -4), 14: (6, 36, -16),
    15: (58, -24, -14), 16: (24, -32, -18), 17: (8, -28, 60), 18: (46, 14, 14), 19: (42, 38, -12), 20: (46, 30, 4),
    21: (12, -80, 6), 22: (44, -24, 46), 23: (6, -18, 38), 24: (38, -10, 46), 25: (10, -58, 38), 26: (6, 36, 4),
    27: (34, 44, 18), 28: (12, 26, 44), 29: (24, -62, 48), 30: (54, -14, -2), 31: (52, -36, 32), 32: (8, 64, -10),
    33: (30, 12, -34), 34: (44, -22, 8), 35: (36, 2, 0),
}


def _code_table() -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    rows = [(0, tissue) for tissue in _EXTRACEREBRAL]
    rows += [(side, tissue) for left, right, tissue in _SIDED.values() for side in (left, right)]
    rows += [*_MIDLINE.values(), *((i, "white") for i in _CALLOSUM)]
    rows += [(base + parcel, "grey") for base in (1000, 2000) for parcel in _PARCELS_MM]
    ids = np.array([row[0] for row in rows], dtype=np.int32)
    tissues = np.array([TISSUES.index(row[1]) for row in rows], dtype=np.uint8)
    return ids, tissues, {int(i): code for code, i in enumerate(ids) if i}


FREESURFER_ID, TISSUE, _CODE = _code_table()
"""(codes,) int32 and uint8: FreeSurfer id and index into :data:`TISSUES` of each code of the template."""


@dataclass(frozen=True)
class Template:
    """The head that every person is a deformation of."""

    codes: np.ndarray
    """(193, 245, 241) uint8, RAS, 1 mm: code of the structure, see :data:`FREESURFER_ID` and :data:`TISSUE`."""
    ventricle_pull: np.ndarray
    """(3, …) float32 on a lattice of every 4th voxel: towards the ventricles, length 1 where strongest."""
    brain_box_mm: np.ndarray
    """(2, 3) lowest and highest corner of what has a FreeSurfer id."""


@functools.cache
def template() -> Template:
    """The template head; the same on every call and every machine."""
    t1, grey, white = _maps()
    codes = _head(t1 > 0)
    brain = _brain(t1[_BRAIN], grey[_BRAIN], white[_BRAIN])
    codes[_BRAIN] = np.where(brain > 0, brain, codes[_BRAIN])
    labelled = np.argwhere(FREESURFER_ID[codes] > 0)
    ventricles = np.isin(FREESURFER_ID, (4, 43, 14))[codes].astype(np.float32)
    near = ndimage.gaussian_filter(ventricles, 6, truncate=3)[::4, ::4, ::4]
    pull = np.stack(np.gradient(near)).astype(np.float32)
    pull /= np.linalg.norm(pull, axis=0).max()
    return Template(codes, pull, ORIGIN_MM + np.stack([labelled.min(axis=0), labelled.max(axis=0)]))


def _maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1, grey and white maps (0–1, float32) on the template grid."""
    from nilearn import datasets  # heavy: only where a template is made

    images = (datasets.load_mni152_template(resolution=1), datasets.load_mni152_gm_template(resolution=1),
              datasets.load_mni152_wm_template(resolution=1))
    maps = []
    for image in images:
        source = np.asarray(image.dataobj, dtype=np.float32)
        start = np.round(image.affine[:3, 3] - ORIGIN_MM).astype(int)  # template voxel of the source's first one
        lo, hi = np.maximum(start, 0), np.minimum(start + source.shape, SHAPE)
        out = np.zeros(SHAPE, np.float32)
        out[tuple(map(slice, lo, hi))] = source[tuple(map(slice, lo - start, hi - start))]
        maps.append(out)
    return tuple(maps)


def _axes(box: tuple[slice, ...], *, step: int = 1) -> Axes:
    """x, y, z in mm of every ``step``-th voxel of a box of the template grid, each shaped to broadcast over the box."""
    x, y, z = np.ix_(*(o + np.arange(b.start, b.stop, step, dtype=np.float32) for o, b in zip(ORIGIN_MM, box, strict=True)))
    return x, y, z


def _ellipsoid(axes: Axes, centre: Sequence[float], radii: Sequence[float], *, tilt: float = 0) -> np.ndarray:
    """Inside an ellipsoid (mm) on the right or its mirror image on the left. ``tilt``: its y axis falls by so much z a mm."""
    x, y, z = np.abs(axes[0]) - centre[0], axes[1] - centre[1], axes[2] - centre[2]
    return (x / radii[0]) ** 2 + (y / radii[1]) ** 2 + ((z + tilt * y) / radii[2]) ** 2 < 1


def _brain(t1: np.ndarray, grey: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Codes of what FreeSurfer would label, 0 elsewhere; sulcal fluid stays unlabelled."""
    fluid = (t1 > 0) & ((1 - grey - white > np.maximum(grey, white)) | (t1 < 0.57))
    solid = (t1 > 0) & ~fluid
    codes = np.zeros(t1.shape, np.uint8)
    axes = _axes(_BRAIN)
    left = np.broadcast_to(axes[0] < 0, t1.shape)

    def mark(name: str, where: np.ndarray) -> None:
        if name in _MIDLINE:
            codes[where] = _CODE[_MIDLINE[name][0]]
        else:
            codes[where] = np.where(left[where], _CODE[_SIDED[name][0]], _CODE[_SIDED[name][1]])

    lateral, third, fourth = (fluid & region for region in _ventricle_regions(axes))
    outside = (t1 == 0) | (fluid & ~(lateral | third | fourth))
    depth_mm = ndimage.distance_transform_edt(~outside)
    cortex = solid & (grey > white) & (t1 < 0.80) & (depth_mm < 6)
    mark("white", solid)
    codes[cortex] = _parcels(np.argwhere(cortex) + [b.start for b in _BRAIN] + ORIGIN_MM)
    for name, where in _deep(axes, t1, solid).items():
        mark(name, where)
    mark("ventricle", lateral)
    mark("third ventricle", third)
    codes[_callosum(axes, white, codes)] = 255  # cut into five below
    brainstem, cerebellum = _hindbrain(axes, solid)
    mark("cerebellum cortex", cerebellum)
    mark("cerebellum white", cerebellum & ndimage.binary_erosion(cerebellum, iterations=3) & (t1 > 0.77))
    mark("brainstem", brainstem)
    mark("fourth ventricle", fourth)
    mark("csf", fluid & _ellipsoid(axes, (0, -6, -18), (9, 12, 6)))
    y = np.argwhere(codes == 255)[:, 1]
    fifth = np.clip(5 * (y - y.min()) // (np.ptp(y) + 1), 0, 4)
    codes[codes == 255] = np.array([_CODE[i] for i in _CALLOSUM], np.uint8)[fifth]
    return codes


def _ventricle_regions(axes: Axes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inside = functools.partial(_ellipsoid, axes)
    third = inside((0, -12, -1), (6, 18, 13))
    lateral = inside((13, -8, 17), (14, 40, 16)) | inside((27, -45, 8), (12, 22, 18)) | inside((33, -24, -12), (8, 20, 10))
    return lateral & ~third, third, inside((0, -44, -34), (11, 9, 16))


def _deep(axes: Axes, t1: np.ndarray, solid: np.ndarray) -> dict[str, np.ndarray]:
    """Grey nuclei, in the order in which later ones overwrite earlier ones."""
    inside = functools.partial(_ellipsoid, axes)
    dark = solid & (t1 < 0.85)
    return {
        "ventral dc": solid & inside((12, -14, -9), (12, 13, 8)),
        "thalamus": solid & inside((11.5, -17, 8), (11.5, 16.5, 11.5)),
        "putamen": dark & inside((26, 4, 2), (8.5, 19, 12)),
        "pallidum": solid & inside((20, -4, -1), (6.5, 10, 8)),
        "caudate": dark & (inside((13, 13, 8), (7, 13, 14)) | inside((17, -6, 21), (4.5, 16, 6))),
        "accumbens": dark & inside((10, 11, -8), (5.5, 5, 5)),
        "hippocampus": dark & inside((28, -22, -13), (7, 19, 6.5), tilt=0.55),
        "amygdala": dark & inside((23, -4, -19), (8, 8, 8)),
    }


def _callosum(axes: Axes, white: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The largest piece of white matter of the midplane's arch, 5 mm wide as FreeSurfer cuts it."""
    x, y, z = axes
    arch = (((y + 4) / 27) ** 2 + ((z - 4) / 15) ** 2 > 1) & (np.abs(y + 4) < 40) & (z > -8) & (z < 32)
    is_white = (codes == _CODE[2]) | (codes == _CODE[41])
    largest, _ = ndimage.label((np.abs(x) <= 2) & arch & (white > 0.5) & is_white)
    return largest == np.bincount(largest.ravel())[1:].argmax() + 1


def _hindbrain(axes: Axes, solid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brainstem, and cerebellum: what lies under the tentorium, a surface fitted by eye."""
    x, y, z = axes
    medulla = (z < -38) & (x**2 + (y + 33 - 0.5 * (z + 48)) ** 2 < 144)
    brainstem = medulla | _ellipsoid(axes, (0, -25, -13), (17, 13, 12)) | _ellipsoid(axes, (0, -25, -31), (19, 13.5, 16))
    tentorium = (
        -9 - 0.28 * np.abs(x) + 11 * np.exp(-((x / 10) ** 2) - ((y + 57) / 14) ** 2) - 0.5 * np.maximum(0, -75 - y)
        - 0.45 * np.maximum(0, np.abs(x) - 35) * np.clip((y + 65) / 20, 0, 1)
    )
    cerebellum = (z < tentorium) & (y < np.where(z > -36, -32, -24))
    return solid & brainstem, solid & cerebellum & ~brainstem


def _parcels(position_mm: np.ndarray) -> np.ndarray:
    """Codes of the nearest parcel centre for (n, 3) places in cortex."""
    mirrored = np.column_stack([np.abs(position_mm[:, 0]), position_mm[:, 1:]])
    nearest = cKDTree(list(_PARCELS_MM.values())).query(mirrored)[1]
    code = np.array([[_CODE[base + parcel] for parcel in _PARCELS_MM] for base in (1000, 2000)], np.uint8)
    return code[(position_mm[:, 0] >= 0).astype(int), nearest]


def _head(brain: np.ndarray) -> np.ndarray:
    """Codes of everything around the brain, drawn at 2 mm: shells about its hull, a face, a neck."""
    air, csf, bone, marrow, fat, muscle, cord = range(7)
    axes = x, y, z = _axes(_WHOLE, step=2)
    blob = functools.partial(_ellipsoid, axes)
    hull = ndimage.distance_transform_edt(~brain[::2, ::2, ::2]) * 2 < 10
    distance_mm = (ndimage.distance_transform_edt(~hull) - ndimage.distance_transform_edt(hull)) * 2 + 10
    distance_mm = ndimage.gaussian_filter(distance_mm, 1.0)

    neck = ((x / 56) ** 2 + ((y + 22) / 58) ** 2 < 1) & (z < -50)
    face = blob((0, 40, -58), (64, 50, 66)) | blob((0, 36, -95), (48, 54, 34)) | blob((0, 88, -48), (13, 20, 18))
    outline = ndimage.gaussian_filter(((distance_mm < 14) | neck | face).astype(np.float32), 2.5) > 0.5
    outline |= blob((79, -22, -30), (8, 13, 21))  # ears
    depth_mm = ndimage.distance_transform_edt(np.pad(outline, ((0, 0), (0, 0), (1, 0)), mode="edge"))[:, :, 1:] * 2

    marbling = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(outline.shape), 2.5)  # fat between the muscles
    out = np.where(outline, np.where(marbling > 1.1 * marbling.std(), fat, muscle), air)
    out[outline & (depth_mm > 2) & (depth_mm < 6)] = fat
    out[outline & blob((0, 30, -78), (40, 50, 5))] = bone  # hard palate and teeth
    out[blob((31, 54, -40), (15, 26, 14))] = fat  # orbits
    out[blob((32, 66, -40), (12, 12, 12))] = csf  # eyes
    out[outline & (blob((8, 62, -50), (7, 30, 20)) | blob((27, 52, -62), (12, 14, 13)) | blob((0, 18, -58), (10, 14, 10)))] = air
    out[((x / 11) ** 2 + ((y - 2) / 6) ** 2 < 1) & (z < -62)] = air  # throat
    out[outline & blob((52, -34, -44), (10, 10, 14))] = bone  # mastoids
    spine_y = y + 48 + 0.1 * (z + 72)  # from the cord's axis
    out[(x**2 / 576 + (spine_y - 8) ** 2 / 784 < 1) & (z < -62)] = marrow  # vertebrae
    out[(x**2 + spine_y**2 < 196) & (z < -62)] = bone
    skull = (distance_mm < 8.5) & ((z > -45) | (y < -20) | (distance_mm < 5)) & outline
    out[skull] = bone
    out[skull & (distance_mm > 4) & (distance_mm < 7) & (z > -35)] = marrow
    out[distance_mm < 2.5] = csf
    out[(x**2 + spine_y**2 < 100) & (z < -58)] = csf
    out[(x**2 + spine_y**2 < 36) & (z < -66)] = cord
    codes = np.repeat(np.repeat(np.repeat(out, 2, 0), 2, 1), 2, 2)[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    codes = ndimage.median_filter(codes.astype(np.uint8), 3)  # rounds the 2 mm steps
    return np.where(brain & (codes != csf), csf, codes)
