"""Runs of one MLflow store into another, by their unique tag; doing it again sends only what is new.

Of two sources of one run (a parent of several jobs, a job after its requeue) figures, settings and files add up. Where they differ, in
status or in a tag, the one touched last decides: a run is touched when it ends, by a figure, or by a file.
"""

import logging
from collections import Counter
from pathlib import Path

from lod_model.tracking_store import KEY_TAG, PARENT_TAG, Figure, Store

log = logging.getLogger("lodbrain.tracking")
TOUCHED_TAG = "lodbrain.touched"
"""On a merged run: when the source that decided its status was touched."""
OF_BIRTH = ("git", "slurm_job")
"""Tags that a run keeps from whoever made it, like all of MLflow's own."""


def merge(source: Store, to: Store) -> Counter:
    """All runs of an SQLite file that carry the tag; returns how many runs, new ones, figures, params, tags, files and ends were sent.

    StoreError if one of the stores does not answer: what was sent stays, and the next call goes on from there.
    """
    done = Counter(runs=0)
    for experiment in source.experiments():
        ids: dict[str, str | None] = {}
        for run in source.runs(experiment):
            if KEY_TAG in run.data.tags:
                ids[run.info.run_id] = _merge_run(source, run, to, experiment, ids, done)
            else:
                done["without key"] += 1
    return done


def _merge_run(source: Store, run, to: Store, experiment: str, ids: dict[str, str | None], done: Counter) -> str | None:
    """One run; ``ids`` maps those before it, parents among them. Its id at the other end, None where it was deleted on purpose."""
    tags, key = dict(run.data.tags), run.data.tags[KEY_TAG]
    if parent := ids.get(tags.pop(PARENT_TAG, "")):
        tags[PARENT_TAG] = parent
    other = to.find(experiment, key)
    if other is not None and other.info.lifecycle_stage != "active":
        log.warning("%s: run %s is deleted there and stays so", to.name, key)
        return None
    if is_new := other is None:
        other = to.make(experiment, key, name=run.info.run_name, tags=tags, start=run.info.start_time)
    done.update(runs=1, new=is_new)
    there = other.info.run_id
    files = source.local_files(run)
    own, known = _histories(source, run, run.data.metrics), _histories(to, other, run.data.metrics)
    touched = max(_last(run, own), *(_changed(path) for path in files.values()), 0)
    before = 0 if is_new else max(_last(other, known), int(other.data.tags.get(TOUCHED_TAG, 0)))
    later = touched > before

    figures = sorted(own - known, key=lambda figure: (figure.step, figure.timestamp))
    params = {name: value for name, value in run.data.params.items() if name not in other.data.params}
    tags = {name: value for name, value in tags.items() if _is_news(name, value, other.data.tags, later)}
    to.add(there, params=params, tags=tags, figures=figures)
    uploaded = to.uploaded(there) if files else set()
    for name, path in files.items():
        if name not in uploaded or _changed(path) > before:
            to.upload(there, path, folder=str(Path(name).parent).removeprefix("."))
            done["files"] += 1
    if later:
        if run.info.status != other.info.status or run.info.end_time != other.info.end_time and run.info.status != "RUNNING":
            to.set_status(there, run.info.status, end=run.info.end_time)
            done["ends"] += 1
        to.add(there, tags={TOUCHED_TAG: touched})  # last: who is interrupted before sends the rest again
    done.update(figures=len(figures), params=len(params), tags=len(tags))
    return there


def _histories(store: Store, run, names) -> set[Figure]:
    """All values of these metrics that a run has; NaN, which equals nothing, is left out."""
    found = (figure for name in names if name in run.data.metrics for figure in store.history(run.info.run_id, name))
    return {figure for figure in found if figure.value == figure.value}


def _last(run, figures: set[Figure]) -> int:
    """When a run ended or, if it goes on, had its last figure, or began."""
    if run.info.status != "RUNNING" and run.info.end_time:
        return run.info.end_time
    return max((figure.timestamp for figure in figures), default=run.info.start_time)


def _changed(path: Path) -> int:
    return int(path.stat().st_mtime * 1000)


def _is_news(name: str, value: str, known: dict[str, str], later: bool) -> bool:
    """That a tag is missing at the other end, or changed by a source that was touched later."""
    if name not in known:
        return True
    return later and known[name] != value and not name.startswith(("mlflow.", "lodbrain.")) and name not in OF_BIRTH
