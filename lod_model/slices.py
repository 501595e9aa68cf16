"""Slices of three views out of whole scans, with labels and weights: what FastSurfer's networks are trained on. Nothing of it is kept on disk."""

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from data_registry import protocol as protocols
from data_registry.params import Slices
from lod_model.augment import augment, sample_seed
from lod_model.data import Scan
from lod_model.networks.competitive import VIEWS, ViewsConfig
from lod_model.pixel_weights import MARGIN, class_weights, pixel_weights
from lod_model.views import AXES, slices_of

SMALLEST_SCALE = 0.5  # the draws are normal: without bounds one in many thousands leaves nothing of a slice
LARGEST_SCALE = 2.0


class SliceDataset(Dataset):
    """Some slices of each view of a scan, others in each epoch. Items are asked for as (epoch, index) and depend on nothing else.

    For each view ``<view>_image`` (n, slices, H, W) float32, 0 … 1; ``<view>_target`` (n, H, W) int64 classes, of the sagittal view those that
    it can tell apart, 255 where the protocol says nothing; ``<view>_weight`` (n, H, W) float32; ``<view>_scale`` (n,) float32, the zoom inside
    the network: base voxel size / voxel size, and noise. Drawn among the slices that have labels; in ``validation`` they are evenly spaced
    among these, without noise. The volume is augmented, not its slices.
    """

    def __init__(
        self, scans: list[Scan], *, protocol: str, how: Slices, config: ViewsConfig, inner_scale: float = 0.0, augmentation: str = "none",
        seed: int = 0, validation: bool = False,
    ) -> None:  # fmt: skip
        self.scans, self.how, self.config, self.augmentation, self.seed, self.validation = scans, how, config, augmentation, seed, validation
        self.inner_scale = inner_scale if how.inner_scale is None else how.inner_scale
        self.protocol = protocols.load(protocol)
        self.sagittal = np.append(protocols.sagittal_classes(self.protocol)[0], np.arange(self.protocol.classes, 256))
        self.swap = np.append(self.protocol.mirrored(), np.arange(self.protocol.classes, 256))

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
        side = self.config.multiple
        image, classes = (np.pad(a, [(0, -n % side) for n in a.shape]) for a in (image, classes))
        sample: dict[str, torch.Tensor] = {}
        for view in VIEWS:
            sample |= {f"{view}_{name}": tensor for name, tensor in self._view(view, image, classes, scan.voxel_mm, generator).items()}
        return sample

    def _view(self, view: str, image: np.ndarray, classes: np.ndarray, voxel_mm: float, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        seen = self.sagittal.astype(np.uint8)[classes] if view == "sagittal" else classes
        chosen = self._chosen(seen, AXES[view][0], generator)
        weights = self._weights(view, seen, chosen)
        number = len(chosen)
        inner, outer = (1 + np.zeros(number), np.ones(number)) if self.validation else self._scales(number, generator)
        found = {
            "image": torch.from_numpy(slices_of(image, view, chosen, thickness=self.config.slices).astype(np.float32) / 255),
            "target": torch.from_numpy(slices_of(seen, view, chosen, thickness=1)[:, 0].astype(np.int64)),
            "weight": torch.from_numpy(weights),
            "scale": torch.from_numpy((self.config.scale(voxel_mm) + inner - 1).astype(np.float32)),
        }
        return found if (outer == 1).all() else zoomed(found, outer)

    def _chosen(self, classes: np.ndarray, axis: int, generator: np.random.Generator) -> list[int]:
        labelled = np.flatnonzero(((classes > 0) & (classes != protocols.IGNORED)).any(axis=tuple({0, 1, 2} - {axis})))
        labelled = labelled if len(labelled) else np.arange(classes.shape[axis])
        if self.validation:
            return labelled[np.linspace(0, len(labelled) - 1, self.how.per_visit + 2).astype(int)[1:-1]].tolist()
        return generator.choice(labelled, self.how.per_visit, replace=len(labelled) < self.how.per_visit).tolist()

    def _scales(self, number: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What is added to the zoom inside, about 1, and the factor of the zoom before the network."""
        draws = [1 + deviation * generator.standard_normal(number) for deviation in (self.inner_scale, self.how.outer_scale)]
        return tuple(np.clip(draw, SMALLEST_SCALE, LARGEST_SCALE) for draw in draws)

    def _weights(self, view: str, classes: np.ndarray, chosen: list[int]) -> np.ndarray:
        """(n, H, W) float32: those of the whole volume, computed on a slab around each slice."""
        parts, axis, cortex = set(self.how.weights), AXES[view][0], self.protocol.cortex
        if view == "sagittal":
            cortex = np.zeros(self.sagittal[: self.protocol.classes].max() + 1, dtype=bool)
            cortex[self.sagittal[: self.protocol.classes][self.protocol.cortex]] = True
        table = class_weights(classes) if "median" in parts else None
        found = []
        for index in chosen:
            first = max(0, index - MARGIN)
            slab = classes[(slice(None),) * axis + (slice(first, index + MARGIN + 1),)]
            weights = pixel_weights(slab, cortex, parts=parts, table=table)
            found.append(slices_of(weights, view, [index - first], thickness=1)[0, 0])
        return np.stack(found)


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
        if not name.endswith("_scale"):
            height, width = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
            outside = protocols.IGNORED if name.endswith("_target") else 0
            parts = [F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2]), value=outside) for part in parts]
        batch[name] = torch.cat(parts)
    return batch
