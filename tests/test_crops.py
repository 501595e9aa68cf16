"""Cubes of asymmetric scans: where they are cut, what moves with them, and what left and right become."""

import numpy as np
import pytest
import torch
from small_scans import blocks, small_scan
from torch.utils.data import DataLoader

from data_registry.protocol import IGNORED, load
from lod_model import augment as augmentation
from lod_model.crops import CropDataset, augmented

SHAPE = (20, 24, 28)
SIDED = ("synthseg33", "fastsurfer95")


@pytest.fixture
def only_flips(monkeypatch):
    """Preset light without anything but the flip."""
    monkeypatch.setitem(augmentation.PRESETS, "light", lambda shape, voxel_mm: augmentation.Variant())


def picture(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def data(scan, *protocols: str, side: int = 8, **how) -> CropDataset:
    return CropDataset([scan], protocol_names=protocols, side=side, multiple=4, **how)


def intensities(sample: dict, scan) -> np.ndarray:
    """The image as it stood in the scan."""
    return np.rint(sample["image"][0].numpy().astype(np.float64) * scan.deviation + scan.mean).astype(int)


def found(cube: np.ndarray, volume: np.ndarray) -> list[tuple[int, ...]]:
    """Every place of the volume where the cube stands."""
    windows = np.lib.stride_tricks.sliding_window_view(volume, cube.shape)
    return [tuple(map(int, place)) for place in np.argwhere((windows == cube).all((3, 4, 5)))]


def test_image_and_classes_are_cut_at_one_place_another_in_each_epoch():
    volume, classes = picture(), blocks(SHAPE, 33, seed=1, side=1)
    scan = small_scan(volume, synthseg33=classes)
    places = []
    for epoch in range(12):
        sample = data(scan, "synthseg33")[epoch, 0]
        assert sample["image"].shape == (1, 8, 8, 8) and sample["image"].dtype == torch.float32 and sample["synthseg33"].dtype == torch.int64
        (place,) = found(intensities(sample, scan), volume)
        assert found(sample["synthseg33"].numpy(), classes) == [place]
        places.append(place)
    assert len(set(places)) == 12
    assert all(max(axis) > (n - 8) / 2 > min(axis) for axis, n in zip(zip(*places, strict=True), SHAPE, strict=True))


def test_a_crop_depends_on_seed_epoch_and_scan_alone():
    scans = [small_scan(picture(seed=s), scan_id=f"sub-{s}", synthseg33=blocks(SHAPE, 33, seed=s)) for s in (1, 2)]

    def samples(workers: int, **how) -> list[dict]:
        crops = CropDataset(scans, protocol_names=["synthseg33"], side=8, multiple=4, augmentation="light", **how)
        return list(DataLoader(crops, sampler=[(0, 0), (3, 1), (1, 0), (3, 0)], num_workers=workers, batch_size=None))

    alone, others, again = samples(0), samples(0, seed=1), samples(2)
    for one, two, other in zip(alone, again, others, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not torch.equal(one["image"], other["image"])
    later = CropDataset(scans[1:], protocol_names=["synthseg33"], side=8, multiple=4, augmentation="light")[3, 0]
    assert torch.equal(later["image"], alone[1]["image"])  # its index is no matter


def test_validation_is_the_middle_and_stays():
    volume = picture()
    scan = small_scan(volume, synthseg33=volume % 33)
    first, later = (data(scan, "synthseg33", validation=True)[epoch, 0] for epoch in (0, 7))
    middle = volume[6:14, 8:16, 10:18]
    assert np.array_equal(intensities(first, scan), middle) and np.array_equal(first["synthseg33"], middle % 33)
    assert torch.equal(first["image"], later["image"])


def test_the_image_has_the_moments_of_the_whole_scan():
    volume = picture()
    scan = small_scan(volume, lod7=volume % 7)
    image = data(scan, "lod7", validation=True)[0, 0]["image"][0].numpy()
    z = (volume - volume.mean(dtype=np.float64)) / volume.std(dtype=np.float64)
    assert np.allclose(image, z[6:14, 8:16, 10:18], atol=1e-5)


@pytest.mark.parametrize("preset", ["none", "light"])
def test_a_small_scan_is_taken_whole_and_padded_with_intensity_0(preset):
    volume = picture((5, 8, 11)) // 2 + 100
    scan = small_scan(volume, lod7=np.full_like(volume, 3))
    sample = data(scan, "lod7", side=16, augmentation=preset)[0, 0]
    assert sample["image"].shape == (1, 8, 8, 12) and sample["lod7"].shape == (8, 8, 12)
    outside = np.ones((8, 8, 12), dtype=bool)
    outside[:5, :, :11] = False
    assert (sample["lod7"][torch.from_numpy(outside)] == IGNORED).all()
    assert len(sample["image"][0][torch.from_numpy(outside)].unique()) == 1
    if preset == "none":
        assert np.array_equal(intensities(sample, scan), np.pad(volume, [(0, 3), (0, 0), (0, 1)]))
        assert (sample["lod7"].numpy()[~outside] == 3).all()


def test_a_scan_without_a_protocol_has_255_for_it():
    sample = data(small_scan(picture(), lod7=picture() % 7), "malp_em", "lod7")[0, 0]
    assert (sample["malp_em"] == IGNORED).all() and sample["lod7"].max() == 6


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("preset", ["light", "strong", "paper"])
def test_protocols_moved_together_are_each_moved_alone(number, preset):
    tables = [load(name) for name in ("fastsurfer95", "malp_em", "synthseg33")[:number]]
    volume, classes = picture(), [blocks(SHAPE, table.classes, seed=place) for place, table in enumerate(tables)]
    for part in classes:
        part[3:6, 4:8, 20:] = IGNORED
        part[:, :, :2] = part[:, :1] = 0
    assert len(np.unique(classes[0].astype(int) * 256 + classes[1])) > 300  # more combinations than a byte has
    for seed in range(6):
        how = {"preset": preset, "seed": seed, "voxel_mm": 1.0}
        together, moved = augmented(volume, classes, tables, **how)
        for part, table, own in zip(classes, tables, moved, strict=True):
            image, (alone,) = augmented(volume, [part], [table], **how)
            assert np.array_equal(image, together) and np.array_equal(alone, own) and own.dtype == np.uint8
        assert np.array_equal(augmented(volume, [], [], **how)[0], together)


@pytest.mark.parametrize("protocols", [SIDED[:1], SIDED[1:], SIDED], ids="+".join)
def test_a_flip_exchanges_left_and_right(only_flips, protocols):
    volume = picture()
    parts = {name: blocks(SHAPE, load(name).classes, seed=place) for place, name in enumerate(protocols)}
    for part in parts.values():
        part[::4, ::3] = IGNORED
    scan = small_scan(volume, **parts)
    turned = 0
    for epoch in range(8):
        plain, sample = (data(scan, *protocols, augmentation=preset)[epoch, 0] for preset in ("none", "light"))
        is_flipped = np.array_equal(intensities(sample, scan), intensities(plain, scan)[::-1])
        assert is_flipped or np.array_equal(intensities(sample, scan), intensities(plain, scan))
        turned += is_flipped
        for name in protocols:
            before, after = plain[name].numpy(), sample[name].numpy()
            wanted = mirrored(load(name), before[::-1]) if is_flipped else before
            assert np.array_equal(after, wanted) and (after == IGNORED).any()
    assert 0 < turned < 8


def mirrored(table, classes: np.ndarray) -> np.ndarray:
    """By the names alone: what is called left is right."""

    def twin(name: str) -> str:
        for left, right in (("Left", "Right"), ("ctx-lh", "ctx-rh"), ("left", "right")):
            if left in name:
                return name.replace(left, right)
            if right in name:
                return name.replace(right, left)
        return name

    names = table.class_names
    swap = {index: names.index(twin(name)) for index, name in enumerate(names)} | {IGNORED: IGNORED}
    assert sum(a != b for a, b in swap.items()) > 20
    return np.vectorize(swap.__getitem__)(classes)


@pytest.mark.parametrize("preset", ["none", "light", "strong"])
def test_a_crop_of_air_is_as_dark_as_air(preset):
    volume = np.zeros(SHAPE, dtype=np.uint8)
    volume[:6, :6, :6] = picture((6, 6, 6))
    scan = small_scan(volume, lod7=volume % 7)
    air = -scan.mean / scan.deviation
    seen = 0
    for epoch in range(40):
        if data(scan, "lod7")[epoch, 0]["lod7"].any():
            continue
        image = data(scan, "lod7", augmentation=preset)[epoch, 0]["image"].numpy()
        assert np.abs(image).max() < 20
        assert preset == "strong" or 2.5 * air < np.median(image) < 0.3 * air  # strong windows noise as it does a head
        seen += 1
    assert seen > 5
