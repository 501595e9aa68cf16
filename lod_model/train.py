"""Stage *train*: one network on every fold of the split, level by level → ``checkpoints/<run>/fold-<k>/weights.pt``.

A fold is finished when its ``fold.json`` stands, written last with the fingerprint of all that the result depends on; finished folds
are skipped, a stopped one resumes at its last epoch. The choice of a checkpoint and the end of a stage see validation scans only.
"""

import argparse
import functools
import json
import logging
import shutil
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_registry import protocol
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing, sha256
from data_registry.params import Params, fingerprint, load_params
from data_registry.schema import table_metadata
from lod_model import preempt, readers
from lod_model.data import TABLES, Scan, all_folds, preparation
from lod_model.tracking import Tracker

log = logging.getLogger("lodbrain.train")
CHECKPOINTS = Path("checkpoints")
RECIPE_VERSION = 2
"""Part of every fold's fingerprint; raise it when a change of code changes what a training gives."""


def main() -> None:
    """Train ``--network`` on all folds, or on ``--fold``, where ``resources.launcher`` or ``--launcher`` says."""
    parser = argparse.ArgumentParser(prog="python -m lod_model.train", description=main.__doc__)
    parser.add_argument("--network", required=True, help="a name from `lodbrain networks`")
    parser.add_argument("--fold", type=int, help="one fold only")
    parser.add_argument("--launcher", choices=("local", "slurm"), help="local: in this process; slurm: an array of jobs, which is waited for")
    arguments = parser.parse_args()
    params = load_params()
    if arguments.launcher:
        params = params.model_copy(update={"resources": params.resources.model_copy(update={"launcher": arguments.launcher})})
    folds = all_folds(params.resources)
    if arguments.fold is not None and arguments.fold not in folds:
        raise InputError(f"--fold {arguments.fold}: the split has folds {', '.join(map(str, folds))}")
    train(arguments.network, params, {k: v for k, v in folds.items() if arguments.fold in (None, k)})


def train(network: str, params: Params, folds: dict[int, dict[str, list[Scan]]]) -> None:
    """Train the folds that are not finished; all go into one MLflow run with a child a fold."""
    run, identity = params.run_name(network), training_identity(network, params)
    todo = {fold: roles for fold, roles in folds.items() if finished(run, fold) != identity}
    log.info("%s: %d folds, %d to train", run, len(folds), len(todo))
    if not todo:
        return
    tracker, parent = begun(network, params)
    if params.resources.launcher == "slurm":
        from lod_model.launch import train_folds

        with tracker.underway(parent):
            train_folds({network: list(todo)}, params)
        tracker.finish(parent)
        return
    tags = tracking_tags() | {"network": network}
    epochs = sum(getattr(params.train, level).epochs for level in ("coarse", "fine") if _grown(network, level, None, params) is not None)
    columns = (TextColumn("train {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(run, total=epochs * len(todo), note="")
        for done, (fold, roles) in enumerate(todo.items()):
            child = tracker.run(run_key(run, identity, fold), name=f"{run}-fold-{fold}", parent=parent, tags=tags | {"fold": str(fold)})
            progress.update(bar, completed=done * epochs, description=f"{run} fold {fold}")
            tick = functools.partial(progress.update, bar, advance=1)
            with tracker.underway(parent), tracker.underway(child, machine=True), preempt.listening(), readers.in_one_line():
                _train_fold(network, params, fold, roles, identity, tracker=tracker, child=child, tick=tick)
        progress.update(bar, completed=epochs * len(todo), note="")
    tracker.finish(parent)


def begun(network: str, params: Params) -> tuple[Tracker, str]:
    """MLflow's run of all folds, made if there is none yet; InputError for settings that do not fit the network."""
    _check_fits(network, _grown(network, "fine", None, params), params)
    run, tracker = params.run_name(network), Tracker(params.experiment, uri=params.resources.mlflow_uri)
    parent = tracker.run(run_key(run, training_identity(network, params)), name=run, tags=tracking_tags() | {"network": network})
    tracker.params(parent, {"network": network, **_flat(params)})
    return tracker, parent


def fold_folder(run: str, fold: int) -> Path:
    """Where a fold's weights stand, below the current folder."""
    return CHECKPOINTS / run / f"fold-{fold}"


def training_identity(network: str, params: Params) -> str:
    """Fingerprint of all that a run's weights depend on; read from the settings and the tables below the current folder."""
    versions = [protocol.load(name).version for name in params.train.protocols]
    versions = versions[0] if isinstance(params.train.protocol, str) else versions
    return fingerprint(RECIPE_VERSION, network, params.train, versions, params.harmonise.grid, tracking_tags())


def tracking_tags() -> dict[str, str]:
    """Hashes of the split and of the data, as MLflow's runs carry them."""
    return {"split_hash": table_metadata(TABLES / "split.parquet")["split_hash"], "data_hash": sha256(TABLES / "samples.parquet")}


def run_key(run: str, identity: str, fold: int | None = None) -> str:
    """The unique tag in MLflow of a run, or of one of its folds."""
    return f"{run}/{identity[:16]}" + ("" if fold is None else f"/{fold}")


def finished(run: str, fold: int) -> str | None:
    """The fingerprint of a finished fold."""
    path = fold_folder(run, fold) / "fold.json"
    return json.loads(path.read_text(encoding="utf-8"))["fingerprint"] if path.is_file() else None


def _train_fold(network: str, params: Params, fold: int, roles: dict[str, list[Scan]], identity: str, *, tracker: Tracker, child: str, tick) -> None:
    """All stages of one fold, then its weights and, last, its ``fold.json``."""
    from lod_model import networks

    learned = networks.outputs(network, params.train.protocols)
    tables = [protocol.load(name) for name in learned]
    roles = {role: [scan for scan in scans if any(map(scan.has, tables))] for role, scans in roles.items()}
    if not roles.get("train"):
        raise InputError(f"{TABLES / 'split.parquet'}: fold {fold} has no scan to train on that has labels of {' or '.join(learned)}")
    folder = fold_folder(params.run_name(network), fold)
    if not (folder / f"started-{identity}").is_file():  # leftovers of other settings
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / f"started-{identity}").touch()
    import torch

    from lod_model import weights

    begin, stages = time.perf_counter(), {}
    prepared = preparation(roles, standardise=params.train.standardise)
    roles = {role: [scan.standardised(prepared.scale) for scan in roles.get(role, [])] for role in ("train", "val")}
    net, names = None, [level for level in ("coarse", "fine") if getattr(params.train, level).epochs]
    for level in names:
        net = _grown(network, level, net, params)
        if net is None:
            continue
        done = folder / f"{level}.pt"  # a finished stage of a fold that was stopped later
        if done.is_file():
            kept = torch.load(done, weights_only=True)
            net.load_state_dict(kept["state"])
            stages[level] = kept["record"]
            continue
        stages[level] = _fit(network, net, level, params, roles, folder, tracker=tracker, child=child, tick=tick)
        with replacing(done) as aside:
            torch.save({"state": net.state_dict(), "record": stages[level]}, aside)
    net.eval()
    provenance = {
        "run": params.run_name(network), "fold": fold, "seed": params.train.seed, "fingerprint": identity,
        "trained_on": sorted({f"{scan.database}.{scan.site}" for scan in roles["train"]}), "train_scans": len(roles["train"]),
    }  # fmt: skip
    about = {"name": network, "protocol": weights.joined(learned), "grid": params.harmonise.grid}
    weights.save(folder / "weights.pt", net, **about, preparation=prepared, provenance=provenance)
    tracker.metrics(child, {f"{level}_val_dice": stage["val_dice"] for level, stage in stages.items()})
    tracker.finish(child)
    for level in names:
        shutil.rmtree(folder / level, ignore_errors=True)
        (folder / f"{level}.pt").unlink(missing_ok=True)
    (folder / f"started-{identity}").unlink()
    with replacing(folder / "fold.json") as aside:
        aside.write_text(json.dumps({"fingerprint": identity, **provenance, "stages": stages}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    summary = ", ".join(f"{level} {stage['epochs']} epochs, val Dice {stage['val_dice']:.3f}" for level, stage in stages.items())
    log.info("%s fold %d: %s, %.0f s", params.run_name(network), fold, summary, time.perf_counter() - begin)


def _grown(network: str, level: str, previous, params: Params):
    """The network of a stage, holding what the stage before it learned; None for a coarse stage that the network does not have."""
    import torch

    from lod_model import networks

    torch.manual_seed(params.train.seed)
    learned = [protocol.load(name) for name in networks.outputs(network, params.train.protocols)]
    window = {"window": params.train.crops.side} if networks.recipe_of(network).samples == "crops" else {}
    own, given = params.train.network_of(network), networks.config_for(network, learned)
    for key, value in given.items():
        if own.get(key, value) != value:
            raise InputError(f"train.network: {key} of {network} is {own[key]}; it follows from train.protocol, so {value}, or nothing, is wanted")
    config = {**window, **own, **given}  # the protocols in the order of train.protocol, which is that of the label maps
    if level == "coarse":
        return networks.build_coarse(network, config)
    net = networks.build(network, config)
    if previous is not None:
        networks.load_coarse(net, previous, freeze=params.train.coarse_level == "frozen")
    return net


def _check_fits(name: str, net, params: Params) -> None:
    """That the network has what the settings ask for; InputError names the setting."""
    from lod_model import networks
    from lod_model.feeding import augments_on_device

    settings = params.train
    for key, value in settings.network.items():
        if isinstance(value, dict) and not networks.is_known(key):
            raise InputError(f"train.network.{key}: no such network; a setting, or settings below one of {', '.join(networks.names())}, is wanted")
    if settings.recipe not in ("shared", "own") and not networks.is_known(settings.recipe):
        raise InputError(f"train.recipe: {settings.recipe!r} is none; shared, own or one of {', '.join(networks.names())} is wanted")
    augments_on_device(name, networks.recipe_of(name, settings.recipe), settings)
    if settings.checkpointing == "blocks" and not hasattr(net, "checkpoint_blocks"):
        raise InputError(f"train.checkpointing is blocks: network {name} has none to keep; none is wanted")
    if settings.fine_patch and (not hasattr(net, "forward_window") or net.config.levels == 1):
        raise InputError(f"train.fine_patch is {settings.fine_patch}: network {name} has no level that sees the whole head; null is wanted")
    if settings.fine_patch and settings.fine_patch % net.config.multiple:
        raise InputError(f"train.fine_patch is {settings.fine_patch}: null or a multiple of {net.config.multiple} is wanted")


def _fit(network: str, net, level: str, params: Params, roles: dict[str, list[Scan]], folder: Path, *, tracker: Tracker, child: str, tick) -> dict:
    """Fit one stage; the network ends with the weights of its best epoch. Returns epochs, best validation Dice and the history."""
    import torch
    from pytorch_lightning import Trainer, seed_everything
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

    from lod_model import networks
    from lod_model.feeding import Feeding
    from lod_model.module import MODULES

    _quiet()
    settings, resources = params.train, params.resources
    if resources.threads:
        torch.set_num_threads(resources.threads)
    seed_everything(settings.seed, verbose=False)
    fed = Feeding(network, net, level, settings)
    loaders = {role: fed.loader(roles.get(role, []), training=role == "train", workers=resources.loader_workers) for role in ("train", "val")}
    best, history = ModelCheckpoint(folder / level, "best", monitor="val_dice", mode="max"), _History(tick, tracker, child, level)
    last = ModelCheckpoint(folder / level, "last", monitor=None, save_top_k=1, every_n_epochs=1, enable_version_counter=False)
    validated = bool(roles.get("val"))
    # last comes last: what it saves must hold the state that the others have after this epoch
    patience = getattr(settings, level).epochs if level == "fine" and settings.whole_epochs else settings.stop_patience
    resume = folder / level / "last.ckpt"
    stopping = preempt.Stopping(loaders["train"].sampler, resume)
    callbacks = [history, stopping, *([best, EarlyStopping("val_loss", patience=patience)] if validated else []), last]
    trainer = Trainer(
        max_epochs=getattr(settings, level).epochs, precision=precision_of(settings.precision), callbacks=callbacks,
        devices=1, num_nodes=1, logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        plugins=preempt.plugins(),
    )  # fmt: skip
    recipe = networks.recipe_of(network, settings.recipe)
    module = MODULES[recipe.samples](net, level=level, settings=settings, recipe=recipe)
    trainer.fit(module, loaders["train"], loaders["val"] if validated else None, ckpt_path=resume if resume.is_file() else None, weights_only=True)
    chosen = best.best_model_path if validated and best.best_model_path else resume
    module.load_state_dict(torch.load(chosen, weights_only=True)["state_dict"])
    score = float(best.best_model_score) if validated and best.best_model_score is not None else float("nan")
    return {"epochs": trainer.current_epoch, "val_dice": score, "precision": trainer.precision, "history": history.rows}


def precision_of(name: str) -> str:
    """Lightning's name of a precision; ``auto`` looks at the device."""
    import torch

    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        name = "bf16-mixed" if has_bf16 else "32"
    return "32-true" if name == "32" else name


def _History(tick, tracker: Tracker, child: str, level: str):
    """A Lightning callback that keeps each epoch's figures, sends them to MLflow and moves the progress bar."""
    from pytorch_lightning import Callback

    class History(Callback):
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def on_train_epoch_end(self, trainer, _module) -> None:
            figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.rows.append({"epoch": trainer.current_epoch, **figures})
            tracker.metrics(child, {f"{level}_{name}": value for name, value in figures.items()}, step=trainer.current_epoch)
            tick(note=f"{level} val Dice {figures.get('val_dice', float('nan')):.3f}")

        def state_dict(self) -> dict:
            return {"rows": self.rows}

        def load_state_dict(self, state: dict) -> None:
            self.rows = state["rows"]

    return History()


def _quiet() -> None:
    """Lightning's advice about worker counts and its banner; errors still come through."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning|torch.optim.lr_scheduler")
    warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|log_every_n_steps|pin_memory).*")


def _flat(params: Params) -> dict[str, object]:
    """The settings as MLflow shows them: dotted keys; where things run is no setting."""
    flat: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", params.model_dump(mode="json", exclude={"resources", "index"}))
    return flat


if __name__ == "__main__":
    run_stage(main)
