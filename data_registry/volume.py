"""Volumes in and out: the one door to nibabel.

Reading is strict: whatever would make left, right or millimetres a guess is refused in one line, or kept with a warning that
every output repeats. Axis order of all arrays is the file's own, (I, J, K); affines map voxel indices to RAS+ millimetres.

Rules where the formats leave room:

- sform before qform, as nibabel and FreeSurfer do; if the two mirror each other, the sform is used and a warning says so.
- neither sform nor qform: nibabel's assumption (first axis to the left) is used and a warning says so.
- an affine sheared by more than 2 degrees is refused: conform keeps voxel axes and would distort the head.
- a voxel outside 0.1–20 mm or a field of view over 1 m is refused: the affine is not in millimetres.
- up to 1 % non-finite voxels become 0 with a warning; more are refused.
"""

import io
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.orientations import aff2axcodes, io_orientation

from data_registry.errors import InputError
from data_registry.files import replacing

logging.getLogger("nibabel").setLevel(logging.CRITICAL + 1)  # what it mends in a header is judged here, in our own line

VOXEL_RANGE_MM = (0.1, 20.0)
MAX_FIELD_OF_VIEW_MM = 1000.0
MAX_SHEAR_DEGREES = 2.0
MAX_NON_FINITE_SHARE = 0.01
_FORMATS = {
    ".nii": (nib.Nifti1Image, nib.Nifti2Image),
    ".mgh": (nib.freesurfer.MGHImage,),
}
SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")


class VolumeError(InputError):
    """A file that is not a usable volume; the message names the file, what came and what was wanted."""


@dataclass(frozen=True)
class Volume:
    """A 3-D array with its place in the world."""

    data: np.ndarray
    """(I, J, K), the file's own axis order."""
    affine: np.ndarray
    """(4, 4) float64: voxel index → RAS+ mm."""
    path: Path = Path("array")
    stored_dtype: str = ""
    """Type of the voxels in the file after its slope and intercept, e.g. uint8."""
    warnings: tuple[str, ...] = field(default=())
    """What a reader must know before trusting left and right or the intensities."""

    @property
    def voxel_mm(self) -> np.ndarray:
        """(3,) edge lengths of a voxel, mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def orientation(self) -> str:
        """Three letters, the direction in which each axis grows, e.g. ``LIA``."""
        return "".join(aff2axcodes(self.affine))


def axes_to_lia(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The permutation and flips that bring an array to its nearest LIA orientation.

    Returns ``source`` (3,), the array axis that becomes LIA axis 0, 1, 2, and ``flip`` (3,) bool, whether it is reversed.

    >>> axes_to_lia(np.diag([1., 1., 1., 1.]))     # RAS → L, I, A: axes 0, 2, 1, the first two reversed
    (array([0, 2, 1]), array([ True,  True, False]))
    """
    world_axis, direction = io_orientation(affine).T  # for each array axis: the RAS axis nearest to it, and its sign
    source = np.argsort(world_axis)[[0, 2, 1]].astype(int)  # LIA is world axes x, z, y
    return source, direction[source] != np.array([-1, -1, 1])


def load_image(path: str | os.PathLike) -> Volume:
    """A single T1w volume as float32; anything that is not one is a :class:`VolumeError`."""
    image, path = _open(path)
    data = _single_volume(image, path)
    if data.dtype.fields is not None:
        raise VolumeError(f"{path}: RGB voxels; a grey-level T1w is wanted")
    if data.dtype.kind not in "iufb":
        raise VolumeError(f"{path}: voxels of type {data.dtype}; real numbers are wanted")
    stored_dtype = str(data.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        data = np.asarray(data, dtype=np.float32)
    affine, warnings = _checked_affine(image, data.shape, path)
    bad = data.size - int(np.isfinite(data).sum())
    if bad > MAX_NON_FINITE_SHARE * data.size:
        raise VolumeError(f"{path}: {bad} of {data.size} voxels are NaN or infinite; at most 1 % is accepted")
    if bad:
        data = np.where(np.isfinite(data), data, np.float32(0))
        warnings += (f"{bad} NaN or infinite voxels read as 0",)
    return Volume(data, affine, path, stored_dtype, warnings)


def load_labels(path: str | os.PathLike) -> Volume:
    """A label map as uint16 ids; fractional, negative or larger ids are a :class:`VolumeError`."""
    image, path = _open(path)
    data = _single_volume(image, path)
    if data.dtype.fields is not None or data.dtype.kind not in "iufb":
        raise VolumeError(f"{path}: voxels of type {data.dtype}; integer label ids are wanted")
    affine, warnings = _checked_affine(image, data.shape, path)
    low, high = data.min(), data.max()
    if not (low >= 0 and high <= 65535):  # NaN fails both comparisons
        raise VolumeError(f"{path}: label ids from {low} to {high}; ids from 0 to 65535 are wanted")
    ids = data.astype(np.uint16)
    if data.dtype.kind == "f" and not np.array_equal(ids, data):
        raise VolumeError(f"{path}: fractional label ids, e.g. {data[ids != data].flat[0]}; integers are wanted")
    return Volume(ids, affine, path, str(data.dtype), warnings)


def save_volume(path: str | os.PathLike, data: np.ndarray, affine: np.ndarray) -> None:
    """Write (I, J, K) ``data`` with its voxel → RAS+ mm ``affine``; the format follows the suffix, the bytes only the arguments."""
    path = Path(path)
    suffix = _suffix(path)
    if suffix.startswith(".mg"):
        image = nib.freesurfer.MGHImage(data.astype(np.int32) if data.dtype == np.uint16 else data, affine)  # it knows no uint16
    else:
        image = nib.Nifti1Image(data, affine)
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
    content = image.to_bytes()
    if suffix.endswith("z"):
        content = igzip.compress(content, 2, mtime=0)
    with replacing(path) as aside:
        aside.write_bytes(content)


def _suffix(path: Path) -> str:
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise VolumeError(f"{path}: unknown kind of file; one of {', '.join(SUFFIXES)} is wanted")
    return suffix


def _open(path: str | os.PathLike):
    """The nibabel image held in memory, whatever its byte order or NIfTI version, and the path."""
    path = Path(path)
    suffix = _suffix(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VolumeError(f"{path}: {error.strerror or error}; a readable {suffix} file is wanted") from None
    if not content:
        raise VolumeError(f"{path}: the file is empty (0 bytes); a {suffix} volume is wanted")
    if content[:2] == b"\x1f\x8b":
        try:
            content = igzip.decompress(content)
        except Exception:  # isal raises several kinds for cut and damaged streams
            raise VolumeError(f"{path}: the gzip stream is cut or damaged; a complete {suffix} file is wanted") from None
    elif suffix.endswith("gz"):
        raise VolumeError(f"{path}: not gzip data (it begins with {content[:12]!r}); a {suffix} volume is wanted")
    kinds = _FORMATS[".mgh" if suffix.startswith(".mg") else ".nii"]
    for kind in kinds:
        try:
            image = kind.from_bytes(content)
        except Exception:  # not this kind: the next one, or the line below
            continue
        if suffix.startswith(".nii"):
            _refuse_zero_pixdim(kind, content, path)
        return image, path
    raise VolumeError(f"{path}: no {' or '.join(k.__name__[:-5] for k in kinds)} header; a {suffix} volume is wanted")


def _refuse_zero_pixdim(kind, content: bytes, path: Path) -> None:
    """nibabel reads a zero voxel size as 1 mm; with no sform to say better, that would be a guess."""
    header = kind.header_class.from_fileobj(io.BytesIO(content), check=False)
    sizes_mm = header["pixdim"][1:4]
    if not header["sform_code"] and not (np.abs(sizes_mm) > 0).all():
        sizes = " x ".join(f"{size:g}" for size in sizes_mm)
        raise VolumeError(f"{path}: pixdim gives a voxel size of {sizes} mm and there is no sform; sizes above 0 are wanted")


def _single_volume(image, path: Path) -> np.ndarray:
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise VolumeError(f"{path}: shape {'x'.join(map(str, image.shape))} holds {int(np.prod(shape[3:]))} volumes; a single 3-D volume is wanted")
    if len(shape) < 3 or min(shape) < 2:
        raise VolumeError(f"{path}: shape {'x'.join(map(str, image.shape))}; a 3-D volume with at least 2 voxels along each axis is wanted")
    try:
        return np.asanyarray(image.dataobj).reshape(shape)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise VolumeError(f"{path}: the voxels cannot be read ({reason}); a complete volume of {'x'.join(map(str, shape))} is wanted") from None


def _checked_affine(image, shape: tuple[int, ...], path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    affine = np.asarray(image.affine, dtype=np.float64)
    warnings: tuple[str, ...] = ()
    if isinstance(image, nib.Nifti1Image):
        qform, q_code = image.get_qform(coded=True) if _quaternion_is_valid(image) else (None, 0)
        sform, s_code = image.get_sform(coded=True)
        if not q_code and not s_code:
            warnings += ("no sform and no qform: the first axis is assumed to run to the left, so left and right are not certain",)
        elif q_code and s_code and np.linalg.det(qform[:3, :3]) * np.linalg.det(sform[:3, :3]) < 0:
            warnings += ("sform and qform mirror each other: the sform is used, so left and right are not certain",)
    if not np.isfinite(affine).all():
        raise VolumeError(f"{path}: the affine holds NaN or infinite values; finite millimetres are wanted")
    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    sizes = " x ".join(f"{size:.4g}" for size in voxel_mm)
    if not ((voxel_mm >= VOXEL_RANGE_MM[0]) & (voxel_mm <= VOXEL_RANGE_MM[1])).all():
        raise VolumeError(f"{path}: voxel size {sizes} mm; {VOXEL_RANGE_MM[0]} to {VOXEL_RANGE_MM[1]} mm is wanted (is the affine in millimetres?)")
    if (voxel_mm * shape).max() > MAX_FIELD_OF_VIEW_MM:
        raise VolumeError(f"{path}: a field of view of {(voxel_mm * shape).max():.0f} mm; at most {MAX_FIELD_OF_VIEW_MM:.0f} mm is wanted")
    directions = affine[:3, :3] / voxel_mm
    shear = np.degrees(np.arcsin(np.clip(np.abs(directions.T @ directions - np.eye(3)).max(), 0, 1)))
    if shear > MAX_SHEAR_DEGREES:
        raise VolumeError(f"{path}: the affine is sheared by {shear:.1f} degrees; axes at right angles (within {MAX_SHEAR_DEGREES:g}) are wanted")
    return affine, warnings


def _quaternion_is_valid(image) -> bool:
    try:
        image.get_qform()
    except Exception:
        return False
    return True
