"""How a network is fed, and how its authors train it: each network's file has a ``RECIPE``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.optim import lr_scheduler


@dataclass(frozen=True)
class Recipe:
    """Of one network. ``samples`` and ``loss`` are part of what it is; the rest can be shared with others, see ``train.recipe``."""

    samples: Literal["volumes", "crops", "slices"]
    """Whole scans, cubes of them, or slices of three views."""
    loss: Literal["dice", "cross_entropy", "weighted"]
    """LOD-Brain's soft Dice; the mean cross-entropy of all protocols; FastSurfer's weighted cross-entropy and Dice."""
    optimiser: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 5e-4
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["plateau", "constant", "step", "warm_restarts"] = "plateau"
    """plateau: a quarter when validation stalls. step: × 0.3 every 5 epochs. warm_restarts: along cosines of 10, 20, 40 … epochs to 1e-4."""
    batch_size: int = 1
    visits: int = 1
    """Of a scan in an epoch."""
    inner_scale: float = 0.0
    """See ``train.slices``."""

    def optimised_as(self, other: Recipe) -> Recipe:
        """The same samples and loss under the other's optimiser, schedule and batch."""
        names = ("optimiser", "learning_rate", "epsilon", "weight_decay", "schedule", "batch_size")
        return replace(self, **{name: getattr(other, name) for name in names})

    def optimiser_for(self, network: nn.Module, *, rate: float = 1.0) -> torch.optim.Optimizer:
        """Of the parameters that are trained; ``rate``: times the learning rate."""
        parameters = [p for p in network.parameters() if p.requires_grad]
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimiser]
        return kind(parameters, lr=rate * self.learning_rate, betas=(0.9, 0.999), eps=self.epsilon, weight_decay=self.weight_decay)

    def schedule_for(self, optimiser: torch.optim.Optimizer, *, patience: int) -> dict | None:
        """What Lightning is told of the learning rate, an epoch at a time; None where it stays."""
        if self.schedule == "plateau":
            return plateau(optimiser, patience=patience)
        if self.schedule == "step":
            return {"scheduler": lr_scheduler.StepLR(optimiser, step_size=5, gamma=0.3)}
        if self.schedule == "warm_restarts":
            return {"scheduler": lr_scheduler.CosineAnnealingWarmRestarts(optimiser, T_0=10, T_mult=2, eta_min=1e-4)}
        return None


def plateau(optimiser: torch.optim.Optimizer, *, patience: int) -> dict:
    """LOD-Brain's: a quarter after ``patience`` epochs without a better validation loss."""
    falling = lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.25, patience=patience, min_lr=1e-7)
    return {"scheduler": falling, "monitor": "val_loss", "strict": False}


LOD_BRAIN = Recipe(samples="volumes", loss="dice")
"""Svanera et al. 2024: Adam 5e-4, one scan a step, the learning rate quartered after five epochs without a better validation loss."""
