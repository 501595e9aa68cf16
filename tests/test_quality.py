"""Image-quality figures by independent arithmetic, and rules one by one."""

import nibabel
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from data_registry import quality, quality_head, quality_labels, quality_rules
from data_registry.intensity import Preparation, above_air
from data_registry.volume import load_image
from pipelines import quality as stage
from pipelines.quality_page import thumbnail

LIA = np.array([[-2.0, 0, 0, 0], [0, 0, 2, 0], [0, -2, 0, 0], [0, 0, 0, 1]])      # 2 mm: every voxel is on the lattice
SIDE_VOXELS = 64
GM, WM = (3, 42), (2, 41)                                                          # FreeSurfer's, left and right


def head(*, noise: float = 0.0, white: int = 200, grey: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A ball of scalp, grey and white matter off the centre, larger on its left, the tissues with noise of 6; T1w and ids (D, H, W)."""
    generator = np.random.default_rng(seed)
    left, inferior, anterior = np.indices((SIDE_VOXELS,) * 3)
    radius = np.sqrt((left - 30) ** 2 + (inferior - 30.0) ** 2 + (anterior - 33.0) ** 2)
    t1w, ids = np.zeros(radius.shape), np.zeros(radius.shape, np.uint16)
    t1w[radius < 22] = 80
    for outer, value, pair in ((18, grey, GM), (13, white, WM)):
        shell = radius < outer
        t1w[shell] = value
        ids[shell] = np.where(left > 29, *pair)[shell]                            # axis 0 grows to the left
    t1w[radius < 22] += generator.normal(0, 6, t1w.shape)[radius < 22]
    if noise:
        t1w = np.hypot(t1w + generator.normal(0, noise, t1w.shape), generator.normal(0, noise, t1w.shape))
    return np.clip(np.rint(t1w), 0, 255).astype(np.uint8), ids


def measured(t1w, ids, **more) -> dict:
    return quality.measure(t1w, ids, affine=LIA, native_affine=LIA, native_shape=t1w.shape, **more)


def by_hand(t1w: np.ndarray, ids: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
    """Intensities of voxels whose neighbours are of the same tissue, by a loop."""
    tissue = np.isin(ids, pair)
    steps = [tuple(sign * (axis == a) for a in range(3)) for axis in range(3) for sign in (1, -1)]
    return np.array([t1w[tuple(at)] for at in np.argwhere(tissue) if all(tissue[tuple(at + step)] for step in np.array(steps))], dtype=float)


def test_tissue_figures_by_independent_arithmetic(monkeypatch):
    monkeypatch.setattr(quality_labels, "CUBE_MM", 1000.0)                          # one cube: then they are MRIQC's
    t1w, ids = head(noise=4)
    figures, gm, wm = measured(t1w, ids), by_hand(t1w, ids, GM), by_hand(t1w, ids, WM)
    mriqc_snr = [np.median(x) / (x.std() * np.sqrt(x.size / (x.size - 1))) for x in (gm, wm)]
    assert [figures["snr_gm"], figures["snr_wm"]] == pytest.approx(mriqc_snr)
    air_sd = figures["noise"] * np.sqrt(2 - np.pi / 2)
    assert figures["cnr"] == pytest.approx((np.median(wm) - np.median(gm)) / np.sqrt(air_sd**2 + gm.var(ddof=1) + wm.var(ddof=1)))
    assert figures["cjv"] == pytest.approx((gm.std(ddof=1) + wm.std(ddof=1)) / (np.median(wm) - np.median(gm)))
    assert figures["wm2max"] == pytest.approx(np.median(wm) / np.sort(t1w.ravel())[int(np.ceil(0.9995 * t1w.size)) - 1])


def test_a_bias_field_is_unevenness_and_no_noise():
    t1w, ids = head()
    ramp = np.linspace(0.7, 1.3, SIDE_VOXELS)[:, None, None]
    even, biased = measured(t1w, ids), measured(np.clip(t1w * ramp, 0, 255).astype(np.uint8), ids)
    assert biased["unevenness"] > 3 * even["unevenness"] and biased["snr_wm"] > 0.5 * even["snr_wm"]
    whole = by_hand((t1w * ramp).astype(int), ids, WM)
    assert biased["snr_wm"] > 1.3 * np.median(whole) / whole.std()                  # what one deviation over all of it would say


def test_entropy_focus_criterion_voxel_by_voxel():
    values = np.random.default_rng(1).integers(0, 200, 500)
    energy = np.sqrt(float((values**2).sum()))
    entropy = sum(x / energy * np.log((x + 1e-16) / energy) for x in values)
    largest = len(values) / np.sqrt(len(values)) * np.log(1 / np.sqrt(len(values)))
    assert quality.efc(np.bincount(values, minlength=256)) == pytest.approx(entropy / largest)
    assert quality.efc(np.bincount([0] * 9, minlength=256)) is None


def test_holes_are_filled_as_by_scipy():
    generator = np.random.default_rng(2)
    for shape in ((9, 8, 7), (12, 11)):
        mask = generator.random(shape) < 0.6
        assert np.array_equal(quality_head.filled(mask), ndimage.binary_fill_holes(mask)) and (quality_head.filled(mask) != mask).any()


@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_noise_of_the_air_is_that_of_a_channel(noise):
    t1w, ids = head(noise=noise)
    figures = measured(t1w, None)
    assert figures["noise"] == pytest.approx(noise, rel=0.05) and figures["air_reason"] is None
    bright = t1w[np.linalg.norm(np.indices(t1w.shape).T - (33, 30, 30), axis=-1).T < 21]
    assert figures["snrd"] == pytest.approx(np.median(bright) / noise, rel=0.1)
    air = noise * np.sqrt(2 * np.log(2))                                            # median of Rayleigh's distribution; in whole grey levels
    assert figures["fber"] == pytest.approx((np.median(bright) / air) ** 2, rel=0.3)
    assert figures["ghost_share"] < 0.01
    ghost = np.maximum(t1w, np.roll(t1w, 31, axis=2) // 6)
    assert measured(ghost, None)["ghost_share"] > 0.02 or noise > 2                 # the strong noise hides it


def test_no_air_is_told_and_not_measured():
    t1w, ids = head(noise=4)
    radius = np.linalg.norm(np.indices(t1w.shape).T - (33, 30, 30), axis=-1).T
    stripped = np.where(radius < 22, t1w, 0)
    blanked = t1w.copy()
    blanked[:, :, 45:] = 0                                                          # a defaced part costs only itself
    for scan, more, words in ((stripped, {}, "with signal lie outside"), (t1w, {"untouched": False}, "intensity"), (t1w // 6, {}, "quieter")):
        figures = measured(scan, ids, **more)
        assert words in figures["air_reason"] and figures["noise"] is None and figures["snrd"] is None and figures["fber"] is None
        assert figures["snr_wm"] > 5
    assert measured(blanked, ids)["noise"] == pytest.approx(4, rel=0.06)


def test_air_with_a_grey_level_of_its_own_is_no_head():
    """WhiteStripe's window: air at 90. Else a good scan would be called noise, and signal to noise have the 90 in it."""
    t1w, ids = head(noise=4)
    striped = np.rint(90 + 0.5 * t1w).astype(np.uint8)
    figures, wrong, robust = (measured(scan, ids) for scan in (above_air(striped, Preparation("whitestripe")), striped, t1w))
    assert quality_rules.judge(wrong)[0] == "fail" and not any("no head" in reason for reason in quality_rules.judge(figures)[1])
    assert figures["snr_wm"] == pytest.approx(robust["snr_wm"], rel=0.03) and figures["cnr"] == pytest.approx(robust["cnr"], rel=0.03)


def test_volumes_sides_and_place_of_the_labels():
    t1w, ids = head()
    figures = measured(t1w, ids)
    volumes = {item["class_name"]: item["ml"] for item in figures["volumes_ml"]}
    assert volumes["white matter"] == pytest.approx(np.isin(ids, WM).sum() * 0.008) and volumes["ventricles"] == 0
    left, right = np.isin(ids, [2, 3]), np.isin(ids, [41, 42])
    assert figures["asymmetry"] == pytest.approx(2 * (left.sum() - right.sum()) / (left.sum() + right.sum())) and figures["asymmetry"] > 0
    assert figures["left_mm"] == pytest.approx(2 * (np.argwhere(left)[:, 0].mean() - np.argwhere(right)[:, 0].mean())) and figures["left_mm"] > 0
    assert measured(t1w, ids[::-1])["left_mm"] < 0
    assert figures["labels_outside"] == 0 and measured(t1w, np.roll(ids, 20, axis=1))["labels_outside"] > 0.2


@pytest.mark.parametrize(("classes", "gm", "wm"), [("fsl_fast", 2, 3), ("spm_tissue", 2, 3), ("malp_em_tissue", 4, 3)])
def test_tissues_of_other_tools_give_contrast_and_no_volumes(classes, gm, wm):
    t1w, ids = head(noise=4)
    tissues = np.select([np.isin(ids, GM), np.isin(ids, WM)], [gm, wm]).astype(np.uint16)
    figures, others = measured(t1w, ids), measured(t1w, tissues, classes=classes)
    lacking = {"volumes_ml", "asymmetry", "left_mm"}
    assert others == {name: value for name, value in figures.items() if name not in lacking} and others["cnr"] > 1
    assert thumbnail(t1w, tissues, classes=classes) == thumbnail(t1w, ids)
    assert stage._labels_of({"label_sources": ["x", classes]}) == (classes, classes)
    assert stage._labels_of({"label_sources": [classes, "aseg"]}) == ("lod7", "aseg") and stage._labels_of({"label_sources": ["x"]}) == ("lod7", None)


def test_the_field_of_view_and_not_the_grid_cuts():
    t1w, ids = head()
    native = LIA.copy()
    native[:3, 3] = LIA[:3, :3] @ (0, 29, 0)                                        # the scan begins 29 voxels down
    cut, labels = t1w.copy(), ids.copy()
    cut[:, :29] = labels[:, :29] = 0
    figures = quality.measure(cut, labels, affine=LIA, native_affine=native, native_shape=(64, 35, 64))
    areas = dict(zip(quality_head.FACES, figures["brain_cut_cm2"], strict=True))
    assert areas.pop("superior") == pytest.approx(np.count_nonzero(ids[:, 30]) * 0.04) and not any(areas.values())
    assert dict(zip(quality_head.FACES, figures["head_cut_cm2"], strict=True))["superior"] > areas["left"]
    assert not any(measured(t1w, ids)["brain_cut_cm2"])


def test_figures_hardly_depend_on_the_grid():
    t1w, ids = head(noise=4)
    fine = [np.repeat(np.repeat(np.repeat(x, 2, 0), 2, 1), 2, 2) for x in (t1w, ids)]
    affine = LIA @ np.diag([0.5, 0.5, 0.5, 1])
    again = quality.measure(*fine, affine=affine, native_affine=affine, native_shape=(128,) * 3)
    before = measured(t1w, ids)
    assert again.pop("volumes_ml") == before.pop("volumes_ml") and (again.pop("own_voxel_mm"), before.pop("own_voxel_mm")) == (1, 2)
    for name, value in before.items():
        assert again[name] == (pytest.approx(value) if value is not None else None), name
    tiny = quality.measure(t1w[:3, :3, :3], ids[:3, :3, :3], affine=LIA, native_affine=LIA, native_shape=(3, 3, 3))
    assert "snr_wm" not in tiny                                                     # no label: nothing, and no error


ADULT = {"grey matter": 511, "basal ganglia": 47, "white matter": 466, "ventricles": 8, "cerebellum": 151, "brainstem": 24}


ELDER = {"grey matter": 422, "basal ganglia": 44, "white matter": 409, "ventricles": 56, "cerebellum": 121, "brainstem": 25}


YEARLING = {"grey matter": 550, "basal ganglia": 30, "white matter": 165, "ventricles": 10, "cerebellum": 70, "brainstem": 12}


def volumes(ml: dict, **other) -> dict:
    return {"volumes_ml": [{"class_name": name, "ml": value} for name, value in (ml | other).items()]}


@pytest.mark.parametrize(
    ("figures", "age", "verdict", "words"),
    [
        ({}, None, "pass", ""),
        ({"cnr": 3.9, "snr_wm": 18, "cjv": 0.33, "labels_outside": 0.0, "asymmetry": -0.02, "left_mm": 50}, 30, "pass", ""),
        ({"cnr": -0.1}, None, "fail", "white matter is darker"),
        ({"cnr": 0.9}, None, "review", "contrast to noise between grey and white matter is 0.90; at least 1"),
        ({"cnr": -2.0}, 0.5, "pass", ""),                                             # before the myelin
        ({"own_voxel_mm": 7.0}, None, "review", "voxels are 7 mm long"),
        ({"snr_wm": 11.9}, None, "review", "11.9; at least 12"),
        ({"labels_outside": 0.1}, None, "review", "10% of the labelled voxels"),
        ({"labels_outside": 0.3}, None, "fail", "30% of the labelled voxels"),
        ({"brain_cut_cm2": [0, 3, 0, 0, 0, 0]}, None, "review", "left face of the field of view cuts 3"),
        ({"brain_cut_cm2": [0, 0, 60, 0, 0, 0]}, None, "fail", "superior face"),
        ({"head_cut_cm2": [0, 0, 5, 300, 0, 0]}, None, "pass", ""),                 # the neck
        ({"head_cut_cm2": [0, 0, 30, 90, 0, 0]}, None, "review", "30 cm² of the head lie on the superior face"),
        ({"head_cut_cm2": [397, 0, 0, 40, 0, 0]}, None, "fail", "397 cm²"),
        ({"head_cut_cm2": [550, 540, 400, 390, 390, 390]}, None, "fail", "no head stands out"),
        ({"asymmetry": -0.2}, None, "review", "the right side's labels are 20% larger"),
        ({"asymmetry": 0.104}, None, "review", "the left side's labels are 10.4% larger than the other's; at most 10% is expected"),
        ({"left_mm": -50.0}, None, "fail", "50 mm to the right"),
        (volumes(ADULT), 30, "pass", ""),
        (volumes(ADULT), None, "pass", ""),
        (volumes(ELDER), 80, "pass", ""),
        (volumes({name: 0.6 * ml for name, ml in ADULT.items()}), 1.5, "pass", ""),   # a child of one is small, and not suspicious
        (volumes({name: 0.6 * ml for name, ml in ADULT.items()}), 30, "fail", "719 mL; 750 to 1900 mL are expected at 30 years"),
        (volumes({name: 0.6 * ml for name, ml in ADULT.items()}), None, "review", "age unknown"),
        (volumes(YEARLING), 1, "pass", ""),
        (volumes(ADULT, ventricles=200), 80, "pass", ""),
        (volumes(ADULT, ventricles=200), 10, "review", "the ventricles have 200 mL; 1 to 100 mL are expected of 10 years"),
        (volumes(ADULT, cerebellum=0), 30, "review", "cerebellum is 0% of the labelled brain; 5% to 20% are expected"),
    ],
)  # fmt: skip
def test_each_rule(figures, age, verdict, words):
    came, reasons = quality_rules.judge(figures, age_years=age)
    assert came == verdict and len(reasons) == (verdict != "pass") and words in "".join(reasons)


def test_what_was_read_by_an_assumption_asks_for_a_review(tmp_path):
    """The warnings of reading itself; one of a voxel is of no account to the others."""
    t1w = head()[0].astype(np.float32)
    t1w[30, 30, 30] = np.nan
    image = nibabel.Nifti1Image(t1w, LIA)
    image.set_sform(LIA, 0)
    image.set_qform(LIA, 0)
    nibabel.save(image, tmp_path / "unsure.nii.gz")
    warnings = load_image(tmp_path / "unsure.nii.gz").warnings
    verdict, reasons = quality_rules.judge({}, warnings=("aseg: labels of 2 mm voxels on a grid of 1 mm, no truth at its resolution", *warnings))
    assert verdict == "review" and len(reasons) == 2
    assert "the first axis is assumed to run to the left" in reasons[0] and reasons[1].startswith("1 NaN")


def test_a_scan_unlike_its_site_asks_for_a_review_and_never_fails():
    site = [{"snr_wm": 18 + 0.1 * k, "cjv": 0.3, "efc": 0.5} for k in range(10)]
    site[4] = {"snr_wm": 14.0, "cjv": 0.3, "efc": 0.9}
    beside = quality_rules.beside_site(site)
    verdicts = [quality_rules.judge(one, beside=far) for one, far in zip(site, beside, strict=True)]
    assert [verdict for verdict, _ in verdicts] == ["pass"] * 4 + ["review"] + ["pass"] * 5
    assert "signal to noise of white matter is 14, 4.8 deviations worse than the site's median" in verdicts[4][1][0]
    assert quality_rules.beside_site(site[:7]) == [{}] * 7                          # too few to say
    site[4]["snr_wm"] = 40.0                                                        # better than the others is no reason
    assert quality_rules.judge(site[4], beside=quality_rules.beside_site(site)[4])[0] == "pass"


def test_the_bounds_against_three_raters(test_data):
    """What the rules say of themselves, on MRIQC's figures of ABIDE I; and that MRIQC's are the definitions we took."""
    d = pd.read_csv(test_data / "meta/mriqc_abide.tsv", sep="\t", na_values=["n/a"])
    bad = d[["rater_1", "rater_2", "rater_3"]].median(axis=1) < 0
    assert (len(d), bad.sum()) == (1101, 174)
    gm, wm = (d[[f"summary_{t}_{s}" for s in ("median", "stdv", "n")]].set_axis(["median", "stdv", "n"], axis=1) for t in ("gm", "wm"))
    assert np.allclose(d.snr_wm, wm["median"] / (wm.stdv * np.sqrt(wm.n / (wm.n - 1))), rtol=1e-3)
    assert np.allclose(d.cnr, (wm["median"] - gm["median"]).abs() / np.sqrt(d.summary_bg_stdv**2 + gm.stdv**2 + wm.stdv**2), rtol=0.02)
    low = d.snr_wm < quality_rules.MIN_SNR_WM
    assert (round(low[bad].mean(), 2), round(low[~bad].mean(), 3)) == (0.33, 0.004)
    worse = {"snr_wm": -1, "cjv": 1, "cnr": -1, "snrd_total": -1, "fber": -1, "efc": 1}
    areas = {name: roc_area(sign * d[name], bad) for name, sign in worse.items()}
    assert {name: round(area, 2) for name, area in areas.items()} == {
        "snr_wm": 0.88, "cjv": 0.74, "cnr": 0.74, "snrd_total": 0.68, "fber": 0.59, "efc": 0.56}  # fmt: skip
    within = []
    for _, site in d.groupby("site"):
        if 3 <= bad[site.index].sum() <= len(site) - 3:
            within.append([roc_area(sign * site[name], bad[site.index]) for name, sign in (("snr_wm", -1), ("cjv", 1), ("cnr", -1), ("efc", 1))])
    assert len(within) == 12 and np.round(np.mean(within, axis=0), 2).tolist() == [0.85, 0.82, 0.79, 0.49]
    far = pd.Series(0.0, index=d.index)
    for _, site in d.groupby("site"):
        beside = quality_rules.beside_site(site[["snr_wm", "cjv"]].to_dict("records"))
        far[site.index] = [max(one.values()) for one in beside]
    flagged = far > quality_rules.SITE_DEVIATIONS
    assert (round(flagged[bad].mean(), 2), round(flagged[~bad].mean(), 3)) == (0.09, 0.014)


def roc_area(values: pd.Series, bad: pd.Series) -> float:
    """Chance that a bad scan has the larger value."""
    ranks, n = values.rank(), bad.sum()
    return float((ranks[bad].sum() - n * (n + 1) / 2) / (n * (~bad).sum()))
