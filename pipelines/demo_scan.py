"""A demo person in a demo scanner: one T1w on the scanner's grid and one label map on FreeSurfer's, of the same deformed head.

Every scan is a function of (seed, database, index) only: a person's and a scan's parameters are drawn from one numpy generator, then
applied. The template head is rendered and corrupted by TorchIO and pulled into place by one smooth map from world to template.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torchio as tio
from scipy import ndimage

from pipelines.demo_anatomy import CENTRE_MM, FREESURFER_ID, ORIGIN_MM, SHAPE, TISSUE, TISSUES, Template, template
from pipelines.demo_sites import Site

_LATTICE_MM = 3  # the deformation is exact on this lattice and linear between its points
_FIELD_MM = 4  # spacing of the random displacement's lattice
_FIELD_SIZE = 65
_WRINKLES_MM = ((28, 3.5), (12, 1.7), (6, 0.7))
"""Random displacement: (width of the Gaussian that smooths it, root mean square along an axis), mm."""


@dataclass(frozen=True)
class Person:
    """One synthetic human, lying in the scanner."""

    age_years: int
    sex: str
    pose: np.ndarray
    """(3, 3) world → template directions: rotation and scale."""
    position_mm: np.ndarray
    """(3,) where the brain's centre lies, from the middle of the field of view, RAS."""
    ventricles_mm: float
    """How far the walls of the ventricles are moved outwards."""
    displacement: np.ndarray
    """(3, 65, 65, 65) float32, mm, on a 4 mm lattice about the brain's centre."""

    def to_template(self, points: np.ndarray) -> np.ndarray:
        """MNI mm of (…, 3) points given in mm from the middle of the field of view.

        The order: undo pose and size, add the random displacement, then look nearer to the ventricles, which enlarges them.
        """
        at = (points - self.position_mm) @ self.pose.T
        index = np.moveaxis(at / _FIELD_MM + _FIELD_SIZE // 2, -1, 0)
        at = at + np.stack([ndimage.map_coordinates(d, index, order=1, mode="nearest") for d in self.displacement], axis=-1) + CENTRE_MM
        index = np.moveaxis((at - ORIGIN_MM) / 4, -1, 0)
        pull = [ndimage.map_coordinates(p, index, order=1, mode="nearest") for p in template().ventricle_pull]
        return at + self.ventricles_mm * np.stack(pull, axis=-1)


def draw_person(site: Site, rng: np.random.Generator) -> Person:
    """A person of the site's ages: size and shape of head, brain and ventricles, and how they lie in the scanner."""
    age, sex = int(rng.integers(site.ages_years[0], site.ages_years[1], endpoint=True)), str(rng.choice(["F", "M"]))
    size = (0.90 if sex == "F" else 0.925) * (1 + rng.uniform(-0.04, 0.04)) * (1 + rng.uniform(-0.04, 0.04, 3))  # per axis, of the template
    turn = np.radians(rng.uniform(-8, 8, 3))
    position_mm = rng.uniform(-12, 12, 3)
    wrinkles = np.zeros((3,) + (_FIELD_SIZE,) * 3, np.float32)
    for width_mm, rms_mm in _WRINKLES_MM:
        noise = rng.standard_normal(wrinkles.shape, dtype=np.float32)
        for axis in range(3):
            smooth = ndimage.gaussian_filter(noise[axis], width_mm / _FIELD_MM, mode="wrap", truncate=3)
            wrinkles[axis] += smooth * (rms_mm / smooth.std())
    ventricles_mm = np.interp(age, [18, 45, 85], [-1.2, 0.2, 4.0]) + rng.normal(0, 0.5)
    return Person(age, sex, np.diag(1 / size) @ _rotation(turn).T, position_mm, float(ventricles_mm), wrinkles)


def _rotation(turn: np.ndarray) -> np.ndarray:
    """(3, 3) rotation by angles (rad) about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(turn), np.sin(turn)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def grid_affine(orientation: str, voxel_mm: tuple[float, ...], shape: tuple[int, ...], *, centre_mm: np.ndarray) -> np.ndarray:
    """(4, 4) voxel → RAS mm of a grid in that orientation about a centre; the centre is voxel ``shape / 2``, as in FreeSurfer.

    >>> grid_affine("LIA", (1, 1, 1), (256, 256, 256), centre_mm=np.zeros(3)).astype(int).tolist()
    [[-1, 0, 0, 128], [0, 0, 1, -128], [0, -1, 0, 128], [0, 0, 0, 1]]
    """
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(orientation):
        pair = next(i for i, letters in enumerate(("RL", "AP", "SI")) if letter in letters)
        affine[pair, axis] = voxel_mm[axis] if letter in "RAS" else -voxel_mm[axis]
    affine[:3, 3] = centre_mm - affine[:3, :3] @ (np.array(shape) / 2)
    return affine


def _positions(person: Person, affine: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Template positions of a grid's voxels as ``grid_sample`` wants them: (1, I, J, K, 3), the last axis z, y, x in −1…1."""
    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    nodes = [np.linspace(0, n - 1, int(np.ceil((n - 1) * v / _LATTICE_MM)) + 1) for n, v in zip(shape, voxel_mm, strict=True)]
    points = np.stack(np.meshgrid(*nodes, indexing="ij"), axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    unit = (person.to_template(points) - ORIGIN_MM) / (np.array(SHAPE) - 1) * 2 - 1
    coarse = torch.from_numpy(np.ascontiguousarray(np.moveaxis(unit[..., ::-1], -1, 0), dtype=np.float32))[None]  # (1, 3, i, j, k)
    return torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True).permute(0, 2, 3, 4, 1)


def _pull(volume: torch.Tensor, positions: torch.Tensor, *, mode: str) -> np.ndarray:
    """(I, J, K) float32: a template volume (X, Y, Z) read at ``positions``; 0 outside it."""
    return torch.nn.functional.grid_sample(volume[None, None].float(), positions, mode=mode, align_corners=True)[0, 0].numpy()


def _labels(person: Person, affine: np.ndarray, shape: tuple[int, ...], *, head: Template) -> np.ndarray:
    """(I, J, K) int32 FreeSurfer ids; only the box that can hold brain is computed."""
    step = 8
    points = np.stack(np.meshgrid(*(np.arange(0, n, step) for n in shape), indexing="ij"), axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    at, (low, high) = person.to_template(points), head.brain_box_mm
    inside = np.argwhere(((at > low - step) & (at < high + step)).all(axis=-1)) * step
    start, stop = np.maximum(inside.min(axis=0) - step, 0), np.minimum(inside.max(axis=0) + step, shape)
    box = affine.copy()
    box[:3, 3] += affine[:3, :3] @ start
    codes = _pull(torch.from_numpy(head.codes), _positions(person, box, tuple(int(n) for n in stop - start)), mode="nearest")
    ids = np.zeros(shape, np.int32)
    ids[tuple(map(slice, start, stop))] = FREESURFER_ID[codes.astype(np.uint8)]
    return ids


def _rendered(site: Site, head: Template, rng: np.random.Generator) -> torch.Tensor:
    """(X, Y, Z) template grid: intensities with partial volume and the slice profile, before the scanner's faults."""
    tissues = tio.Subject(tissue=tio.LabelMap(tensor=torch.from_numpy(TISSUE[head.codes])[None]))
    means = np.array([site.means[name] for name in TISSUES]) * rng.normal(1, 0.03, len(TISSUES))
    deviations = np.where(np.array(TISSUES) == "air", 0, rng.uniform(0.04, 0.08, len(TISSUES)))
    painted = tio.LabelsToImage("tissue", mean=means.tolist(), std=deviations.tolist(), image_key="t1w")(tissues)["t1w"]
    across = {letter: axis for axis, pair in enumerate(("RL", "AP", "SI")) for letter in pair}
    width_mm = np.zeros(3)  # of the point spread along x, y, z
    for letter, size in zip(site.orientation, site.voxel_mm, strict=True):
        width_mm[across[letter]] = max(size, 1.0)
    return tio.Blur(std=tuple(width_mm * 0.55))(painted).data[0]


def _corrupted(site: Site, clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(I, J, K) int16: gamma, bias field and Rician noise, and the scanner's own scale."""
    coefficients = rng.uniform(-site.bias, site.bias, 10)
    coefficients[0] = 0  # the constant term is a matter of scale
    faults = tio.Compose([
        tio.Gamma(gamma=site.gamma * float(rng.uniform(0.95, 1.05))),
        tio.BiasField(coefficients=coefficients.tolist(), order=2),
    ])
    seen = faults(tio.ScalarImage(tensor=torch.from_numpy(np.maximum(clean, 0))[None])).data
    receiver = tio.ScalarImage(tensor=torch.cat([seen, torch.zeros_like(seen)]))  # real and imaginary
    noisy = tio.Noise(mean=0, std=site.noise, seed=int(rng.integers(2**31)))(receiver).data
    stored = torch.hypot(noisy[0], noisy[1]) * (site.scale * float(rng.uniform(0.85, 1.15)))
    return stored.round().clamp(0, 32767).numpy().astype(np.int16)


@dataclass(frozen=True)
class Scan:
    """What one visit to the scanner leaves behind."""

    person: Person
    t1w: np.ndarray
    """(I, J, K) int16, the site's grid."""
    t1w_affine: np.ndarray
    labels: np.ndarray
    """(256, 256, 256) int32 FreeSurfer ids, LIA, 1 mm."""
    labels_affine: np.ndarray


def make_scan(site: Site, index: int, *, seed: int) -> Scan:
    """The scan of the site's ``index``-th person; the same arguments give the same arrays, whatever was made before."""
    rng = np.random.default_rng([seed, zlib.crc32(site.database.encode()), index])
    head, person = template(), draw_person(site, rng)
    centre_mm = rng.uniform([-3, -20, -20], [3, 20, 20]).round(2)  # of the field of view, from the scanner's isocentre
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        painted = _rendered(site, head, rng)
        grid = grid_affine(site.orientation, site.voxel_mm, site.shape, centre_mm=np.zeros(3))
        t1w = _corrupted(site, _pull(painted, _positions(person, grid, site.shape), mode="bilinear"), rng)
        conformed = grid_affine("LIA", (1, 1, 1), (256, 256, 256), centre_mm=np.zeros(3))
        labels = _labels(person, conformed, (256, 256, 256), head=head)
    for affine in (grid, conformed):
        affine[:3, 3] += centre_mm
    return Scan(person, t1w, grid, labels, conformed)
