"""What a job of an array logs, without its training: ``one_job.py URI-or-none FOLD``; a parent of all jobs, a child of its own."""

import sys
from pathlib import Path

from lod_model.tracking import Tracker


def main() -> None:
    uri, fold = sys.argv[1], int(sys.argv[2])
    tracker = Tracker("array", uri=None if uri == "none" else uri)
    parent = tracker.run("run", name="run", tags={"split_hash": "s"})
    tracker.params(parent, {"train.seed": 0})
    child = tracker.run(f"run/{fold}", name=f"run-fold-{fold}", parent=parent, tags={"fold": str(fold)})
    with tracker.underway(parent), tracker.underway(child, machine=True):
        for step in range(5):
            tracker.metrics(child, {"loss": 1 / (1 + step + fold), "dice": step / 5}, step=step)
        note = Path(f"note-{fold}.txt")
        note.write_text(f"fold {fold}")
        tracker.artifacts(child, [note])
    tracker.finish(child)
    tracker.finish(parent)


if __name__ == "__main__":
    main()
