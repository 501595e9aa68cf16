"""The settings of ``params.yaml``, checked when loaded: frozen, and an unknown key is an error that lists the known ones.

One section a stage; ``resources`` says where and how wide things run and is seen by no cache key.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from data_registry import conform, protocol
from data_registry.errors import InputError
from data_registry.intensity import Intensity
from data_registry.jobs import Count, Section, Slurm
from data_registry.large_batch import LargeBatch

Settings = TypeVar("Settings", bound=Section)


def LeftOutIf(default: object) -> object:
    """A key that came later counts in no fingerprint while it has its first value: shards and folds made before it stand."""
    return Field(exclude_if=lambda value: value == default)


Share = Annotated[float, Field(ge=0, lt=1)]


class Index(Section):
    """Where the data is."""

    roots: tuple[str, ...]
    """BIDS databases, or folders of BIDS databases; relative paths start at the folder of params.yaml."""
    people: tuple[str, ...] = ()
    """Tables (.tsv: database, subject, person) of who is known: one name, one person; other names, other people."""
    labels: str | None = None
    """A folder for label maps of databases that nobody may write to: what `python -m pipelines.label` makes goes to <labels>/<database>/derivatives,
    and index looks there too. null: all label maps are the databases' own."""


class Harmonise(Section):
    """BIDS trees → shards."""

    grid: str = "1mm"
    """1mm, any size as <x>mm, min (FastSurfer's rule) or native."""
    intensity: Intensity = "robust"
    """From one scan alone, see data_registry/intensity.py. n4: its bias field is divided out first. whitestripe: its white matter gets one
    grey level. n4_whitestripe: one after the other."""
    interpolation: Annotated[conform.Interpolation, LeftOutIf("linear")] = "linear"
    """How a T1w reaches the grid."""
    labels: Literal["majority", "nearest"] = "majority"
    """How label maps reach a coarser grid."""
    block_protocols: tuple[str, ...] = ("lod7",)
    """Protocols whose classes are stored beside the source ids, and their counts for each block, for the coarse stage."""
    class_protocols: Annotated[tuple[str, ...], LeftOutIf(())] = ()
    """Protocols whose classes alone are stored: quicker to read than source ids that must be looked up, and no counts of many classes."""
    likeness: Annotated[bool, LeftOutIf(True)] = True
    """Describe each brain by 512 numbers, by which the split finds people who stand in two databases; 0.17 s a scan."""
    shards_per_site: Annotated[int, Field(ge=1, le=999)] = 4

    @field_validator("grid")
    @classmethod
    def _grid_is_known(cls, value: str) -> str:
        conform.parse_grid(value)
        return value

    @property
    def stored_protocols(self) -> tuple[str, ...]:
        """All whose classes are stored."""
        return tuple(dict.fromkeys(self.block_protocols + self.class_protocols))

    @field_validator("block_protocols", "class_protocols")
    @classmethod
    def _protocols_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            protocol.load(name)
        return value


Guard = Literal["person", "family", "content", "suspected", "scanner"]


class Split(Section):
    """Who is held out."""

    key: Literal["place", "site", "database", "manufacturer", "scanner", "resolution"] = "place"
    """resolution: the smallest edge of a scan's own voxels in mm, to one decimal, e.g. "0.8"."""
    folds: Count = 5
    """Grouped folds, never more than there are groups; every group is held out exactly once. 1: none is, and unseen people alone are the test."""
    holdout: tuple[str, ...] = ()
    """Instead of folds: the groups held out together in one fold."""
    guards: tuple[Guard, ...] = ("person", "family", "content", "suspected", "scanner")
    """What may never stand on both sides of a fold. suspected: whose heads are so alike that somebody is to look (tables/people.tsv)."""
    val_share: Share = 0.15
    """Of the people of training places, for early stopping and the choice of a checkpoint."""
    internal_share: Share = 0.25
    """Of the people of training places, unseen, for the comparison with held-out places."""
    train_people: Annotated[Count | None, LeftOutIf(None)] = None
    """Train on so many people alone, spread over sites, those of a smaller number among those of a larger; null: on all. What is validated
    and tested on stays."""
    quality: Annotated[Literal["report", "exclude_fail"], LeftOutIf("report")] = "report"
    """report: what the stage quality says leaves no scan out. exclude_fail: scans whose verdict is fail are in no fold, with their reason."""
    seed: int = 0


class Stage(Section):
    """One step of progressive training."""

    epochs: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)]


class Crops(Section):
    """For networks that are trained on parts of a scan."""

    side: Count = 128
    """Voxels; a smaller scan is taken whole."""


class Slices(Section):
    """For networks that are trained on slices of three views."""

    per_visit: Count = 4
    """Of each view, of one scan; batch_size counts slices."""
    inner_scale: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of what is added to a slice's zoom inside the network; null: the network's own."""
    outer_scale: tuple[Annotated[float, Field(ge=0.5, le=2)], Annotated[float, Field(ge=0.5, le=2)]] = (1.0, 1.0)
    """Range of the factor, uniform, by which image and labels are zoomed before the network sees them; FastSurfer's is 0.8 to 1.15."""
    weights: tuple[Literal["median", "gradient", "hires", "gm"], ...] = ("median", "gradient", "hires", "gm")
    """Parts of a pixel's weight in the loss, see lod_model/pixel_weights.py."""


class Train(Section):
    """Training of one network on every fold; LOD-Brain's goes coarse to fine, all others have the fine stage alone."""

    protocol: str | tuple[str, ...] = "lod7"
    """Or several, for networks with an output for each; the others take the first."""
    recipe: Annotated[str, LeftOutIf("shared")] = "shared"
    """shared: optimiser, learning rate, schedule and batch of this section for every network. own: those that its authors give, see the
    network's file in lod_model/networks. A network's name: those of that network. Samples, loss and epochs are the network's, and this
    section's, either way."""
    seed: int = 0
    coarse: Stage = Stage(epochs=50, learning_rate=5e-4)
    fine: Stage = Stage(epochs=50, learning_rate=5e-4)
    schedule: Literal["plateau", "one_cycle"] = "plateau"
    """plateau: the paper's, a quarter of the learning rate when validation stalls. one_cycle: up over the first 15 % of a stage's steps, so
    that a fresh level does not drive small classes to zero, then to zero along a cosine; better for few epochs."""
    coarse_level: Literal["trained", "frozen"] = "trained"
    """In the fine stage. frozen: held still, without gradients and without dropout; the published weights were trained with it free."""
    coarse_augmentation: Literal["after", "before"] = "after"
    """after: the stored coarse columns are augmented. before: the full grid is, then max-pooled and its classes counted; noise, blur and thin
    slices are then those of the full grid, at the cost of augmenting 64 times the voxels."""
    fine_patch: Annotated[int, Field(ge=1)] | None = None
    """Edge, in voxels, of the part of the head that the finest level is trained on, while the levels before it see the whole; null: all of
    it. The group norms of the finest level then take their moments over that part, which are not those of a whole head."""
    whole_epochs: Annotated[int, Field(ge=0)] = 0
    """With fine_patch: the last epochs of the fine stage, on whole heads, so that weights and moments fit each other again. The stage then
    runs to its end: nothing stops it early."""
    checkpointing: Literal["none", "blocks"] = "none"
    """blocks: keep the blocks' inputs alone and compute their insides again on the way back; less memory, more time, the same gradients."""
    batch_size: Count = 1
    """Samples of a step, of all processes together; large_batch says what more processes than these do."""
    large_batch: Annotated[LargeBatch, LeftOutIf(LargeBatch())] = LargeBatch()
    accumulate: Annotated[Count, LeftOutIf(1)] = 1
    """Parts in which a process goes through its share of a batch, one after the other: less memory, the same gradient, but of batch norms,
    and of FastSurfer's loss, whose sums are then a part's."""
    batch_norms: Annotated[Literal["own", "all"], LeftOutIf("own")] = "own"
    """Whose samples batch norms take their moments of, in training. own: a process's, which with a sample a process are those of the recipe;
    so what networks with batch norms learn depends on the number of processes. all: every process's, on GPUs. Group norms, as LOD-Brain's and
    the U-Net's, look at one sample either way."""
    compile: Annotated[Literal["none", "network"], LeftOutIf("none")] = "none"
    """network: torch.compile makes code of its passes, in minutes, for scans of one size; wants a C++ compiler, on GPUs Triton."""
    precision: Literal["32", "bf16-mixed", "auto"] = "32"
    """auto: bf16-mixed where the processor computes in bf16 (twice as fast), else 32."""
    augmentation: Literal["none", "light", "strong", "paper"] = "light"
    augment_on: Annotated[Literal["workers", "device", "auto"], LeftOutIf("workers")] = "workers"
    """device: workers read and draw, the device that trains does what was drawn; a GPU's noise then is another draw. auto: device on a GPU, for
    networks that are not trained on slices; else workers."""
    standardise: Annotated[Literal["none", "nyul"], LeftOutIf("none")] = "none"
    """nyul: intensities go to a standard scale, fitted on the fold's training scans alone, see data_registry/nyul.py."""
    network: dict = {}
    """Overrides of the network's own configuration, e.g. widths; below a network's name those of that network alone."""
    visits: Annotated[Count | None, LeftOutIf(None)] = None
    """How often an epoch comes to a scan, for another part of it each time; null: the network's own number, 1 where scans are taken whole."""
    crops: Annotated[Crops, LeftOutIf(Crops())] = Crops()
    slices: Annotated[Slices, LeftOutIf(Slices())] = Slices()
    reduce_patience: Count = 5
    """Epochs without a better validation loss before the learning rate is quartered."""
    stop_patience: Count = 10
    """Epochs without a better validation loss before a stage ends."""
    min_samples_per_epoch: Count = 1
    """An epoch goes through the scans as often as it takes to see this many, so that few scans do not mean few steps."""
    site_temperature: Annotated[float, Field(gt=0, le=1)] = 1.0
    """1: every scan equally often; towards 0: every site equally often."""

    @property
    def protocols(self) -> tuple[str, ...]:
        """Names of all of them."""
        return (self.protocol,) if isinstance(self.protocol, str) else self.protocol

    def network_of(self, name: str) -> dict:
        """What overrides the configuration of the network ``name``.

        >>> Train(network={"dropout": 0.1, "unet": {"widths": [8, 16]}}).network_of("unet")
        {'dropout': 0.1, 'widths': [8, 16]}
        """
        own, chosen = {key: value for key, value in self.network.items() if not isinstance(value, dict)}, self.network.get(name, {})
        if not isinstance(chosen, dict):
            raise InputError(f"train.network.{name} is {chosen!r}; settings of that network are wanted below it")
        return own | chosen

    @field_validator("protocol")
    @classmethod
    def _protocols_are_known(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (value,) if isinstance(value, str) else value
        if not names or len(set(names)) < len(names):
            raise ValueError("one protocol, or a list of different ones, is wanted")
        for name in names:
            protocol.load(name)
        return value

    @model_validator(mode="after")
    def _something_is_trained(self) -> "Train":
        if not self.coarse.epochs + self.fine.epochs:
            raise ValueError("coarse.epochs and fine.epochs are both 0; at least one epoch is wanted")
        if self.whole_epochs and not (self.fine_patch and self.whole_epochs <= self.fine.epochs):
            wanted = f"at most the {self.fine.epochs} of fine.epochs" if self.fine_patch else "0 without fine_patch"
            raise ValueError(f"whole_epochs is {self.whole_epochs}; {wanted} is wanted")
        return self


class Evaluate(Section):
    """Scores on held-out places and unseen people."""

    postprocess: Literal["none", "components", "release"] = "components"
    """As in `lodbrain segment`, so that what is measured is what ships."""
    reference_weights: tuple[str, ...] = ()
    """Weight files scored beside the trained folds, e.g. imported ones. The stage's key sees the names: give other weights another name."""


class Resources(Section):
    """Where and how wide; never part of a result's identity."""

    workers: Count = 2
    shards: str = "shards"
    """A folder, or an fsspec URL, e.g. s3://bucket/shards (pip install 'lodbrain[s3]'), of this project alone. Its credentials and endpoint are
    the environment's: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, …"""
    cache_folder: str = "cache/shards"
    """On a disk of this machine, one user's: copies of the shards of a URL; a folder's are read in place."""
    cache_gb: Annotated[float, Field(gt=0)] = 50
    """Of those copies together; the least recently used go first."""
    ray_address: str | None = None
    """An existing Ray cluster, host:port; null starts one on this machine. That of a surrounding Ray job, or of RAY_ADDRESS, comes first."""
    task_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory that a task of harmonise or label declares to Ray, in 10⁹ bytes; null: as much as the grid's size, or the tool, asks for."""
    tries: Count = 3
    """Deaths of a worker on one scan before harmonise leaves the scan out."""
    threads: Count | None = None
    """Of a training process; null lets torch choose."""
    loader_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read and augment samples beside the training process."""
    mlflow_uri: str | None = None
    """Tracking server, e.g. http://lab:5000. null is SQLite below mlflow/ of the current folder: mlflow.db, or in a SLURM job a file of its own
    in jobs/, as with LODBRAIN_MLFLOW_OFFLINE=1 whatever stands here; `python -m lod_model.tracking sync` merges such files."""
    launcher: Literal["local", "slurm"] = "local"
    """Where the stage train trains. slurm: its unfinished folds are one array of jobs, which it waits for."""
    slurm: Slurm = Slurm()


class Params(Section):
    """The whole of ``params.yaml``."""

    experiment: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "base"
    networks: tuple[str, ...] = ("lod_brain",)
    index: Index
    harmonise: Harmonise = Harmonise()
    split: Split = Split()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    resources: Resources = Resources()

    def run_name(self, network: str) -> str:
        """``<network>-<experiment>-<seed>``, as ``dvc.yaml`` names the folder of its checkpoints."""
        return f"{network}-{self.experiment}-{self.train.seed}"


def load_params(path: str | os.PathLike = "params.yaml") -> Params:
    """Read and check ``params.yaml``; see :func:`load_settings`."""
    return load_settings(path, Params)


def load_settings(path: str | os.PathLike, model: type[Settings]) -> Settings:
    """Read a YAML file and check it; anything wrong is an :class:`InputError` that names the file and the key."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = " (run in the folder that holds it)" if model is Params else ""
        raise InputError(f"{path}: {error.strerror}; the settings file is wanted{hint}") from None
    except UnicodeError:
        raise InputError(f"{path}: not UTF-8 text; a YAML file in UTF-8 is wanted") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return checked(content or {}, model, str(path))


def checked(content: dict, model: type[Settings], where: str) -> Settings:
    """Settings of plain values; anything wrong is an :class:`InputError` that begins with ``where`` and names the key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{where}: " + "; ".join(_sentence(detail, model) for detail in error.errors())) from None


def _sentence(detail: dict, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        for part in detail["loc"][:-1]:
            model = _section_of(model.model_fields[part].annotation) or model if part in model.model_fields else model
        return f"{key} is not a known key; {', '.join(model.model_fields)} are"
    if detail["type"] == "missing":
        return f"{key} is missing"
    reason = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict):  # a whole section is no help to look at
        return f"{key}: {reason}" if key else reason
    return f"{key} is {detail['input']!r}: {reason}"


def _section_of(annotation: object) -> type[Section] | None:
    """The settings that a field holds, alone or as a tuple's or dict's values."""
    inside = (annotation, *get_args(annotation))
    return next((part for part in inside if isinstance(part, type) and issubclass(part, Section)), None)


def fingerprint(*parts: object) -> str:
    """Hex SHA-256 of plain values, independent of key order.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
