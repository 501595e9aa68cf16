"""One stage of training as a Lightning module: what is trained, on which loss, with which optimiser."""

from typing import Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from data_registry.params import Train
from lod_model.cross_entropy import protocols_cross_entropy
from lod_model.data import COARSE_FACTOR
from lod_model.deferred import finished
from lod_model.fastsurfer_loss import combined_loss
from lod_model.losses import block_dice_loss, dice_loss
from lod_model.networks.recipe import Recipe, plateau


class StageModule(LightningModule):
    """Trains ``network`` with its recipe's loss and, where the network has one, its L2 penalty.

    Optimiser and schedule are the recipe's own where ``train.recipe`` says so, else those of the settings: Adam, and a learning rate that
    falls when validation stalls or goes up and down once.
    """

    def __init__(self, network: nn.Module, *, level: Literal["coarse", "fine"], settings: Train, recipe: Recipe) -> None:
        super().__init__()
        self.network, self.level, self.settings, self.recipe = network, level, settings, recipe
        self.stage = settings.coarse if level == "coarse" else settings.fine
        if settings.checkpointing == "blocks":
            network.checkpoint_blocks()

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

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=_size(batch))
        return loss + self.network.l2() if hasattr(self.network, "l2") else loss

    def validation_step(self, batch: dict[str, Tensor], _index: int) -> None:
        loss, dice = self.validated(batch)
        self.log_dict({"val_loss": loss, "val_dice": dice}, on_step=False, on_epoch=True, batch_size=_size(batch))

    def configure_optimizers(self) -> dict:
        if self.settings.recipe != "shared":
            optimiser = self.recipe.optimiser_for(self.network)
            schedule = self.recipe.schedule_for(optimiser, patience=self.settings.reduce_patience)
            return {"optimizer": optimiser} | ({"lr_scheduler": schedule} if schedule else {})
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=self.stage.learning_rate, betas=(0.9, 0.999))
        if self.settings.schedule == "one_cycle":
            steps = int(self.trainer.estimated_stepping_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.stage.learning_rate, total_steps=steps, pct_start=0.15, cycle_momentum=False)
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        return {"optimizer": optimiser, "lr_scheduler": plateau(optimiser, patience=self.settings.reduce_patience)}


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

    def _both(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits = self.network(batch["image"])
        logits = logits if isinstance(logits, dict) else {self.protocols[0]: logits}
        return logits, {name: batch[name] for name in logits}

    @staticmethod
    def _dice_loss(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return torch.stack([dice_loss(logits[name], targets[name], over="present") for name in logits]).mean()


class SliceModule(StageModule):
    """Slices of three views: of each view ``<view>_image`` (B, 7, H, W), ``_target`` and ``_weight`` (B, H, W) and ``_scale`` (B,).

    The three networks share no parameter, so their losses are added: each is trained as if it were alone.
    """

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.stack([total for total, _ in self._by_view(batch)]).sum()

    def validated(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        views = self._by_view(batch)
        return torch.stack([total for total, _ in views]).sum(), torch.stack([dice for _, dice in views]).mean()

    def _by_view(self, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for view in ("axial", "coronal", "sagittal"):
            logits = getattr(self.network, view)(batch[f"{view}_image"], batch[f"{view}_scale"])
            total, dice, _ = combined_loss(logits, batch[f"{view}_target"], batch[f"{view}_weight"])
            found.append((total, 1 - dice))
        return found


MODULES = {"volumes": VolumeModule, "crops": CropModule, "slices": SliceModule}
"""By a recipe's samples."""


def _size(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))
