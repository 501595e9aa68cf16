"""Stages as jobs of SLURM: which tasks, by which command, with which settings of ``resources.slurm``; :mod:`data_registry.slurm` does the rest."""

import argparse
import logging
import os
import shlex
import sys
import time

from data_registry import slurm
from data_registry.errors import InputError, run_stage
from data_registry.params import Params, load_params
from data_registry.slurm import Place, Task
from lod_model.begin import begun
from lod_model.runs import finished, training_identity
from lod_model.tracking import LOCAL_FOLDER, sync

log = logging.getLogger("lodbrain.slurm")
MODULES = {"harmonise": ["pipelines.harmonise"], "evaluate": ["lod_model.evaluate"], "sync": ["lod_model.tracking", "sync"]}
JOBS = LOCAL_FOLDER / "jobs"
"""MLflow's runs as jobs keep them, each in a file of its own."""


def main() -> None:
    """Submit a stage and wait for its end. What its jobs ask for stands in resources.slurm of params.yaml; Ctrl-C cancels them."""
    parser = argparse.ArgumentParser(prog="python -m lod_model.launch", description=main.__doc__)
    parser.add_argument("stage", choices=("train", *MODULES), help="train: one array over networks and unfinished folds; sync: MLflow's")
    parser.add_argument("--network", action="append", help="train: which, once or more (default: those of params.yaml)")
    parser.add_argument("--dvc", action="store_true", help="harmonise, evaluate: by `dvc repro --single-item`, so that DVC knows what was made")
    parser.add_argument("--no-wait", action="store_true", help="submit only")
    arguments = parser.parse_args()
    params = load_params()
    if arguments.stage == "train":
        _train(arguments.network or params.networks, params, wait=not arguments.no_wait)
        return
    places = submit_stage(arguments.stage, params, by_dvc=arguments.dvc)
    if not arguments.no_wait:
        _complain(slurm.wait_for(places, cancel={place.job for place in places}))


def submit_stage(stage: str, params: Params, *, by_dvc: bool = False) -> dict[Place, str]:
    """A stage that is one job: harmonise on a Ray cluster over its nodes, the others as they are."""
    job = getattr(params.resources.slurm, stage)
    command = [sys.executable, "-m", *(["dvc", "repro", "--single-item", stage] if by_dvc and stage != "sync" else MODULES[stage])]
    if stage == "sync":
        command += ["--from", str(JOBS), "--to", _store(params)]
    line = slurm.step(command, job)
    if stage == "harmonise":
        job, line = job.model_copy(update={"tasks_per_node": 1}), shlex.join([str(slurm.SCRIPTS / "on-ray.sh"), *command])
    return slurm.submit(stage, [Task(stage, line)], job, params.resources.slurm)


def train_folds(wanted: dict[str, list[int]], params: Params, *, wait: bool = True) -> None:
    """Train folds by network, as one array; those that an earlier array works on are left to it. InputError, in the end, if any fails."""
    identities = {network: training_identity(network, params) for network in wanted}
    folds = {f"{params.run_name(network)}/fold-{fold}": (network, fold) for network, numbers in wanted.items() for fold in numbers}
    places, new = _submit_folds(folds, identities, params)
    if not wait:
        return
    failed = slurm.wait_for(places, cancel=new)
    until = time.monotonic() + slurm.GRACE_S
    for name, (network, fold) in folds.items():
        while name not in failed and finished(params.run_name(network), fold) != identities[network]:
            if time.monotonic() > until:
                failed[name] = "no fold.json of these settings; params.yaml or a table has changed since it was submitted"
            time.sleep(1)
    if any(JOBS.rglob("*.db")):
        try:
            sync([JOBS], _store(params))
        except InputError as error:
            log.warning("%s; `python -m lod_model.launch sync`, later, gathers what the jobs have kept", error)
    _complain(failed)


def _submit_folds(folds: dict[str, tuple[str, int]], identities: dict[str, str], params: Params) -> tuple[dict[Place, str], set[str]]:
    """Where each fold is trained, and which jobs are new."""
    job = params.resources.slurm.train
    there, tasks = slurm.at_work(), []
    for name, (network, fold) in folds.items():
        place, identity = there.get(name, (None, None))
        if place is None:
            command = [sys.executable, "-m", "lod_model.train", "--network", network, "--fold", str(fold), "--launcher", "local"]
            tasks.append(Task(name, slurm.step(command, job), identities[network]))
        elif identity != identities[network]:
            raise InputError(f"{name}: job {place} trains it with other settings or data; its end, or `scancel {place}`, is wanted")
    left = {place: name for name, (place, _) in there.items() if name in folds}
    if left:
        log.info("still at work, and waited for: %s", ", ".join(f"{name} (job {place})" for place, name in left.items()))
    runs = "+".join(map(params.run_name, identities))
    own = slurm.submit(runs, tasks, job, params.resources.slurm) if tasks else {}
    return left | own, {place.job for place in own}


def _train(networks: tuple[str, ...], params: Params, *, wait: bool) -> None:
    from lod_model.data import all_folds

    numbers, wanted = list(all_folds(params.resources)), {}
    for network in networks:
        identity = training_identity(network, params)
        if todo := [fold for fold in numbers if finished(params.run_name(network), fold) != identity]:
            wanted[network] = todo
            begun(network, params)
    train_folds(wanted, params, wait=wait)


def _store(params: Params) -> str:
    """Where all of MLflow's runs are."""
    return params.resources.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{LOCAL_FOLDER / 'mlflow.db'}"


def _complain(failed: dict[str, str]) -> None:
    if failed:
        raise InputError(f"{'; '.join(f'{name} failed: {why}' for name, why in failed.items())}; what is finished is kept, run it again to go on")


if __name__ == "__main__":
    run_stage(main)
