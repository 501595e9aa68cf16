"""One stage of one fold: a network, fed and fitted by Lightning, on however many processes, until it ends or is asked to stop."""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_registry.params import Params
from lod_model import checkpoints, preempt, processes
from lod_model.data import Scan
from lod_model.tracking import Tracker


@dataclass(frozen=True)
class Account:
    """Where what a training reaches is told: MLflow's run of the fold, in the first process alone, and the progress bar."""

    tracker: Tracker | None
    run: str | None
    tick: Callable[..., None]


def fit(network: str, net, level: str, params: Params, roles: dict[str, list[Scan]], folder: Path, *, factor: int, account: Account) -> dict:
    """Fit one stage; in the first process the network ends with the weights of its best epoch. Returns what was reached."""
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
    fed = Feeding(network, net, level, settings, factor=factor)
    loaders = {role: fed.loader(roles.get(role, []), training=role == "train", workers=resources.loader_workers) for role in ("train", "val")}
    shares = {role: loader.batch_sampler for role, loader in loaders.items()}
    best, history = ModelCheckpoint(folder / level, "best", monitor="val_dice", mode="max"), _History(account, level)
    last = ModelCheckpoint(folder / level, "last", monitor=None, save_top_k=1, every_n_epochs=1, enable_version_counter=False)
    # last comes last: what it saves must hold the state that the others have after this epoch
    patience = getattr(settings, level).epochs if level == "fine" and settings.whole_epochs else settings.stop_patience
    validated = [best, EarlyStopping("val_loss", patience=patience)] if roles.get("val") else []
    resume = folder / level / "last.ckpt"
    trainer = Trainer(
        max_epochs=getattr(settings, level).epochs, precision=precision_of(settings.precision), accumulate_grad_batches=settings.accumulate,
        callbacks=[history, preempt.Stopping(shares["train"], resume), *validated, last], logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, plugins=[processes.environment(), checkpoints.plugin()],
        **processes.trainer_options(synchronised=settings.batch_norms == "all"),
    )  # fmt: skip
    recipe = networks.recipe_of(network, settings.recipe)
    place = f"{params.run_name(network)} {folder.name}"
    module = MODULES[recipe.samples](net, level=level, settings=settings, recipe=recipe, shares=shares, factor=factor, place=place)
    there = processes.from_first(resume.is_file)
    trainer.fit(module, loaders["train"], loaders["val"] if validated else None, ckpt_path=resume if there else None, weights_only=True)
    if processes.group().is_first:
        chosen = best.best_model_path if validated and best.best_model_path else resume
        module.load_state_dict(torch.load(chosen, weights_only=True)["state_dict"])
    score = float(best.best_model_score) if validated and best.best_model_score is not None else math.nan
    reached = {"epochs": trainer.current_epoch, "steps": trainer.global_step, "val_dice": score}
    return reached | {"precision": trainer.precision, "history": history.rows}


def precision_of(name: str) -> str:
    """Lightning's name of a precision; ``auto`` looks at the device."""
    import torch

    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        name = "bf16-mixed" if has_bf16 else "32"
    return "32-true" if name == "32" else name


def _History(account: Account, level: str):
    """A Lightning callback that keeps each epoch's figures, sends them to MLflow and moves the progress bar."""
    from pytorch_lightning import Callback

    class History(Callback):
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def on_train_epoch_end(self, trainer, _module) -> None:
            figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.rows.append({"epoch": trainer.current_epoch, **figures})
            if account.tracker is not None:
                account.tracker.metrics(account.run, {f"{level}_{name}": value for name, value in figures.items()}, step=trainer.current_epoch)
            account.tick(note=f"{level} val Dice {figures.get('val_dice', math.nan):.3f}")

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
    warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|log_every_n_steps|pin_memory|bucket view strides).*")
