"""The report's figures, each a PNG as a data URI, so that the report is one file.

Small multiples, one panel a structure, every scan a point: a bar would hide how places differ. Colours of structures are the label
protocol's; points carry a dark edge because some of those colours are near white. Figures depend on nothing but their arguments.
"""

import base64
import io
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_registry.errors import InputError

MEAN = "mean"
"""Stands beside the structures' names for their mean."""
MAX_PANELS = 12
MAX_PLACES = 40

WIDTH_IN = 10.8
INK, QUIET, BASELINE = "#1f2933", "#8a94a0", "#d55e00"  # the last one: Okabe and Ito's vermilion
_STYLE = {
    "font.size": 9, "font.family": "DejaVu Sans", "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": QUIET, "axes.labelcolor": INK, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e7eb", "grid.linewidth": 0.7, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
_VIEWS = (  # name, axis looked along, axis down the page, its direction, axis across, marks at the left, right, top, bottom
    ("coronal", 2, 1, 1, 0, "R", "L", "S", "I"),
    ("axial", 1, 2, -1, 0, "R", "L", "A", "P"),
    ("sagittal", 0, 1, 1, 2, "P", "A", "S", "I"),
)


@dataclass(frozen=True)
class Case:
    """One scan with its reference and what a run predicted, as evaluation stored it."""

    t1w: np.ndarray
    """(D, H, W) uint8, LIA: axis 0 grows to the patient's left, 1 to inferior, 2 to anterior."""
    reference: np.ndarray
    """(D, H, W) uint8 classes."""
    predicted: np.ndarray
    """(D, H, W) uint8 classes."""
    scan_id: str
    run: str
    fold: int
    place: str
    dice: float
    """Mean of the foreground classes."""
    voxel_mm: float


def load_case(path: str | os.PathLike) -> Case:
    """Read one stored case; anything missing is an :class:`InputError` that names the file and what it lacks."""
    kinds = {"scan_id": str, "run": str, "fold": int, "place": str, "dice": float, "voxel_mm": float}
    try:
        with np.load(path, allow_pickle=False) as stored:
            volumes = {name: stored[name] for name in ("t1w", "reference", "predicted")}
            return Case(**volumes, **{name: kind(stored[name].item()) for name, kind in kinds.items()})
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a readable case ({error}); run the evaluate stage again") from None


def _figure(panels: int, *, columns: int, panel_height_in: float) -> tuple:
    """A figure of ``panels`` axes, row by row, unused ones removed: (figure, [axes])."""
    from matplotlib.figure import Figure  # draws with Agg, keeps no global state

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH_IN, rows * panel_height_in), dpi=160, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=False).ravel()
    for unused in axes[panels:]:
        unused.remove()
    return figure, list(axes[:panels])


def _data_uri(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _styled(draw):
    """``draw`` under the report's style."""
    import functools

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def panel_names(median_by_structure: pd.Series, *, worst_is_low: bool) -> list[str]:
    """The structures that get a panel: the mean first if there is one, then all in the given order, or the worst where too many.

    >>> panel_names(pd.Series({"mean": .8, "a": .9, "b": .7}), worst_is_low=True)
    ['mean', 'a', 'b']
    """
    structures = median_by_structure.drop(MEAN, errors="ignore")
    room = MAX_PANELS - (MEAN in median_by_structure.index)
    if len(structures) > room:
        structures = structures.sort_values(ascending=worst_is_low).iloc[:room]
    return ([MEAN] if MEAN in median_by_structure.index else []) + list(structures.index)


def _title(structure: str) -> str:
    return "mean of structures" if structure == MEAN else structure


def _fill(colours: dict[str, str], structure: str) -> str:
    return colours.get(structure, "#56606b")


def _spread(count: int, width: float) -> np.ndarray:
    """(count,) offsets in ±width that keep neighbours apart; the same for the same count."""
    return (np.arange(1, count + 1) * 0.6180339887 % 1 - 0.5) * 2 * width


@_styled
def strip_by_place(values: pd.DataFrame, colours: dict[str, str], *, panels: list[str], label: str, baseline: pd.DataFrame | None = None) -> str:
    """Every scan's figure by place, a panel a structure, with the place's median; hollow diamonds are the baseline's medians.

    ``values`` and ``baseline`` have place, structure, value. Beyond 40 places, those with the worst median of the first panel are drawn.
    """
    lower_is_worse = label.startswith("Dice")
    order = values[values.structure == panels[0]].groupby("place").value.median().sort_values(ascending=lower_is_worse)
    places = list(order.index[:MAX_PLACES][::-1])  # the worst at the top
    figure, axes = _figure(len(panels), columns=4, panel_height_in=0.75 + 0.3 * max(2, len(places)))
    for number, (ax, structure) in enumerate(zip(axes, panels, strict=True)):
        chosen = values[(values.structure == structure) & values.value.notna()]
        for row, place in enumerate(places):
            points = chosen[chosen.place == place].sort_values("scan_id").value.to_numpy()
            if len(points):
                ax.scatter(points, row + _spread(len(points), 0.2), s=17, color=_fill(colours, structure), edgecolor=INK, linewidth=0.5, alpha=0.85)
                ax.plot([np.median(points)] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=2, solid_capstyle="butt")
            if baseline is not None:
                floor = baseline[(baseline.structure == structure) & (baseline.place == place)].value.median()
                ax.scatter(floor, row, marker="D", s=24, facecolor="none", edgecolor=BASELINE, linewidth=1.3)
        ax.set_title(_title(structure))
        ax.set_yticks(range(len(places)), places if number % 4 == 0 else [""] * len(places))
        ax.set_ylim(-0.6, len(places) - 0.4)
        ax.tick_params(axis="y", length=0)
        if number >= len(panels) - 4:
            ax.set_xlabel(label)
        if not lower_is_worse:
            ax.set_xlim(left=0)
    return _data_uri(figure)


@_styled
def scatter_panels(pairs: pd.DataFrame, colours: dict[str, str], *, panels: list[str], x_label: str, y_label: str, notes: dict[str, str]) -> str:
    """``x`` against ``y`` of every scan, a panel a structure, with the line of identity and a note; ``pairs`` has structure, x, y."""
    figure, axes = _figure(len(panels), columns=4, panel_height_in=2.9)
    for number, (ax, structure) in enumerate(zip(axes, panels, strict=True)):
        chosen = pairs[pairs.structure == structure].dropna(subset=["x", "y"])
        ax.scatter(chosen.x, chosen.y, s=19, color=_fill(colours, structure), edgecolor=INK, linewidth=0.5, alpha=0.85, zorder=2)
        if len(chosen):
            low, high = float(chosen[["x", "y"]].min().min()), float(chosen[["x", "y"]].max().max())
            margin = 0.06 * (high - low) or 0.01 * max(abs(high), 1)
            ax.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
        ax.axline((0, 0), slope=1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        ax.set_aspect("equal", adjustable="box")
        ax.locator_params(nbins=4)
        ax.set_title(_title(structure))
        ax.text(0.97, 0.03, notes.get(structure, ""), transform=ax.transAxes, ha="right", va="bottom", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5})  # fmt: skip
        if number % 4 == 0:
            ax.set_ylabel(y_label)
        if number >= len(panels) - 4:
            ax.set_xlabel(x_label)
    return _data_uri(figure)


@_styled
def strip_of_differences(differences: pd.DataFrame, colours: dict[str, str], *, panels: list[str], label: str, notes: dict[str, str]) -> str:
    """Every scan's difference, a row a structure, with its median and the line of no difference; has structure, scan_id, value."""
    figure, (ax,) = _figure(1, columns=1, panel_height_in=0.8 + 0.36 * len(panels))
    for row, structure in enumerate(panels[::-1]):
        points = differences[differences.structure == structure].sort_values("scan_id").value.dropna().to_numpy()
        if len(points):
            ax.scatter(points, row + _spread(len(points), 0.2), s=19, color=_fill(colours, structure), edgecolor=INK, linewidth=0.5, alpha=0.85)
            ax.plot([np.median(points)] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=2, solid_capstyle="butt")
        ax.text(1.01, row, notes.get(structure, ""), transform=ax.get_yaxis_transform(), va="center", fontsize=8.5)
    ax.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(panels)), [_title(name) for name in panels[::-1]])
    ax.set_ylim(-0.6, len(panels) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(label)
    return _data_uri(figure)


@_styled
def overlay(case: Case, class_colours: list[str]) -> str:
    """Three planes of a case, each where reference and prediction differ most: contours above, voxels that differ below.

    Above, the reference is a solid line and the prediction a dashed one, in the class's colour; below, every voxel that differs has the
    colour of the predicted class (black where background is predicted). ``class_colours`` is by class index.
    """
    from matplotlib.colors import to_rgb

    figure, axes = _figure(6, columns=3, panel_height_in=3.7)
    differ = case.reference != case.predicted
    palette = np.array([to_rgb(colour) for colour in class_colours])
    box = _brain_box(case)
    for column, (name, along, down, direction, *_) in enumerate(_VIEWS):
        others = tuple(axis for axis in range(3) if axis != along)
        index = int(np.clip(differ.sum(axis=others).argmax(), box[along].start, box[along].stop - 1))
        t1w, reference, predicted = (_plane(v, box, view=_VIEWS[column], index=index) for v in (case.t1w, case.reference, case.predicted))
        height_mm, width_mm = (n * case.voxel_mm for n in t1w.shape)
        place = {"extent": (0, width_mm, height_mm, 0), "interpolation": "nearest"}
        grey = np.repeat(np.clip(t1w / max(1.0, float(np.percentile(case.t1w[case.t1w > 0], 99.5)) if case.t1w.any() else 1.0), 0, 1)[..., None], 3, axis=2)
        upper, lower = axes[column], axes[column + 3]
        upper.imshow(grey, **place)
        for labels, style, width in ((reference, "solid", 1.5), (predicted, (0, (1.6, 1.2)), 1.5)):
            _contours(upper, labels, class_colours, voxel_mm=case.voxel_mm, style=style, width=width)
        wrong = reference != predicted
        lower.imshow(np.where(wrong[..., None], palette[predicted], 0.3 + 0.7 * grey), **place)
        upper.set_title(f"{name}, plane {index} of {case.t1w.shape[along]}")
        lower.set_title(f"voxels that differ: {wrong.sum():,}", fontweight="normal")
        for ax in (upper, lower):
            _mark(ax, _VIEWS[column][5:], width_mm=width_mm, height_mm=height_mm)
    return _data_uri(figure)


def _brain_box(case: Case) -> tuple[slice, slice, slice]:
    """The part of the grid that holds both label maps with 10 mm around; the whole grid if neither has a label."""
    where = np.argwhere((case.reference > 0) | (case.predicted > 0))
    if not len(where):
        return tuple(slice(0, n) for n in case.t1w.shape)
    margin = int(np.ceil(10 / case.voxel_mm))
    low, high = where.min(axis=0) - margin, where.max(axis=0) + 1 + margin
    return tuple(slice(max(0, int(a)), min(n, int(b))) for a, b, n in zip(low, high, case.t1w.shape, strict=True))


def _plane(volume: np.ndarray, box: tuple, *, view: tuple, index: int) -> np.ndarray:
    """A plane as rows down the page and columns across: patient right at the page's left, superior or anterior at the top."""
    _, along, down, direction, across, *_ = view
    plane = volume[tuple(index if axis == along else box[axis] for axis in range(3))]
    plane = plane if down < across else plane.T
    return plane[::direction]


def _contours(ax, labels: np.ndarray, class_colours: list[str], *, voxel_mm: float, style, width: float) -> None:
    rows_mm, columns_mm = ((np.arange(n) + 0.5) * voxel_mm for n in labels.shape)
    for index in range(1, len(class_colours)):
        mask = labels == index
        if mask.any() and not mask.all():
            ax.contour(columns_mm, rows_mm, mask.astype(float), levels=[0.5], colors=[class_colours[index]], linewidths=width, linestyles=[style])


def _mark(ax, letters: tuple[str, str, str, str], *, width_mm: float, height_mm: float) -> None:
    """Letters of direction on the four edges and a bar of 20 mm."""
    left, right, top, bottom = letters
    ax.set_axis_off()
    spots = ((0.02, 0.5, left, "left", "center"), (0.98, 0.5, right, "right", "center"), (0.5, 0.98, top, "center", "top"),
             (0.5, 0.02, bottom, "center", "bottom"))  # fmt: skip
    for x, y, letter, across, upright in spots:
        ax.text(x, y, letter, transform=ax.transAxes, color="white", fontsize=10, fontweight="bold", ha=across, va=upright)
    if width_mm > 40:
        ax.plot([width_mm - 26, width_mm - 6], [height_mm - 6] * 2, color="white", linewidth=2.5, solid_capstyle="butt")
        ax.text(width_mm - 16, height_mm - 8, "20 mm", color="white", fontsize=8, ha="center", va="bottom")
    ax.set(xlim=(0, width_mm), ylim=(height_mm, 0))
