"""Stage *quality*: shards → ``tables/quality.parquet``, a row a scan with figures, verdict and reasons, and ``quality/quality.html`` to look at.

Figures are those of :mod:`data_registry.quality`, rules those of :mod:`data_registry.quality_rules`. What is found in a shard is kept below
``cache/quality/`` under the shard's hash, so that a run that was stopped, or a new subject, costs only what is new. Rules that compare a scan with
its site are asked at the end, over all of them. No scan is left out here: who wants that says ``split.quality: exclude_fail``.
"""

import base64
import json
import logging
from collections import defaultdict
from pathlib import Path

import numpy as np

from data_registry import protocol
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.intensity import Intensity, Preparation, above_air
from data_registry.ledgers import Withdrawn, withdrawn
from data_registry.params import Resources, fingerprint, load_params
from data_registry.quality import measure
from data_registry.quality_labels import CLASSES, TISSUES
from data_registry.quality_rules import beside_site, judge, suspicion
from data_registry.schema import read_table, table_metadata, write_table
from data_registry.shard_store import ShardStore, open_store
from pipelines.harmonise import SAMPLES_TABLE
from pipelines.index import SCANS_TABLE
from pipelines.parallel import Death, run_bounded
from pipelines.progress import Scans
from pipelines.quality_page import thumbnail, write_pages

log = logging.getLogger("lodbrain.quality")
QUALITY_TABLE = Path("tables/quality.parquet")
PAGES = Path("quality")
FOUND = Path("cache/quality")
FIGURES_VERSION = 2
"""Part of what is kept; raise it when a change of code changes a figure or a picture."""
FEW = 64
"""Scans that are looked at sooner than Ray has started."""


def main() -> None:
    """Look at all harmonised scans of the current folder."""
    params = load_params()
    gone = withdrawn()
    rows = [row for row in read_table(SAMPLES_TABLE, "samples").to_pylist() if not gone.has_scan(row["scan_id"])]
    samples, left_out = [row for row in rows if row["status"] == "ok"], [row for row in rows if row["status"] != "ok"]
    scans = {row["scan_id"]: row for row in read_table(SCANS_TABLE, "scans").to_pylist()}
    left_out += [row for row in scans.values() if row["reason"] is not None and not gone.has_scan(row["scan_id"])]
    preparation = json.loads(table_metadata(SAMPLES_TABLE).get("preparation", "{}"))
    items = plan_looks(samples, preparation.get("intensity", "robust"))
    FOUND.mkdir(parents=True, exist_ok=True)
    _look_at_all([item for item in items if _kept(item["found"]) is None], open_store(params.resources), params.resources)
    found = {one["scan_id"]: one for item in items for one in _kept(item["found"])}
    table = verdicts(samples, {name: one["figures"] for name, one in found.items()}, {name: row["age_years"] for name, row in scans.items()})
    write_pages(PAGES, table, {name: one["picture"] for name, one in found.items()}, left_out)
    write_table(QUALITY_TABLE, "quality", [{key: value for key, value in row.items() if key not in ("beside", "warnings")} for row in table])
    wanted = {Path(item["found"]).name for item in items}
    for path in [path for path in FOUND.iterdir() if path.name not in wanted]:
        path.unlink()
    number = {verdict: sum(row["verdict"] == verdict for row in table) for verdict in ("pass", "review", "fail")}
    log.info("%s: %d scans, %s", QUALITY_TABLE, len(table), ", ".join(f"{count} {verdict}" for verdict, count in number.items()))
    print(f"quality: {PAGES / 'quality.html'}")


def forget(gone: Withdrawn) -> int:
    """Delete what is kept of shards that held who is withdrawn, and what cannot be read; how many files."""
    number = 0
    for path in sorted(FOUND.glob("*.json")):
        found = _kept(path)
        if found is None or any(gone.has_scan(one["scan_id"]) for one in found):
            path.unlink()
            number += 1
    return number


def plan_looks(samples: list[dict], intensity: Intensity) -> list[dict]:
    """An item a shard: its samples, how its intensities were made, and the file that keeps what is found in it."""
    members = defaultdict(list)
    for row in samples:
        members[row["shard"]].append(row)
    items = []
    for shard, rows in sorted(members.items()):
        key = fingerprint(FIGURES_VERSION, rows[0]["shard_sha256"], intensity)
        items.append({"shard": shard, "samples": rows, "intensity": intensity, "found": str((FOUND / f"{key}.json").absolute())})
    return items


def verdicts(samples: list[dict], figures: dict[str, dict], ages: dict[str, float | None]) -> list[dict]:
    """Rows of the table, by scan_id, each with ``beside``, how far the scan stands out from its site, and harmonise's ``warnings``."""
    sites = defaultdict(list)
    for row in samples:
        sites[row["database"], row["site"]].append(row)
    table = []
    for rows in sites.values():
        own = [figures[row["scan_id"]] for row in rows]
        for row, mine, beside in zip(rows, own, beside_site(own), strict=True):
            verdict, reasons = judge(mine, age_years=ages.get(row["scan_id"]), beside=beside, warnings=row["warnings"] or ())
            judged = {"verdict": verdict, "reasons": reasons, "suspicion": suspicion(verdict, reasons, beside)}
            judged |= {"beside": beside, "warnings": row["warnings"]}
            table.append({key: row[key] for key in ("scan_id", "database", "site", "shard_sha256")} | judged | mine)
    return sorted(table, key=lambda row: row["scan_id"])


def look_at_shard(store: ShardStore, item: dict) -> int:
    """One task: figures and picture of each scan of a shard, written as JSON, whole or not at all. Returns how many."""
    found = []
    for row in item["samples"]:
        classes, source = _labels_of(row)
        columns = ["t1w_x1"] + [f"{source}_x1"] * (source is not None)
        arrays = store.read_row(row["shard"], row["row_group"], columns, scan_id=row["scan_id"], sha256=row["shard_sha256"])
        t1w, ids = above_air(arrays["t1w_x1"], Preparation(item["intensity"])), arrays.get(f"{source}_x1")
        affine, native_affine = (np.reshape(row[name], (4, 4)) for name in ("affine", "native_affine"))
        shape = tuple(row["native_shape"])
        where = {"affine": affine, "native_affine": native_affine, "native_shape": shape}
        figures = measure(t1w, ids, **where, classes=classes, untouched=item["intensity"] == "robust")
        picture = base64.b64encode(thumbnail(t1w, ids, classes=classes)).decode()
        found.append({"scan_id": row["scan_id"], "figures": figures, "picture": picture})
    with replacing(item["found"]) as aside:
        aside.write_text(json.dumps(found), encoding="utf-8")
    return len(found)


def _labels_of(sample: dict) -> tuple[str, str | None]:
    """The protocol that tissues are taken from, and the source whose label map has them; the default and None without one."""
    read = ((name, source) for name in (CLASSES, *TISSUES) for source in protocol.load(name).sources if source in sample["label_sources"])
    return next(read, (CLASSES, None))


def _kept(path: str | Path) -> list[dict] | None:
    """What was found in a shard; None if nothing, or nothing whole, is there."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _look_at_all(todo: list[dict], store: ShardStore, resources: Resources) -> None:
    total = sum(len(item["samples"]) for item in todo)
    if total <= FEW:
        for item in todo:
            look_at_shard(store, item)
        return
    deaths = dict.fromkeys(range(len(todo)), 0)

    def again(index: int, _: Death) -> tuple | None:
        deaths[index] += 1
        return (store, todo[index]) if deaths[index] < resources.tries else None

    failed = []
    memory = [int(0.4e9 + 6 * max(np.prod(row["shape"]) for row in item["samples"])) for item in todo]
    with Scans("quality", total) as progress:
        tasks = [(store, item) for item in todo]
        for index, result in run_bounded(look_at_shard, tasks, memory=memory, again=again, workers=resources.workers, address=resources.ray_address):
            if isinstance(result, Exception):
                failed.append(f"{todo[index]['shard']}: {(str(result).strip() or type(result).__name__).splitlines()[-1]}")
            else:
                progress.done += result
    if failed:
        raise InputError(f"{len(failed)} shards could not be looked at, e.g. {failed[0]}; run the stage again, what was found is kept")


if __name__ == "__main__":
    run_stage(main, about=__doc__)
