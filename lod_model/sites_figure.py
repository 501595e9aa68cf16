"""The map of what the corpus is: every site a circle, by field strength, maker and age.

A row a field strength; across it the mean age; the circle's area is the number of scans, its colour the scanner's maker. Circles give way
up and down, never across, so that an age can be read; where a range is all that was published, a bar below shows it, with the circle at
its middle. Sites without either stand in a block of their own at the right; those whose scans nobody counted are small rings.
"""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np

from data_registry.catalogue_schema import Database
from data_registry.catalogue_stats import stats
from data_registry.catalogue_table import site_rows
from data_registry.files import replacing

MAKERS = {"Siemens": "#0072b2", "Philips": "#d55e00", "GE": "#009e73", "other": "#cc79a7", "unknown": "#9aa5b1"}
"""Okabe and Ito's colours; grey where nobody says."""
INK, QUIET, RULE = "#1f2933", "#616e7c", "#d9dee4"
WIDTH_IN, LEFT_IN, BLOCK_IN, AGES_IN, GAP_IN = 11.1, 1.0, 3.1, 6.2, 0.35
AGES = (0.0, 90.0)
PT_PER_SQRT_SCAN, SMALLEST_PT, UNCOUNTED_PT = 0.46, 3.2, 3.4
LABELLED = 8


def draw(path: Path, databases: Iterable[Database]) -> None:
    """Write the picture; its suffix says as what."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    databases = list(databases)
    rows = sorted(site_rows(databases), key=lambda row: -(row["field_strength_tesla"] or -1))
    groups = [(tesla, list(group)) for tesla, group in groupby(rows, key=lambda row: row["field_strength_tesla"])]
    groups.sort(key=lambda item: np.inf if item[0] is None else item[0])
    packed = [(tesla, *_pack(group)) for tesla, group in groups]
    heights = [max(height, 0.62) for *_, height in packed]
    top, bottom = 1.25, 0.7
    total = top + bottom + sum(heights) + GAP_IN * (len(heights) - 1)
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}):
        figure = plt.figure(figsize=(WIDTH_IN, total), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH_IN), ylim=(0, total))
        axes.axis("off")
        y = total - top
        for (tesla, circles, _), height in zip(packed, heights, strict=True):
            _row(axes, tesla, circles, y - height / 2, height)
            y -= height + GAP_IN
        _ages(axes, bottom - 0.12, total - top + 0.1)
        _legend(axes, rows, total)
        _title(axes, stats(databases), total)
        with replacing(path) as aside:
            figure.savefig(aside, format=path.suffix[1:], dpi=160)
        plt.close(figure)


def _radius_in(row: dict) -> float:
    return max(SMALLEST_PT, PT_PER_SQRT_SCAN * np.sqrt(row["scans"])) / 72 if row["scans"] else UNCOUNTED_PT / 72


def _has_range(row: dict) -> bool:
    return row["age_mean_years"] is None and None not in (row["age_min_years"], row["age_max_years"])


def _x_of_age(age: float) -> float:
    return LEFT_IN + AGES_IN * (age - AGES[0]) / (AGES[1] - AGES[0])


def _pack(rows: list[dict]) -> tuple[list[tuple[dict, float, float, float]], float]:
    """(row, x, y about the row's middle, radius) in inches, and the height they take."""
    circles = _swarm([row for row in rows if row["age_mean_years"] is not None])
    circles += _lanes([row for row in rows if _has_range(row)], below=min((y - radius for _, _, y, radius in circles), default=0.0))
    centre = (max((y + r for _, _, y, r in circles), default=0.0) + min((y - r for _, _, y, r in circles), default=0.0)) / 2
    circles = [(row, x, y - centre, radius) for row, x, y, radius in circles]
    circles += _block([row for row in rows if row["age_mean_years"] is None and not _has_range(row)])
    return circles, 2 * max(abs(y) + radius for _, _, y, radius in circles) + 0.06


def _swarm(rows: list[dict]) -> list[tuple[dict, float, float, float]]:
    """Large circles first, each as near the middle as those before it leave room."""
    placed: list[tuple[dict, float, float, float]] = []
    for row in sorted(rows, key=lambda row: (-_radius_in(row), row["database"], row["site"])):
        radius, x = _radius_in(row), _x_of_age(row["age_mean_years"])
        near = [(px, py, radius + pr + 0.012) for _, px, py, pr in placed if abs(px - x) < radius + pr + 0.012]
        reach = [(py, np.sqrt(distance**2 - (px - x) ** 2)) for px, py, distance in near]
        edges = [0.0] + [py + side * (arm + 1e-6) for py, arm in reach for side in (-1, 1)]
        free = [y for y in edges if all(abs(y - py) >= arm for py, arm in reach)]
        placed.append((row, x, min(free, key=lambda y: (abs(y), y)), radius))
    return placed


def _lanes(rows: list[dict], below: float) -> list[tuple[dict, float, float, float]]:
    """Each on a line of its own, the youngest first."""
    placed = []
    for row in sorted(rows, key=lambda row: (row["age_min_years"], row["age_max_years"], row["database"])):
        radius = _radius_in(row)
        placed.append((row, _x_of_age((row["age_min_years"] + min(row["age_max_years"], AGES[1])) / 2), below - 0.04 - radius, radius))
        below -= 0.04 + 2 * radius
    return placed


def _block(rows: list[dict]) -> list[tuple[dict, float, float, float]]:
    """Lines of circles, makers together, filled from the left."""
    left, right = LEFT_IN + AGES_IN + 0.42, LEFT_IN + AGES_IN + BLOCK_IN + 0.4
    lines: list[list[tuple[dict, float, float]]] = [[]]
    x = left
    for row in sorted(rows, key=lambda row: (list(MAKERS).index(_maker(row)), -_radius_in(row), row["database"], row["site"])):
        radius = _radius_in(row)
        if lines[-1] and x + 2 * radius > right:
            lines.append([])
            x = left
        lines[-1].append((row, x + radius, radius))
        x += 2 * radius + 0.03
    heights = [2 * max((radius for *_, radius in line), default=0) + 0.03 for line in lines]
    tops = sum(heights) / 2 - np.cumsum([0, *heights[:-1]])
    return [(row, x, top - height / 2, radius) for line, top, height in zip(lines, tops, heights, strict=True) for row, x, radius in line]


def _maker(row: dict) -> str:
    maker = row["manufacturer"] or "unknown"
    return maker if maker in MAKERS else "other"


def _row(axes, tesla: float | None, circles: list, middle: float, height: float) -> None:
    from matplotlib.patches import Circle

    axes.text(0.3, middle + 0.06, "?" if tesla is None else f"{tesla:g} T", fontsize=15, fontweight="bold", va="center")
    axes.text(0.3, middle - 0.17, f"{len(circles)} site{'s' * (len(circles) != 1)}", fontsize=8, color=QUIET, va="center")
    for row, x, y, radius in circles:
        colour = MAKERS[_maker(row)]
        look = {"facecolor": colour, "alpha": 0.85, "edgecolor": "white"} if row["scans"] else {"facecolor": "white", "edgecolor": colour}
        if _has_range(row):
            ends = [_x_of_age(row["age_min_years"]), _x_of_age(min(row["age_max_years"], AGES[1]))]
            axes.plot(ends, [middle + y] * 2, color=colour, linewidth=1.6, alpha=0.45, solid_capstyle="round", zorder=2)
        axes.add_patch(Circle((x, middle + y), radius, linewidth=0.6 if row["scans"] else 1.1, zorder=3, **look))
    names = [row["database"] for row, *_ in circles]
    for row, x, y, radius in sorted(circles, key=lambda circle: -circle[3])[:LABELLED]:
        name = row["database"] if names.count(row["database"]) == 1 else f"{row['database']}\n{row['site']}"
        name = name if "\n" in name else name.replace("_", "\n")
        size = min(7.5, 1.6 * radius * 72 / (0.66 * max(map(len, name.split("\n")))))
        if size >= 4.5:
            axes.text(x, middle + y, name, fontsize=size, color="white", ha="center", va="center", zorder=4, linespacing=0.95)


def _ages(axes, low: float, high: float) -> None:
    for age in range(int(AGES[0]), int(AGES[1]) + 1, 10):
        x = _x_of_age(age)
        axes.plot([x, x], [low, high], color=RULE, linewidth=0.6, zorder=0)
        axes.text(x, low - 0.06, str(age), ha="center", va="top", color=QUIET)
    words = "mean age of a site, years (a bar: its range, where the mean is not published)"
    axes.text(LEFT_IN + AGES_IN / 2, low - 0.28, words, ha="center", va="top")
    x = LEFT_IN + AGES_IN + 0.3
    axes.plot([x, x], [low, high], color=RULE, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
    axes.text(x + 0.12 + BLOCK_IN / 2, low - 0.28, "age not published", ha="center", va="top")


def _legend(axes, rows: list[dict], total: float) -> None:
    from matplotlib.patches import Circle

    x, y = LEFT_IN, total - 0.95
    for maker, colour in MAKERS.items():
        number = sum(_maker(row) == maker for row in rows)
        if number:
            axes.add_patch(Circle((x + 0.06, y), 0.06, facecolor=colour, edgecolor="white", alpha=0.85))
            text = f"{maker} ({number})" if maker != "unknown" else f"maker unknown ({number})"
            axes.text(x + 0.18, y, text, va="center")
            x += 0.42 + 0.078 * len(text)
    x = LEFT_IN + AGES_IN + 0.3
    for scans in (30, 300, 1000):
        radius = _radius_in({"scans": scans})
        axes.add_patch(Circle((x + radius, y), radius, facecolor="none", edgecolor=QUIET, linewidth=0.8))
        axes.text(x + 2 * radius + 0.06, y, f"{scans}", va="center", color=QUIET)
        x += 2 * radius + 0.22 + 0.07 * len(str(scans))
    axes.text(x, y, "scans", va="center", color=QUIET)
    axes.add_patch(Circle((x + 0.58, y), UNCOUNTED_PT / 72, facecolor="white", edgecolor=QUIET, linewidth=1.1))
    axes.text(x + 0.68, y, "not counted", va="center", color=QUIET)


def _title(axes, figures: dict, total: float) -> None:
    axes.text(0.3, total - 0.3, "What the corpus is", fontsize=16, fontweight="bold", va="center")
    words = f"{figures['databases']} databases, {figures['sites']} sites, {figures['places']} places, {figures['scans']:,} scans"
    axes.text(0.3, total - 0.58, words, fontsize=10.5, color=QUIET, va="center")
