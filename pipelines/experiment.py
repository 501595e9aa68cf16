"""Run an experiment of a paper: the arms of ``params/<experiment>.yaml``, one after the other, and the table of them.

    python -m pipelines.experiment params/vinn_ablation.yaml --data /data/bids [/data/more] [--out runs/vinn_ablation] [--smoke]

An arm is a project folder, ``<out>/arms/<name>``, with its own ``params.yaml``; its stages run there as they would alone. Arms whose data are
prepared alike share one index and one set of shards, ``<out>/data/<hash>``. An arm that is finished under the settings, data and code that
stand is skipped, and so is what is finished of one that is not: a run that was stopped goes on by the same command.

``--smoke`` runs the same path in minutes, with what the file says for it; without ``--data`` on the synthetic sites, which it builds if they
are not there. Its table says that its figures mean nothing.
"""

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from data_registry import protocol
from data_registry.errors import InputError, run_stage
from data_registry.experiment import Experiment, arm_params, load_experiment
from data_registry.files import replacing, sha256
from data_registry.params import Params, fingerprint
from pipelines.demo import build_sites
from pipelines.index import find_databases
from pipelines.project import CHECKOUT, DEMO_ROOT, stage_environment

log = logging.getLogger("lodbrain.experiment")
CODE = ("pipelines/split.py", "data_registry/split.py", "lod_model/train.py", "lod_model/evaluate.py", "lod_model/metrics.py")
"""What ``dvc.yaml`` makes an arm's stages depend on."""
SHARED_TABLES = ("scans.parquet", "samples.parquet")


def main() -> None:
    """Run what is not finished, then make the table; prints it and where it stands."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.experiment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="params/<experiment>.yaml")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="BIDS databases, or folders of them")
    parser.add_argument("--out", type=Path, help="default: runs/<experiment>, with --smoke runs/<experiment>-smoke")
    parser.add_argument("--smoke", action="store_true", help="the same path in minutes; its figures mean nothing")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment)
    name = re.sub(r"[^a-z0-9_]", "_", arguments.experiment.stem.lower())
    out = (arguments.out or CHECKOUT / "runs" / (name + "-smoke" * arguments.smoke)).resolve()
    roots = [os.path.abspath(root) for root in arguments.data or [CHECKOUT / DEMO_ROOT]]
    arms = arm_params(arguments.experiment, experiment, smoke=arguments.smoke, given={"index": {"roots": roots}})
    if not arguments.data and not arguments.smoke:
        raise InputError(f"{arguments.experiment}: --data is missing; BIDS databases with labels are wanted ({experiment.data}), or --smoke")
    if not arguments.data:
        build_sites(CHECKOUT / DEMO_ROOT)
    find_databases([Path(root) for root in roots])
    run(name, arms, out)
    command = f"python -m pipelines.experiment {shlex.quote(str(arguments.experiment))} --data DATA"
    describe(out, experiment, list(arms), name=name, file=arguments.experiment, roots=roots, full=command * arguments.smoke)
    _stage(out, "lod_model.experiment_table", str(out), where="table")
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"table: {out / 'table.md'}, {out / 'table.tsv'}")


def run(name: str, arms: dict[str, Params], out: Path) -> None:
    """Prepare the data of all arms, then train and score those that are not finished."""
    folders = {arm: out / "data" / fingerprint(params.index, params.harmonise)[:8] for arm, params in arms.items()}
    for number, folder in enumerate(dict.fromkeys(folders.values()), start=1):
        params = next(params for arm, params in arms.items() if folders[arm] == folder)
        _settle(folder, params, folder, name)
        judged = any(params.split.quality != "report" for arm, params in arms.items() if folders[arm] == folder)
        for stage in ("index", "harmonise", *(["quality"] if judged else [])):
            _stage(folder, f"pipelines.{stage}", where=f"data {number} of {len(set(folders.values()))}, {params.harmonise.grid}")
    for number, (arm, params) in enumerate(arms.items(), start=1):
        _run_arm(f"arm {number} of {len(arms)}, {arm}", f"{name}_{arm}", params, folders[arm], out / "arms" / arm)


def _run_arm(where: str, name: str, params: Params, data: Path, folder: Path) -> None:
    """Split, train and evaluate in the arm's folder, on the shards of ``data``; ``arm.json`` is written last."""
    code = [sha256(CHECKOUT / path) for path in CODE]
    shared = SHARED_TABLES + (("quality.parquet",) if params.split.quality != "report" else ())
    tables = [sha256(data / "tables" / table) for table in shared]
    versions = [protocol.load(table).version for table in params.train.protocols]
    identity = fingerprint(params.model_dump(mode="json", exclude={"resources", "index"}), tables, versions, code)
    done = folder / "arm.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["fingerprint"] == identity:
        log.info("%s: finished before", where)
        return
    _settle(folder, params, data, name)
    for table in shared:
        with replacing(folder / "tables" / table) as aside:
            shutil.copyfile(data / "tables" / table, aside)
    _stage(folder, "pipelines.split", where=where)
    _stage(folder, "lod_model.train", "--network", params.networks[0], where=where)
    _stage(folder, "lod_model.evaluate", where=where)
    with replacing(done) as aside:
        aside.write_text(json.dumps({"fingerprint": identity, "network": params.networks[0]}) + "\n", encoding="utf-8")


def _settle(folder: Path, params: Params, data: Path, name: str) -> None:
    """The folder with its ``params.yaml``: named after the arm, on the shards of ``data``, all arms in one MLflow store."""
    store = folder.parents[1] / "mlflow"
    store.mkdir(parents=True, exist_ok=True)
    uri = params.resources.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store / 'mlflow.db'}"
    weights = tuple(str((CHECKOUT / path).resolve()) for path in params.evaluate.reference_weights)
    params = params.model_copy(update={
        "experiment": name,
        "evaluate": params.evaluate.model_copy(update={"reference_weights": weights}),
        "resources": params.resources.model_copy(update={
            "mlflow_uri": uri, "shards": _shards(params.resources.shards, data), "cache_folder": str(data / params.resources.cache_folder),
        }),
    })  # fmt: skip
    with replacing(folder / "params.yaml") as aside:
        aside.write_text(yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _shards(chosen: str, data: Path) -> str:
    """Where the shards of ``data`` stand: in it, or, each in a place of its own, below the URL or whole path that the settings name."""
    return f"{chosen.rstrip('/')}/{data.name}" if "://" in chosen or Path(chosen).is_absolute() else str(data / chosen)


def _stage(folder: Path, module: str, *arguments: str, where: str) -> None:
    """Run a stage in its folder; what it says goes to ``log.txt`` there, and the last line of one that fails into the :class:`InputError`."""
    begin, stage = time.perf_counter(), module.rpartition(".")[2]
    with open(folder / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"# {module}\n")
        file.flush()
        status = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=folder, env=stage_environment(), stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        last = [line for line in (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-1]
        reason = last.removeprefix("error: ")
        raise InputError(f"{where}: {stage} ended with status {status}: {reason} (all it said: {folder / 'log.txt'}; finished work is kept)")
    log.info("%s: %s, %.0f s", where, stage, time.perf_counter() - begin)


def describe(out: Path, experiment: Experiment, arms: list[str], *, name: str, file: Path, roots: list[str], full: str) -> None:
    """``experiment.json``, what the table is made by; ``full``: the command of the full run, empty if this is it."""
    published = str((file.parent / experiment.table.published).resolve()) if experiment.table.published else ""
    content = {"name": name, "arms": arms, "roots": roots, "full": full, "published": published, "experiment": experiment.model_dump(mode="json")}
    with replacing(out / "experiment.json") as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
