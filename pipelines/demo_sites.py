"""The demo's six sites: a database each, with a scanner of its own. No such institutions exist and nobody was scanned."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """A database with one site and one scanner; sizes along the array's axes, in its own ``orientation``."""

    database: str
    site: str
    manufacturer: str
    model: str
    field_tesla: float
    orientation: str
    """Direction in which each array axis grows, e.g. ``LIA``."""
    voxel_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    slice_axis: int
    """Array axis across the slices."""
    timing_s: tuple[float, float, float]
    """Repetition, echo and inversion time."""
    ages_years: tuple[int, int]
    means: dict[str, float]
    """Intensity of each of :data:`~pipelines.demo_anatomy.TISSUES`; white matter of the brightest site is about 0.9."""
    gamma: float
    bias: float
    """Largest coefficient of the log bias field, a polynomial of order 2 over the field of view."""
    noise: float
    """Standard deviation of either channel of the receiver, on the scale of ``means``."""
    scale: float
    """Stored value of intensity 1."""


def _means(csf: float, grey: float, white: float, *, fat: float, muscle: float = 0.4, marrow: float = 0.6) -> dict[str, float]:
    """Deep grey matter lies between grey and white, as T1 has it: striatum near grey, thalamus half-way, brainstem near white."""
    return {
        "air": 0.01, "csf": csf, "grey": grey, "white": white, "striatum": grey + 0.2 * (white - grey),
        "thalamus": grey + 0.5 * (white - grey), "brainstem": grey + 0.75 * (white - grey), "bone": 0.08, "marrow": marrow, "fat": fat,
        "muscle": muscle,
    }


SITES = {site.database: site for site in (
    Site("alder", "north", "Siemens", "Synthetic Trio", 3.0, "PIR", (1.0, 1.0, 1.0), (256, 256, 176), 2, (2.3, 0.00298, 0.9), (20, 45),
         _means(0.12, 0.50, 0.86, fat=0.95), gamma=1.0, bias=0.15, noise=0.025, scale=500),
    Site("birch", "coast", "GE", "Synthetic Signa", 3.0, "LPS", (0.9375, 0.9375, 1.2), (256, 256, 160), 2, (0.0073, 0.00302, 0.4), (18, 60),
         _means(0.26, 0.58, 0.78, fat=1.1, marrow=0.75), gamma=0.85, bias=0.3, noise=0.03, scale=2400),
    Site("cedar", "hill", "Philips", "Synthetic Achieva", 1.5, "RAS", (0.9, 0.9, 0.9), (208, 256, 240), 0, (0.0081, 0.0037, 0.85), (40, 85),
         _means(0.18, 0.44, 0.70, fat=0.9, muscle=0.3), gamma=1.0, bias=0.2, noise=0.04, scale=220),
    Site("elm", "lake", "Siemens", "Synthetic Avanto", 1.5, "LIA", (0.9375, 0.9375, 3.0), (256, 256, 76), 2, (1.9, 0.0031, 1.1), (25, 75),
         _means(0.16, 0.55, 0.80, fat=1.0), gamma=1.15, bias=0.2, noise=0.03, scale=350),
    Site("hazel", "river", "Philips", "Synthetic Ingenia", 3.0, "LAS", (1.2, 1.2, 1.2), (160, 200, 184), 1,
         (0.0067, 0.0031, 0.95), (20, 80), _means(0.06, 0.38, 0.92, fat=0.8, marrow=0.4, muscle=0.25), gamma=0.95, bias=0.3, noise=0.02, scale=900),
    Site("rowan", "town", "GE", "Synthetic Optima", 1.5, "ASR", (1.0, 1.0, 1.5), (240, 256, 120), 2, (0.0094, 0.0041, 0.5), (60, 85),
         _means(0.20, 0.52, 0.74, fat=0.35, marrow=0.3, muscle=0.45), gamma=1.0, bias=0.35, noise=0.035, scale=1200),
)}
"""By name of the database. They differ in scanner, contrast, noise, bias field, voxels, array orientation, field of view and ages."""
