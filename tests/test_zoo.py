"""The zoo of nasty inputs behaves as its manifest says; with the authors' weights (``full``), verdicts and Dice on real scans.

Reads the optional folder of real scans (fixture ``test_data``). The fast half uses a small random network on a coarse grid: it tests
reading, geometry and refusals, not segmentation.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_registry import protocol as protocols
from data_registry import shards
from data_registry.conform import conform, labels_to_grid, probabilities_to_native
from data_registry.params import Harmonise
from data_registry.shard_store import FolderStore
from data_registry.volume import Volume, axes_to_lia, load_image, load_labels
from lod_model import metrics
from lod_model import weights as weight_files
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig
from lod_model.postprocess import hard_classes, postprocess
from lod_model.predict import predict
from lod_model.segment import Outcome, segment
from pipelines.harmonise import make_shard

PASS_NOT = ("half_head.nii.gz", "noise.nii.gz")
# Dice of the raw argmax by the authors' weights, mean of classes 1–6: the table of the test data's README.
README_DICE = {
    "georgetown/sub-01": 0.920,
    "georgetown/sub-02": 0.920,
    "georgetown/sub-04": 0.929,
    "georgetown/sub-06": 0.925,
    "georgetown/sub-08": 0.915,
    "mneecog/sub-ecog": 0.918,
    "mrtrixbids/sub-01": 0.907,
    "brainload/sub-1": 0.933,
    "voxelmorph/sub-test": 0.900,
}


@pytest.fixture(scope="module")
def manifest(test_data) -> list[dict]:
    with open(test_data / "zoo" / "manifest.tsv", encoding="utf-8") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


@pytest.fixture(scope="module")
def outcomes(test_data, manifest, tmp_path_factory) -> dict[str, Outcome]:
    """All zoo files through one call with a small network at random."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("zoo")
    network = LODBrain(LODBrainConfig(widths=(2, 2, 4)))
    weight_files.save(folder / "tiny.pt", network, name="lod_brain", protocol="lod7", grid="8mm", provenance={})
    paths = [test_data / "zoo" / row["file"] for row in manifest]
    done = segment(paths, out=folder / "out", weights=folder / "tiny.pt", postprocess="none")
    assert [outcome.path.name for outcome in done] == [row["file"] for row in manifest]
    return {outcome.path.name: outcome for outcome in done}


def _sidecar(outcomes: dict[str, Outcome], name: str) -> dict:
    folder = next(outcome.dseg.parent for outcome in outcomes.values() if outcome.dseg)
    (found,) = [s for s in (json.loads(p.read_text()) for p in folder.glob("*_dseg.json")) if Path(s["input"]).name == name]
    return found


def _rows(manifest: list[dict], chosen: Callable[[str], bool]) -> list[str]:
    names = [row["file"] for row in manifest if chosen(row["expected"])]
    assert names, "the manifest has no such file"
    return names


def test_all_33_are_here(manifest):
    assert len(manifest) == 33


def test_what_is_to_be_handled_has_labels_on_its_own_grid(test_data, manifest, outcomes):
    for name in _rows(manifest, lambda expected: expected.startswith("handled")):
        outcome = outcomes[name]
        assert outcome.dseg, outcome.reasons
        scan, labels = load_image(test_data / "zoo" / name), load_labels(outcome.dseg)
        assert labels.data.shape == scan.data.shape and np.allclose(labels.affine, scan.affine, atol=1e-4), name
        assert labels.data.max() <= 6 and _sidecar(outcomes, name)["verdict"] == outcome.verdict


def test_what_is_to_be_refused_is_refused_in_one_line(manifest, outcomes):
    for name in _rows(manifest, lambda expected: expected == "refused"):
        outcome = outcomes[name]
        assert outcome.dseg is None and outcome.verdict == "fail", name
        (line,) = outcome.reasons
        assert line.startswith(f"{outcome.path}: ") and "\n" not in line and "Error:" not in line, line
        assert "wanted" in line, line
        sidecar = _sidecar(outcomes, name)
        assert (sidecar["verdict"], sidecar["reasons"]) == ("fail", [line])


def test_what_may_be_either_is_refused_or_carries_a_warning_and_does_not_pass(manifest, outcomes):
    for name in _rows(manifest, lambda expected: expected.startswith("refused or handled")):
        outcome = outcomes[name]
        assert outcome.verdict != "pass", name
        if outcome.dseg:
            warnings = _sidecar(outcomes, name)["warnings"]
            assert warnings and set(warnings) <= set(outcome.reasons), name


def _in_lia(labels: Volume) -> np.ndarray:
    source, flip = axes_to_lia(labels.affine)
    return labels.data.transpose(source)[tuple(slice(None, None, -1 if reverse else 1) for reverse in flip)]


def test_the_order_of_voxels_changes_no_label_in_world_space(manifest, outcomes):
    plain = load_labels(outcomes["plain.nii.gz"].dseg)
    assert len(np.unique(plain.data)) > 2, "the random network says too little to compare"
    for name in _rows(manifest, lambda expected: "same labels in world space" in expected):
        labels = load_labels(outcomes[name].dseg)
        ours, theirs = axes_to_lia(labels.affine), axes_to_lia(plain.affine)
        assert not np.array_equal(ours[0], theirs[0]) or not np.array_equal(ours[1], theirs[1]), f"{name} has plain's voxel order"
        assert np.allclose(_centre_mm(labels), _centre_mm(plain), atol=0.05), name
        assert (_in_lia(labels) == _in_lia(plain)).mean() > 0.999, name


def _centre_mm(labels: Volume) -> np.ndarray:
    return labels.affine[:3, :3] @ np.argwhere(labels.data == labels.data.max()).mean(axis=0) + labels.affine[:3, 3]


def test_every_input_has_outputs_of_its_own(outcomes):
    made = [outcome.dseg for outcome in outcomes.values() if outcome.dseg]
    assert len(set(made)) == len(made)
    assert len(list(made[0].parent.glob("*_dseg.json"))) == 33


def test_harmonise_meets_the_zoo_the_same_way(test_data, manifest, tmp_path):
    """One shard of all 33: what is refused is quarantined in one line, the rest stands in the shard, warnings beside it."""
    scans = [{"scan_id": row["file"], "database": "zoo", "site": "zoo", "t1w_path": row["file"], "labels": []} for row in manifest]
    item = {"shard": "grid=16mm/site=zoo.zoo/part-000.parquet", "recipe": "", "scans": scans}
    quarantined = make_shard(FolderStore(tmp_path), item, {"zoo": str(test_data / "zoo")}, Harmonise(grid="16mm"))
    samples = {row["scan_id"]: row for row in shards.read_metadata(tmp_path / item["shard"])["samples"]}
    assert quarantined == sum(row["status"] != "ok" for row in samples.values()) and len(samples) == 33
    for row in manifest:
        sample, expected = samples[row["file"]], row["expected"]
        if sample["status"] == "ok":
            assert expected != "refused", row
            assert not expected.startswith("refused or handled") or sample["warnings"], row
            t1w = shards.read_row(tmp_path / item["shard"], sample["row_group"], ["t1w_x1"])["t1w_x1"]
            assert t1w.std() > 1 and t1w.mean() == pytest.approx(sample["mean"])
        else:
            assert expected.startswith("refused"), sample
            assert sample["reason"].startswith(str(test_data / "zoo" / row["file"])) and "\n" not in sample["reason"]


# --- with the authors' weights ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(test_data) -> weight_files.Weights:
    return weight_files.load(test_data / "lod_brain_weights" / "weights_lv1.h5")


@pytest.mark.full
@pytest.mark.parametrize("name", ["half_head.nii.gz", "noise.nii.gz", "no_orientation.nii.gz", "sform_qform_disagree.nii.gz"])
def test_what_cannot_be_trusted_does_not_pass(test_data, published, tmp_path, name):
    (outcome,) = segment([test_data / "zoo" / name], out=tmp_path, weights=published)
    assert outcome.dseg and outcome.verdict != "pass"


@pytest.mark.full
def test_a_real_head_passes(test_data, published, tmp_path):
    (outcome,) = segment([test_data / "zoo" / "plain.nii.gz"], out=tmp_path, weights=published)
    assert (outcome.verdict, outcome.reasons) == ("pass", ())


def _dice_of_pair(test_data: Path, scan_name: str, published: weight_files.Weights) -> dict[str, float]:
    """Mean Dice of classes 1–6 by method. Compared on the grid for the scan whose labels lie on another grid, else on the scan's own."""
    database, subject = scan_name.split("/")
    root = test_data / "bids" / database
    scan = load_image(root / subject / "anat" / f"{subject}_T1w.nii.gz")
    (label_path,) = (root / "derivatives" / "freesurfer" / subject / "mri").glob("*aseg.mgz")
    labels, protocol = load_labels(label_path), protocols.load("lod7")
    conformed = conform(scan, grid=published.grid)
    on_scan = labels.data.shape == scan.data.shape and np.allclose(labels.affine, scan.affine, atol=1e-3)
    reference = protocol.classes_of(labels.data if on_scan else labels_to_grid(labels, conformed.placement))
    probabilities = predict(published.network, conformed.data)
    found = {}
    for method in ("none", "components"):  # in this order: post-processing works in place
        probabilities = postprocess(probabilities, method=method)
        found[method] = probabilities_to_native(probabilities, conformed.placement) if on_scan else hard_classes(probabilities)
    return {method: float(metrics.dice(reference, classes, 7).mean()) for method, classes in found.items()}


@pytest.mark.full
@pytest.mark.parametrize("scan_name", README_DICE)
def test_the_published_weights_reach_their_dice(test_data, published, scan_name):
    dice = _dice_of_pair(test_data, scan_name, published)
    print(f"{scan_name}: {dice}, README {README_DICE[scan_name]}")
    assert min(dice.values()) > README_DICE[scan_name] - 0.005, dice
