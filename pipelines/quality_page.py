"""The pages of the stage *quality*: ``quality.html``, all sites in a table and the most suspicious scans, and a page a site with all of its scans.

Each page is one file that opens offline: pictures are in it, and there is a page a site so that none grows with the number of sites. Three slices
a scan, radiological (the patient's left is on the right of axial and coronal slices), the labels' outline on them.
"""

import io
import shutil
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

import numpy as np

from data_registry.files import replacing
from data_registry.quality_head import filled
from data_registry.quality_labels import CLASSES, class_of_id
from data_registry.quality_rules import FIGURE_NAMES

SIDE = 144            # pixels of a slice
OUTLINE = (255, 140, 0)
SHOWN = 100           # scans on the first page
LEFT_OUT_SHOWN = 200
BELOW_TOP = 0.27      # of the field of view, from the top of the head to the middle of the brain, where no labels tell
FIGURES = ("snr_wm", "snr_gm", "cnr", "cjv", "unevenness", "snrd", "fber", "efc", "ghost_share")
NAMES = FIGURE_NAMES | {"snr_gm": "signal to noise of grey matter", "efc": "entropy focus criterion", "ghost_share": "share of bright air"}


def thumbnail(t1w: np.ndarray, ids: np.ndarray | None, *, classes: str = CLASSES) -> bytes:
    """JPEG, SIDE × 3 SIDE pixels: axial, coronal and sagittal slice of a T1w (D, H, W) uint8 LIA, the brain's labels (``classes``) outlined."""
    from PIL import Image
    from scipy import ndimage

    table = class_of_id(classes)
    left, inferior, anterior = _middle(t1w, ids, table)
    panels = []
    for cut, turned in (((slice(None), inferior, slice(None, None, -1)), True), ((slice(None), slice(None), anterior), True),
                        ((left, slice(None), slice(None, None, -1)), False)):  # fmt: skip
        grey = t1w[cut].T if turned else t1w[cut]
        panel = np.repeat(np.array(Image.fromarray(np.ascontiguousarray(grey)).resize((SIDE, SIDE), Image.Resampling.BOX))[..., None], 3, axis=2)
        if ids is not None:
            inside = (table[ids[cut].T if turned else ids[cut]] > 0).view(np.uint8)
            inside = np.array(Image.fromarray(np.ascontiguousarray(inside)).resize((SIDE, SIDE), Image.Resampling.NEAREST)) > 0
            closed = ndimage.binary_closing(np.pad(inside, 8), iterations=4)  # the brain's rim, not each sulcus
            inside = filled(closed)[8:-8, 8:-8]
            panel[inside & ~ndimage.binary_erosion(inside)] = OUTLINE
        panels.append(panel)
    file = io.BytesIO()
    Image.fromarray(np.concatenate(panels, axis=1)).save(file, format="JPEG", quality=75, subsampling=0)
    return file.getvalue()


def _middle(t1w: np.ndarray, ids: np.ndarray | None, table: np.ndarray) -> tuple[int, int, int]:
    """Voxel through which the slices go: the middle of the brain's labels, else below the top of what is bright; to about 4 mm."""
    step = max(1, t1w.shape[0] // 64)
    brain = np.zeros(1, bool) if ids is None else table[ids[::step, ::step, ::step]] > 0
    if brain.any():
        ends = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        return tuple(int(line[0] + line[-1]) * step // 2 for line in ends)
    coarse = t1w[::step, ::step, ::step]
    bright = coarse > coarse.mean()
    rows = np.flatnonzero(bright.mean(axis=(0, 2)) > 0.01)
    inferior = min(len(coarse) - 1, int((rows[0] if len(rows) else 0) + BELOW_TOP * len(coarse)))
    plane = np.argwhere(bright[:, : inferior + 1])
    left, _, anterior = plane.mean(0) if len(plane) else np.array(coarse.shape) / 2
    return int(left) * step, inferior * step, int(anterior) * step


def write_pages(folder: Path, table: list[dict], pictures: dict[str, str], left_out: list[dict]) -> None:
    """Write all pages of rows of the table quality (with ``beside`` and ``warnings``) and ``pictures`` (base64 JPEG by scan_id); others go."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined)  # fmt: skip
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    template = environment.get_template("quality.html.j2")
    ordered = sorted(table, key=lambda row: (-row["suspicion"], row["scan_id"]))
    sites = defaultdict(list)
    for row in ordered:
        sites[f"{row['database']}.{row['site']}"].append(row)
    pages = {name: f"site={quote(name, safe=' ')}.html" for name in sites}
    summary = [_summary(name, rows) | {"page": quote(pages[name])} for name, rows in sites.items()]
    summary.sort(key=lambda site: (-site["fail"], -site["review"], site["site"]))
    folder.mkdir(exist_ok=True)
    common = {"figures": FIGURES, "names": NAMES, "pictures": pictures, "side": SIDE}
    suspicious = [row for row in ordered if row["verdict"] != "pass"]
    shown = ordered[: max(20, min(SHOWN, len(suspicious)))]
    more = {"left_out": left_out[:LEFT_OUT_SHOWN], "left_out_total": len(left_out), "more": len(suspicious) - len(shown)}
    files = {"quality.html": {"title": "Quality of all scans", "scans": shown, "total": len(table), "sites": summary} | more}
    for name, rows in sites.items():
        files[pages[name]] = {"title": name, "scans": rows, "total": len(rows), "sites": [], "left_out": [], "left_out_total": 0, "more": 0}
    for name, content in files.items():
        with replacing(folder / name) as aside:
            aside.write_text(template.render(**content, **common), encoding="utf-8")
    for path in folder.iterdir():
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _summary(name: str, rows: list[dict]) -> dict:
    """A site in a line: scans by verdict, and medians of the figures that it has."""
    medians = {}
    for figure in FIGURES:
        values = [row[figure] for row in rows if row.get(figure) is not None]
        medians[figure] = float(np.median(values)) if values else None
    return {"site": name, "scans": len(rows), "medians": medians} | {v: sum(row["verdict"] == v for row in rows) for v in ("pass", "review", "fail")}
