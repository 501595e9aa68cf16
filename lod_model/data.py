"""Training samples out of the shards: which scans a fold gives each role, in which order, and what the network is fed.

The order of an epoch is a pure function of (seed, epoch); the parameters of an augmentation of (seed, epoch, sample).
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from data_registry import nyul
from data_registry import protocol as protocols
from data_registry.errors import InputError
from data_registry.intensity import ROBUST, Preparation, moments
from data_registry.ledgers import withdrawn
from data_registry.params import Resources
from data_registry.schema import read_table, table_metadata
from data_registry.shard_store import ShardStore, open_store
from data_registry.shards import block_counts, classes_of, pooled
from lod_model.augment import augment, sample_seed
from lod_model.deferred import KEY, Deferred, drawn
from lod_model.runs import TABLES

COARSE_FACTOR = 4


@dataclass(frozen=True)
class Scan:
    """Where a scan's arrays stand, and the moments of its T1w over the whole full-resolution grid."""

    scan_id: str
    database: str
    site: str
    place: str
    store: ShardStore
    shard: str
    shard_sha256: str
    row_group: int
    mean: float
    deviation: float
    voxel_mm: float
    label_sources: tuple[str, ...]
    histogram: np.ndarray = field(compare=False, repr=False)
    """(256,) voxels of each intensity, as stored."""
    table: np.ndarray | None = field(default=None, compare=False, repr=False)
    """(256,) uint8, never decreasing: what stored intensities become on read; null: they stay."""
    person: str = ""
    """As the split has it; empty if it is not known."""

    def t1w(self, factor: int = 1) -> np.ndarray:
        """(D/f, H/f, W/f) uint8, max-pooled by ``factor``; a table that never decreases gives the same before and after pooling."""
        stored = self._read(f"t1w_x{factor}")[f"t1w_x{factor}"]
        return stored if self.table is None else self.table[stored]

    def standardised(self, scale: tuple[float, ...] | None) -> "Scan":
        """The scan on a standard scale, with its moments there; itself where there is no scale."""
        if scale is None:
            return self
        table = nyul.table_for(self.histogram, scale)
        mean, deviation = moments(nyul.mapped(self.histogram, table))
        return replace(self, table=table, mean=mean, deviation=deviation)

    def classes(self, protocol: protocols.Protocol) -> np.ndarray:
        """(D, H, W) uint8 classes of the protocol, IGNORED among them: as stored, or from the first of its sources that the scan has."""
        name = f"{protocol.name}_classes_x1"
        if stored := self._read(name):
            return stored[name]
        source = next(source for source in protocol.sources if source in self.label_sources)
        ids = self._read(f"{source}_x1")[f"{source}_x1"]
        return classes_of(ids, protocol, where=f"{self.store.where(self.shard)}, {self.scan_id}")

    def fractions(self, protocol: protocols.Protocol, factor: int) -> np.ndarray:
        """(C, D/f, H/f, W/f) float32: the share of each class in each block; voxels that the protocol leaves out are in no class."""
        name = f"{protocol.name}_x{factor}"
        counts = self._read(name)
        if name not in counts:
            where = self.store.where(self.shard)
            raise InputError(f"{where}: {self.scan_id} has no column {name}; harmonise.block_protocols must name {protocol.name}")
        return counts[name].astype(np.float32) / factor**3

    def zscored(self, image: np.ndarray, raw: np.ndarray, *, most: float = np.inf) -> np.ndarray:
        """float32, by the moments of the whole scan on the full grid. ``image`` is what augmentation has made of ``raw``, a part of the scan or
        a level of detail: what it did to their moments, it is taken to have done to the whole's, the deviation up to a factor of ``most``."""
        mean = self.mean + float(image.mean(dtype=np.float64)) - float(raw.mean(dtype=np.float64))
        factor = (float(image.std(dtype=np.float64)) + 1e-6) / (float(raw.std(dtype=np.float64)) + 1e-6)
        return (image - np.float32(mean)) / np.float32(max(self.deviation * min(max(factor, 1 / most), most), 1e-6))

    def has(self, protocol: protocols.Protocol) -> bool:
        """Whether it has labels that the protocol speaks of."""
        return bool(set(protocol.sources) & set(self.label_sources))

    def _read(self, column: str) -> dict[str, np.ndarray]:
        return self.store.read_row(self.shard, self.row_group, [column], scan_id=self.scan_id, sha256=self.shard_sha256)


def all_folds(resources: Resources = Resources()) -> dict[int, dict[str, list[Scan]]]:  # noqa: B008 (frozen)
    """fold → role → scans by scan_id, from the tables below the current folder and the shards that ``resources`` name.

    A frozen split may name scans that were withdrawn since; they are passed over, and all others keep their roles.
    """
    store, gone = open_store(resources), withdrawn()
    places = {row["scan_id"]: row["place"] for row in read_table(TABLES / "scans.parquet", "scans").select(["scan_id", "place"]).to_pylist()}
    samples = {row["scan_id"]: row for row in read_table(TABLES / "samples.parquet", "samples").to_pylist() if row["status"] == "ok"}
    histograms = {scan_id: np.array(row["histogram"]) for scan_id, row in samples.items()}
    folds: dict[int, dict[str, list[Scan]]] = {}
    for row in sorted(read_table(TABLES / "split.parquet", "split").to_pylist(), key=lambda row: (row["fold"], row["scan_id"])):
        sample = samples.get(row["scan_id"])
        if gone.has_scan(row["scan_id"]):
            continue
        if sample is None:
            raise InputError(f"{TABLES / 'split.parquet'}: {row['scan_id']} is not in {TABLES / 'samples.parquet'}; run `python -m pipelines.split`")
        scan = Scan(
            scan_id=row["scan_id"], database=sample["database"], site=sample["site"], place=places[row["scan_id"]],
            store=store, shard=sample["shard"], shard_sha256=sample["shard_sha256"], row_group=sample["row_group"],
            mean=sample["mean"], deviation=sample["deviation"], voxel_mm=sample["voxel_mm"], label_sources=tuple(sample["label_sources"]),
            histogram=histograms[row["scan_id"]], person=row["person"],
        )  # fmt: skip
        folds.setdefault(row["fold"], {}).setdefault(row["role"], []).append(scan)
    return folds


def preparation(roles: dict[str, list[Scan]], *, standardise: str) -> Preparation:
    """What the shards' scans went through, as their table says, and the standard scale of a fold: fitted on its role ``train`` alone."""
    note = table_metadata(TABLES / "samples.parquet").get("preparation")
    made = Preparation(**json.loads(note)) if note else ROBUST
    return replace(made, scale=nyul.fit(scan.histogram for scan in roles["train"])) if standardise == "nyul" else made


class SampleDataset(Dataset):
    """One level of detail of a role's scans. Items are asked for as (epoch, index) and depend on nothing else.

    Level ``coarse``: the T1w max-pooled by 4 and class fractions (C, d, h, w) float32, from the coarse columns alone. Level ``fine``: the
    full grid and classes (D, H, W) int64. The image is (1, …) float32, z-scored with the moments of the full-resolution volume.

    ``augmented`` before: what the coarse level sees is made from the full grid, augmented, then pooled and counted; without augmentation
    that is what stands in the coarse columns. ``windows``: the target of the fine level is cut to a window, its first voxel ``window``.
    ``deferred``: image and target as they are read, and what :func:`lod_model.deferred.finished` is to make of them; collated by that module.
    """

    def __init__(
        self, scans: list[Scan], *, level: Literal["coarse", "fine"], protocol: str, augmentation: str = "none", seed: int = 0,
        augmented: Literal["after", "before"] = "after", windows: "Windows | None" = None, deferred: bool = False,
    ) -> None:  # fmt: skip
        self.scans, self.level, self.augmentation, self.seed = scans, level, augmentation, seed
        self.augmented, self.windows, self.deferred = augmented, windows, deferred
        self.protocol = protocols.load(protocol)

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        scan = self.scans[index]
        pooling = self.level == "coarse" and self.augmented == "before" and self.augmentation != "none"   # after augmentation
        factor = COARSE_FACTOR if self.level == "coarse" and not pooling else 1
        raw = scan.t1w(factor)
        target = scan.fractions(self.protocol, factor) if factor > 1 else scan.classes(self.protocol)
        seed = sample_seed(self.seed, epoch, scan.scan_id)
        mirrored, voxel_mm = self.protocol.mirrored(), scan.voxel_mm * factor
        windows = self.windows if self.windows and epoch < self.windows.until else None
        if self.deferred:
            image, (target,), variant, moments_before = drawn(raw, [target], [mirrored], preset=self.augmentation, seed=seed, voxel_mm=voxel_mm)
            plan = Deferred(
                variant, raw.shape, ("target",), scan.mean, scan.deviation, raw=moments_before,
                pooling=(COARSE_FACTOR, self.protocol.classes) if pooling else None, window=windows and (windows, seed, scan.scan_id),
            )  # fmt: skip
            return {"image": _tensor(image)[None], "target": _tensor(target), KEY: plan}
        image, target = augment(raw, target, preset=self.augmentation, seed=seed, mirrored=mirrored, voxel_mm=voxel_mm)
        image = scan.zscored(image, raw)
        if pooling:
            image = pooled(image, COARSE_FACTOR)
            target = block_counts(target, COARSE_FACTOR, self.protocol.classes).astype(np.float32) / COARSE_FACTOR**3
        sample = {"image": _tensor(image)[None]}
        if windows:
            first = windows.first(target, seed, where=scan.scan_id)
            target = target[tuple(slice(start, start + windows.side) for start in first)]
            sample["window"] = torch.from_numpy(first)
        return sample | {"target": _tensor(target if self.level == "coarse" else target.astype(np.int64))}


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@dataclass(frozen=True)
class Windows:
    """Cubes of ``side`` voxels that start at multiples of ``step``, for all passes before number ``until``."""

    side: int
    step: int
    until: float = float("inf")

    def first(self, classes: np.ndarray, seed: int, *, where: str) -> np.ndarray:
        """First voxel (3,) of one of the windows that hold any labelled voxel, each equally likely; of all, where nothing is labelled.

        So a labelled voxel that is not near the image's border stands in as many windows as any other. InputError for a window that is
        larger than the image.

        >>> classes = np.zeros((4, 4, 4), np.uint8); classes[3, 0, 3] = 1
        >>> Windows(side=2, step=2).first(classes, 0, where="sub-01").tolist()
        [2, 0, 2]
        """
        self.check(classes.shape, where=where)
        return self.place(pooled(classes > 0, self.step), seed)

    def check(self, shape: tuple[int, ...], *, where: str) -> None:
        """InputError for a window that is larger than the image."""
        if self.side > min(shape):
            sides = " × ".join(map(str, shape))
            raise InputError(f"train.fine_patch is {self.side}: {where} has {sides} voxels; null or at most {min(shape)} is wanted")

    def place(self, labelled: np.ndarray, seed: int) -> np.ndarray:
        """As :meth:`first`, of blocks of ``step`` voxels that hold a labelled one."""
        for axis in range(3):
            labelled = np.lib.stride_tricks.sliding_window_view(labelled, self.side // self.step, axis=axis).any(-1)
        places = np.argwhere(labelled if labelled.any() else ~labelled)
        return places[np.random.default_rng([seed, 1]).integers(len(places))] * self.step


class EpochOrder(Sampler[tuple[int, int]]):
    """The (pass, index) of an epoch's samples: every scan once a pass, or sites balanced by a temperature; as many passes as ``at_least``
    samples take, each with its own number, so that a repeated scan is augmented anew.

    With temperature 1 a pass is a permutation; towards 0 scans are drawn so that every site comes equally often (a site with share s
    of the scans gets a share proportional to s**temperature).
    """

    def __init__(self, scans: list[Scan], *, seed: int, temperature: float = 1.0, shuffle: bool = True, at_least: int = 1) -> None:
        self.scans, self.seed, self.temperature, self.shuffle, self.epoch = scans, seed, temperature, shuffle, 0
        self.passes = -(-at_least // len(scans)) if scans else 1
        self.resumed = (0, 0)

    def resume_at(self, epoch: int, consumed: int) -> None:
        """That epoch leaves out its first samples; a call before it begins."""
        self.epoch, self.resumed = epoch, (epoch, consumed)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.scans) * self.passes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if not self.shuffle:
            return iter([(0, index) for index in range(len(self.scans))])
        sites = [(scan.database, scan.site) for scan in self.scans]
        passes = range(self.epoch * self.passes, (self.epoch + 1) * self.passes)
        samples = [(number, int(index)) for number in passes for index in epoch_order(sites, self.seed, number, self.temperature)]
        return iter(samples[self.resumed[1] if self.epoch == self.resumed[0] else 0 :])


def epoch_order(sites: list, seed: int, epoch: int, temperature: float) -> np.ndarray:
    """Indices of one epoch, a pure function of its arguments.

    >>> sorted(epoch_order(["a", "a", "b"], 0, 3, 1.0).tolist())
    [0, 1, 2]
    >>> many = ["a"] * 90 + ["b"] * 10
    >>> int((epoch_order(many, 0, 0, 1e-6) >= 90).sum())     # site b: half of the draws
    50
    """
    generator = np.random.default_rng([seed, epoch])
    if temperature == 1.0:
        return generator.permutation(len(sites))
    counts = Counter(sites)
    weights = {site: n**temperature for site, n in counts.items()}
    exact = {site: len(sites) * w / sum(weights.values()) for site, w in weights.items()}
    wanted = {site: int(share) for site, share in exact.items()}
    for site in sorted(exact, key=lambda site: (wanted[site] - exact[site], str(site)))[: len(sites) - sum(wanted.values())]:
        wanted[site] += 1
    drawn = []
    for site, number in wanted.items():
        own = np.array([index for index, other in enumerate(sites) if other == site])
        rounds = [generator.permutation(own) for _ in range(-(-number // len(own)))]
        drawn.append(np.concatenate(rounds)[:number] if rounds else own[:0])
    return generator.permutation(np.concatenate(drawn))
