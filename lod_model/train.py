"""Stage *train*: one network on every fold of the split, level by level → ``checkpoints/<run>/fold-<k>/weights.pt``.

A fold is finished when its ``fold.json`` stands, written last with the fingerprint of all that the result depends on; finished folds
are skipped, a stopped one resumes at its last epoch. The choice of a checkpoint and the end of a stage see validation scans only.
"""

import argparse
import contextlib
import functools
import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_registry import protocol
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.params import Params, load_params
from lod_model import checkpoints, preempt, processes, readers
from lod_model.begin import begun, epochs_of, grown
from lod_model.data import Scan, all_folds, preparation
from lod_model.fit import Account, fit
from lod_model.launch import train_folds
from lod_model.provenance import databases_seen, write_seen
from lod_model.runs import TABLES, finished, fold_folder, run_key, tracking_tags, training_identity
from lod_model.tracking import Tracker

log = logging.getLogger("lodbrain.train")


def main() -> None:
    """Train --network on all folds, or on --fold, where resources.launcher or --launcher says; as all tasks of an srun, or of torchrun, or alone."""
    parser = argparse.ArgumentParser(prog="python -m lod_model.train", description=main.__doc__)
    parser.add_argument("--network", required=True, help="a name from `lodbrain networks`")
    parser.add_argument("--fold", type=int, help="one fold only")
    parser.add_argument("--launcher", choices=("local", "slurm"), help="local: here; slurm: an array of jobs, which is waited for")
    arguments = parser.parse_args()
    with processes.together():
        params, folds = processes.all_can(lambda: _asked_for(arguments))
        train(arguments.network, params, folds)


def _asked_for(arguments: argparse.Namespace) -> tuple[Params, dict[int, dict[str, list[Scan]]]]:
    params = load_params()
    if arguments.launcher:
        params = params.model_copy(update={"resources": params.resources.model_copy(update={"launcher": arguments.launcher})})
    folds = all_folds(params.resources)
    if arguments.fold is not None and arguments.fold not in folds:
        raise InputError(f"--fold {arguments.fold}: the split has folds {', '.join(map(str, folds))}")
    return params, {k: v for k, v in folds.items() if arguments.fold in (None, k)}


def train(network: str, params: Params, folds: dict[int, dict[str, list[Scan]]]) -> None:
    """Train the folds that are not finished; all go into one MLflow run with a child a fold."""
    run, identity, several = params.run_name(network), training_identity(network, params), processes.group().world > 1
    todo = processes.from_first(lambda: [fold for fold in folds if finished(run, fold) != identity])
    log.info("%s: %d folds, %d to train", run, len(folds), len(todo))
    if not todo:
        return
    epochs = processes.all_can(lambda: epochs_of(network, params))
    tracking: list[tuple[Tracker, str]] = []  # of the first process
    processes.from_first(lambda: tracking.append(begun(network, params)))
    tracker, parent = tracking[0] if tracking else (None, None)
    if params.resources.launcher == "slurm" and not several:
        with tracker.underway(parent):
            train_folds({network: todo}, params)
        tracker.finish(parent)
        return
    tags = tracking_tags() | {"network": network}
    columns = (TextColumn("train {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=tracker is None) as progress:
        bar = progress.add_task(run, total=epochs * len(todo), note="")
        for done, fold in enumerate(todo):
            progress.update(bar, completed=done * epochs, description=f"{run} fold {fold}")
            account = Account(tracker, None, functools.partial(progress.update, bar, advance=1))
            with contextlib.ExitStack() as underway:
                if tracker is not None:
                    name = f"{run}-fold-{fold}"
                    child = tracker.run(run_key(run, identity, fold), name=name, parent=parent, tags=tags | {"fold": str(fold)})
                    underway.enter_context(tracker.underway(parent))
                    underway.enter_context(tracker.underway(child, machine=True))
                    account = replace(account, run=child)
                underway.enter_context(preempt.listening())
                underway.enter_context(readers.in_one_line())
                _train_fold(network, params, fold, folds[fold], identity, account)
        progress.update(bar, completed=epochs * len(todo), note="")
    if tracker is not None:
        tracker.finish(parent)


def _train_fold(network: str, params: Params, fold: int, roles: dict[str, list[Scan]], identity: str, account: Account) -> None:
    """All stages of one fold, then its weights and, last, its ``fold.json``."""
    from lod_model import networks, weights
    from lod_model.feeding import samples_of_a_step

    learned = networks.outputs(network, params.train.protocols)
    tables = [protocol.load(name) for name in learned]
    roles = {role: [scan for scan in scans if any(map(scan.has, tables))] for role, scans in roles.items()}
    if not roles.get("train"):
        missing = f"{TABLES / 'split.parquet'}: fold {fold} has no scan to train on that has labels of {' or '.join(learned)}"
        processes.end_together(InputError(missing))
    folder, batch_size = fold_folder(params.run_name(network), fold), samples_of_a_step(network, params.train)
    factor = params.train.large_batch.factor_for(batch_size, processes.group().world)
    factor = processes.from_first(lambda: _started(folder, identity, factor))
    if (idle := processes.group().world - batch_size * factor) > 0:
        log.warning("%d processes share steps of %d samples: %d are idle", processes.group().world, batch_size * factor, idle)
    begin, stages = time.perf_counter(), {}
    prepared = processes.all_can(lambda: preparation(roles, standardise=params.train.standardise))
    roles = {role: [scan.standardised(prepared.scale) for scan in roles.get(role, [])] for role in ("train", "val")}
    net, names = None, [level for level in ("coarse", "fine") if getattr(params.train, level).epochs]
    for level in names:
        net = grown(network, level, net, params)
        if net is None:
            continue
        done = folder / f"{level}.pt"  # a finished stage of a fold that was stopped later
        stages[level] = processes.from_first(functools.partial(_finished_stage, done, net))
        if stages[level] is None:
            stages[level] = fit(network, net, level, params, roles, folder, factor=factor, account=account)
            kept = {"state": net.state_dict(), "record": stages[level]}
            processes.from_first(functools.partial(checkpoints.save, kept, done))
    provenance = {
        "run": params.run_name(network), "fold": fold, "seed": params.train.seed, "fingerprint": identity, "batch_factor": factor,
        "trained_on": sorted({f"{scan.database}.{scan.site}" for scan in roles["train"]}), "train_scans": len(roles["train"]),
        "data": tracking_tags() | {"databases": processes.from_first(lambda: databases_seen(roles))},
    }  # fmt: skip
    about = {"name": network, "protocol": weights.joined(learned), "grid": params.harmonise.grid, "preparation": prepared, "provenance": provenance}
    processes.from_first(lambda: _finish(folder, net.eval(), about, stages, roles, account))
    summary = ", ".join(f"{level} {stage['epochs']} epochs, val Dice {stage['val_dice']:.3f}" for level, stage in stages.items())
    log.info("%s fold %d: %s, %.0f s", params.run_name(network), fold, summary, time.perf_counter() - begin)


def _started(folder: Path, identity: str, factor: int) -> int:
    """Times the recipe's batch that a fold is trained with: what stands there, else ``factor``, in a folder without leftovers of other settings."""
    note = folder / f"started-{identity}"
    if not note.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        with replacing(note) as aside:
            aside.write_text(f"{factor}\n")
    return int(note.read_text())


def _finished_stage(done: Path, net) -> dict | None:
    """The record of a finished stage, whose weights the network then has; None if it is not."""
    import torch

    if not done.is_file():
        return None
    kept = torch.load(done, weights_only=True)
    net.load_state_dict(kept["state"])
    return kept["record"]


def _finish(folder: Path, net, about: dict, stages: dict[str, dict], roles: dict[str, list[Scan]], account: Account) -> None:
    """Write what is left of a fold that is trained."""
    from lod_model import weights

    write_seen(folder, roles)
    weights.save(folder / "weights.pt", net, **about)
    account.tracker.metrics(account.run, {f"{level}_val_dice": stage["val_dice"] for level, stage in stages.items()})
    account.tracker.finish(account.run)
    for level in ("coarse", "fine"):
        shutil.rmtree(folder / level, ignore_errors=True)
        (folder / f"{level}.pt").unlink(missing_ok=True)
    (folder / f"started-{about['provenance']['fingerprint']}").unlink()
    with replacing(folder / "fold.json") as aside:
        aside.write_text(json.dumps({**about["provenance"], "stages": stages}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
