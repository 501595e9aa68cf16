"""Post-processing against results written down by hand."""

import numpy as np
import pytest

from data_registry.errors import InputError
from lod_model.postprocess import hard_classes, largest_component, postprocess


def _certain(classes: np.ndarray, number: int) -> np.ndarray:
    """(number, D, H, W) probabilities, .9 for the class of each voxel."""
    rest = np.float32(0.1 / (number - 1))
    return np.stack([np.where(classes == index, np.float32(0.9), rest) for index in range(number)])


def _body_and_island() -> np.ndarray:
    classes = np.zeros((8, 8, 8), dtype=np.uint8)
    classes[1:4, 1:4, 1:4] = 1
    classes[3, 3, 3] = 2
    classes[6, 6, 6] = 1
    return classes


def test_none_changes_nothing():
    probabilities = _certain(_body_and_island(), 3)
    before = probabilities.copy()
    assert np.array_equal(postprocess(probabilities, method="none"), before)


def test_components_removes_the_island_and_only_that():
    classes = _body_and_island()
    probabilities = _certain(classes, 3)
    cleaned = postprocess(probabilities, method="components")
    assert cleaned is probabilities
    expected = classes.copy()
    expected[6, 6, 6] = 0
    assert np.array_equal(hard_classes(cleaned), expected)
    assert cleaned[:, 6, 6, 6].tolist() == [1, 0, 0]


def test_components_counts_classes_together():
    """Two large single-class parts that touch are one component; the third is smaller than both together."""
    classes = np.zeros((12, 4, 4), dtype=np.uint8)
    classes[0:2], classes[2:4], classes[6:9] = 1, 2, 1
    cleaned = hard_classes(postprocess(_certain(classes, 3), method="components"))
    assert np.unique(np.argwhere(cleaned)[:, 0]).tolist() == [0, 1, 2, 3]


def test_corners_connect():
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    assert np.argwhere(largest_component(mask)).tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("method", ["none", "components", "release"])
def test_nothing_but_background_stays_so(method):
    probabilities = _certain(np.zeros((4, 5, 6), dtype=np.uint8), 7)
    assert not hard_classes(postprocess(probabilities, method=method)).any()


def test_release_removes_second_components_but_keeps_ventricles():
    classes = np.zeros((24, 12, 12), dtype=np.uint8)
    classes[2:22, 2:10, 2:10] = 3  # white matter, all else lies in it
    classes[3:7, 4:8, 4:8] = 5
    classes[15:17, 4:7, 4:7] = 5  # a second, smaller cerebellum
    classes[9:11, 3:6, 3:6] = 4
    classes[19:21, 3:6, 3:6] = 4  # a second ventricle is anatomy
    cleaned = hard_classes(postprocess(_certain(classes, 7), method="release"))
    assert cleaned[5, 5, 5] == 5 and cleaned[15, 5, 5] != 5
    assert cleaned[9, 4, 4] == 4 and cleaned[19, 4, 4] == 4


def test_release_smooths_each_map():
    """A single voxel of p = 1 keeps Σ = 1 and loses its peak to a Gaussian of 0.5 voxels: (1 / (1 + 2e⁻² + 2e⁻⁸))³ = .487."""
    probabilities = np.zeros((7, 9, 9, 9), dtype=np.float32)
    probabilities[4, 4, 4, 4] = 1
    assert postprocess(probabilities, method="release")[4, 4, 4, 4] == pytest.approx(0.4867, abs=1e-3)


def test_release_is_for_seven_classes():
    with pytest.raises(InputError, match="7 classes of lod7, not for 3"):
        postprocess(np.zeros((3, 4, 4, 4), dtype=np.float32), method="release")


def test_unknown_method_lists_the_known():
    with pytest.raises(InputError, match="one of none, components, release is wanted"):
        postprocess(np.zeros((3, 4, 4, 4), dtype=np.float32), method="crf")
