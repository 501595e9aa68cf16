"""Conform: left stays left, the way back, agreement with an independent resampler, labels through world space."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from data_registry import conform, resample
from data_registry.errors import InputError
from data_registry.volume import Volume, VolumeError

ORIENTATIONS = [(axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]


def oriented(axes, signs, *, shape=(40, 48, 44), voxel_mm=(1.0, 1.0, 1.0), tilt_degrees=0.0) -> np.ndarray:
    """An affine whose array axis i runs along world axis axes[i], the field of view centred on the world's origin."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(axes)] * np.array(signs) * np.array(voxel_mm)
    angle = np.radians(tilt_degrees)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def world(affine: np.ndarray, shape) -> np.ndarray:
    """(…, 3) RAS mm of every voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def head(affine, shape) -> tuple[np.ndarray, np.ndarray]:
    """A ball as the head, and a marker on the patient's left, anterior, superior (no symmetry left)."""
    at = world(affine, shape)
    ball = (np.linalg.norm(at, axis=-1) < 18) * 100.0
    marker = np.linalg.norm(at - np.array([-9, 6, 4]), axis=-1) < 4
    return (ball + marker * 100).astype(np.float32), marker


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
@pytest.mark.parametrize("tilt_degrees", [0, 25])
def test_left_is_left_there_and_back(axes, signs, tilt_degrees):
    shape = (40, 48, 44)
    affine = oriented(axes, signs, shape=shape, tilt_degrees=tilt_degrees)
    data, marker = head(affine, shape)
    conformed = conform.conform(Volume(data, affine), grid="4mm")
    found = conformed.data > 180
    centre = world(conformed.placement.affine, conformed.data.shape)[found].mean(axis=0)
    assert np.linalg.norm(centre - world(affine, shape)[marker].mean(axis=0)) < 2.5
    lia = conformed.placement.affine[:3, :3]
    assert lia[0, 0] < 0 and lia[2, 1] < 0 and lia[1, 2] > 0
    back = conform.labels_to_native(found.astype(np.uint8), conformed.placement) > 0
    assert back.shape == shape
    assert 2 * (back & marker).sum() / (back.sum() + marker.sum()) > 0.6
    assert world(affine, shape)[back][:, 0].max() < 0  # all of it on the patient's left


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(ORIENTATIONS), st.tuples(*[st.integers(20, 60)] * 3))
def test_round_trip_is_exact_for_whole_voxels(orientation, shape):
    affine = oriented(*orientation, shape=shape, voxel_mm=(4.0, 4.0, 4.0))
    labels = np.random.default_rng(sum(shape)).integers(1, 9, shape).astype(np.uint16)
    placement = conform.place_grid(Volume(labels, affine), "4mm")
    on_grid = conform.labels_to_grid(Volume(labels, affine), placement)
    assert np.array_equal(conform.labels_to_native(on_grid, placement), labels)
    onehot = np.stack([on_grid == c for c in range(9)]).astype(np.float32)
    assert np.array_equal(conform.probabilities_to_native(onehot, placement), labels)


def test_a_scan_on_the_grid_passes_unchanged_oblique_or_not():
    data = np.random.default_rng(0).integers(0, 256, (64, 64, 64)).astype(np.float32)
    for tilt in (0, 12):
        affine = oriented((0, 2, 1), (-1, -1, 1), shape=data.shape, voxel_mm=(4, 4, 4), tilt_degrees=tilt)
        conformed = conform.conform(Volume(data, affine, stored_dtype="uint8"), grid="4mm")
        assert np.array_equal(conformed.data, data)
        assert np.allclose(conformed.placement.affine, affine)


def simple_itk(volume: np.ndarray, affine: np.ndarray, placement: conform.Placement, interpolator) -> np.ndarray:
    def image(array, matrix):
        out = sitk.GetImageFromArray(array.transpose(2, 1, 0))
        spacing = np.linalg.norm(matrix[:3, :3], axis=0)
        out.SetSpacing(spacing.tolist())
        out.SetDirection((matrix[:3, :3] / spacing).ravel().tolist())
        out.SetOrigin(matrix[:3, 3].tolist())
        return out

    reference = image(np.zeros(placement.shape, np.uint8), placement.affine)
    return sitk.GetArrayFromImage(sitk.Resample(image(volume, affine), reference, sitk.Transform(), interpolator, 0.0)).transpose(2, 1, 0)


@pytest.mark.parametrize("voxel_mm", [(2.0, 2.0, 2.0), (1.2, 1.1, 3.0), (0.9, 1.3, 1.0)])
def test_agrees_with_an_independent_resampler(voxel_mm):
    shape = (60, 50, 40)
    affine = oriented((2, 0, 1), (1, -1, -1), shape=shape, voxel_mm=voxel_mm, tilt_degrees=7)
    data = np.random.default_rng(0).random(shape).astype(np.float32) * 255
    placement = conform.place_grid(Volume(data, affine), "0.9mm")
    ours = resample.resample_image(data, np.linalg.inv(affine) @ placement.affine, placement.shape)
    theirs = simple_itk(data, affine, placement, sitk.sitkLinear)
    assert np.abs(ours - theirs).max() < 0.5
    assert ours.std() > 10
    ids = (data / 16).astype(np.uint16)
    nearest = resample.resample_nearest(ids, np.linalg.inv(affine) @ placement.affine, placement.shape)
    assert (nearest != simple_itk(ids, affine, placement, sitk.sitkNearestNeighbor)).mean() < 2e-3  # ties between two voxels


@pytest.mark.parametrize(("voxel_mm", "grid"), [((1.8, 1.9, 1.9), "1mm"), ((0.9, 1.3, 1.0), "1.2mm"), ((1.0, 1.0, 1.0), "2mm")])
def test_labels_there_and_back_lose_no_more_than_by_nearest_neighbour(voxel_mm, grid):
    """Against SimpleITK's nearest neighbour both ways; an asymmetric head of three labels, thin ones among them."""
    shape = (58, 46, 38)
    affine = oriented((1, 2, 0), (-1, 1, 1), shape=shape, voxel_mm=voxel_mm, tilt_degrees=11)
    i, j, k = (np.indices(shape) - np.array([25, 24, 18])[:, None, None, None]) / np.array([18, 15, 12])[:, None, None, None]
    radius = np.sqrt(i**2 + j**2 + k**2) + 0.1 * np.sin(7 * i) * np.cos(5 * j)
    ids = (np.select([radius < 0.6, radius < 0.75, radius < 1], [2, 3, 42], 0) * (1 + (i > 0.3))).astype(np.uint16)
    placement = conform.place_grid(Volume(ids, affine), grid)
    back = conform.labels_to_native(conform.labels_to_grid(Volume(ids, affine), placement), placement)
    there = simple_itk(ids, affine, placement, sitk.sitkNearestNeighbor)
    theirs = simple_itk(there, placement.affine, SimpleNamespace(affine=affine, shape=shape), sitk.sitkNearestNeighbor)
    ours, peers = (np.mean([2 * ((a == x) & (ids == x)).sum() / ((a == x).sum() + (ids == x).sum()) for x in (2, 3, 42)]) for a in (back, theirs))
    assert ours >= peers - 1e-3 and ours > 0.6


def test_coarser_grid_averages_instead_of_aliasing():
    """A 1 mm checkerboard of 0 and 200 is 100 at 4 mm; sampling it would give 0 or 200."""
    index = np.indices((64, 64, 64)).sum(axis=0) % 2
    affine = oriented((0, 2, 1), (-1, -1, 1), shape=index.shape)
    placement = conform.place_grid(Volume(index, affine), "4mm")
    out = resample.resample_image((index * 200).astype(np.float32), np.linalg.inv(affine) @ placement.affine, placement.shape)
    inside = out[26:38, 26:38, 26:38]
    assert np.allclose(inside, 100, atol=1)


def test_a_linear_ramp_stays_a_ramp():
    shape = (30, 30, 30)
    affine = oriented((0, 2, 1), (-1, -1, 1), shape=shape, voxel_mm=(3.0, 3.0, 3.0))
    ramp = np.broadcast_to(np.arange(30.0, dtype=np.float32)[:, None, None], shape)
    placement = conform.place_grid(Volume(ramp, affine), "1mm")
    to_native = np.linalg.inv(affine) @ placement.affine
    out = resample.resample_image(ramp, to_native, placement.shape)
    where = to_native[0, 0] * np.arange(256) + to_native[0, 3]
    inside = (where > 0) & (where < 29)
    assert np.allclose(out[inside, 128, 128], where[inside], atol=1e-4)


def test_labels_on_another_grid_of_the_same_world():
    shape = (40, 48, 44)
    scan = oriented((1, 0, 2), (-1, 1, 1), shape=shape, tilt_degrees=15)
    data, _ = head(scan, shape)
    other = oriented((0, 1, 2), (1, 1, 1), shape=(90, 90, 90), voxel_mm=(0.6, 0.6, 0.6))
    _, marker = head(other, (90, 90, 90))
    placement = conform.place_grid(Volume(data, scan), "2mm")
    on_grid = conform.labels_to_grid(Volume(marker.astype(np.uint16) * 17, other), placement)
    at = world(placement.affine, placement.shape)
    assert np.linalg.norm(at[on_grid == 17].mean(axis=0) - [-9, 6, 4]) < 0.5
    volume_ml = (on_grid == 17).sum() * 8 / 1000
    assert volume_ml == pytest.approx(4 / 3 * np.pi * 4**3 / 1000, rel=0.2)  # a ball of some 30 voxels


def test_labels_that_do_not_belong_to_the_scan_are_refused():
    shape = (40, 48, 44)
    affine = oriented((0, 1, 2), (1, 1, 1), shape=shape)
    data, marker = head(affine, shape)
    placement = conform.place_grid(Volume(data, affine), "2mm")
    labels = (data > 0).astype(np.uint16)
    moved = affine.copy()
    moved[0, 3] += 30
    with pytest.raises(VolumeError, match="inside the scan's field of view in world space"):
        conform.labels_to_grid(Volume(labels, moved), placement)
    with pytest.raises(VolumeError, match="ends inside the scan's field of view"):
        conform.labels_to_grid(Volume(labels[:20], affine), placement)
    with pytest.raises(VolumeError, match="no voxel is labelled"):
        conform.labels_to_grid(Volume(labels * 0, affine), placement)
    box = np.argwhere(labels)
    low, high = box.min(axis=0) - 1, box.max(axis=0) + 2
    cropped = affine.copy()
    cropped[:3, 3] = affine[:3, :3] @ low + affine[:3, 3]
    inside = labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    assert np.array_equal(  # a map cropped to its labels covers all there is
        conform.labels_to_grid(Volume(inside, cropped), placement), conform.labels_to_grid(Volume(labels, affine), placement)
    )


def test_majority_by_hand():
    block = np.array([[[2, 2], [2, 7]], [[7, 7], [7, 5]]], dtype=np.uint16)  # 7 four times, 2 three times
    assert resample.majority(block, 2).tolist() == [[[7]]]
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, (8, 8, 8)).astype(np.uint16)
    ours = resample.majority(labels, 4)
    for d, h, w in itertools.product(range(2), repeat=3):
        counts = np.bincount(labels[4 * d : 4 * d + 4, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4].ravel())
        assert ours[d, h, w] == counts.argmax()


def test_intensities():
    shape = (40, 48, 44)
    affine = oriented((0, 1, 2), (1, 1, 1), shape=shape)
    data, _ = head(affine, shape)
    plain = conform.conform(Volume(data, affine), grid="2mm").data
    assert plain.min() == 0 and plain.max() == 255
    for changed in (data * 1e7, data - 1024, data.astype(np.float64) * 0.001):
        assert np.abs(conform.conform(Volume(changed.astype(np.float32), affine), grid="2mm").data.astype(int) - plain).max() <= 1
    for value in (0, 7):
        with pytest.raises(VolumeError, match="no contrast"):
            conform.conform(Volume(np.full(shape, value, np.float32), affine), grid="2mm")


def test_a_scan_longer_than_the_grid_says_so():
    data = np.random.default_rng(0).random((20, 20, 80)).astype(np.float32)
    conformed = conform.conform(Volume(data, np.diag([4.0, 4, 4, 1])), grid="4mm")
    assert conformed.warnings == ("the scan is 64 mm longer than the grid and is cut at both ends",)


@pytest.mark.parametrize("grid", ["1", "0mm", "xmm", "-1mm", "big", "20mm"])
def test_unknown_grids(grid):
    with pytest.raises(InputError, match="is not known"):
        conform.parse_grid(grid)
