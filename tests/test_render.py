"""Renderings of label maps: labels and image agree, left is left, and a sample is its seed."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_registry import protocol as protocols
from data_registry.errors import InputError
from data_registry.volume import save_volume
from lod_model.render import OUTSIDE, Anatomy, Rendering, _intensities, load_anatomy, render, zscored

LOD7 = protocols.load("lod7")
STILL = Rendering(
    rotation_degrees=0, scale=0, axis_scale=0, translation_mm=0, warps=(), arbitrary_contrast=0, inverted=0, texture=0.005001, stripped=0, cut=0,
    strength=0,
)  # fmt: skip
IDS = np.array([0, 2, 3, 4, 10, 16, 41, 42, 46, 507])


@pytest.fixture(scope="module")
def head() -> Anatomy:
    """Boxes of tissue, nothing symmetric: the left hemisphere (high axis 0) is white matter, the right one cortex, soft tissue around."""
    ids = np.zeros((256, 256, 256), dtype=np.uint16)
    ids[60:200, 50:180, 40:210] = 507
    ids[130:190, 60:140, 50:200] = 2
    ids[70:130, 60:140, 50:200] = 42
    ids[140:160, 80:101, 61:91] = 10
    ids[101:120, 90:120, 100:120] = 4
    ids[120:140, 140:170, 80:100] = 16
    codes = torch.from_numpy(np.searchsorted(IDS, ids).astype(np.uint8))
    return Anatomy("boxes", F.pad(codes, [1] * 6), IDS)


def block_counts(head: Anatomy, factor: int) -> np.ndarray:
    classes = LOD7.classes_of(head.ids[head.codes[1:-1, 1:-1, 1:-1].numpy()].astype(np.uint16))
    n = 256 // factor
    blocks = classes.reshape(n, factor, n, factor, n, factor)
    return np.stack([(blocks == c).sum((1, 3, 5)) for c in range(7)])


@pytest.mark.parametrize("voxel_mm", [2, 4])
def test_a_head_that_is_not_moved_has_the_label_maps_own_counts(head, voxel_mm):
    sample = render(head, protocol=LOD7, seed=0, voxel_mm=voxel_mm, how=STILL)
    assert sample.samples == voxel_mm**3 and sample.image.shape == sample.counts.shape[1:] == (256 // voxel_mm,) * 3
    assert np.array_equal(sample.counts, block_counts(head, voxel_mm))


def test_a_protocol_with_sides_and_what_it_leaves_out(head):
    """Left is the high end of axis 0; an id without a side is of no class."""
    synthseg, ids = protocols.load("synthseg33"), np.where(IDS == 16, 77, IDS)
    counts = render(Anatomy(head.name, head.codes, ids), protocol=synthseg, seed=0, voxel_mm=4, how=STILL).counts
    left, right, stem = (block_counts(head, 4).sum((1, 2, 3))[c] for c in (3, 1, 6))
    assert counts[synthseg.table[2]].sum() == left and counts[synthseg.table[42]].sum() == right
    assert np.argwhere(counts[synthseg.table[2]]).mean(0)[0] > np.argwhere(counts[synthseg.table[42]]).mean(0)[0]
    assert stem > 0 and (64 - counts.sum(0, dtype=int)).sum() == stem


def test_a_translation_moves_image_and_labels_alike(head):
    """Content at x + shift appears at x: the structure's centre moves against the drawn shift; all axes by their own amount."""
    still, moved = (
        render(head, protocol=LOD7, seed=5, voxel_mm=4, how=dataclasses.replace(STILL, translation_mm=mm)) for mm in (0, 12)
    )
    thalamus = [np.argwhere(s.counts[2] > 32).mean(0) for s in (still, moved)]
    bright = [np.argwhere(s.image > 0.9 * s.image.max()).mean(0) for s in (still, moved)]
    shift = thalamus[1] - thalamus[0]
    assert np.abs(shift).max() > 0.5 and len(set(np.round(shift, 1))) == 3
    assert np.allclose(bright[1] - bright[0], shift, atol=0.6)


def test_partial_volume_and_fractions_agree(head):
    """Without texture the image is the fractions times the tissues' intensities."""
    sample = render(head, protocol=LOD7, seed=1, how=dataclasses.replace(STILL, rotation_degrees=20, texture=0.0051))
    fractions = sample.counts.reshape(7, -1) / 8
    inside = (fractions[[1, 3]].sum(0) == 1) & (fractions[1] > 0)                 # right cortex and left white matter alone
    pure = [np.median(sample.image.reshape(-1)[fractions[c] == 1]) for c in (1, 3)]
    expected = fractions[1, inside] * pure[0] + fractions[3, inside] * pure[1]
    assert np.abs(sample.image.reshape(-1)[inside] - expected).mean() < 0.01
    assert ((fractions[1, inside] > 0.2) & (fractions[1, inside] < 0.8)).sum() > 100


def test_counts_are_complete_and_left_stays_left(head):
    for seed in range(4):
        sample = render(head, protocol=LOD7, seed=seed, voxel_mm=4, samples=2)
        assert (sample.counts.sum(0) == 8).all() and np.isfinite(sample.image).all() and sample.image.dtype == np.float32
        white, grey = (np.argwhere(sample.counts[c] > 4)[:, 0].mean() for c in (3, 1))
        assert white > grey + 5, "the left hemisphere stays at the high end of axis 0"


def test_a_sample_is_its_seed_and_draws_from_nothing_else(head):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    threads = torch.get_num_threads()
    one = render(head, protocol=LOD7, seed=11, voxel_mm=4)
    torch.set_num_threads(1)
    same, other = (render(head, protocol=LOD7, seed=seed, voxel_mm=4) for seed in (11, 12))
    torch.set_num_threads(threads)
    assert np.array_equal(one.image, same.image) and np.array_equal(one.counts, same.counts)
    assert not np.array_equal(one.counts, other.counts)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_contrasts_are_those_of_t1_and_alike_on_both_sides():
    at = {i: k for k, i in enumerate(IDS.tolist())}
    for seed in range(50):
        mean, deviation = _intensities(IDS, np.random.default_rng(seed), STILL)
        assert mean[at[4]] < mean[at[3]] < mean[at[2]], "ventricle, cortex, white matter"
        assert mean[at[2]] == mean[at[41]] and mean[at[3]] == mean[at[42]]
        assert mean[at[0]] == deviation[at[0]] == 0
    assert all(_intensities(IDS, np.random.default_rng(s), dataclasses.replace(STILL, stripped=1))[0][at[507]] == 0 for s in range(5))
    shuffled = [_intensities(IDS, np.random.default_rng(s), dataclasses.replace(STILL, arbitrary_contrast=1))[0] for s in range(30)]
    assert 5 < sum(bool(m[at[4]] < m[at[2]]) for m in shuffled) < 25
    assert 507 in OUTSIDE


def test_one_site_has_one_contrast(head):
    how = dataclasses.replace(STILL, contrast_seed=4)
    elsewhere = dataclasses.replace(how, contrast_seed=5)
    samples = [render(head, protocol=LOD7, seed=seed, voxel_mm=4, how=h) for seed, h in ((0, how), (1, how), (0, elsewhere))]
    a, b, other = (np.array([np.median(s.image[s.counts[c] == 64]) for c in (1, 2, 3, 4, 6)]) for s in samples)
    assert np.abs(a - b).max() < 0.01 < 0.05 < np.abs(a - other).max()


def test_cutting_never_takes_the_brain(head):
    how = dataclasses.replace(STILL, cut=1)
    for seed in range(3):
        whole, cut = (render(head, protocol=LOD7, seed=seed, voxel_mm=4, how=h) for h in (STILL, how))
        brain = whole.counts[0] < 64
        assert (cut.image[brain] > 0).mean() > 0.99 and (cut.image == 0).sum() > (whole.image == 0).sum()


def test_label_maps_are_read_in_any_orientation_and_refused_in_one_line(head, tmp_path):
    ids = head.ids[head.codes[1:-1, 1:-1, 1:-1].numpy()].astype(np.uint16)        # LIA
    ras = ids[::-1, :, :].transpose(0, 2, 1)[:, :, ::-1]
    save_volume(tmp_path / "boxes.nii.gz", np.ascontiguousarray(ras), np.array([[1, 0, 0, -127], [0, 1, 0, -128], [0, 0, 1, -127], [0, 0, 0, 1.0]]))
    read = load_anatomy(tmp_path / "boxes.nii.gz")
    assert read.name == "boxes" and np.array_equal(read.ids, [i for i in IDS if (ids == i).any()])
    assert np.array_equal(read.ids[read.codes.numpy()], head.ids[head.codes.numpy()])
    many = np.arange(8**3, dtype=np.uint16).reshape(8, 8, 8)
    save_volume(tmp_path / "many.nii.gz", many, np.eye(4))
    with pytest.raises(InputError, match="many.nii.gz: 512 different ids.*is wanted"):
        load_anatomy(tmp_path / "many.nii.gz")


def test_zscored_is_over_all_voxels():
    out = zscored(np.array([[[0, 0, 10, 10]]], dtype=np.float32))
    assert out.tolist() == [[[-1, -1, 1, 1]]] and zscored(np.ones((2, 2, 2), np.float32)).tolist() == np.zeros((2, 2, 2)).tolist()
