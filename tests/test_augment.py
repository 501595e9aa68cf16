"""Augmentation: sides change with their names, labels move with the picture, (seed, epoch, sample) alone decide, odd volumes survive."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data_registry.protocol import IGNORED
from lod_model import corrupt as corruption
from lod_model.augment import PRESETS, Variant, augment, flip, sample_seed
from lod_model.corrupt import bias_field, corrupt, resampling
from lod_model.paper_augmentation import DRAWS
from lod_model.randomness import reproducible
from lod_model.warp import Pose, distort, draw_pose, grid_distortion, warp

MIRRORED = np.array([0, 2, 1, 3])  # 1 and 2: left and right of one structure


def head(shape=(26, 30, 22)) -> tuple[np.ndarray, np.ndarray]:
    """An asymmetric head: a bright block left, a dimmer one right, both on a dark body."""
    classes = np.zeros(shape, np.uint8)
    classes[4:-4, 4:-4, 4:-4] = 3
    classes[6:12, 8:20, 6:14] = 1
    classes[14:20, 10:16, 8:16] = 2
    return np.array([0, 220, 150, 60], np.uint8)[classes], classes


def fractions(classes: np.ndarray) -> np.ndarray:
    return np.stack([classes == c for c in range(4)]).astype(np.float32)


def run(preset: str, image: np.ndarray, target: np.ndarray, seed: int):
    return augment(image, target, preset=preset, seed=seed, mirrored=MIRRORED, voxel_mm=2.0)


class Heads(Dataset):
    def __init__(self, preset: str) -> None:
        self.preset = preset

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        image, classes = head()
        target = classes if index % 2 else fractions(classes)
        image, target = run(self.preset, image, target, sample_seed(1, 2, f"scan-{index}"))
        return image.tobytes(), target.tobytes()


@pytest.mark.parametrize("preset", PRESETS)
def test_any_number_of_workers_gives_the_same_bytes(preset):
    torch.manual_seed(7)
    np.random.seed(7)
    torch_state, numpy_state, threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    alone = [Heads(preset)[index] for index in range(6)]
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.get_num_threads() == threads
    assert len(set(alone)) == 6
    for workers in (0, 1, 3):
        assert [batch[0] for batch in DataLoader(Heads(preset), batch_size=1, num_workers=workers, collate_fn=list)] == alone


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(26, 30, 22), (33, 20, 41)])
def test_output_is_a_sample_like_its_input(preset, shape):
    image, classes = head(shape)
    for seed in range(12):
        x, moved = run(preset, image, classes, seed)
        y, shares = run(preset, image, fractions(classes), seed)
        assert x.dtype == np.float32 and x.flags.c_contiguous and x.shape == shape and np.isfinite(x).all()
        assert moved.dtype == np.uint8 and moved.shape == shape and set(np.unique(moved)) <= {0, 1, 2, 3}
        assert shares.dtype == np.float32 and shares.flags.c_contiguous and shares.shape == (4, *shape)
        assert np.allclose(shares.sum(0), 1, atol=1e-5) and shares.min() > -1e-5
        assert np.array_equal(x, y)  # one picture whatever the target's form
        assert (shares.argmax(0) == moved).mean() > 0.9  # and one geometry


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("value", [0, 100, 255])
def test_a_constant_picture_survives(preset, value):
    image = np.full((20, 18, 24), value, np.uint8)
    for seed in range(16):
        assert np.isfinite(run(preset, image, np.zeros_like(image), seed)[0]).all()
    for draw in DRAWS:
        step = draw()
        assert torch.isfinite(step(torch.from_numpy(image / np.float32(255)))).all(), step
    for seed in range(30):
        assert np.isfinite(corrupt(image / np.float32(255), seed=seed, voxel_mm=1.0)).all()


@pytest.mark.parametrize("preset", ["light", "strong", "paper"])
def test_left_stays_left_whatever_is_flipped(preset, monkeypatch):
    """The left block lies where axis 0 is small; flipped and renamed, class 1 must still be the one there, and half the samples flip."""
    monkeypatch.setitem(PRESETS, preset, lambda shape, voxel_mm: Variant())
    image, classes = head()
    flips = 0
    for seed in range(40):
        for target in (classes, fractions(classes)):
            x, moved = run(preset, image, target, seed)
            moved = moved if moved.ndim == 3 else moved.argmax(0)
            left, right = (np.argwhere(moved == c)[:, 0].mean() for c in (1, 2))
            assert left < right
        flips += not np.array_equal(x, image)
        assert np.array_equal(x, image[::-1] if not np.array_equal(x, image) else image)
    assert 10 < flips < 30


def test_labels_follow_the_picture():
    """Without changes to intensities, the moved picture and the moved labels are still each other's."""
    image, classes = head((40, 44, 36))
    values = torch.tensor([0.0, 0.9, 0.6, 0.3])
    for seed in range(6):
        with reproducible(seed):
            pose = draw_pose((40, 44, 36), degrees=15, scale=0.2, shift=0.1, bend=0.03, p_affine=1, p_bend=1)
            came = grid_distortion((40, 44, 36))
        labels = torch.from_numpy(classes[None].astype(np.float32))
        for moved in (lambda v, kind, pose=pose: warp(v, pose, mode=kind), lambda v, kind, came=came: distort(v, came, mode=kind)):
            nearest = moved(labels, "nearest")[0].long()
            shares = moved(torch.from_numpy(fractions(classes)), "linear")
            picture = moved(values[torch.from_numpy(classes.astype(int))][None], "linear")[0]
            assert (nearest != labels[0]).float().mean() > 0.005  # it did move
            assert torch.allclose(picture, torch.tensordot(values, shares, 1), atol=1e-4)
            assert (shares.argmax(0) == nearest).float().mean() > 0.93
            assert torch.equal(shares.argmax(0)[shares.amax(0) > 0.99], nearest[shares.amax(0) > 0.99])


def test_a_shift_moves_by_whole_voxels_and_what_comes_in_is_zero():
    volume = torch.arange(1.0, 5 * 6 * 7 + 1).reshape(1, 5, 6, 7)
    moved = warp(volume, Pose(torch.eye(3), torch.tensor([1.0, 0, -2.0])), mode="linear")
    assert torch.allclose(moved[0, :4, :, 2:], volume[0, 1:, :, :5], atol=1e-3)
    assert moved[0, 4].abs().max() < 1e-3 and moved[0, :, :, :2].abs().max() < 1e-3
    sparse = torch.zeros(2, 12, 12, 12)
    sparse[:, 5, 6, 4] = torch.tensor([3.0, 4.0])  # less than half full: the other branch
    moved = warp(sparse, Pose(torch.eye(3), torch.tensor([1.0, 0, -2.5])), mode="linear")
    assert torch.allclose(moved[:, 4, 6, 6:8], torch.tensor([[1.5, 1.5], [2.0, 2.0]]), atol=1e-4) and moved.sum() == pytest.approx(7, abs=1e-3)


def test_a_turn_keeps_millimetres_on_a_grid_that_is_no_cube():
    volume = torch.zeros(1, 21, 41, 11)
    volume[0, 10, 28, 5] = 1  # 8 voxels from the middle along axis 1
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert torch.nonzero(warp(volume, Pose(quarter, torch.zeros(3)), mode="linear")[0] > 0.9).tolist() == [[18, 20, 5]]


def test_a_flip_undoes_itself():
    image, classes = head()
    twice = flip(*flip(image, classes, MIRRORED), MIRRORED)
    assert np.array_equal(twice[0], image) and np.array_equal(twice[1], classes)


def test_thick_slices_average_what_they_cover():
    matrix = resampling(6, slice_mm=3.0, width_mm=0, voxel_mm=1.0)
    slices = matrix @ torch.tensor([0.0, 3, 6, 6, 9, 12])  # means 3 and 9, centred on voxels 1 and 4
    assert torch.allclose(slices, torch.tensor([3.0, 3, 5, 7, 9, 9]), atol=1e-5)
    assert resampling(6, slice_mm=1.0, width_mm=0.1, voxel_mm=1.0) is None
    blurred = resampling(41, slice_mm=0, width_mm=4.0, voxel_mm=2.0)[20]
    assert blurred.sum() == pytest.approx(1) and blurred[21] / blurred[20] == pytest.approx(0.5, abs=1e-3)  # half maximum at half the width


def test_the_bias_field_is_torchios_polynomial():
    from torchio import BiasField

    with reproducible(0):
        ours = bias_field((6, 8, 4), limit=0.4, order=2)
    with reproducible(0):
        drawn = (torch.rand(3, 3, 3) * 2 - 1) * 0.4
    kept = [float(drawn[i, j, k]) for i in range(3) for j in range(3 - i) for k in range(3 - i - j)]
    theirs = torch.from_numpy(BiasField.generate_bias_field(torch.empty(1, 6, 8, 4), 2, kept)).log()
    assert ours.shape == theirs.shape and torch.allclose(ours.log(), theirs, atol=1e-5) and float(theirs.std()) > 0.1


def test_strength_scales_and_zero_is_nothing(monkeypatch):
    image = (head((32, 32, 32))[0] / 255).astype(np.float32)
    monkeypatch.setattr(corruption, "invert", lambda x, depth: x)  # inversion has no strength
    changes = [[np.abs(corrupt(image, seed=s, strength=strength, voxel_mm=2.0) - image).mean() for s in range(20)] for strength in (0, 0.25, 1)]
    assert max(changes[0]) == 0 and sum(changes[1]) < sum(changes[2])


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_voxels_left_out_stay_so_and_move_along(preset):
    image, classes = head()
    left_out = np.where(classes == 1, IGNORED, classes).astype(np.uint8)
    in_no_class = fractions(left_out)                                        # class 1 is nowhere, and nothing in its place
    if preset is None:
        one, other = (flip(image, target, MIRRORED)[1] for target in (left_out, in_no_class))
        assert np.array_equal(one == IGNORED, (classes == 1)[::-1]) and np.array_equal(other.sum(0) == 0, one == IGNORED)
        return
    (_, before), (_, moved) = (run(preset, image, target, 5) for target in (classes, left_out))
    assert np.array_equal(moved == IGNORED, before == before[moved == IGNORED][0]) and (moved == IGNORED).any()
    (_, before), (_, moved) = (run(preset, image, target, 5) for target in (fractions(classes), in_no_class))
    assert moved.shape == before.shape and before.sum((1, 2, 3))[2] / before.size > 1e-3
    gone = before[1] if np.allclose(moved[2], before[2]) else before[2]      # mirrored or not
    np.testing.assert_allclose(1 - moved.sum(0), gone, atol=1e-5)
    np.testing.assert_allclose(moved[0], before[0], atol=1e-5)


def test_a_flip_swaps_sided_classes():
    image = np.zeros((8, 8, 8), np.uint8)
    image[:4] = 200
    target = np.where(image > 0, 1, 2).astype(np.uint8)
    mirrored = np.array([0, 2, 1])  # classes 1 and 2 are left and right of one structure
    seeds = [sample_seed(0, epoch, "s") for epoch in range(40)]
    seen = set()
    for seed in seeds:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRESETS, "light", lambda shape, voxel_mm: Variant())
            moved_image, moved = augment(image, target, preset="light", seed=seed, mirrored=mirrored)
        flipped = moved_image[0, 0, 0] == 0
        seen.add(bool(flipped))
        assert np.array_equal(moved, target)  # swapped sides and swapped names: the same map
        assert np.array_equal(moved_image, image[::-1] if flipped else image)
    assert seen == {True, False}
