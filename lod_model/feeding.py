"""What a network is fed in training: which samples its recipe asks for, in which order, in which batches."""

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data_registry.errors import InputError
from data_registry.params import Train
from lod_model import deferred, networks, preempt, processes
from lod_model.crops import CropDataset
from lod_model.data import EpochOrder, SampleDataset, Scan, Windows
from lod_model.networks.recipe import Recipe
from lod_model.shares import Shares, WholeBatches
from lod_model.slices import SliceDataset, collated


class Feeding:
    """Of one stage of a network's training. ``batch_size`` counts samples, of which a step takes ``factor`` times as many."""

    def __init__(self, network: str, net: nn.Module, level: str, settings: Train, *, factor: int = 1) -> None:
        self.recipe, self.net, self.level, self.settings = networks.recipe_of(network, settings.recipe), net, level, settings
        self.protocols = networks.outputs(network, settings.protocols)
        self.batch_size, self.factor = samples_of_a_step(network, settings), factor
        self.deferred = augments_on_device(network, self.recipe, settings)

    def loader(self, scans: list[Scan], *, training: bool, workers: int) -> DataLoader:
        """Batches of the scans' samples, of each this process's share; those for validation are the same each time, and not augmented."""
        settings, group, least = self.settings, processes.group(), 1
        if training:
            least = max(settings.min_samples_per_epoch, (settings.visits or self.recipe.visits) * len(scans))
            least = settings.large_batch.samples(least, self.batch_size, self.factor)
        order = EpochOrder(scans, seed=settings.seed, temperature=settings.site_temperature, shuffle=training, at_least=least)
        data = getattr(self, f"_{self.recipe.samples}")(scans, order, training)
        if training:
            shares = Shares(order, self.batch_size * self.factor, parts=settings.accumulate, rank=group.rank, world=group.world)
        else:  # where each scan has a loss of its own, as many at a time as in training: more may not fit into memory
            share = self.batch_size * self.factor / group.world if self.recipe.samples == "volumes" else self.batch_size
            number = min(self.batch_size, math.ceil(share / settings.accumulate))
            shares = WholeBatches(order, number, rank=group.rank, world=group.world)
        together = {"collate_fn": collated} if self.recipe.samples == "slices" else {}
        if self.deferred and training:
            together = {"collate_fn": deferred.collated, "pin_memory": torch.cuda.is_available()}
        return DataLoader(data, batch_sampler=shares, num_workers=workers, worker_init_fn=preempt.deaf, **together)

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


def samples_of_a_step(network: str, settings: Train) -> int:
    """By the recipe; where it counts slices, of which a sample has several, as many samples as have them."""
    recipe = networks.recipe_of(network, settings.recipe)
    batch_size = settings.batch_size if settings.recipe == "shared" else recipe.batch_size
    return -(-batch_size // settings.slices.per_visit) if recipe.samples == "slices" else batch_size


def augments_on_device(network: str, recipe: Recipe, settings: Train) -> bool:
    """Whether workers leave augmentation to the device that trains; InputError where ``train.augment_on`` asks for what there is not."""
    if settings.augment_on == "device" and recipe.samples == "slices":
        raise InputError(f"train.augment_on is device: network {network} is trained on slices, cut where the scan is read; workers or auto is wanted")
    there = settings.augment_on == "device" or (settings.augment_on == "auto" and torch.cuda.is_available())
    return there and recipe.samples != "slices" and settings.augmentation != "none"
