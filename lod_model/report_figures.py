"""The report's figures, each a PNG as a data URI, so that the report is one file; and how it writes numbers.

Small multiples, one panel a structure, every scan a point: a bar would hide how places differ. Colours of structures are the label
protocol's; points carry a dark edge because some of those colours are near white. Figures depend on nothing but their arguments.
"""

import base64
import functools
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

WIDTH_IN, OVERLAY_IN = 10.8, 7.7
INK, QUIET, BASELINE = "#1f2933", "#8a94a0", "#d55e00"  # the last one: Okabe and Ito's vermilion
_STYLE = {
    "font.size": 9, "font.family": "DejaVu Sans", "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": QUIET, "axes.labelcolor": INK, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e7eb", "grid.linewidth": 0.7, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
_VIEWS = (  # name, axis looked along, axis down the page, its direction, axis across, letters at the left, right, top, bottom
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


def _legend(figure, entries: list[tuple[str, dict]]) -> None:
    """Marks and their words, below the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="none", label=label, **mark) for label, mark in entries]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, handletextpad=0.3)


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
    marks = [("one scan", {"marker": "o", "markersize": 5, "color": "#56606b", "markeredgecolor": INK}),
             ("median of the place", {"marker": "|", "markersize": 11, "markeredgewidth": 2, "color": INK})]  # fmt: skip
    if baseline is not None:
        marks.append(("median of the atlas", {"marker": "D", "markersize": 5, "markerfacecolor": "none", "markeredgecolor": BASELINE}))
    _legend(figure, marks)
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
        ax.set_title(notes.get(structure, ""), loc="right", fontsize=7.5, fontweight="normal")
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
    """Three planes of a case, each where reference and prediction differ most: reference, prediction, and the voxels that differ.

    Contours have the class's colour; a voxel that differs has the colour of the predicted class, black where background is predicted.
    ``class_colours`` is by class index.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    palette = np.array([to_rgb(colour) for colour in class_colours])
    differ, box = case.reference != case.predicted, _brain_box(case)
    white = float(np.percentile(case.t1w[case.t1w > 0], 99.5)) if case.t1w.any() else 1.0
    planes = []
    for view in _VIEWS:
        along = view[1]
        index = int(np.clip(differ.sum(axis=tuple({0, 1, 2} - {along})).argmax(), box[along].start, box[along].stop - 1))
        planes.append((index, *(_plane(volume, box, view=view, index=index) for volume in (case.t1w, case.reference, case.predicted))))
    shapes = [t1w.shape for _, t1w, *_ in planes]
    wide = [columns / rows for rows, columns in shapes]  # a panel as high as its neighbours, whatever its shape
    figure = Figure(figsize=(OVERLAY_IN, 3 * (OVERLAY_IN / sum(wide) + 0.12)), dpi=180, layout="constrained")
    axes = figure.subplots(3, 3, gridspec_kw={"width_ratios": wide})
    for column, (view, (index, t1w, reference, predicted)) in enumerate(zip(_VIEWS, planes, strict=True)):
        grey = np.repeat(np.clip(t1w / white, 0, 1)[..., None], 3, axis=2)  # (rows, columns, RGB)
        wrong = reference != predicted
        pictures = (grey, grey, np.where(wrong[..., None], palette[predicted], 0.22 + 0.55 * grey))
        titles = (f"reference, {view[0]} plane {index}", "prediction", f"differ: {wrong.sum():,} voxels")
        for row, (picture, labels, title) in enumerate(zip(pictures, (reference, predicted, None), titles, strict=True)):
            ax = axes[row, column]
            height_mm, width_mm = (n * case.voxel_mm for n in t1w.shape)
            ax.imshow(picture, extent=(0, width_mm, height_mm, 0), interpolation="nearest")
            if labels is not None:
                _contours(ax, labels, class_colours, voxel_mm=case.voxel_mm)
            ax.set_title(title, fontweight="normal", fontsize=10)
            _mark(ax, view[5:], width_mm=width_mm, height_mm=height_mm)
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


def _contours(ax, labels: np.ndarray, class_colours: list[str], *, voxel_mm: float) -> None:
    rows_mm, columns_mm = ((np.arange(n) + 0.5) * voxel_mm for n in labels.shape)
    for index in range(1, len(class_colours)):
        mask = labels == index
        if mask.any() and not mask.all():
            ax.contour(columns_mm, rows_mm, mask.astype(float), levels=[0.5], colors=[class_colours[index]], linewidths=1.5)


def _mark(ax, letters: tuple[str, str, str, str], *, width_mm: float, height_mm: float) -> None:
    """Letters of direction on the four edges and a bar of 20 mm."""
    from matplotlib.patheffects import withStroke

    left, right, top, bottom = letters
    ax.set_axis_off()
    edge = {"path_effects": [withStroke(linewidth=2.5, foreground="black")], "color": "white"}
    spots = ((0.02, 0.5, left, "left", "center"), (0.98, 0.5, right, "right", "center"), (0.5, 0.98, top, "center", "top"),
             (0.5, 0.02, bottom, "center", "bottom"))  # fmt: skip
    for x, y, letter, across, upright in spots:
        ax.text(x, y, letter, transform=ax.transAxes, fontsize=12, fontweight="bold", ha=across, va=upright, **edge)
    if width_mm > 40:
        ax.plot([width_mm - 26, width_mm - 6], [height_mm - 6] * 2, linewidth=2.5, solid_capstyle="butt", **edge)
        ax.text(width_mm - 16, height_mm - 9, "20 mm", fontsize=9, ha="center", va="bottom", **edge)
    ax.set(xlim=(0, width_mm), ylim=(height_mm, 0))


def number(value: float, digits: int = 3) -> str:
    """A number for a table, a dash where it is not defined.

    >>> number(0.91249), number(float("nan")), number(1234.5, 0)
    ('0.912', '–', '1,234')
    """
    return "–" if value is None or not np.isfinite(value) else f"{value:,.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign.

    >>> signed(-0.0121), signed(0.5, 1), signed(-0.0001)
    ('−0.012', '+0.5', '0.000')
    """
    text = number(abs(value), digits)
    return text if text == "–" or not float(text.replace(",", "")) else ("−" if value < 0 else "+") + text


def p_value(value: float) -> str:
    r"""A p value with its relation.

    >>> p_value(0.0312), p_value(0.00001), p_value(float("nan"))
    ('=\xa00.031', '<\xa00.001', 'not defined')
    """
    return "not defined" if not np.isfinite(value) else "<\u00a00.001" if value < 0.001 else f"=\u00a0{value:.3f}"
