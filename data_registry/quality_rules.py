"""What the figures of :mod:`data_registry.quality` mean for a scan's use: pass, review or fail, each with a sentence that has figure and bound.

``fail``: this can hardly be a whole head's T1w with its labels. ``review``: look before use. ``pass``: no rule applied. Rules skip a figure
that is not defined.

Bounds:

- White matter's signal to noise below 12: in 1101 scans of ABIDE I, with MRIQC's figures and up to three raters, 33 % of those that the median
  rater would exclude and 0.4 % of the others lie below it; the area under its ROC curve is .88. CJV has .74, CNR .74, SNR of the air .68, FBER .59,
  the entropy focus criterion .56: these are compared within their site only, where their areas are .82, .79, .71, .69 and .49 (mean of 12 sites;
  white matter's .85), so the last is not used. Contrast below 1 has verdict's bound for a T1w.
- Beside its site: deviations by the median and the scaled median absolute deviation of the site's scans (at least 8), at least 5 % of the median, in
  the direction that is worse. More than 3.5 in CJV or white matter's signal to noise: 9 % of ABIDE's excluded scans, 1.4 % of the others.
  This leads to a review at most, as it shows that a scan is unlike its neighbours, not that it is bad.
- Volumes of adults as in ``lodbrain segment``'s verdict. Younger brains: 340 mL at birth (Holland et al., JAMA Neurology 71:1266, 2014), 101 %
  more after a year, 15 % more after the second, nearly all of it grey matter (Knickmeyer et al., J Neurosci 28:12176, 2008); grey matter is
  largest at 6 years, white matter at 29, ventricles grow in age (Bethlehem et al., Nature 604:525, 2022). Shares of the brain, which hardly
  depend on its size: means are .43 .04 .39 .13 .02 in adults (AOMIC) and .41 .04 .40 .12 .02 in elders (OASIS3) by FreeSurfer; bounds leave room.
- Contrast is not judged below one year of age, when grey and white matter swap their intensities in a T1w.
- Voxels above 3 mm: slices too thick for 3-D networks at 1 mm; a hint, not a fault.
- Head at the edge: whole heads of the test data have less than 1 cm² of tissue on the superior face and a few on others, up to 112 where the field
  of view is narrow; a mid-sagittal cut has 400. The neck's is free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_registry.quality_head import FACES

READ_WITH_DOUBT = ("left and right are not certain", "NaN or infinite voxels read as 0")
"""Ends of those warnings of :mod:`data_registry.volume` that call for a review; others, on a long neck or on labels of large voxels, do not."""
MIN_SNR_WM = 12.0
MIN_CNR = 1.0
MAX_OUTSIDE, FAIL_OUTSIDE = 0.05, 0.2
MAX_ASYMMETRY = 0.1
MAX_CUT_CM2, FAIL_CUT_CM2 = 2.0, 50.0
FAIL_HEAD_CUT_CM2 = 200.0
HEAD_CUT_CM2: Mapping[str, float] = {"superior": 20.0, "right": 60.0, "left": 60.0, "posterior": 60.0, "anterior": 60.0}
SHARES: Mapping[str, tuple[float, float]] = {
    "grey matter": (0.30, 0.60),
    "basal ganglia": (0.02, 0.07),
    "white matter": (0.22, 0.55),
    "cerebellum": (0.05, 0.20),
    "brainstem": (0.01, 0.04),
}
YOUNG_SHARES = {**SHARES, "grey matter": (0.30, 0.75), "white matter": (0.12, 0.55), "cerebellum": (0.03, 0.20)}
MAX_VOXEL_MM = 3.0
CONTRAST_FROM_YEARS = 1
SITE_SCANS = 8
SITE_DEVIATIONS = 3.5
LEAST_SPREAD = 0.05
WORSE: Mapping[str, int] = {"snr_wm": -1, "cjv": 1, "cnr": -1, "snrd": -1, "fber": -1, "unevenness": 1}
"""Figures that are compared within a site: 1 if more is worse."""
ASKED = ("snr_wm", "cjv")
"""Those of them that can lead to a review; the others only order the page."""
FIGURE_NAMES = {
    "snr_wm": "signal to noise of white matter",
    "cjv": "coefficient of joint variation",
    "cnr": "contrast to noise",
    "snrd": "signal to noise of the air",
    "fber": "foreground to background energy",
    "unevenness": "unevenness of white matter",
}


@dataclass(frozen=True)
class Ages:
    """What is expected up to an age."""

    below_years: float
    brain_ml: tuple[float, float]
    ventricles_ml: tuple[float, float]
    shares: Mapping[str, tuple[float, float]] = field(default_factory=lambda: SHARES)


AGES = (
    Ages(1, (250, 1300), (1, 60), YOUNG_SHARES),
    Ages(2, (500, 1500), (1, 60), YOUNG_SHARES),
    Ages(6, (650, 1800), (1, 80), YOUNG_SHARES),
    Ages(18, (750, 1900), (1, 100)),
    Ages(60, (750, 1900), (2, 150)),
    Ages(130, (750, 1900), (4, 250)),
)
ANY_AGE = Ages(130, (250, 1900), (1, 250))
ADULT_ML = (750.0, 1900.0)


def expected(age_years: float | None) -> Ages:
    """The row of :data:`AGES` for an age; bounds that cover all ages if it is not known.

    >>> expected(5.9).brain_ml, expected(6).brain_ml, expected(None).ventricles_ml
    ((650, 1800), (750, 1900), (1, 250))
    """
    if age_years is None or not np.isfinite(age_years):
        return ANY_AGE
    return next((row for row in AGES if age_years < row.below_years), ANY_AGE)


def judge(
    figures: Mapping, *, age_years: float | None = None, beside: Mapping[str, float] | None = None, warnings: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Verdict and reasons, failures first, of the figures of one scan; ``beside``: deviations from its site, see :func:`beside_site`;
    ``warnings``: what harmonise said of it."""
    failures, doubts = [], []
    snr, infant = figures.get("snr_wm"), expected(age_years).below_years <= CONTRAST_FROM_YEARS
    cnr = None if infant else figures.get("cnr")
    if cnr is not None and cnr <= 0:
        failures.append(f"white matter is darker than grey matter (contrast to noise {cnr:.2f}; more than 0 is wanted): no T1w, or another's labels")
    elif cnr is not None and cnr < MIN_CNR:
        doubts.append(f"contrast to noise between grey and white matter is {cnr:.2f}; at least {MIN_CNR:g} is expected of a T1w")
    if snr is not None and snr < MIN_SNR_WM:
        doubts.append(f"signal to noise of white matter is {snr:.1f}; at least {MIN_SNR_WM:g} is expected (motion or noise)")
    edge = figures.get("own_voxel_mm")
    if edge is not None and edge > MAX_VOXEL_MM:
        doubts.append(f"voxels are {edge:.2g} mm long; at most {MAX_VOXEL_MM:g} mm is expected")
    outside = figures.get("labels_outside")
    if outside is not None and outside > MAX_OUTSIDE:
        sentence = f"{100 * outside:.3g}% of the labelled voxels lie outside the head; at most {MAX_OUTSIDE:.0%} is expected (are they this scan's?)"
        (failures if outside > FAIL_OUTSIDE else doubts).append(sentence)
    for face, area in zip(FACES, figures.get("brain_cut_cm2") or (), strict=False):
        if area > MAX_CUT_CM2:
            sentence = f"the {face} face of the field of view cuts {area:.0f} cm² of labelled brain; at most {MAX_CUT_CM2:g} cm² is expected"
            (failures if area > FAIL_CUT_CM2 else doubts).append(sentence)
    bad, doubtful = _head_cut(dict(zip(FACES, figures.get("head_cut_cm2") or (), strict=False)))
    failures += bad
    doubts += doubtful
    volumes = {item["class_name"]: item["ml"] for item in figures.get("volumes_ml") or ()}
    if volumes:
        bad, doubtful = _volumes(volumes, age_years)
        failures += bad
        doubts += doubtful
    sides = figures.get("asymmetry")
    if sides is not None and abs(sides) > MAX_ASYMMETRY:
        larger = "left" if sides > 0 else "right"
        doubts.append(f"the {larger} side's labels are {100 * abs(sides):.3g}% larger than the other's; at most {MAX_ASYMMETRY:.0%} is expected")
    apart = figures.get("left_mm")
    if apart is not None and apart <= 0:
        failures.append(f"the left's labels lie {-apart:.0f} mm to the right of the right's; they are expected on the left (a flipped map?)")
    for name in ASKED:
        if (beside or {}).get(name, 0) > SITE_DEVIATIONS:
            far = f"{beside[name]:.1f} deviations worse than the site's median; at most {SITE_DEVIATIONS} is expected"
            doubts.append(f"{FIGURE_NAMES[name]} is {figures[name]:.3g}, {far}")
    doubts += [warning for warning in warnings if warning.endswith(READ_WITH_DOUBT)]
    return "fail" if failures else "review" if doubts else "pass", failures + doubts


def _head_cut(areas: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Failures and doubts about the head on the faces of the field of view, cm² by face."""
    over = {face: area for face, area in areas.items() if area > HEAD_CUT_CM2.get(face, np.inf)}
    if len(over) == len(HEAD_CUT_CM2):
        return [f"what is bright has {min(over.values()):.0f} cm² and more on every face of the field of view: no head stands out from noise"], []
    told = {
        face: f"{area:.0f} cm² of the head lie on the {face} face of the field of view; at most {HEAD_CUT_CM2[face]:g} cm² is expected"
        for face, area in over.items()
    }
    return [told[face] for face in over if over[face] > FAIL_HEAD_CUT_CM2], [told[face] for face in over if over[face] <= FAIL_HEAD_CUT_CM2]


def _volumes(volumes: Mapping[str, float], age_years: float | None) -> tuple[list[str], list[str]]:
    """Failures and doubts about the volumes of lod7's classes, mL by name."""
    row, brain = expected(age_years), sum(ml for name, ml in volumes.items() if name != "ventricles")
    whom = "a person of unknown age" if row is ANY_AGE else f"{age_years:.3g} years"
    low, high = row.brain_ml
    if not low <= brain <= high:
        return [f"the labelled brain has {brain:.0f} mL; {low:.0f} to {high:.0f} mL are expected at {whom}".replace("at a person", "of a person")], []
    doubts = []
    if row is ANY_AGE and brain < ADULT_ML[0]:
        doubts.append(f"the labelled brain has {brain:.0f} mL; at least {ADULT_ML[0]:.0f} mL are expected after early childhood (age unknown)")
    for name, (low, high) in row.shares.items():
        if not low <= volumes[name] / brain <= high:
            doubts.append(f"{name} is {100 * volumes[name] / brain:.3g}% of the labelled brain; {low:.0%} to {high:.0%} are expected")
    low, high = row.ventricles_ml
    if not low <= volumes["ventricles"] <= high:
        doubts.append(f"the ventricles have {volumes['ventricles']:.3g} mL; {low:.0f} to {high:.0f} mL are expected of {whom}")
    return [], doubts


def beside_site(scans: Sequence[Mapping]) -> list[dict[str, float]]:
    """For each scan of one site, by figure: how many robust deviations it is worse than the site's median; empty below SITE_SCANS scans.

    >>> scans = [{"cjv": 0.30 + 0.01 * k} for k in range(9)] + [{"cjv": 0.9}, {"cjv": None}]
    >>> [round(one.get("cjv", 0), 1) for one in beside_site(scans)[-3:]]
    [0.9, 15.0, 0]
    """
    beside: list[dict[str, float]] = [{} for _ in scans]
    for name, sign in WORSE.items():
        with_it = [index for index, scan in enumerate(scans) if scan.get(name) is not None]
        if len(with_it) < SITE_SCANS:
            continue
        values = np.array([scans[index][name] for index in with_it])
        middle = np.median(values)
        deviation = max(1.4826 * np.median(np.abs(values - middle)), LEAST_SPREAD * abs(middle))
        if deviation > 0:
            for index, value in zip(with_it, values, strict=True):
                beside[index][name] = float(sign * (value - middle) / deviation)
    return beside


def suspicion(verdict: str, reasons: Sequence[str], beside: Mapping[str, float]) -> float:
    """What the page sorts by: 100 for fail, 10 a reason, and how far the scan stands out from its site in its worst figure, at most 9.

    >>> suspicion("review", ["a", "b"], {"cjv": 4.0, "snrd": -2.0}), suspicion("pass", [], {})
    (24.0, 0.0)
    """
    return 100.0 * (verdict == "fail") + 10.0 * len(reasons) + float(np.clip(max(beside.values(), default=0.0), 0, 9))
