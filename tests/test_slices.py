"""Slices of asymmetric scans with sided labels: what belongs together, in which plane and orientation, and what each pixel counts."""

import numpy as np
import pytest
import torch
from small_scans import blocks, small_scan

from data_registry.params import Slices
from data_registry.protocol import IGNORED, load, sagittal_classes
from lod_model import augment as augmentation
from lod_model.networks.competitive import VIEWS, ViewsConfig
from lod_model.networks.fastsurfer_vinn import FastSurferVINNConfig
from lod_model.pixel_weights import PARTS, pixel_weights
from lod_model.slices import SliceDataset, collated, zoomed
from lod_model.views import as_slices

SHAPE = (11, 14, 18)
CONFIG = FastSurferVINNConfig(filters=4, native_filters=4, depth=2, inner_size=32)


class Every(SliceDataset):
    """All planes that have labels, in order."""

    def _chosen(self, labelled, generator):
        return labelled.tolist()


def picture(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(protocol: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Blocks of all classes up to the volume's faces, ignored ones among them."""
    classes = blocks(shape, load(protocol).classes, seed=1)
    classes[:, :, 6:9] //= 2  # the first classes more often
    classes[blocks(shape, 8, seed=2) == 0] = IGNORED
    return classes


def samples(scan, *, kind=SliceDataset, protocol="fastsurfer79", config=CONFIG, how=None, **more) -> SliceDataset:
    return kind([scan], protocol=protocol, how=how or Slices(), config=config, **more)


def test_target_slices_put_back_are_the_volume():
    volume, classes = picture(), labels("fastsurfer79")
    sample = samples(small_scan(volume, fastsurfer79=classes), kind=Every)[0, 0]
    merged, number = sagittal_classes(load("fastsurfer79"))
    merged = np.append(merged, np.full(256 - len(merged), IGNORED))
    for view in VIEWS:
        target, image = sample[f"{view}_target"].numpy(), sample[f"{view}_image"].numpy()
        slices = as_slices(classes, view)
        (n, h, w), multiple = slices.shape, CONFIG.multiple
        assert target.shape == (n, h + -h % multiple, w + -w % multiple) and image.shape == (n, 7, *target.shape[1:])
        back, grey = np.zeros_like(classes), np.zeros_like(volume)
        as_slices(back, view)[...], as_slices(grey, view)[...] = target[:, :h, :w], np.rint(image[:, 3, :h, :w] * 255)
        assert np.array_equal(back, merged[classes] if view == "sagittal" else classes)
        assert np.array_equal(grey, volume)
        for offset in range(-3, 4):
            near = as_slices(volume, view)[np.clip(np.arange(n) + offset, 0, n - 1)]
            assert np.array_equal(np.rint(image[:, 3 + offset, :h, :w] * 255), near)
        assert (target[:, h:] == IGNORED).all() and (target[:, :, w:] == IGNORED).all()
        assert not image[:, :, h:].any() and not image[:, :, :, w:].any()
    assert sample["sagittal_target"][sample["sagittal_target"] != IGNORED].max() == number - 1 == 50


def test_left_and_right_are_one_for_the_sagittal_view_alone():
    table = load("fastsurfer79")
    left, right = table.class_names.index("Left-Thalamus"), table.class_names.index("Right-Thalamus")
    classes = np.zeros(SHAPE, np.uint8)
    classes[7:, 3:6, 4:9], classes[:4, 3:6, 4:9] = left, right  # axis 0 grows to the left
    sample = samples(small_scan(picture(), fastsurfer79=classes), kind=Every)[0, 0]
    axial, coronal = sample["axial_target"][0], sample["coronal_target"][0]
    assert axial.shape == (20, 12) and (axial[4:9, 7:11] == left).all() and (axial[4:9, :4] == right).all()  # rows: front, columns: left
    assert coronal.shape == (12, 16) and (coronal[7:11, 3:6] == left).all() and (coronal[:4, 3:6] == right).all()  # rows: left, columns: down
    (fused,) = set(sample["sagittal_target"].unique().tolist()) - {0, IGNORED}
    assert fused == sagittal_classes(table)[0][left] and len(sample["sagittal_target"]) == 8


@pytest.mark.parametrize("parts", [PARTS, *((part,) for part in PARTS), ("median", "hires"), ()], ids="+".join)
@pytest.mark.parametrize("where", ["everywhere", "inside", "one voxel"])
def test_weights_of_slabs_are_those_of_the_volume(parts, where):
    classes = labels("fastsurfer79")
    if where == "inside":
        classes[:3] = classes[-2:] = 0
        classes[:, 6:9] = classes[:, :, :1] = 0
    elif where == "one voxel":
        classes[...] = 0
        classes[0, 4, 17] = 40
    sample = samples(small_scan(picture(), fastsurfer79=classes), kind=Every, how=Slices(weights=parts))[0, 0]
    table = load("fastsurfer79")
    merged = sagittal_classes(table)[0]
    for view in VIEWS:
        seen, cortex = classes, table.cortex
        if view == "sagittal":
            seen, cortex = np.append(merged, np.arange(79, 256))[classes].astype(np.uint8), np.zeros(51, bool)
            cortex[merged[table.cortex]] = True
        wanted = as_slices(pixel_weights(seen, cortex, parts=parts), view)
        n, h, w = wanted.shape
        there = as_slices((classes > 0) & (classes < IGNORED), view).any((1, 2))
        weights = sample[f"{view}_weight"].numpy()
        assert np.array_equal(weights[:, :h, :w], wanted[there])
        assert not weights[:, h:].any() and not weights[:, :, w:].any()
        if where == "everywhere":
            assert there.all() and len(np.unique(weights)) > (2 if parts else 1)


@pytest.mark.parametrize(
    ("network", "voxel_mm", "scale"), [(CONFIG, 0.8, 1.25), (CONFIG, 2.0, 0.5), (ViewsConfig(kernels=(1, 1), depth=2), 0.8, 1.0)]
)
def test_scale_is_the_networks_and_noise_in_training_alone(network, voxel_mm, scale):
    scan = small_scan(picture(), voxel_mm=voxel_mm, fastsurfer79=labels("fastsurfer79"))
    assert network.scale(voxel_mm) == scale

    def scales(inner_scale: float, how=None, **more) -> np.ndarray:
        data = samples(scan, config=network, inner_scale=inner_scale, how=how or Slices(per_visit=30, weights=()), **more)
        return np.concatenate([data[epoch, 0][f"{view}_scale"].numpy() for epoch in range(6) for view in VIEWS])

    assert (scales(0.1, validation=True) == scale).all() and (scales(0.0) == scale).all()
    noise = scales(0.1) - scale
    assert len(np.unique(noise)) > 530 and abs(noise.mean()) < 0.02 and 0.09 < noise.std() < 0.11
    assert (scales(0.1, Slices(inner_scale=0.0, weights=())) == scale).all()  # the settings come before the network's own
    wild = scales(0.0, Slices(inner_scale=3.0, weights=()))
    assert wild.min() == scale / 2 and wild.max() == scale * 2


def test_drawn_among_labelled_planes_others_in_each_epoch():
    volume, classes = picture(), np.zeros(SHAPE, np.uint8)
    classes[2:9, 3:12, 4:16] = 1
    classes[:, 0], classes[:, :, 16:] = IGNORED, IGNORED
    scan = small_scan(volume, fastsurfer79=classes)
    for view in VIEWS:
        slices, seen = as_slices(volume, view), set()
        first, last = {"axial": (3, 11), "coronal": (4, 15), "sagittal": (2, 8)}[view]
        for epoch in range(12):
            chosen = planes(samples(scan)[epoch, 0], view, slices)
            assert len(set(chosen)) == 4
            seen.add(tuple(chosen))
        assert len(seen) == 12 and {index for each in seen for index in each} == set(range(first, last + 1))
        wanted = np.linspace(first, last, 6).astype(int)[1:-1].tolist()
        assert planes(samples(scan, validation=True)[0, 0], view, slices) == planes(samples(scan, validation=True)[5, 0], view, slices) == wanted
    many = samples(scan, how=Slices(per_visit=9))[0, 0]  # of 7 sagittal planes
    assert many["sagittal_target"].shape[0] == 9 and len(set(planes(many, "axial", as_slices(volume, "axial")))) == 9


def planes(sample: dict, view: str, slices: np.ndarray) -> list[int]:
    """Which planes of the volume the sample's slices are."""
    grey = np.rint(sample[f"{view}_image"][:, 3].numpy() * 255)[:, : slices.shape[1], : slices.shape[2]]
    return [next(i for i, plane in enumerate(slices) if np.array_equal(plane, one)) for one in grey]


def test_an_unlabelled_scan_gives_slices_all_the_same():
    sample = samples(small_scan(picture(), fastsurfer79=np.zeros(SHAPE, np.uint8)))[0, 0]
    assert len(sample["axial_target"]) == 4 and (sample["axial_target"][:, :18, :11] == 0).all() and (sample["axial_weight"][:, :18, :11] == 1).all()


def test_a_sample_depends_on_seed_epoch_and_scan_alone():
    scan = small_scan(picture(), fastsurfer79=labels("fastsurfer79"))
    how = {"inner_scale": 0.1, "augmentation": "light", "how": Slices(outer_scale=(0.8, 1.2))}
    one, same, other, later = (samples(scan, **how)[3, 0], samples(scan, **how)[3, 0], samples(scan, seed=1, **how)[3, 0], samples(scan, **how)[4, 0])
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name in one:
        assert not torch.equal(one[name], other[name]) and not torch.equal(one[name], later[name])


@pytest.mark.parametrize("protocol", ["fastsurfer79", "synthseg33"])
def test_a_flip_exchanges_left_and_right(monkeypatch, protocol):
    """Weights, which the names have no part in, are those of the flipped volume."""
    monkeypatch.setitem(augmentation.PRESETS, "light", lambda shape, voxel_mm: augmentation.Variant())
    volume, classes, table = picture(), labels(protocol), load(protocol)
    scan = small_scan(volume, **{protocol: classes})
    twins = {index: table.class_names.index(name) for index, name in enumerate(map(twin, table.class_names))} | {IGNORED: IGNORED}
    assert sum(a != b for a, b in twins.items()) >= 26
    flipped = small_scan(volume[::-1].copy(), **{protocol: np.vectorize(twins.__getitem__)(classes[::-1]).astype(np.uint8)})
    config = FastSurferVINNConfig(classes=table.classes, filters=4, native_filters=4, depth=2, inner_size=32)
    plain, turned = (samples(one, kind=Every, protocol=protocol, config=config)[0, 0] for one in (scan, flipped))
    assert not torch.equal(plain["axial_target"], turned["axial_target"])
    assert torch.equal(plain["sagittal_target"].flip(0), turned["sagittal_target"])
    count = 0
    for epoch in range(8):
        sample = samples(scan, kind=Every, protocol=protocol, config=config, augmentation="light")[epoch, 0]
        is_flipped = torch.equal(sample["axial_image"], turned["axial_image"])
        assert all(torch.equal(sample[name], (turned if is_flipped else plain)[name]) for name in sample)
        count += is_flipped
    assert 0 < count < 8


def twin(name: str) -> str:
    for left, right in (("Left", "Right"), ("ctx-lh", "ctx-rh"), ("left", "right")):
        if left in name:
            return name.replace(left, right)
        if right in name:
            return name.replace(right, left)
    return name


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.25, 1.6])
def test_the_outer_zoom_moves_image_labels_and_weights_together(factor):
    """A disc, 20 below the middle and 12 before it, of radius 16: all three by the factor."""
    rows, columns = np.mgrid[:128, :160] - np.array([63.5, 79.5])[:, None, None]
    disc = np.hypot(rows - 20, columns + 12) < 16
    found = {
        "image": torch.from_numpy(np.tile(disc, (2, 7, 1, 1))).float(), "target": torch.from_numpy(np.tile(disc * 3, (2, 1, 1))),
        "weight": torch.from_numpy(np.tile(1 + disc, (2, 1, 1))).float(), "scale": torch.ones(2),
    }  # fmt: skip
    after = zoomed(found, np.array([factor, 1.0]))
    target, weight = after["target"][0].numpy(), after["weight"][0].numpy()
    assert after["target"].dtype == torch.int64
    for moved in (target == 3, weight == 2, *(after["image"][0].numpy() > 0.5)):
        assert np.allclose([rows[moved].mean(), columns[moved].mean()], [20 * factor, -12 * factor], atol=0.3)
        assert np.sqrt(moved.sum() / np.pi) == pytest.approx(16 * factor, abs=0.3)
    assert np.array_equal(weight == 2, target == 3) and set(np.unique(target)) == {0, 3}
    outside = (abs(rows) > 64 * factor) | (abs(columns) > 80 * factor)  # what came in costs nothing
    assert not weight[outside].any() and (weight[~outside] > 0).all() and outside.any() == (factor < 1)
    assert torch.equal(after["scale"], found["scale"])
    for name in found:  # the second slice has factor 1
        assert torch.allclose(after[name][1].float(), found[name][1].float(), atol=1e-5)


def test_the_zoom_inside_follows_the_outer_one():
    """A square of 9 voxels that became wider before the network has voxels that are smaller by as much."""
    classes = np.zeros((64, 64, 64), np.uint8)
    classes[28:37, 28:37, 28:37] = 1
    scan = small_scan(picture(classes.shape), voxel_mm=0.8, fastsurfer79=classes)
    sample = samples(scan, how=Slices(per_visit=40, outer_scale=(0.6, 1.4), weights=()))[0, 0]
    sides = (sample["axial_target"] == 1).sum((1, 2)).sqrt().numpy()
    scales = sample["axial_scale"].numpy()
    assert scales.std() > 0.2 and np.abs(sides / 9 - scales / 1.25).max() < 0.12
    noisy = samples(scan, how=Slices(per_visit=40, inner_scale=0.1, outer_scale=(0.6, 1.4), weights=()))[0, 0]["axial_scale"].numpy()
    assert 0.07 < (noisy - scales).std() < 0.13  # the same outer zooms


def test_the_outer_zoom_is_of_training_alone():
    scan = small_scan(picture(), fastsurfer79=labels("fastsurfer79"))
    plain, wide = (samples(scan, how=Slices(outer_scale=spread))[0, 0] for spread in ((1.0, 1.0), (0.6, 1.4)))
    assert not torch.equal(plain["axial_target"], wide["axial_target"]) and plain["axial_target"].shape == wide["axial_target"].shape
    calm, same = (samples(scan, how=Slices(outer_scale=spread), validation=True)[0, 0] for spread in ((1.0, 1.0), (0.6, 1.4)))
    assert all(torch.equal(calm[name], same[name]) for name in calm)


def test_scans_of_two_sizes_make_one_batch():
    small, large = (samples(small_scan(picture(shape), fastsurfer79=labels("fastsurfer79", shape)))[0, 0] for shape in (SHAPE, (20, 12, 30)))
    batch = collated([small, large])
    assert batch["axial_image"].shape == (8, 7, 32, 20) and batch["coronal_target"].shape == (8, 20, 16) and batch["sagittal_scale"].shape == (8,)
    for view in VIEWS:
        for name, outside in (("image", 0), ("target", IGNORED), ("weight", 0)):
            whole, parts = batch[f"{view}_{name}"], (small[f"{view}_{name}"], large[f"{view}_{name}"])
            for part, rest in zip(parts, whole.split(4), strict=True):
                h, w = part.shape[-2:]
                assert torch.equal(rest[..., :h, :w], part) and whole.dtype == part.dtype
                assert (rest[..., h:, :] == outside).all() and (rest[..., w:] == outside).all()
        assert not any(side % CONFIG.multiple for side in batch[f"{view}_image"].shape[2:])
