"""What a network is fed in training: which samples its recipe asks for, in which order, in which batches."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data_registry.errors import InputError
from data_registry.params import Train
from lod_model import deferred, networks, preempt
from lod_model.crops import CropDataset
from lod_model.data import EpochOrder, SampleDataset, Scan, Windows
from lod_model.networks.recipe import Recipe
from lod_model.slices import SliceDataset, collated


class Feeding:
    """Of one stage of a network's training."""

    def __init__(self, network: str, net: nn.Module, level: str, settings: Train) -> None:
        self.recipe, self.net, self.level, self.settings = networks.recipe_of(network, settings.recipe), net, level, settings
        self.protocols = networks.outputs(network, settings.protocols)
        self.batch_size = settings.batch_size if settings.recipe == "shared" else self.recipe.batch_size
        self.deferred = augments_on_device(network, self.recipe, settings)

    def loader(self, scans: list[Scan], *, training: bool, workers: int) -> DataLoader:
        """Batches of the scans' samples; those for validation are the same each time, and not augmented."""
        settings = self.settings
        visits = (settings.visits or self.recipe.visits) if training else 1
        least = max(settings.min_samples_per_epoch, visits * len(scans)) if training else 1
        order = EpochOrder(scans, seed=settings.seed, temperature=settings.site_temperature, shuffle=training, at_least=least)
        data = getattr(self, f"_{self.recipe.samples}")(scans, order, training)
        together = {"batch_size": self.batch_size}
        if self.deferred and training:
            together |= {"collate_fn": deferred.collated, "pin_memory": torch.cuda.is_available()}
        if self.recipe.samples == "slices":  # batch_size counts slices, of which a sample has several
            together = {"batch_size": -(-self.batch_size // settings.slices.per_visit), "collate_fn": collated}
        return DataLoader(data, sampler=order, num_workers=workers, worker_init_fn=preempt.deaf, **together)

    def _volumes(self, scans: list[Scan], order: EpochOrder, training: bool) -> Dataset:
        settings, windows = self.settings, None
        if training and self.level == "fine" and settings.fine_patch:
            windows = Windows(settings.fine_patch, self.net.config.multiple, (settings.fine.epochs - settings.whole_epochs) * order.passes)
        return SampleDataset(
            scans, level=self.level, protocol=self.protocols[0], seed=settings.seed, augmented=settings.coarse_augmentation, windows=windows,
            augmentation=settings.augmentation if training else "none", deferred=self.deferred and training,
        )  # fmt: skip

    def _crops(self, scans: list[Scan], _order: EpochOrder, training: bool) -> Dataset:
        settings = self.settings
        return CropDataset(
            scans, protocol_names=self.protocols, side=settings.crops.side, multiple=self.net.config.multiple, seed=settings.seed,
            augmentation=settings.augmentation if training else "none", validation=not training, deferred=self.deferred and training,
        )  # fmt: skip

    def _slices(self, scans: list[Scan], _order: EpochOrder, training: bool) -> Dataset:
        settings = self.settings
        return SliceDataset(
            scans, protocol=self.protocols[0], how=settings.slices, config=self.net.config, inner_scale=self.recipe.inner_scale, seed=settings.seed,
            augmentation=settings.augmentation if training else "none", validation=not training,
        )  # fmt: skip


def augments_on_device(network: str, recipe: Recipe, settings: Train) -> bool:
    """Whether workers leave augmentation to the device that trains; InputError where ``train.augment_on`` asks for what there is not."""
    if settings.augment_on == "device" and recipe.samples == "slices":
        raise InputError(f"train.augment_on is device: network {network} is trained on slices, cut where the scan is read; workers or auto is wanted")
    there = settings.augment_on == "device" or (settings.augment_on == "auto" and torch.cuda.is_available())
    return there and recipe.samples != "slices" and settings.augmentation != "none"
