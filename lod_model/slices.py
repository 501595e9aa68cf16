"""Slices of three views out of whole scans, with labels and weights: what FastSurfer's networks are trained on. Nothing of it is kept on disk."""

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from data_registry import protocol as protocols
from data_registry.params import Slices
from data_registry.resample import bounding_box
from lod_model.augment import augment, sample_seed
from lod_model.data import Scan
from lod_model.networks.competitive import VIEWS, ViewsConfig
from lod_model.pixel_weights import MARGIN, counted_weights, pixel_weights
from lod_model.views import AXES, as_slices, slices_of

MOST = 2.0  # times a scale, and its inverse: draws are normal, and one in many thousands would leave nothing of a slice


class SliceDataset(Dataset):
    """Some slices of each view of a scan, others in each epoch. Items are asked for as (epoch, index) and depend on nothing else.

    For each view ``<view>_image`` (n, slices, H, W) float32, 0 … 1; ``<view>_target`` (n, H, W) int64 classes, of the sagittal view those that
    it can tell apart, 255 where the protocol says nothing; ``<view>_weight`` (n, H, W) float32; ``<view>_scale`` (n,) float32, the zoom inside
    the network: base voxel size / voxel size, and noise. Drawn among the slices that have labels; in ``validation`` they are evenly spaced
    among these, without noise. The volume is augmented, not its slices. H and W are made up to a multiple of the network's at their ends,
    where nothing is asked of it.
    """

    def __init__(
        self, scans: list[Scan], *, protocol: str, how: Slices, config: ViewsConfig, inner_scale: float = 0.0, augmentation: str = "none",
        seed: int = 0, validation: bool = False,
    ) -> None:  # fmt: skip
        self.scans, self.how, self.config, self.augmentation, self.seed, self.validation = scans, how, config, augmentation, seed, validation
        self.inner_scale = inner_scale if how.inner_scale is None else how.inner_scale
        self.protocol = protocols.load(protocol)
        classes, merged = self.protocol.classes, protocols.sagittal_classes(self.protocol)[0]
        self.swap = np.append(self.protocol.mirrored(), np.arange(classes, 256))
        self.seen = {view: np.arange(256, dtype=np.uint8) for view in VIEWS}  # class → the class that a view sees
        self.seen["sagittal"][:classes] = merged
        self.cortex = dict.fromkeys(VIEWS, self.protocol.cortex)
        self.cortex["sagittal"] = np.isin(np.arange(merged.max() + 1), merged[self.protocol.cortex])

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        scan = self.scans[index]
        seed = sample_seed(self.seed, epoch, scan.scan_id)
        image, classes = scan.t1w(), scan.classes(self.protocol)
        if self.augmentation != "none":
            moved, classes = augment(image, classes, preset=self.augmentation, seed=seed, mirrored=self.swap, voxel_mm=scan.voxel_mm)
            image = np.clip(np.rint(moved), 0, 255).astype(np.uint8)
        generator = np.random.default_rng([seed, 2])
        counts, labelled = _surveyed(classes)
        sample: dict[str, torch.Tensor] = {}
        for view in VIEWS:
            chosen = self._chosen(labelled[AXES[view][0]], generator)
            inner, outer = self._scales(self.config.scale(scan.voxel_mm), len(chosen), generator)
            found = {
                "image": torch.from_numpy(slices_of(image, view, chosen, thickness=self.config.slices)).float().div_(255),
                "target": torch.from_numpy(self.seen[view][slices_of(classes, view, chosen, thickness=1)[:, 0]]).long(),
                "weight": torch.from_numpy(self._weights(view, classes, counts, chosen)),
                "scale": torch.from_numpy(inner.astype(np.float32)),
            }
            found = found if (outer == 1).all() else zoomed(found, outer)
            height, width = (side + -side % self.config.multiple for side in found["target"].shape[1:])
            sample |= {f"{view}_{name}": _padded(name, tensor, height, width) for name, tensor in found.items()}
        return sample

    def _chosen(self, labelled: np.ndarray, generator: np.random.Generator) -> list[int]:
        number = self.how.per_visit
        if self.validation:
            return labelled[np.linspace(0, len(labelled) - 1, number + 2).astype(int)[1:-1]].tolist()
        return generator.choice(labelled, number, replace=len(labelled) < number).tolist()

    def _scales(self, scale: float, number: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(n,) each: the zoom inside, ``scale`` and noise, and the factor of the zoom before the network.

        What is enlarged before the network has smaller voxels, so its zoom inside begins from as much more.
        """
        if self.validation:
            return np.full(number, scale), np.ones(number)
        noise = self.inner_scale * generator.standard_normal(number)
        outer = generator.uniform(*self.how.outer_scale, number)
        return np.clip(scale * outer + noise, scale * outer / MOST, scale * outer * MOST), outer

    def _weights(self, view: str, classes: np.ndarray, counts: np.ndarray, chosen: list[int]) -> np.ndarray:
        """(n, H, W) float32: those of the whole volume, computed on a slab around each slice."""
        parts, slices, seen = set(self.how.weights), as_slices(classes, view), self.seen[view]
        table = counted_weights(np.bincount(seen, counts, minlength=256)) if "median" in parts else None
        found = np.empty((len(chosen), *slices.shape[1:]), dtype=np.float32)
        for weights, index in zip(found, chosen, strict=True):
            first = max(0, index - MARGIN)
            slab = seen[np.ascontiguousarray(slices[first : index + MARGIN + 1])]
            weights[...] = pixel_weights(slab, self.cortex[view], parts=parts, table=table)[index - first]
        return found


def _surveyed(classes: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """(256,) voxels of each class, IGNORED too, and along each axis the planes that have labels; all planes where nothing is labelled."""
    box = bounding_box(classes)
    part = classes[box]
    counts = np.bincount(part.ravel(), minlength=256)
    counts[0] += classes.size - part.size
    there = (part + np.uint8(1)) > 1  # neither background nor, going round, IGNORED
    plane = there.any(0)  # (H, W)
    lines = there.any(2).any(1), plane.any(1), plane.any(0)
    planes = [np.flatnonzero(line) + side.start for line, side in zip(lines, box, strict=True)]
    return counts, planes if len(planes[0]) else [np.arange(n) for n in classes.shape]


def zoomed(found: dict[str, torch.Tensor], factors: np.ndarray) -> dict[str, torch.Tensor]:
    """Slices and their labels zoomed in their plane about the centre, each by its factor; what comes in from outside is background."""
    theta = torch.zeros(len(factors), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.from_numpy(1 / factors).float()

    def sampled(x: torch.Tensor, mode: str) -> torch.Tensor:
        grid = F.affine_grid(theta, [len(x), 1, *x.shape[-2:]], align_corners=False)
        return F.grid_sample(x if x.ndim == 4 else x[:, None].float(), grid, mode=mode, padding_mode="zeros", align_corners=False)

    target, weight = (sampled(found[name], "nearest")[:, 0] for name in ("target", "weight"))
    return found | {"image": sampled(found["image"], "bilinear"), "target": target.long(), "weight": weight}


def collated(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The slices of several scans as one batch; smaller ones are padded at their ends, where nothing is asked of the network."""
    batch = {}
    for name in samples[0]:
        parts = [sample[name] for sample in samples]
        height, width = (max(part.shape[axis] for part in parts) for axis in (-2, -1)) if parts[0].ndim > 1 else (0, 0)
        batch[name] = torch.cat([_padded(name, part, height, width) for part in parts])
    return batch


def _padded(name: str, tensor: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """At the ends of its last two axes; a scale has none."""
    if name.endswith("scale") or tensor.shape[-2:] == (height, width):
        return tensor
    outside = protocols.IGNORED if name.endswith("target") else 0
    return F.pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]), value=outside)
