"""Intensity from one scan alone: robust as ever, a known bias field taken off, the white matter at its grey level, one line where there is none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_networks import made

from data_registry import conform, resample
from data_registry.errors import InputError
from data_registry.intensity import ROBUST, STRIPE_LEVELS, WHITE, Preparation, histogram_of, moments, prepare, white_stripe, without_bias
from data_registry.label_sources import find_labels
from data_registry.params import Harmonise
from data_registry.shard_store import FolderStore
from data_registry.shards import read_metadata
from data_registry.volume import Volume, VolumeError, load_image, load_labels, save_volume
from lod_model import weights
from lod_model.networks.lod_brain import LODBrainConfig
from lod_model.segment import classes_of, segment
from pipelines.harmonise import make_shard, plan_shards

AFFINE = np.array([[0, 0, -3.0, 80], [3.2, 0, 0, -90], [0, 3.4, 0, -70], [0, 0, 0, 1]])   # axes anterior, superior, left


@pytest.fixture(autouse=True)
def _few_iterations(request, monkeypatch):
    """N4 to its end takes seconds; only one test asks how well it does."""
    if "known" not in request.node.name:
        monkeypatch.setattr("data_registry.intensity.N4_ITERATIONS", (3, 2))


def head(*, white: float = 500, grey: float = 350, noise: float = 15, seed: int = 0) -> Volume:
    """An egg of white matter (reaching 35 mm deep), grey matter, skull and fat brighter than anything, off the centre of its array."""
    shape = (60, 54, 56)
    where = np.indices(shape) * np.array([3.2, 3.4, 3.0])[:, None, None, None] - np.array([92, 95, 80])[:, None, None, None]
    radius = np.linalg.norm(where / np.array([1.0, 0.9, 0.8])[:, None, None, None], axis=0)
    shells = [(85, 2 * white), (76, 60), (70, grey), (52, white)]
    data = np.zeros(shape)
    for reach, value in shells:
        data[radius < reach] = value
    return Volume((data + np.random.default_rng(seed).normal(0, noise, shape)).astype(np.float32), AFFINE, Path("egg.nii"), "float32")


def bias(shape: tuple[int, ...]) -> np.ndarray:
    """A field from about 0.6 to 1.5, steepest along the first axis."""
    i, j, k = (np.linspace(-1, 1, n) for n in shape)
    return np.exp(0.35 * i[:, None, None] + 0.15 * j[None, :, None] ** 2 - 0.1 * k[None, None, :]).astype(np.float32)


def test_robust_is_conform_alone():
    on_grid = conform.conform(head(), grid="4mm")
    for scan in (head(), Volume(on_grid.data.astype(np.float32), on_grid.placement.affine, stored_dtype="uint8")):
        assert np.array_equal(prepare(scan, grid="4mm", preparation=ROBUST).data, conform.conform(scan, grid="4mm").data)


def test_n4_takes_off_a_field_that_is_known():
    """White matter multiplied by the field varies by 9 %; corrected, by less than 2 %, mostly noise, and what was taken off is the field."""
    plain = Volume(head(noise=8).data[::2, ::2, ::2], AFFINE * [2, 2, 2, 1])
    white, field = plain.data > 430, bias(plain.data.shape)
    white &= plain.data < 570
    given = Volume(plain.data * field, plain.affine, Path("egg.nii"), "uint8")
    found = without_bias(given)
    before, after = (v.data[white].std() / v.data[white].mean() for v in (given, found))
    assert before > 0.08 and after < 0.02, (before, after)
    estimated = given.data[white] / found.data[white]
    assert np.corrcoef(estimated, field[white])[0, 1] > 0.98
    assert found.data.dtype == np.float32 and found.stored_dtype == "float32"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_n4_gives_the_same_bytes_on_any_number_of_cores(threads):
    import SimpleITK as sitk

    given = Volume(head().data * bias((60, 54, 56)), AFFINE)
    first, before = without_bias(given).data, sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
        assert np.array_equal(without_bias(given).data, first)
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def test_n4_is_of_the_scan_before_its_window():
    given = Volume(head().data * bias((60, 54, 56)), AFFINE)
    corrected = without_bias(given)
    assert np.array_equal(prepare(given, grid="4mm", preparation=Preparation("n4")).data, conform.conform(corrected, grid="4mm").data)
    both = prepare(given, grid="4mm", preparation=Preparation("n4_whitestripe"))
    assert np.array_equal(both.data, prepare(corrected, grid="4mm", preparation=Preparation("whitestripe")).data)


def test_n4_corrects_a_uint8_scan_on_the_grid_and_one_with_negative_values():
    """Neither passes by: an integer scan that lies on the grid, and an offset that no logarithm has."""
    small = conform.conform(head(), grid="4mm")
    biased = np.clip(small.data * 0.6 * bias(small.data.shape), 0, 255).astype(np.uint8).astype(np.float32)
    scan = Volume(biased, small.placement.affine, stored_dtype="uint8")
    assert np.array_equal(prepare(scan, grid="4mm", preparation=ROBUST).data, biased)
    assert not np.array_equal(prepare(scan, grid="4mm", preparation=Preparation("n4")).data, biased)
    below = without_bias(Volume(biased - 100, small.placement.affine))
    assert np.allclose(below.data, without_bias(scan).data, atol=1e-3)


def test_the_stripe_by_hand():
    """White matter alone deep inside, Gaussian of 15: the stripe of ±5 % is ±0.1257 deviations wide, evenly filled to a per cent."""
    peak, deviation = white_stripe(head(grey=500))
    low, high = conform.robust_range(head(grey=500))
    smoothing = 112 / 8192 * (high - low) * 9 / 8
    assert peak == pytest.approx(500, abs=4)
    assert deviation == pytest.approx(np.hypot(15, smoothing) * 0.1257 / np.sqrt(3), rel=0.05)


@pytest.mark.parametrize(("factor", "offset"), [(1, 0), (0.02, 0), (7, -3000)])
def test_white_matter_gets_its_grey_level_whatever_the_scale(factor, offset):
    scan = head()
    changed = Volume((scan.data * factor + offset).astype(np.float32), AFFINE)
    peak, deviation = white_stripe(changed)
    assert peak == pytest.approx(500 * factor + offset, abs=5 * factor)          # fat is brighter, grey matter as large
    data = prepare(changed, grid="4mm", preparation=Preparation("whitestripe")).data
    first = prepare(scan, grid="4mm", preparation=Preparation("whitestripe")).data
    assert data.dtype == np.uint8 and np.abs(data.astype(int) - first).max() <= 1
    assert abs(float(np.median(data[np.abs(data.astype(int) - WHITE) < 20])) - WHITE) <= 1


def test_the_window_of_the_stripe_by_hand():
    """Voxel for voxel on the scan's own size: WHITE + (x − peak) · STRIPE_LEVELS / deviation, clipped."""
    scan = head()
    lia = np.array([[-4.0, 0, 0, 0], [0, 0, 4, 0], [0, -4, 0, 0], [0, 0, 0, 1]])
    scan = Volume(resample.resample_image(scan.data, np.diag([0.8, 0.8, 0.8, 1]), (64, 64, 64)), lia)
    assert scan.orientation == "LIA"
    peak, deviation = white_stripe(scan)
    wanted = np.clip(WHITE + (scan.data.astype(float) - peak) * STRIPE_LEVELS / deviation, 0, 255)
    data = prepare(scan, grid="4mm", preparation=Preparation("whitestripe")).data
    assert np.abs(data - wanted).max() < 0.51 and {0, 255} <= set(data.flat)


def nothing_to_find(name: str) -> np.ndarray:
    shape, generator = (60, 54, 56), np.random.default_rng(0)
    if name == "noise":
        return generator.uniform(0, 1000, shape)
    few = np.zeros(shape)
    few[20:26, 20:26, 20:26] = generator.normal(100, 5, (6, 6, 6))
    return few


@pytest.mark.parametrize("name", ["noise", "few"])
@pytest.mark.parametrize("intensity", ["whitestripe", "n4_whitestripe"])
def test_no_peak_is_one_line(name, intensity):
    scan = Volume(nothing_to_find(name).astype(np.float32), AFFINE, Path("odd.nii"))
    with pytest.raises(VolumeError, match=r"^odd.nii: no white matter peak, [^\n]* wanted for whitestripe$"):
        prepare(scan, grid="4mm", preparation=Preparation(intensity))


@pytest.mark.parametrize("intensity", ["robust", "n4", "whitestripe"])
def test_no_contrast_is_said_first(intensity):
    with pytest.raises(VolumeError, match="flat.nii: no contrast, the voxels are 7"):
        prepare(Volume(np.full((20, 18, 16), 7, np.float32), AFFINE, Path("flat.nii")), grid="4mm", preparation=Preparation(intensity))


@pytest.mark.parametrize("shape", [(2, 30, 31), (2, 2, 2), (5, 40, 3)])
def test_n4_takes_scans_of_any_shape(shape):
    data = np.random.default_rng(0).uniform(0, 9, shape).astype(np.float32)
    corrected = without_bias(Volume(data, AFFINE))
    assert corrected.data.shape == shape and np.isfinite(corrected.data).all() and (corrected.data >= 0).all()


def test_what_has_no_peak_is_quarantined_beside_what_has(tmp_path):
    for subject, data in (("01", head().data), ("02", nothing_to_find("noise").astype(np.float32))):
        save_volume(tmp_path / f"sub-{subject}_T1w.nii.gz", data, AFFINE)
    common = {"database": "alpha", "site": "alpha", "t1w_sha256": "", "labels": []}
    scans = [{"scan_id": f"alpha_sub-{s}", "subject": s, "t1w_path": f"sub-{s}_T1w.nii.gz", **common} for s in ("01", "02")]
    settings = Harmonise(grid="4mm", intensity="whitestripe", shards_per_site=1)
    (item,) = plan_shards(scans, settings)
    assert make_shard(FolderStore(tmp_path), item, {"alpha": str(tmp_path)}, settings) == 1
    good, bad = read_metadata(tmp_path / item["shard"])["samples"]
    assert (good["status"], bad["status"]) == ("ok", "quarantined")
    assert bad["reason"].startswith(f"{tmp_path}/sub-02_T1w.nii.gz: no white matter peak") and "\n" not in bad["reason"]


def test_the_recipe_of_a_shard_sees_every_choice_and_robust_is_as_before():
    scans = [{"scan_id": "a", "subject": "1", "database": "d", "site": "s", "t1w_sha256": "f", "labels": []}]
    choices = [Harmonise(), *(Harmonise(intensity=name) for name in ("n4", "whitestripe", "n4_whitestripe")), Harmonise(interpolation="cubic")]
    assert len({plan_shards(scans, settings)[0]["recipe"] for settings in choices}) == 5
    assert set(Harmonise().model_dump(mode="json")) == {"grid", "intensity", "labels", "block_protocols", "shards_per_site"}


REAL = ("malc/sub-1000", "ixi2mm/sub-IXI013", "mrtrixbids/sub-01", "georgetown/sub-06", "voxelmorph/sub-test", "brainload/sub-1", "mneecog/sub-ecog")


@pytest.mark.parametrize("scan", REAL)
def test_the_peak_of_real_scans_is_their_white_matter(test_data, scan):
    """Against the mode of the voxels that the labels call cerebral white matter: FreeSurfer's 2 and 41, else MUSE's and Neuromorphometrics's."""
    database, subject = scan.split("/")
    volume = load_image(next((test_data / "bids" / scan).rglob("*_T1w.nii.gz")))
    source, path = next(iter(find_labels(test_data / "bids" / database, subject.removeprefix("sub-"), "").items()))
    labels = load_labels(path)
    ids = conform.resample_nearest(labels.data, np.linalg.inv(labels.affine) @ volume.affine, volume.data.shape)
    white = np.isin(ids, (2, 41) if source.startswith(("a", "w")) else (44, 45, *range(81, 96)))
    low, high = conform.robust_range(volume)
    counts, edges = np.histogram(volume.data[white], bins=64, range=(low, high))
    mode = np.convolve(counts, [1, 2, 3, 2, 1], "same").argmax()
    peak, deviation = white_stripe(volume)
    assert white.sum() > 10_000 and abs(peak - edges[mode : mode + 2].mean()) < 0.08 * (peak - low)
    assert (peak - low) / 300 < deviation < (peak - low) / 45


def test_cubic_is_exact_where_it_should_be():
    """A second-order polynomial sampled half-way between voxels, away from the border; linear is off by a quarter."""
    along = np.arange(12.0)
    data = np.broadcast_to((along**2 - 3 * along)[:, None, None], (12, 4, 5))
    to_input = np.diag([0.5, 1, 1, 1])
    half = np.arange(24) / 2
    cubic, linear = (resample.resample_image(data, to_input, (24, 4, 5), interpolation=name)[:, 2, 3] for name in ("cubic", "linear"))
    assert np.allclose(cubic[2:20], (half**2 - 3 * half)[2:20], atol=1e-4)
    assert np.allclose((linear - (half**2 - 3 * half))[3:20:2], 0.25)


def test_cubic_overshoots_no_grey_level():
    data = np.zeros((12, 13, 14), np.float32)
    data[4:8, 5:9, 3:9] = 1000
    scan = Volume(data, np.diag([8.0, 8, 8, 1]))
    cubic, linear = (prepare(scan, grid="4mm", preparation=Preparation(interpolation=name)).data for name in ("cubic", "linear"))
    assert cubic.max() == linear.max() == 255 and not np.array_equal(cubic, linear)
    assert ((cubic == 0) | (cubic >= linear) | (linear > 0)).all()     # an overshoot below 0 would be a bright voxel in the dark


def test_a_preparation_that_is_not_known():
    for wrong, words in [({"intensity": "best"}, "intensity is 'best'; one of robust, n4, whitestripe, n4_whitestripe is wanted"),
                         ({"interpolation": "nearest"}, "interpolation is 'nearest'; one of linear, cubic is wanted"),
                         ({"scale": (3, 2, 1)}, "11 landmarks that grow")]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            Preparation(**wrong)


SCALE = tuple(range(20, 240, 20))


@pytest.mark.parametrize("preparation", [ROBUST, Preparation("n4", "cubic"), Preparation("whitestripe"), Preparation(scale=SCALE)])
def test_the_network_sees_a_new_scan_as_its_weights_say(tmp_path, preparation):
    """Through the checkpoint and back, one scan and the batch: what a network is fed is the prepared scan, z-scored."""
    path = tmp_path / "w.pt"
    about = {"name": "lod_brain", "protocol": "lod7", "grid": "8mm", "provenance": {}}
    weights.save(path, made(LODBrainConfig(widths=(2, 2, 4))), **about, preparation=preparation)
    found, fed = weights.load(path), []
    assert found.preparation == preparation
    found.network.register_forward_pre_hook(lambda _module, inputs: fed.append(inputs[0].clone()))
    save_volume(tmp_path / "sub-01_T1w.nii.gz", head().data * bias((60, 54, 56)), AFFINE)
    scan = load_image(tmp_path / "sub-01_T1w.nii.gz")
    classes_of(scan, weights=found)
    (outcome,) = segment([scan.path], out=tmp_path / "out", weights=found, engine="plain")
    said = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert outcome.dseg and torch.equal(fed[0], fed[1].cpu()) and Preparation(**said["preparation"]) == preparation
    data = prepare(scan, grid="8mm", preparation=preparation).data
    mean, deviation = moments(np.bincount(data.ravel(), minlength=256))
    assert torch.equal(fed[0][0, 0], torch.from_numpy(data).float().sub(mean).div(deviation))
    robust = prepare(scan, grid="8mm", preparation=ROBUST).data
    assert np.array_equal(data, robust) == (preparation == ROBUST)


@pytest.mark.parametrize("shape", [(0,), (2,), (1001,), (7, 9, 11)])
def test_a_histogram_counts_every_voxel_once(shape):
    grey = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
    for array in (grey, grey.T, grey[::-1]):
        assert np.array_equal(histogram_of(array), np.bincount(array.ravel(), minlength=256))
