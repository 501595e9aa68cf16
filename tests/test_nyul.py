"""Nyúl's standard scale: landmarks by hand, tables that commute with pooling, and the proof that nothing fitted has seen what is held out."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_heads import CHECKOUT, add_subject, run

from data_registry import nyul
from data_registry.errors import InputError
from data_registry.intensity import Preparation, moments, prepare
from data_registry.params import fingerprint, load_params
from data_registry.schema import read_table, table_metadata
from data_registry.shards import pooled
from data_registry.volume import load_image
from lod_model import evaluate, weights
from lod_model.data import SampleDataset, all_folds, preparation
from lod_model.runs import fold_folder
from lod_model.segment import classes_of
from lod_model.train import train

PARAMS = """
index: {roots: [roots]}
harmonise: {grid: 16mm, shards_per_site: 2, intensity: n4, interpolation: cubic}
split: {folds: 3}
train:
  standardise: nyul
  coarse: {epochs: 1, learning_rate: 0.01}
  fine: {epochs: 1, learning_rate: 0.01}
  augmentation: none
  network: {widths: [2, 4, 8]}
"""
STAGES = ("index", "harmonise", "split")


def histogram(**levels: int) -> np.ndarray:
    counts = np.zeros(256, dtype=np.int64)
    for level, number in levels.items():
        counts[int(level[1:])] = number
    return counts


# By hand


def test_landmarks_by_hand():
    """Mean (50·10 + 30·100 + 20·200) / 1100 = 6.8: air at 0 stays out, 10 does not; 100 foreground voxels, so a voxel is a percentile."""
    found = dict(zip(nyul.PERCENTILES, nyul.landmarks(histogram(_0=1000, _10=50, _100=30, _200=20)), strict=True))
    assert found[10] == pytest.approx(9.5 + 10 / 50) and found[60] == pytest.approx(99.5 + 10 / 30) and found[99] == pytest.approx(199.5 + 19 / 20)


def test_air_does_not_move_the_landmarks():
    """Twice the air, and padding as much again: the same landmarks, as long as the mean lies between air and tissue."""
    tissue = histogram(_60=50, _100=300, _200=200)
    some, more = (tissue + histogram(_0=padding, _3=air) for padding, air in ((1000, 2000), (3000, 4000)))
    assert np.array_equal(nyul.landmarks(some), nyul.landmarks(more))


def test_the_scale_is_a_mean_of_landmarks_stretched_to_common_ends():
    one, other = histogram(_0=900, _100=50, _200=50), histogram(_0=900, _50=50, _90=50)
    a, b = nyul.landmarks(one), nyul.landmarks(other)
    first, last = (a[0] + b[0]) / 2, (a[-1] + b[-1]) / 2
    stretched = [first + (own - own[0]) / (own[-1] - own[0]) * (last - first) for own in (a, b)]
    assert nyul.fit([one, other]) == pytest.approx(((stretched[0] + stretched[1]) / 2).tolist())
    assert nyul.fit([one]) == pytest.approx(a.tolist())
    with pytest.raises(InputError, match="no scan to fit"):
        nyul.fit([])


def random_histograms(number: int) -> list[np.ndarray]:
    """Air, grey and white matter, each scan at a contrast of its own."""
    generator, found = np.random.default_rng(5), []
    for i in range(number):
        tissues = [generator.normal(*of) for of in ((4, 2, 40_000), (60 + 6 * i, 9, 9_000), (110 + 9 * i, 8 + i, 8_000))]
        found.append(np.bincount(np.clip(np.concatenate(tissues), 0, 255).astype(int), minlength=256))
    return found


def test_a_table_never_decreases_keeps_zero_and_brings_the_landmarks_together():
    histograms = random_histograms(6)
    scale = nyul.fit(histograms)
    for own in histograms:
        table = nyul.table_for(own, scale)
        assert table.dtype == np.uint8 and table.shape == (256,) and table[0] == 0 and (np.diff(table.astype(int)) >= 0).all()
        moved = nyul.landmarks(nyul.mapped(own, table))
        assert np.abs(moved - scale).max() < 2.5 and np.abs(nyul.landmarks(own) - scale).max() > 2.5


def test_pooling_before_and_after_a_table_is_the_same():
    data = np.random.default_rng(0).integers(0, 256, (8, 12, 16), dtype=np.uint8)
    table = nyul.table_for(random_histograms(2)[0], nyul.fit(random_histograms(4)))
    for factor in (2, 4):
        assert np.array_equal(pooled(table[data], factor), table[pooled(data, factor)])


def test_moments_of_the_mapped_histogram_are_those_of_the_mapped_voxels():
    data = np.random.default_rng(0).integers(0, 200, (8, 12, 16), dtype=np.uint8)
    own, table = np.bincount(data.ravel(), minlength=256), nyul.table_for(random_histograms(2)[0], nyul.fit(random_histograms(4)))
    assert np.array_equal(nyul.mapped(own, table), np.bincount(table[data].ravel(), minlength=256))
    mapped = table[data].astype(np.float64)
    assert moments(nyul.mapped(own, table)) == pytest.approx((mapped.mean(), mapped.std()), rel=1e-12)


@pytest.mark.parametrize("wrong", [None, 3, "abc", (1, 2), tuple(range(11)), tuple(range(250, 261)), (*range(1, 11), float("nan"))])
def test_what_is_no_scale_is_refused(wrong):
    with pytest.raises(InputError, match="11 landmarks that grow from above 0 to below 256 are wanted"):
        nyul.checked(wrong)


def test_a_histogram_without_contrast_is_refused():
    with pytest.raises(InputError, match="no contrast, every voxel is 9"):
        nyul.landmarks(histogram(_9=100))


# On a project


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Three places of four people, bias taken off by N4, each place at a contrast of its own; harmonised and split."""
    folder = tmp_path_factory.mktemp("nyul")
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "pipelines").symlink_to(CHECKOUT / "pipelines")
    for number, name in enumerate(("alpha", "beta", "gamma")):
        for subject in range(4):
            add_subject(folder / "roots" / name, f"{subject:02d}", seed=10 * number + subject)
    made(folder)
    return folder


def made(folder: Path) -> None:
    for stage in STAGES:
        done = run(folder, f"pipelines.{stage}")
        assert done.returncode == 0, done.stderr


@pytest.fixture
def inside(project, monkeypatch) -> Path:
    monkeypatch.chdir(project)
    return project


def fitted(roles) -> Preparation:
    return preparation(roles, standardise="nyul")


def test_a_fold_is_fitted_on_the_role_train_alone(inside):
    """Every histogram of every other role replaced: bit for bit the same scale. One training scan's replaced: another."""
    other = random_histograms(1)[0]
    for roles in all_folds().values():
        scale = fitted(roles).scale
        assert {"train", "val", "internal_test", "external_test"} <= set(roles)
        unseen = {role: [scan if role == "train" else replace(scan, histogram=other) for scan in scans] for role, scans in roles.items()}
        assert fitted(unseen).scale == scale and fitted({"train": roles["train"]}).scale == scale
        for index, scan in enumerate(roles["train"]):
            changed = [*roles["train"]]
            changed[index] = replace(scan, histogram=other)
            assert fitted(roles | {"train": changed}).scale != scale


def test_no_voxel_of_a_held_out_place_reaches_what_is_trained(project, tmp_path, monkeypatch):
    """Every scan of the held-out place acquired anew, all stages again: scale and weights of its fold bit for bit, but not the other folds'."""
    shutil.copytree(project, tmp_path / "p", symlinks=True)
    monkeypatch.chdir(tmp_path / "p")
    before = all_folds()
    fold = next(k for k, roles in before.items() if roles["external_test"][0].place == "gamma")
    train("lod_brain", load_params(), {fold: before[fold]})
    first = weights.load(fold_folder("lod_brain-base-0", fold) / "weights.pt")
    for subject in range(4):
        add_subject(Path("roots/gamma"), f"{subject:02d}", seed=500 + subject)
    made(Path.cwd())
    after = all_folds()
    names = [{role: [scan.scan_id for scan in scans] for role, scans in folds[fold].items()} for folds in (before, after)]
    assert names[0] == names[1]
    histograms = [{scan.scan_id: scan.histogram.tolist() for scan in folds[fold]["external_test"]} for folds in (before, after)]
    assert len(histograms[0]) == 4 and all(histograms[0][name] != histograms[1][name] for name in histograms[0])
    train("lod_brain", load_params(), {fold: after[fold]})
    again = weights.load(fold_folder("lod_brain-base-0", fold) / "weights.pt")
    assert again.provenance["fingerprint"] != first.provenance["fingerprint"]     # it was trained again, on other data
    assert again.preparation.scale == first.preparation.scale and again.hash == first.hash
    for other in set(before) - {fold}:
        assert fitted(after[other]).scale != fitted(before[other]).scale


def test_the_scale_of_val_and_internal_test_people_is_not_asked_for(project, tmp_path, monkeypatch):
    """Through the whole of a fold's training, histograms of unseen people are read by nobody."""
    for name in ("tables", "shards", "params.yaml"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    roles, seen, landmarks = all_folds()[0], [], nyul.landmarks
    monkeypatch.setattr("data_registry.nyul.landmarks", lambda own: seen.append(id(own)) or landmarks(own))
    fit = nyul.fit
    monkeypatch.setattr("data_registry.nyul.fit", lambda own: (fit(own), seen.append("fitted"))[0])
    train("lod_brain", load_params(), {0: roles})
    names = {id(scan.histogram): role for role, scans in roles.items() for scan in scans}
    end = seen.index("fitted")
    assert [names[one] for one in seen[:end]] == ["train"] * len(roles["train"])
    assert {names[one] for one in seen[end + 1 :]} == {"train", "val"}            # their own tables, onto the scale that stands


def test_one_image_in_training_evaluation_and_segmentation(inside, monkeypatch):
    """n4, cubic, nyul: what training is fed from a shard, what evaluation is, and what `segment` makes of the original file are one."""
    params, folds = load_params(), all_folds()
    train("lod_brain", params, folds)
    found = weights.load(fold_folder("lod_brain-base-0", 0) / "weights.pt")
    assert found.preparation == Preparation("n4", "cubic", nyul.fit([scan.histogram for scan in folds[0]["train"]]))
    scan = folds[0]["train"][0]
    image = SampleDataset([scan.standardised(found.preparation.scale)], level="fine", protocol="lod7")[0, 0]["image"]
    small = SampleDataset([scan.standardised(found.preparation.scale)], level="coarse", protocol="lod7")[0, 0]["image"]
    assert torch.equal(torch.nn.functional.max_pool3d(image, 4), small)
    fed = []
    found.network.register_forward_pre_hook(lambda _module, inputs: fed.append(inputs[0][0].clone()))
    subject = scan.scan_id.split("-")[1]
    original = load_image(inside / f"roots/{scan.site}/sub-{subject}/anat/sub-{subject}_T1w.nii.gz")
    classes_of(original, weights=found)
    monkeypatch.setattr(evaluate, "with_engine", lambda network, _: (network, {}))  # the rewritten network is fed the same, past the hook
    evaluate._network_contender(found, "", None, 0, params).predict(scan)
    assert torch.equal(fed[0], fed[1]) and torch.allclose(fed[0], image, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.chdir(inside)
    plain = prepare(original, grid="16mm", preparation=replace(found.preparation, scale=None)).data
    assert np.array_equal(plain, scan.t1w()) and not np.array_equal(plain, scan.standardised(found.preparation.scale).t1w())
    evaluate.main()
    rows = read_table("tables/results.parquet", "results").to_pandas()
    assert set(rows[rows.network == "lod_brain"].fold) == set(folds)


def test_reference_weights_of_another_preparation_are_refused(inside, tmp_path):
    params, folds = load_params(), all_folds()
    train("lod_brain", params, folds)
    found = weights.load(fold_folder("lod_brain-base-0", 0) / "weights.pt")
    about = {"name": "lod_brain", "protocol": "lod7", "grid": "16mm", "provenance": {}}
    for preparation_, refused in ((Preparation(), True), (Preparation("n4", "cubic"), False)):
        weights.save(tmp_path / "r.pt", found.network, **about, preparation=preparation_)
        wanted = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"reference_weights": (str(tmp_path / "r.pt"),)})})
        if refused:
            with pytest.raises(InputError, match="r.pt: weights for intensity robust and linear .*; this project's shards are n4 and cubic"):
                list(evaluate._contenders(wanted, 0, folds[0]))
        else:
            assert [c.run for c in evaluate._contenders(wanted, 0, folds[0])][-1] == "reference-r"


def test_a_setting_at_its_first_value_is_in_no_fingerprint(inside):
    params = load_params()
    none = params.train.model_copy(update={"standardise": "none"})
    assert "standardise" not in none.model_dump(mode="json") and fingerprint(params.train) != fingerprint(none)
    note = json.loads(table_metadata("tables/samples.parquet")["preparation"])
    assert Preparation(**note) == preparation(all_folds()[0], standardise="none") == Preparation("n4", "cubic")
    assert note == asdict(Preparation("n4", "cubic"))
