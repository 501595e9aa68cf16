"""Metrics against arithmetic done by hand."""

import numpy as np
import pytest

from data_registry.protocol import IGNORED
from lod_model.metrics import dice, hd95, majority_atlas, surface_distances, volumes_ml, without_ignored


def cube(start: tuple[int, int, int], size: int, *, side: int = 12, label: int = 1) -> np.ndarray:
    labels = np.zeros((side,) * 3, dtype=np.uint8)
    labels[tuple(slice(s, s + size) for s in start)] = label
    return labels


def test_identical_maps_score_one_and_zero_mm():
    labels = cube((2, 3, 4), 4)
    labels[8:10, 8:10, 8:10] = 2
    assert dice(labels, labels, 3).tolist() == [1.0, 1.0]
    assert hd95(labels, labels, 3, voxel_mm=1.0).tolist() == [0.0, 0.0]


def test_one_voxel_shift():
    # 4³ = 64 voxels each, 3·4·4 = 48 in common: 2·48 / 128
    reference, predicted = cube((2, 2, 2), 4), cube((3, 2, 2), 4)
    assert dice(reference, predicted, 2).tolist() == [0.75]
    # Of each surface's 56 voxels the 16 of the outer face are one voxel away, more than 5 %
    assert hd95(reference, predicted, 2, voxel_mm=1.0).tolist() == [1.0]


@pytest.mark.parametrize(("start", "expected_mm"), [((4, 2, 2), 1.0), ((2, 4, 2), 4.0), ((2, 2, 4), 6.0)])
def test_hd95_of_a_two_voxel_shift_on_anisotropic_voxels(start, expected_mm):
    # Single voxels, so that the distance is shift × edge: 2 × 0.5, 2 × 2, 2 × 3 mm
    assert hd95(cube((2, 2, 2), 1), cube(start, 1), 2, voxel_mm=(0.5, 2.0, 3.0)).tolist() == [expected_mm]


def test_hd95_leaves_out_the_far_five_percent():
    # 100 voxels in a row against 101, one of them far away: the 95 % point does not see it; against 10 it does
    long, short = np.zeros((1, 1, 140), dtype=np.uint8), np.zeros((1, 1, 140), dtype=np.uint8)
    long[..., :100], short[..., :10] = 1, 1
    for row, expected_mm in ((long, 0.0), (short, None)):
        far = row.copy()
        far[..., 139] = 1
        value = hd95(row, far, 2, voxel_mm=1.0)[0]
        if expected_mm is None:  # 11 distances, ten 0 and one 130: linear interpolation at 0.95 · 10 = 9.5 between 0 and 130
            assert value == pytest.approx(65.0)
        else:
            assert value == expected_mm


def test_hd95_is_symmetric_and_takes_the_worse_direction():
    # Every reference voxel lies in the prediction (0 mm one way); the prediction's far half does not (the other way)
    reference, predicted = cube((2, 2, 2), 2), cube((2, 2, 2), 8)
    forth, back = hd95(reference, predicted, 2, voxel_mm=1.0), hd95(predicted, reference, 2, voxel_mm=1.0)
    assert forth == back
    assert forth[0] > 5


def test_average_distance_of_a_shifted_cube():
    # Of each surface's 56 voxels 20 are one voxel from the other surface: the 16 of the outer face, the 4 inner ones of the face opposite
    far, average = surface_distances(cube((2, 2, 2), 4), cube((3, 2, 2), 4), 2, voxel_mm=1.0)
    assert far.tolist() == [1.0] and average.tolist() == [pytest.approx(40 / 112)]


def test_average_distance_is_over_the_voxels_of_both_surfaces():
    reference, predicted = cube((2, 2, 2), 1), cube((2, 2, 2), 1)
    predicted[2, 2, 5] = 1  # 0 mm the one way, 0 and 3 · 3 mm the other: 9 mm over three voxels
    for one, other in ((reference, predicted), (predicted, reference)):
        assert surface_distances(one, other, 3, voxel_mm=(0.5, 2.0, 3.0))[1].tolist() == [pytest.approx(3.0), pytest.approx(np.nan, nan_ok=True)]


def test_absent_classes():
    reference, predicted = cube((2, 2, 2), 3, label=1), cube((2, 2, 2), 3, label=2)
    np.testing.assert_array_equal(dice(reference, predicted, 4), [0, 0, np.nan])
    np.testing.assert_array_equal(hd95(reference, predicted, 4, voxel_mm=1.0), [np.nan] * 3)
    assert volumes_ml(reference, 4, voxel_ml=0.001).tolist() == pytest.approx([0.027, 0, 0])


def test_empty_maps_are_not_a_number():
    empty = np.zeros((3, 4, 5), dtype=np.uint8)
    assert np.isnan(dice(empty, empty, 3)).all()
    assert np.isnan(hd95(empty, empty, 3, voxel_mm=1.0)).all()
    assert volumes_ml(empty, 3, voxel_ml=1.0).tolist() == [0, 0]


def test_volume_of_anisotropic_voxels():
    # 64 voxels of 0.5 × 2 × 3 mm = 192 mm³
    assert volumes_ml(cube((1, 1, 1), 4), 2, voxel_ml=0.5 * 2 * 3 / 1000).tolist() == pytest.approx([0.192])


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"\(12, 12, 12\) and \(8, 8, 8\)"):
        dice(cube((1, 1, 1), 2), cube((1, 1, 1), 2, side=8), 2)
    with pytest.raises(ValueError, match="class index 5 among 3 classes"):
        volumes_ml(cube((1, 1, 1), 2, label=5), 3, voxel_ml=1.0)


def test_majority_atlas_against_a_brute_force_count():
    maps = np.random.default_rng(0).integers(0, 5, size=(7, 4, 5, 6)).astype(np.uint8)
    votes = np.stack([(maps == index).sum(axis=0) for index in range(5)])  # argmax takes the smallest class among equals
    atlas = majority_atlas(iter(maps))
    assert atlas.dtype == np.uint8
    np.testing.assert_array_equal(atlas, votes.argmax(axis=0))


def test_majority_atlas_of_one_map_is_the_map_and_of_none_an_error():
    labels = cube((2, 2, 2), 3, label=6)
    np.testing.assert_array_equal(majority_atlas([labels]), labels)
    assert not majority_atlas([np.zeros((2, 2, 2), dtype=np.uint8)]).any()
    with pytest.raises(ValueError, match="0 label maps"):
        majority_atlas([])
    with pytest.raises(ValueError, match=r"map 1 is uint8 \(2, 2, 2\); uint8 \(12, 12, 12\)"):
        majority_atlas([labels, np.zeros((2, 2, 2), dtype=np.uint8)])


def test_voxels_that_the_reference_leaves_out_count_on_neither_side():
    # reference: 1 on 4..7 of a row, the first two left out; prediction: 1 on 3..7 and far off, all inside what is left out
    reference, predicted = np.zeros((2, 1, 1, 16), dtype=np.uint8)
    reference[..., 4:8], predicted[..., 3:8], reference[..., 4:6], reference[..., 12:], predicted[..., 12:] = 1, 1, IGNORED, IGNORED, 2
    before = reference.copy()
    assert dice(reference, predicted, 3).tolist() == [pytest.approx(2 * 2 / (2 + 3)), pytest.approx(np.nan, nan_ok=True)]
    # surfaces: 6 7 against 3 6 7; 95 % of (3, 0, 0) mm, linearly interpolated
    assert hd95(reference, predicted, 3, voxel_mm=1.0)[0] == pytest.approx(0.9 * 3)
    assert volumes_ml(reference, 3, voxel_ml=1).tolist() == [2, 0]
    assert volumes_ml(without_ignored(reference, predicted)[1], 3, voxel_ml=1).tolist() == [3, 0]
    assert np.array_equal(reference, before) and without_ignored(predicted, reference)[0] is predicted
    with pytest.raises(ValueError, match="class index 255 among 3 classes"):
        dice(predicted, reference, 3)  # a prediction leaves nothing out


def test_majority_of_the_maps_that_name_a_voxel():
    maps = np.array([[[[1, IGNORED, IGNORED, 0]]], [[[IGNORED, 2, IGNORED, 0]]], [[[0, 0, IGNORED, 1]]]], dtype=np.uint8)
    assert majority_atlas([*maps, np.array([[[1, IGNORED, IGNORED, IGNORED]]], dtype=np.uint8)]).tolist() == [[[1, 0, 0, 0]]]
