"""One stage of training as a Lightning module: what is trained, on which loss, with which optimiser."""

import math
from typing import Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from data_registry.errors import InputError
from data_registry.params import Train
from data_registry.protocol import IGNORED
from lod_model import processes
from lod_model.augment import sample_seed
from lod_model.cross_entropy import protocols_cross_entropy
from lod_model.data import COARSE_FACTOR
from lod_model.deferred import finished
from lod_model.fastsurfer_loss import combined_loss
from lod_model.losses import block_dice_loss, dice_loss
from lod_model.networks.competitive import VIEWS
from lod_model.networks.group_norm import GroupNorm
from lod_model.networks.recipe import Recipe, plateau
from lod_model.shares import Part, Shares

PASSES = ("forward", "forward_coarse", "forward_window")


class StageModule(LightningModule):
    """Trains ``network`` with its recipe's loss and, where the network has one, its L2 penalty.

    Optimiser and schedule are the recipe's own where ``train.recipe`` says so, else those of the settings: Adam, and a learning rate that
    falls when validation stalls or goes up and down once; both follow ``factor``, see ``train.large_batch``. The gradient of a step is that of
    its whole batch, in however many processes and parts it is computed. What a pass draws, dropout, is a function of (seed, its first sample).
    ``shares`` by role; ``place``: the run and the fold, for who reads an error.
    """

    def __init__(
        self, network: nn.Module, *, level: Literal["coarse", "fine"], settings: Train, recipe: Recipe, shares: dict[str, Shares] | None = None,
        factor: int = 1, place: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.level, self.settings, self.recipe = network, level, settings, recipe
        self.shares, self.factor, self.place = shares or {}, factor, place
        self.stage = settings.coarse if level == "coarse" else settings.fine
        self.losses: list[tuple[list[str], Tensor]] = []  # of a step's parts, or of a validation's batches: their scans, and the loss
        if settings.checkpointing == "blocks":
            network.checkpoint_blocks()
        if settings.compile == "network":
            for part in [getattr(network, view) for view in VIEWS] if recipe.samples == "slices" else [network]:
                compile_passes(part)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """A scalar that goes to 0 as labels are met."""
        raise NotImplementedError

    def validated(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, mean soft Dice) of a batch of validation samples."""
        loss = self.loss(batch)
        return loss, 1 - loss

    def on_after_batch_transfer(self, batch: dict, _loader: int) -> dict[str, Tensor]:
        """What workers have left to the device is done there."""
        return finished(batch)

    def weight(self, batch: dict[str, Tensor], part: Part) -> float | Tensor:
        """What this process's loss counts in the mean over all that DDP takes, so that it is the loss of the whole part."""
        return part.own * processes.group().world / max(part.together, 1)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        shares = self.shares["train"]
        part = shares.part(index)
        number, scan = shares.key_of(part)
        torch.manual_seed(sample_seed(self.settings.seed, number, f"draws of {shares.sampler.scans[scan].scan_id}"))
        loss = self.loss(batch)
        self.losses.append((shares.scans(index), loss.detach()))
        self._log({"train_loss": loss.detach()}, _size(batch) if part.own else 0)
        loss = loss * self.weight(batch, part) * (part.together * shares.parts / part.batch)  # Lightning divides by the number of parts
        return loss + self.network.l2() if hasattr(self.network, "l2") else loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        own = self.shares["val"].part(index).own
        loss, dice = self.validated(batch)
        self.losses.append((self.shares["val"].scans(index), loss))
        self._log({"val_loss": loss, "val_dice": dice}, _size(batch) if own else 0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """InputError, in all processes, rather than a step by what is no number: all have the same gradient."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            self._stop("the gradient")
        self.losses.clear()

    def on_validation_epoch_start(self) -> None:
        self.losses.clear()

    def on_validation_epoch_end(self) -> None:
        if processes.any_of(not all(loss.isfinite() for _, loss in self.losses)):
            self._stop("the validation loss")
        self.losses.clear()

    def optimizer_step(self, epoch: int, batch_index: int, optimizer: torch.optim.Optimizer, closure=None) -> None:
        """While a large batch warms up, a step is a part of what the schedule says, which goes its way."""
        part = 1.0
        if self.factor > 1 and (self.settings.schedule != "one_cycle" or self.settings.recipe != "shared"):
            part = self.settings.large_batch.warming(self.factor, self.trainer.global_step, int(self.trainer.estimated_stepping_batches))
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * part
        super().optimizer_step(epoch, batch_index, optimizer, closure)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def configure_optimizers(self) -> dict:
        rate = self.settings.large_batch.rate(self.factor)
        if self.settings.recipe != "shared":
            optimiser = self.recipe.optimiser_for(self.network, rate=rate)
            schedule = self.recipe.schedule_for(optimiser, patience=self.settings.reduce_patience)
            return {"optimizer": optimiser} | ({"lr_scheduler": schedule} if schedule else {})
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        highest = self.stage.learning_rate * rate
        optimiser = torch.optim.Adam(parameters, lr=highest, betas=(0.9, 0.999))
        if self.settings.schedule == "one_cycle":
            steps = int(self.trainer.estimated_stepping_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, highest, total_steps=steps, pct_start=0.15, cycle_momentum=False)
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        return {"optimizer": optimiser, "lr_scheduler": plateau(optimiser, patience=self.settings.reduce_patience)}

    def _log(self, values: dict[str, Tensor], size: int) -> None:
        """Means over an epoch's samples. Sizes are multiples of the number of processes because Lightning rounds their mean over these down."""
        several = processes.group().world
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=size * several, sync_dist=several > 1)

    def _stop(self, what: str) -> None:
        """All processes, saying of which scans it comes."""
        told = [item for items in processes.gathered([(scans, float(loss)) for scans, loss in self.losses]) for item in items]
        bad = [scan for scans, loss in told if not math.isfinite(loss) for scan in scans]
        scans = sorted(set(bad or [scan for scans, _ in told for scan in scans]))
        more = f" and {len(scans) - 8} more" if len(scans) > 8 else ""
        where = f"{self.place}, {self.level}, epoch {self.current_epoch}: {what} is not finite at {', '.join(scans[:8])}{more}"
        wanted = f"a lower train.{self.level}.learning_rate, precision 32, or other scans, are wanted"
        processes.end_together(InputError(f"{where}; the last checkpoint stands, and {wanted}"))


def compile_passes(network: nn.Module) -> None:
    """Have torch.compile make code of them, when they are first run, but of the exact group norms: their loops over slabs would take hours."""
    for norm in network.modules():
        if isinstance(norm, GroupNorm):
            norm.forward = torch.compiler.disable(norm.forward)
    for name in PASSES:
        if hasattr(network, name):
            setattr(network, name, torch.compile(getattr(network, name), dynamic=False))


class VolumeModule(StageModule):
    """Whole scans, one level of detail, LOD-Brain's soft Dice: 1 − its mean over all channels, per scan, then averaged.

    ``coarse``: images (B, 1, d, h, w) max-pooled by 4, targets (B, C, d, h, w) class fractions; the loss is that of the full-resolution
    volume, computed on blocks. ``fine``: images (B, 1, D, H, W), targets (B, D, H, W) classes; where a batch has ``window``, (B, 3) first
    voxels, its targets are those of windows, on which alone the finest level runs: mean Dice over the classes that a window has.
    """

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.level == "coarse":
            return block_dice_loss(self.network.forward_coarse(batch["image"]), batch["target"], COARSE_FACTOR**3)
        if "window" in batch:
            return torch.stack([self._window_loss(*scan) for scan in zip(batch["image"], batch["target"], batch["window"], strict=True)]).mean()
        return dice_loss(self.network(batch["image"]), batch["target"])

    def _window_loss(self, image: Tensor, target: Tensor, first: Tensor) -> Tensor:
        """Of one scan, image (1, D, H, W): each has a window of its own."""
        window = [slice(start, start + side) for start, side in zip(first.tolist(), target.shape, strict=True)]
        return dice_loss(self.network.forward_window(image[None], window), target[None], over="present")


class CropModule(StageModule):
    """Cubes of scans: image (B, 1, d, h, w), a target (B, d, h, w) for each protocol below its name; 255 is no label and costs nothing.

    The mean over protocols of NeuroNet's cross-entropy, or of LOD-Brain's soft Dice over the classes that a cube has.
    """

    def __init__(self, network: nn.Module, **how) -> None:
        super().__init__(network, **how)
        self.protocols = tuple(how["settings"].protocols)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits, targets = self._both(batch)
        return protocols_cross_entropy(logits, targets) if self.recipe.loss == "cross_entropy" else self._dice_loss(logits, targets)

    def validated(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, targets = self._both(batch)
        dice = self._dice_loss(logits, targets)
        return protocols_cross_entropy(logits, targets) if self.recipe.loss == "cross_entropy" else dice, 1 - dice

    def weight(self, batch: dict[str, Tensor], part: Part) -> float | Tensor:
        """The mean cross-entropy is one over the scans that have labels."""
        if self.recipe.loss != "cross_entropy":
            return super().weight(batch, part)
        labelled = torch.stack([(batch[name] != IGNORED).flatten(1).any(1) for name in self.protocols]).any(0).sum() * (part.own > 0)
        return labelled * processes.group().world / processes.summed(labelled).clamp(min=1)

    def _both(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits = self.network(batch["image"])
        logits = logits if isinstance(logits, dict) else {self.protocols[0]: logits}
        return logits, {name: batch[name] for name in logits}

    @staticmethod
    def _dice_loss(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return torch.stack([dice_loss(logits[name], targets[name], over="present") for name in logits]).mean()


class SliceModule(StageModule):
    """Slices of three views: of each view ``<view>_image`` (B, 7, H, W), ``_target`` and ``_weight`` (B, H, W) and ``_scale`` (B,).

    The three networks share no parameter, so their losses are added: each is trained as if it were alone. The loss is one of sums over a
    whole batch: in training, over that of all processes.
    """

    def weight(self, batch: dict[str, Tensor], part: Part) -> float | Tensor:
        """The loss is the same in all processes, its gradient in each that of its own slices."""
        return processes.group().world

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if not self.shares["train"].part(index).own:
            batch = batch | {name: torch.full_like(tensor, IGNORED) for name, tensor in batch.items() if name.endswith("target")}
        return super().training_step(batch, index)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.stack([total for total, _ in self._by_view(batch)]).sum()

    def validated(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        views = self._by_view(batch)
        return torch.stack([total for total, _ in views]).sum(), torch.stack([dice for _, dice in views]).mean()

    def _by_view(self, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for view in VIEWS:
            logits = getattr(self.network, view)(batch[f"{view}_image"], batch[f"{view}_scale"])
            about = {"summed": _summed} if self.training else {}
            total, dice, _ = combined_loss(logits, batch[f"{view}_target"], batch[f"{view}_weight"], **about)
            found.append((total, 1 - dice))
        return found


MODULES = {"volumes": VolumeModule, "crops": CropModule, "slices": SliceModule}
"""By a recipe's samples."""


def _summed(sums: Tensor) -> Tensor:
    """Over all processes, with this one's gradients."""
    return processes.summed(sums) + (sums - sums.detach())


def _size(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))
