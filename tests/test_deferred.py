"""Augmentation on the device: the same samples as from workers, whatever the batch and the precision, and Lightning's hook that calls it."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from small_scans import Arrays, blocks, small_scan
from torch.utils.data import DataLoader

from data_registry.errors import InputError
from data_registry.params import Params, Stage, Train
from data_registry.protocol import IGNORED, load
from data_registry.shards import block_counts, pooled
from lod_model import networks, warp
from lod_model.augment import PRESETS
from lod_model.begin import check_fits
from lod_model.crops import CropDataset
from lod_model.data import COARSE_FACTOR, SampleDataset, Scan, Windows
from lod_model.deferred import KEY, collated, finished
from lod_model.feeding import Feeding, augments_on_device
from lod_model.module import MODULES
from lod_model.randomness import Fields

SHAPE = (24, 28, 20)
LEVELS = {
    "fine": {"level": "fine"},
    "fine, windows": {"level": "fine", "windows": Windows(8, 4)},
    "coarse, augmented after": {"level": "coarse"},
    "coarse, augmented before": {"level": "coarse", "augmented": "before"},
}


def head(seed: int, shape: tuple[int, ...] = SHAPE) -> Scan:
    """A head that no flip leaves as it is, with voxels that the protocol leaves out, and its coarse columns."""
    classes = np.zeros(shape, np.uint8)
    classes[3:-4, 4:-3, 3:-5] = blocks([n - 7 if axis != 2 else n - 8 for axis, n in enumerate(shape)], 7, seed=seed)
    classes[5:8, 5:9, 6:9] = IGNORED
    grey = np.random.default_rng(seed).integers(0, 40, shape) + np.where(classes == IGNORED, 200, 30 * classes)
    grey[:4] //= 3
    scan, image = small_scan(grey.astype(np.uint8), scan_id=f"sub-{seed}", voxel_mm=1.5, lod7=classes), grey.astype(np.uint8)
    coarse = {"t1w_x4": pooled(image, COARSE_FACTOR), "lod7_x4": block_counts(classes, COARSE_FACTOR, 7)}
    object.__setattr__(scan, "store", Arrays(**scan.store.columns, **coarse))
    return scan


def both(scans: list[Scan], epoch: int, *, preset: str, **how) -> tuple[list[dict], dict]:
    """A pass as workers augment it, and as they leave it."""
    ways = [SampleDataset(scans, protocol="lod7", augmentation=preset, seed=2, deferred=later, **how) for later in (False, True)]
    done, left = ([data[epoch, index] for index in range(len(scans))] for data in ways)
    return done, collated(left)


def assert_same(done: list[dict], batch: dict) -> None:
    for name in done[0]:
        for sample, ours in zip(done, batch[name], strict=True):
            assert ours.dtype == sample[name].dtype and ours.shape == sample[name].shape, name
            if ours.dtype == torch.float32:
                torch.testing.assert_close(ours.cpu(), sample[name], atol=2e-4, rtol=0)
            else:
                assert torch.equal(ours.cpu(), sample[name]), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_device_makes_what_workers_make(preset, level):
    scans, images, by_worker = [head(1), head(2)], [], 0
    for epoch in range(7):
        done, batch = both(scans, epoch, preset=preset, **LEVELS[level])
        by_worker += sum(plan.raw is not None for plan in batch[KEY])
        if all(plan.raw is None for plan in batch[KEY]):  # what travels is as it was read
            assert batch["image"].dtype == torch.uint8 and (batch["target"].dtype == torch.uint8 or LEVELS[level] == {"level": "coarse"})
        before = {name: value.clone() for name, value in batch.items() if name != KEY}
        made = finished(batch)
        assert_same(done, made)
        assert KEY not in made and all(torch.equal(before[name], batch[name]) for name in before)
        images += list(made["image"])
    assert len({image.numpy().tobytes() for image in images}) >= len(images) - 4  # paper leaves a tenth as they are
    assert (by_worker > 0) == (preset == "strong")  # motion, ghosts and spikes are TorchIO's


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_is_its_samples(preset):
    """Two samples with parameters of their own, together and alone."""
    _, together = both([head(1), head(2)], 3, preset=preset, level="fine")
    alone = [both([scan], 3, preset=preset, level="fine")[1] for scan in (head(1), head(2))]
    made = finished(together)
    for index, batch in enumerate(alone):
        for name, value in finished(batch).items():
            assert torch.equal(value[0], made[name][index])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_precision_around_changes_nothing(preset, monkeypatch):
    batches = [both([head(1), head(2)], epoch, preset=preset, level="fine")[1] for epoch in range(4)]
    made = [finished(batch) for batch in batches]
    seen, moved = [], warp.along
    monkeypatch.setattr(warp, "along", lambda *args: seen.append(torch.get_float32_matmul_precision()) or moved(*args))
    torch.set_float32_matmul_precision("medium")  # products may have bfloat16's bits
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = [finished(batch) for batch in batches]
        assert torch.get_float32_matmul_precision() == "medium" and set(seen) == {"highest"}
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(made, again, strict=True):
        assert all(value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_crops_too(preset):
    """Two protocols, one of which a scan has not; cubes that are padded."""
    one, two = blocks(SHAPE, 7, seed=4), blocks(SHAPE, 33, seed=5)
    one[:4], two[:, :3] = IGNORED, IGNORED
    scans = [small_scan(head(seed).t1w(), scan_id=f"sub-{seed}", **labels) for seed, labels in enumerate(({"lod7": one, "synthseg33": two}, {}))]
    ways = [
        CropDataset(scans, protocol_names=["lod7", "synthseg33"], side=22, multiple=8, augmentation=preset, seed=5, deferred=later)
        for later in (False, True)
    ]
    for epoch in range(8):
        done, left = ([data[epoch, index] for index in range(2)] for data in ways)
        assert_same(done, finished(collated(left)))


def test_plans_travel_between_processes():
    scans = [head(1)]
    data = SampleDataset(scans, protocol="lod7", augmentation="strong", level="fine", deferred=True)
    keys = [(epoch, 0) for epoch in range(6)]
    batches = list(DataLoader(data, batch_size=2, sampler=keys, num_workers=2, collate_fn=collated))
    here = collated([data[4, 0], data[5, 0]])
    assert len(batches) == 3
    for name, value in finished(batches[2]).items():
        assert torch.equal(value, finished(here)[name])
    assert len(pickle.dumps(here[KEY])) < 60_000  # parameters, and states of generators, no volumes


def trained(how: str, name: str, **settings) -> tuple[dict[str, float], Feeding]:
    """Losses of the last of three epochs on two scans."""
    torch.manual_seed(0)
    settings = Train(augment_on=how, batch_size=2, fine=Stage(epochs=3, learning_rate=1e-2), coarse=Stage(epochs=0, learning_rate=1), **settings)
    net = networks.build(name, networks.config_for(name, [load("lod7")]) | {"widths": [2, 4, 8], "dropout": 0.0})
    fed, scans = Feeding(name, net, "fine", settings), [head(1, (24, 24, 24)), head(2, (24, 24, 24))]
    loaders = [fed.loader(scans, training=training, workers=0) for training in (True, False)]
    shares = dict(zip(("train", "val"), (loader.batch_sampler for loader in loaders), strict=True))
    module = MODULES[fed.recipe.samples](net, level="fine", settings=settings, recipe=fed.recipe, shares=shares)
    trainer = Trainer(max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                      num_sanity_val_steps=0, accelerator="cpu")  # fmt: skip
    trainer.fit(module, *loaders)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, fed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"fine_patch": 8}])
def test_a_training_learns_the_same(settings):
    """Through Lightning's hook; what validates is left alone."""
    torch.set_num_threads(1)
    (losses, _), (ours, fed), (plain, _) = (trained(how, "lod_brain", **settings) for how in ("workers", "device", "auto"))
    unlike, _ = trained("workers", "lod_brain", augmentation="none", **settings)
    assert ours == pytest.approx(losses, abs=1e-4) and unlike != pytest.approx(losses, abs=1e-3) and {"train_loss", "val_loss"} <= set(losses)
    assert plain == losses or torch.cuda.is_available()  # auto is workers where there is no GPU
    validation = next(iter(fed.loader([head(1)], training=False, workers=0)))
    untouched = SampleDataset([head(1)], level="fine", protocol="lod7")[0, 0]
    assert fed.deferred and KEY not in validation and torch.equal(validation["image"][0], untouched["image"])


def test_slices_are_augmented_by_workers():
    recipe = networks.recipe_of("fastsurfer_vinn")
    for settings in (Train(augment_on="auto"), Train()):
        assert not augments_on_device("fastsurfer_vinn", recipe, settings)
    with pytest.raises(InputError, match="train.augment_on is device: network fastsurfer_vinn is trained on slices"):
        check_fits("fastsurfer_vinn", None, Params(index={"roots": ("data",)}, train=Train(augment_on="device")))
    assert augments_on_device("lod_brain", networks.recipe_of("lod_brain"), Train(augment_on="device"))
    assert not augments_on_device("lod_brain", networks.recipe_of("lod_brain"), Train(augment_on="device", augmentation="none"))
    assert "augment_on" not in Train().model_dump(mode="json") and Train(augment_on="device").model_dump()["augment_on"] == "device"


def test_noise_elsewhere_is_seeded_by_the_same_state():
    """A device that is no processor cannot take the processor's state: its generator gets a seed that depends on all of it."""
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 1, 2)]
    seeds = [Fields(state).seed for state in states]
    assert seeds[0] == seeds[1] != seeds[2] and all(0 <= seed < 2**63 for seed in seeds)
    assert Fields(7).seed == 7


def test_all_of_the_grid_is_sampled_where_no_box_is_looked_for(monkeypatch):
    """As on a GPU, which would be waited for."""
    with_box = finished(both([head(1), head(2)], 3, preset="light", level="fine")[1])
    monkeypatch.setattr(warp, "_box_of_a_sparse", lambda volume: None)
    without = finished(both([head(1), head(2)], 3, preset="light", level="fine")[1])
    assert torch.equal(with_box["target"], without["target"]) and torch.allclose(with_box["image"], without["image"], atol=1e-5)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(batch: dict) -> dict:
    return finished({name: value.to("cuda") for name, value in batch.items()})


@cuda
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpu_makes_what_workers_make(preset, level, monkeypatch):
    """With the processor's noise, ties of nearest neighbours apart."""
    each = Fields.each
    monkeypatch.setattr(Fields, "each", lambda self, draw, like: (x.to(like.device) for x in each(self, draw, torch.empty(like.shape))))
    for epoch in range(8):
        done, batch = both([head(1), head(2)], epoch, preset=preset, **LEVELS[level])
        made = on_gpu(batch)
        assert made["image"].is_cuda and made["target"].is_cuda
        for sample, image, target in zip(done, made["image"].cpu(), made["target"].cpu(), strict=True):
            assert ((image - sample["image"]).abs() > 5e-3).float().mean() <= 1e-4
            assert ((target.float() - sample["target"].float()).abs() > 1e-4).float().mean() <= 1e-4


@cuda
def test_a_gpus_own_noise_is_as_strong():
    batch = torch.zeros(64, 64, 64, device="cuda")
    for kind, mean, deviation in ((torch.randn, 0, 1), (torch.rand, 0.5, 12**-0.5)):
        (first, second), again = (list(itertools.islice(Fields(5).each(kind, batch), 2)) for _ in range(2))
        assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and not torch.equal(first, second)
        assert first.mean().item() == pytest.approx(mean, abs=0.01) and first.std().item() == pytest.approx(deviation, rel=0.01)


@cuda
def test_nothing_waits_for_a_gpu():
    """But for the choice of windows, which need labels."""
    batches = [both([head(1), head(2)], epoch, preset=preset, level="fine")[1] for preset in PRESETS for epoch in range(6)]
    batches = [{name: value.to("cuda") for name, value in batch.items()} for batch in batches]
    finished(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            finished(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
