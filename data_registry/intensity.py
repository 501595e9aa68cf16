"""What the intensities of one scan become before a network sees them: named choices that look at this scan alone; uint8 on the grid.

- ``robust``: the window of :mod:`data_registry.conform` alone.
- ``n4``: the bias field is divided out first (Tustison et al., IEEE TMI 29:1310, 2010), see :func:`without_bias`; then ``robust``.
- ``whitestripe``: the window is laid around the white matter (Shinohara et al., NeuroImage: Clinical 6:9, 2014), see :func:`white_stripe`:
  its peak becomes the grey level ``WHITE``, one standard deviation of the stripe ``STRIPE_LEVELS`` grey levels. With peak p and deviation s
  an intensity x becomes WHITE + (x − p) · STRIPE_LEVELS / s, clipped to 0 … 255 before it is interpolated; where the scan ends is 0.
- ``n4_whitestripe``: N4, then WhiteStripe.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from data_registry import nyul
from data_registry.conform import Conformed, Interpolation, conform, robust_range
from data_registry.errors import InputError
from data_registry.volume import Volume, VolumeError

Intensity = Literal["robust", "n4", "whitestripe", "n4_whitestripe"]

N4_VOXEL_MM = 4.0        # the field is estimated on blocks of about this size
N4_ITERATIONS = (25, 25, 25)  # at most, on lattices of 1, 2 and 4 elements along each axis: about 256, 128 and 64 mm

WHITE = 160
STRIPE_LEVELS = 1.25     # keeps grey matter above 0 and air near it, where one σ of the stripe is from 1/280 to 1/50 of the peak
STRIPE = 0.05            # of the voxels, on either side of the peak
AIR = 0.01               # of the voxels that are seen
DEEP = 1 / 3             # of the greatest depth: scalp, fat and most of the skull lie nearer to the air
DEPTH_VOXEL_MM = 4.0
BINS = 8192              # over the robust range and an eighth of it more
SMOOTHING = 112          # bins: the comb of scans stored as integers, and noise
LEAST_VOXELS = 1000
LEAST_HEIGHT = 0.5       # of the highest mode
LARGEST_WIDTH = 0.5      # of the range, at half height


@dataclass(frozen=True)
class Preparation:
    """All that happens to a T1w besides the grid; the choice of a training travels with its weights.

    InputError for a name that is not known and for a scale that is none.

    >>> from dataclasses import asdict
    >>> Preparation(**asdict(Preparation("n4"))) == Preparation("n4")     # as a checkpoint holds it
    True
    """

    intensity: Intensity = "robust"
    interpolation: Interpolation = "linear"
    scale: tuple[float, ...] | None = None
    """The standard scale of :mod:`data_registry.nyul`, or none."""

    def __post_init__(self) -> None:
        for name, kind in (("intensity", Intensity), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} is {getattr(self, name)!r}; one of {', '.join(get_args(kind))} is wanted")
        if self.scale is not None:
            object.__setattr__(self, "scale", nyul.checked(self.scale))


ROBUST = Preparation()
"""What every training and every weights file was before there was a choice."""


def prepare(volume: Volume, *, grid: str, preparation: Preparation) -> Conformed:
    """Bring a T1w to the named grid as uint8, its intensities as ``preparation`` says.

    Raises :class:`VolumeError` for a scan without contrast, and for one in which a choice finds nothing to go by.
    """
    window = None
    if preparation.intensity != "robust":
        robust_range(volume)   # refuses a scan without contrast before anything is estimated from it
    if preparation.intensity.startswith("n4"):
        volume = without_bias(volume)
    if preparation.intensity.endswith("whitestripe"):
        peak, deviation = white_stripe(volume)
        low = peak - WHITE * deviation / STRIPE_LEVELS
        window = low, low + 255 * deviation / STRIPE_LEVELS
    conformed = conform(volume, grid=grid, window=window, interpolation=preparation.interpolation)
    if preparation.scale is None:
        return conformed
    table = nyul.table_for(histogram_of(conformed.data), preparation.scale)
    return replace(conformed, data=table[conformed.data])


def above_air(t1w: np.ndarray, preparation: Preparation) -> np.ndarray:
    """A prepared T1w, uint8, with its air at 0: WhiteStripe gives air, and what a stripped scan has in its place, a grey level of its own.

    It is the level that AIR of the voxels reach that are not 0, as they are where the scan ends.

    >>> above_air(np.array([0, 90, 90, 92, 160], np.uint8), Preparation("whitestripe")).tolist()
    [0, 0, 0, 2, 70]
    """
    if not preparation.intensity.endswith("whitestripe"):
        return t1w
    seen = np.cumsum(histogram_of(t1w)[1:])
    air = np.uint8(1 + np.searchsorted(seen, AIR * seen[-1]))
    return np.maximum(t1w, air) - air


def without_bias(volume: Volume) -> Volume:
    """The T1w divided by its bias field, from SimpleITK's N4.

    The field is estimated on blocks of about 4 mm (means), inside Otsu's foreground, with N4's own defaults (convergence .001, 200 bins,
    full width .15, Wiener noise .01, cubic splines) but for the lattices of N4_ITERATIONS: a head coil's field is smooth over 64 mm, and finer
    lattices follow the anatomy. Its logarithm is then evaluated on every voxel. One thread: the same bytes on any machine's number of cores.
    """
    import SimpleITK as sitk  # a third of a second: not for who does without

    data = volume.data - min(np.float32(0), volume.data.min())   # N4 takes logarithms
    image = sitk.GetImageFromArray(data)
    image.SetSpacing([float(edge) for edge in volume.voxel_mm[::-1]])
    sizes = zip(volume.voxel_mm[::-1], volume.data.shape[::-1], strict=True)
    small = sitk.BinShrink(image, [max(1, min(round(N4_VOXEL_MM / edge), length // 4)) for edge, length in sizes])
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)   # N4's own setting does not reach the filters inside it, which add up by thread
    try:
        n4 = sitk.N4BiasFieldCorrectionImageFilter()
        n4.SetMaximumNumberOfIterations(N4_ITERATIONS)
        n4.Execute(small, sitk.OtsuThreshold(small, 0, 1, 200))
        field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    if not np.isfinite(field).all():
        raise VolumeError(f"{volume.path}: N4's bias field is not finite; a T1w of a whole head is wanted for n4")
    return replace(volume, data=data / np.exp(field, dtype=np.float32), stored_dtype="float32")


def white_stripe(volume: Volume) -> tuple[float, float]:
    """The peak of the normal-appearing white matter of a T1w and the standard deviation of the stripe around it, as intensities.

    Both come from the voxels deep in the head, where neither fat nor marrow is bright. The peak is that of their flat half (by squared
    gradient), in which white matter is the brightest mode at least half as high as the highest; the stripe holds STRIPE of all of them on either
    side of the peak. Histograms are smoothed, and peak, quantiles and deviation are read from what is smoothed, so that a scan stored in
    a hundred integers has them too. VolumeError where there is no such mode.
    """
    low, high = robust_range(volume)
    values, flat = _deep_in_the_head(volume, low, high)
    if flat.sum() < LEAST_VOXELS:
        raise VolumeError(f"{volume.path}: no white matter peak, {flat.sum()} voxels lie deep in a head; {LEAST_VOXELS} are wanted for whitestripe")
    edges = np.linspace(low, high + (high - low) / 8, BINS + 1)
    centres, peak = (edges[1:] + edges[:-1]) / 2, _brightest_mode(_density(values[flat], edges), str(volume.path))
    density = _density(values, edges)
    cumulated = np.cumsum(density) / density.sum()
    inside = np.abs(cumulated - cumulated[peak]) <= STRIPE
    mean = np.average(centres[inside], weights=density[inside])
    return float(centres[peak]), float(np.sqrt(np.average((centres[inside] - mean) ** 2, weights=density[inside])))


def _density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(BINS,) voxels of each bin, smoothed."""
    from scipy import ndimage

    return ndimage.gaussian_filter1d(np.histogram(values, bins=edges)[0].astype(float), SMOOTHING, mode="constant")


def _brightest_mode(density: np.ndarray, where: str) -> int:
    """The bin of the brightest mode that is high and narrow enough to be a tissue's; VolumeError where there is none."""
    modes = np.flatnonzero((density[1:-1] > density[:-2]) & (density[1:-1] >= density[2:])) + 1
    modes = modes[density[modes] >= LEAST_HEIGHT * density.max()]
    if not len(modes):
        raise VolumeError(f"{where}: no white matter peak, the histogram has no mode; a T1w is wanted for whitestripe")
    peak = int(modes[-1])
    below = np.flatnonzero(density < density[peak] / 2)
    left, right = below[below < peak], below[below > peak]
    width = ((right[0] if len(right) else BINS) - (left[-1] if len(left) else 0)) / BINS
    if width > LARGEST_WIDTH:
        raise VolumeError(
            f"{where}: no white matter peak, the brightest mode is {width:.0%} of the intensity range wide; "
            f"at most {LARGEST_WIDTH:.0%} is wanted for whitestripe"
        )
    return peak


def _deep_in_the_head(volume: Volume, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Intensities of the tissue deep in the head, and which of them are the half that varies least from voxel to voxel."""
    from scipy import ndimage

    step = [max(1, round(DEPTH_VOXEL_MM / edge)) for edge in volume.voxel_mm]
    coarse = volume.data[tuple(slice(n // 2, None, n) for n in step)]
    air = low + (_otsu(np.histogram(coarse, bins=256, range=(low, high))[0]) + 1) / 256 * (high - low) / 2   # half of Otsu's: dark tissue counts
    head = ndimage.binary_fill_holes(coarse > air)
    depth_mm = ndimage.distance_transform_edt(np.pad(head, 1), sampling=volume.voxel_mm * step)[1:-1, 1:-1, 1:-1]
    deep = depth_mm > DEEP * depth_mm.max()
    if not deep.any():
        return np.empty(0, np.float32), np.empty(0, bool)
    box = tuple(slice(indices.min(), indices.max() + 1) for indices in np.nonzero(deep))
    data = volume.data[tuple(slice(part.start * n, part.stop * n) for part, n in zip(box, step, strict=True))]
    deep = deep[box]
    for axis, n in enumerate(step):
        deep = np.repeat(deep, n, axis=axis)
    deep = deep[tuple(slice(length) for length in data.shape)] & (data > air)
    slope = sum(np.square(np.gradient(data, edge, axis=axis)) for axis, edge in enumerate(volume.voxel_mm))[deep]
    return data[deep], slope <= (np.median(slope) if len(slope) else 0)


def _otsu(histogram: np.ndarray) -> int:
    """The last bin of the darker of the two classes that differ most (Otsu, IEEE TSMC 9:62, 1979).

    >>> _otsu(np.array([5, 4, 0, 0, 3, 3]))
    1
    """
    count, total = np.cumsum(histogram)[:-1], np.cumsum(histogram * np.arange(len(histogram)))[:-1]
    both, whole = count * (histogram.sum() - count), (histogram * np.arange(len(histogram))).sum()
    between = (total * histogram.sum() - whole * count).astype(float) ** 2 / np.where(both > 0, both, np.inf)
    return int(between.argmax())


def histogram_of(grey: np.ndarray) -> np.ndarray:
    """(256,) counts of a uint8 array of any shape: of pairs, then of both halves, in half of one count's time."""
    values = grey.ravel()  # contiguous, unlike reshape of what is reversed
    even = values.size // 2 * 2
    pairs = np.bincount(values[:even].view(np.uint16), minlength=65536).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1) + np.bincount(values[even:], minlength=256)


def voxels_sha256(grey: np.ndarray, histogram: np.ndarray) -> str:
    """SHA-256 of a T1w on the grid by the robust window, so that uint8 that passed unchanged has that of the same voxels in any other file."""
    counts = histogram.cumsum()
    low = int(np.searchsorted(counts, np.floor(0.001 * (counts[-1] - 1)), side="right"))
    above = counts[-1] - counts[low]
    high = int(np.searchsorted(counts, counts[low] + np.ceil(0.999 * (above - 1)), side="right"))
    if (low, high) != (0, 255) and above:
        window = (np.arange(256, dtype=np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        grey = np.rint(np.clip(window, 0, 255)).astype(np.uint8)[grey]
    return hashlib.sha256(grey).hexdigest()


def moments(histogram: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation of the voxels that a histogram counts, exact to float64: integers until the division.

    >>> moments(np.array([2, 0, 2]))
    (1.0, 1.0)
    """
    levels, size = np.arange(len(histogram)), histogram.sum()
    mean = float((histogram * levels).sum() / size)
    return mean, float(np.sqrt((histogram * (levels - mean) ** 2).sum() / size))
