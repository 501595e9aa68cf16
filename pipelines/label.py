"""Labels for scans that have none: runs an installed recon-all, run_fastsurfer.sh or mri_synthseg over them, then `pipelines.index` finds the maps.

Not a stage of ``dvc repro``: it takes hours a scan, and what it makes belongs to the databases (or to ``index.labels``, where those cannot be
written). A scan with its label map in place is skipped; one that fails is a line, with its log in ``logs/label``, and the others go on::

    python -m pipelines.label --tool synthseg                                    # over this machine's workers
    python -m pipelines.label --tool recon-all --launcher slurm --threads 4      # an array of jobs, a scan a task
"""

import argparse
import logging
import math
import os
import sys
from collections import Counter
from pathlib import Path

from data_registry import protocol, slurm
from data_registry.errors import InputError, run_stage
from data_registry.ledgers import withdrawn
from data_registry.params import Params, load_params
from data_registry.schema import read_table
from pipelines.index import SCANS_TABLE, find_databases, labels_folder, scan_name
from pipelines.label_scan import WORK, Work, label_scan
from pipelines.labellers import TOOLS, check_installed, place
from pipelines.parallel import run_bounded
from pipelines.progress import Scans

log = logging.getLogger("lodbrain.label")
CHECKOUT = Path(__file__).resolve().parents[1]
LOGS = Path("logs/label")
AN_ARRAY = 1000  # SLURM's own limit, where its administrator has set none
MARGIN_HOURS = 0.5  # of a job beyond its tool's time, so that the tool is stopped here, with a line, and not by SLURM


def main() -> None:
    """Label the scans of tables/scans.parquet that have no labels yet, by an installed tool."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.label", description=main.__doc__)
    parser.add_argument("--tool", required=True, choices=TOOLS)
    parser.add_argument("--database", help="of one database alone")
    parser.add_argument("--launcher", choices=("local", "ray", "slurm"), help="default: resources.launcher of params.yaml")
    parser.add_argument("--limit-hours", type=float, default=24, help="of one scan (default: 24)")
    parser.add_argument("--threads", type=int, help="of one scan (default: 1; of a SLURM job its cpus)")
    parser.add_argument("--project", type=Path, default=Path(), help="the folder of params.yaml (default: the current one)")
    parser.add_argument("--scan", action="append", help="these alone, one after the other in this process: what a SLURM job runs")
    given = parser.parse_args()
    if not 0 < given.limit_hours < math.inf or (given.threads is not None and given.threads < 1):
        raise InputError(f"--limit-hours {given.limit_hours:g}, --threads {given.threads}; finite numbers above 0 are wanted")
    os.chdir(given.project)
    params = load_params()
    launcher = given.launcher or params.resources.launcher
    threads = given.threads or (params.resources.slurm.label.cpus if launcher == "slurm" and not given.scan else 1)
    todo = plan(given.tool, params, database=given.database, scans=given.scan, threads=threads, limit_s=3600 * given.limit_hours)
    label(todo, params, launcher="here" if given.scan else launcher)


def plan(tool: str, params: Params, *, database: str | None, scans: list[str] | None, threads: int, limit_s: float) -> list[Work]:
    """The scans to be labelled: usable ones without labels that a stored protocol reads, and without a finished result of the tool."""
    gone, rows = withdrawn(), read_table(SCANS_TABLE, "scans").to_pylist()
    rows = {row["scan_id"]: row for row in rows if row["reason"] is None and not gone.has_scan(row["scan_id"])}
    if unknown := set(scans or ()) - set(rows):
        raise InputError(f"{SCANS_TABLE}: no usable scan {', '.join(sorted(unknown))}; run `python -m pipelines.index` again")
    roots, labels = find_databases([Path(root) for root in params.index.roots]), labels_folder(params.index)
    if missing := ({database} if database else {row["database"] for row in rows.values()}) - set(roots):
        raise InputError(f"database {', '.join(sorted(missing))} is below no root of params.yaml; one of {', '.join(roots)} is wanted")
    read = {source for name in params.harmonise.stored_protocols for source in protocol.load(name).sources}
    todo = []
    for scan_id, row in rows.items():
        has = {label["source"] for label in row["labels"]}
        if (scans and scan_id not in scans) or (database and row["database"] != database) or (has & read if read else has):
            continue
        root = roots[row["database"]].absolute()
        work = Work(
            tool=tool, scan=row, name=scan_name(row["t1w_path"]), t1w=root / row["t1w_path"], base=labels / row["database"] if labels else root,
            log=(LOGS / f"{scan_id}.log").absolute(), threads=threads, limit_s=limit_s,
        )  # fmt: skip
        if not place(TOOLS[tool], work.base, row, work.name)[1].is_file():
            todo.append(work)
    log.info("%d usable scans, %d to be labelled by %s", len(rows), len(todo), tool)
    return todo


def label(todo: list[Work], params: Params, *, launcher: str) -> None:
    """Label them; :class:`InputError` in the end if any failed, with their number, or in the beginning if the tool cannot run."""
    if not todo:
        return
    if launcher != "slurm" or not params.resources.slurm.setup:  # whose lines may make it known in the job alone
        check_installed(todo[0].tool)
    for base in {work.base for work in todo}:
        try:
            (base / WORK / todo[0].tool).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{base}: {error.strerror}; a folder that can be written, or index.labels in params.yaml, is wanted") from None
    if launcher == "here":
        failed = _here(todo)
    elif launcher == "slurm":
        failed = _by_slurm(todo, params)
    else:
        failed = _by_ray(todo, params, launcher)
    log.info("%d of %d scans labelled; `python -m pipelines.index` takes them up", len(todo) - len(failed), len(todo))
    if failed:
        first = next(iter(failed))
        if len(todo) == 1:
            raise InputError(f"{first}: {failed[first]}")
        raise InputError(f"{len(failed)} of {len(todo)} scans failed, e.g. {first}: {failed[first]}; the same command tries them again")


def _here(todo: list[Work]) -> dict[str, str]:
    """One after the other in this process; why those failed that did, by scan_id, as of the other two."""
    failed = {}
    for work in todo:
        try:
            label_scan(work)
        except Exception as error:  # whatever one scan does, the others go on
            _note(failed, work, error)
    return failed


def _by_ray(todo: list[Work], params: Params, launcher: str) -> dict[str, str]:
    """As tasks of a Ray cluster: one of this machine alone, or one that runs already."""
    resources, tool = params.resources, TOOLS[todo[0].tool]
    address = resources.ray_address if launcher == "ray" else None
    if launcher == "ray" and not (address or os.environ.get("RAY_ADDRESS")):
        raise InputError("--launcher ray: no cluster; resources.ray_address in params.yaml, or a Ray job, is wanted")
    memory = int(1e9 * (resources.task_gb or tool.memory_gb))
    deaths: Counter[int] = Counter()
    failed: dict[str, str] = {}

    def again(index: int, death: str) -> tuple | None:
        deaths[index] += 1
        progress.retries += 1
        return (todo[index],) if deaths[index] < resources.tries else None

    with Scans("label", len(todo)) as progress:
        items = [(work,) for work in todo]
        results = run_bounded(
            label_scan, items, memory=[memory] * len(todo), again=again, workers=resources.workers, address=address, cpus=todo[0].threads
        )
        for index, result in results:
            progress.done += 1
            if isinstance(result, Exception):
                progress.quarantined += 1
                _note(failed, todo[index], result)
    return failed


def _by_slurm(todo: list[Work], params: Params) -> dict[str, str]:
    """As arrays of jobs, a scan a task, one array at a time; scans that an earlier array is at are waited for."""
    settings, failed = params.resources.slurm, {}
    first = todo[0]
    hours = first.limit_s / 3600 + MARGIN_HOURS + settings.warning_s / 3600
    job = settings.label.model_copy(update={"hours": hours, "cpus": first.threads, "nodes": 1, "tasks_per_node": 1})
    name = f"label-{first.tool}"
    there = {task: at for task, (at, _) in slurm.at_work().items()}
    left = {there[task]: work.scan["scan_id"] for work in todo if (task := f"{name}/{work.scan['scan_id']}") in there}
    new = [work for work in todo if work.scan["scan_id"] not in left.values()]
    modules = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))  # the project's folder need not have the code
    command = [
        "env", f"PYTHONPATH={modules}", sys.executable, "-m", "pipelines.label",
        "--tool", first.tool, "--limit-hours", f"{first.limit_s / 3600:g}", "--threads", str(first.threads),
    ]  # fmt: skip
    for start in range(0, max(len(new), 1), AN_ARRAY):
        tasks = [
            slurm.Task(f"{name}/{work.scan['scan_id']}", slurm.step([*command, "--scan", work.scan["scan_id"]], job))
            for work in new[start : start + AN_ARRAY]
        ]
        own = {at: task.removeprefix(f"{name}/") for at, task in slurm.submit(name, tasks, job, settings).items()}
        failed |= slurm.wait_for(left | own, cancel={at.job for at in own})
        left = {}
    return failed


def _note(failed: dict[str, str], work: Work, error: Exception) -> None:
    """A line for a scan without labels."""
    why = (str(error).strip() or type(error).__name__).splitlines()[-1]
    failed[work.scan["scan_id"]] = why
    log.warning("%s: %s", work.scan["scan_id"], why)


if __name__ == "__main__":
    run_stage(main)
