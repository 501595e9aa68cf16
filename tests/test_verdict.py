"""The verdict's rules, each on a small head made by hand."""

import numpy as np
import pytest

from data_registry import protocol as protocols
from data_registry.volume import Volume
from lod_model.verdict import contrast, cut_cm2, judge, volumes_ml

LOD7 = protocols.load("lod7")
VOXEL_ML = 1.0  # voxels of 10 mm
SLABS_ML = {"grey matter": 460, "basal ganglia": 45, "white matter": 440, "ventricles": 25, "cerebellum": 135, "brainstem": 25}
GREY = {"grey matter": 80.0, "white matter": 120.0}


def _head(changes: dict[str, int] | None = None, *, at: int = 1) -> tuple[np.ndarray, Volume]:
    """A 'brain' whose classes have the given volumes, in a field of view of 16³ voxels, and its T1w with WM brighter than GM."""
    ids = [index for name, ml in (SLABS_ML | (changes or {})).items() for index in [LOD7.class_names.index(name)] * ml]
    classes = np.zeros((16, 16, 16), dtype=np.uint8)
    box = classes[at : at + 12, 1:15, 1:15]
    box[np.unravel_index(np.arange(len(ids)), box.shape)] = ids
    data = np.zeros(classes.shape, dtype=np.float32)
    for name, value in GREY.items():
        data[classes == LOD7.class_names.index(name)] = value
    data += np.random.default_rng(0).normal(0, 10, classes.shape).astype(np.float32)
    return classes, Volume(data, np.diag([10.0, 10, 10, 1]))


def test_a_plausible_head_passes_without_reasons():
    classes, scan = _head()
    verdict = judge(classes, scan, LOD7)
    assert (verdict.verdict, verdict.reasons) == ("pass", ())
    assert volumes_ml(classes, scan, LOD7) == pytest.approx({name: float(ml) for name, ml in SLABS_ML.items()})


@pytest.mark.parametrize(
    ("changes", "verdict", "sentence"),
    [
        ({"brainstem": 0}, "fail", "no voxel of brainstem was found"),
        ({"grey matter": 200, "white matter": 210}, "fail", "the brain has 615 mL; 750 to 1900 mL"),
        ({"grey matter": 1100, "white matter": 700}, "fail", "the brain has 2005 mL"),
        ({"ventricles": 300}, "review", "ventricles has 300 mL; 2 to 250 mL"),
        ({"cerebellum": 40}, "review", "cerebellum has 40 mL; 60 to 302 mL"),
    ],
)
def test_volumes_out_of_human_range(changes, verdict, sentence):
    found = judge(*_head(changes), LOD7)
    assert found.verdict == verdict
    assert any(sentence in reason for reason in found.reasons), found.reasons


def test_nothing_found_fails():
    classes, scan = _head()
    found = judge(np.zeros_like(classes), scan, LOD7)
    assert found.verdict == "fail"
    assert "no voxel of grey matter, basal ganglia, white matter" in found.reasons[0]


def test_contrast_by_hand_and_its_rule():
    classes = np.array([[[1, 1, 3, 3]]], dtype=np.uint8)
    scan = Volume(np.array([[[70, 90, 110, 130]]], dtype=np.float32), np.eye(4))
    assert contrast(classes, scan, LOD7) == pytest.approx(4.0)  # (120 − 80) / 10
    classes, scan = _head()
    upside_down = Volume(200 - scan.data, scan.affine)
    found = judge(classes, upside_down, LOD7)
    assert found.verdict == "review" and "another contrast" in found.reasons[0]


def test_a_brain_at_the_edge_of_the_field_of_view():
    classes, scan = _head(at=0)
    areas = {face: area for face, area in cut_cm2(classes, scan).items() if area}
    assert areas == {"left": 196.0}  # 14 × 14 voxels of 1 cm²
    found = judge(classes, scan, LOD7)
    assert found.verdict == "fail" and "the left face of the field of view cuts 196 cm²" in found.reasons[0]


def test_a_small_cut_asks_for_a_review():
    classes, scan = _head()
    classes[0, 1, 1:4] = 1
    found = judge(classes, scan, LOD7)
    assert found.verdict == "review" and "the left face of the field of view cuts 3 cm² of brain; at most 2 cm²" in found.reasons[0]


def test_a_face_is_named_by_the_patient_not_by_the_array():
    classes, scan = _head(at=0)
    mirrored = Volume(scan.data, np.diag([-10.0, 10, 10, 1]))
    assert {face for face, area in cut_cm2(classes, mirrored).items() if area} == {"right"}


def test_anisotropic_voxels_have_faces_of_their_own_area():
    classes = np.ones((2, 3, 4), dtype=np.uint8)
    scan = Volume(np.zeros(classes.shape, dtype=np.float32), np.diag([1.0, 2, 5, 1]))
    areas = cut_cm2(classes, scan)  # (2 × 3 × 4 voxels of 1 × 2 × 5 mm: faces of 6 × 20, 2 × 20 and 2 × 6 mm)
    assert [areas[face] for face in ("left", "posterior", "inferior")] == pytest.approx([1.2, 0.4, 0.12])


def test_a_warning_asks_for_a_review():
    found = judge(*_head(), LOD7, warnings=("left and right are not certain",))
    assert (found.verdict, found.reasons) == ("review", ("left and right are not certain",))


@pytest.mark.parametrize(("name", "missing", "verdict"), [("fastsurfer95", 9, "review"), ("fastsurfer95", 10, "fail"), ("fsl_first", 1, "review"),
                                                          ("fsl_fast", 1, "fail"), ("malp_em", 0, "pass")])  # fmt: skip
def test_few_missing_classes_of_many_ask_for_a_look(name, missing, verdict):
    table = protocols.load(name)
    classes = np.zeros((8, 8, 8), np.uint8)
    classes[1:-1, 1:-1, 1:-1] = np.resize(np.arange(1, table.classes - missing), 216).reshape(6, 6, 6)
    found = judge(classes, Volume(classes.astype(np.float32), np.eye(4)), table)
    assert found.verdict == verdict and len(found.reasons) == bool(missing)
    assert all(reason.startswith(f"no voxel of {', '.join(table.class_names[-missing:])} was found") for reason in found.reasons)
