"""One stage of progressive training as a Lightning module: which level is trained, on which loss, with which optimiser."""

from typing import Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from data_registry.params import Train
from lod_model.data import COARSE_FACTOR
from lod_model.losses import block_dice_loss, dice_loss


class StageModule(LightningModule):
    """Trains ``network`` on one level of detail with the paper's Dice and, where the network has one, its L2 penalty.

    ``coarse``: images (B, 1, d, h, w) max-pooled by 4, targets (B, C, d, h, w) class fractions; the loss is that of the full-resolution
    volume, computed on blocks. ``fine``: images (B, 1, D, H, W), targets (B, D, H, W) classes; where a batch has ``window``, (B, 3) first
    voxels, its targets are those of windows, on which alone the finest level runs: mean Dice over the classes that a window has.
    """

    def __init__(self, network: nn.Module, *, level: Literal["coarse", "fine"], settings: Train) -> None:
        super().__init__()
        self.network, self.level, self.settings = network, level, settings
        self.stage = settings.coarse if level == "coarse" else settings.fine
        if settings.checkpointing == "blocks":
            network.checkpoint_blocks()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """1 − mean soft Dice over all channels, per scan, then averaged."""
        if self.level == "coarse":
            return block_dice_loss(self.network.forward_coarse(batch["image"]), batch["target"], COARSE_FACTOR**3)
        if "window" in batch:
            return torch.stack([self._window_loss(*scan) for scan in zip(batch["image"], batch["target"], batch["window"], strict=True)]).mean()
        return dice_loss(self.network(batch["image"]), batch["target"])

    def _window_loss(self, image: Tensor, target: Tensor, first: Tensor) -> Tensor:
        """Of one scan, image (1, D, H, W): each has a window of its own."""
        window = [slice(start, start + side) for start, side in zip(first.tolist(), target.shape, strict=True)]
        return dice_loss(self.network.forward_window(image[None], window), target[None], over="present")

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch["image"]))
        return loss + self.network.l2() if hasattr(self.network, "l2") else loss

    def validation_step(self, batch: dict[str, Tensor], _index: int) -> None:
        loss = self.loss(batch)
        self.log_dict({"val_loss": loss, "val_dice": 1 - loss}, on_step=False, on_epoch=True, batch_size=len(batch["image"]))

    def configure_optimizers(self) -> dict:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=self.stage.learning_rate, betas=(0.9, 0.999))
        if self.settings.schedule == "one_cycle":
            steps = int(self.trainer.estimated_stepping_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.stage.learning_rate, total_steps=steps, pct_start=0.15, cycle_momentum=False)
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.25, patience=self.settings.reduce_patience, min_lr=1e-7)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss", "strict": False}}
