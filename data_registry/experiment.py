"""Experiments: what a file ``params/<experiment>.yaml`` says. Some arms, each a whole ``params.yaml`` by what it differs in, and one table.

``pipelines.experiment`` runs the arms, ``lod_model.experiment_table`` makes the table.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_registry.errors import InputError
from data_registry.params import Params, Section, checked, load_settings

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class Table(Section):
    """How the table is made of the arms' scores."""

    by: Literal["none", "role", "resolution", "protocol"] = "none"
    """What an arm's scores are divided by: unseen people and held-out groups (internal, external), voxel sizes, label protocols."""
    across: Literal["structures", "arms"] = "structures"
    """What the columns are: structures and metrics, of a row for each arm and part; or the arms, of a row for each part."""
    structures: tuple[Literal["all", "subcortical", "cortical", "each"], ...] = ("all",)
    """Means over structures; subcortical: all that are no cortex. each: every structure has its column."""
    metrics: tuple[Literal["dice", "asd"], ...] = ("dice",)
    roles: tuple[Literal["internal_test", "external_test"], ...] = ("external_test",)
    """The tests that count: of unseen people, of held-out groups."""
    reference: str = ""
    """The arm that the others are compared with, on the scans that both scored; or the part, e.g. internal."""
    join: dict[str, tuple[str, ...]] = {}
    """Arms that are one in the table, e.g. networks of one protocol each."""
    labels: dict[str, str] = {}
    """What the paper calls an arm."""
    published: str = ""
    """A TSV of part, arm and the paper's figure; a relative path starts at the experiment's file."""

    @model_validator(mode="after")
    def _has_one_figure_a_place(self) -> "Table":
        if self.across == "arms" and (len(self.structures) * len(self.metrics) > 1 or "each" in self.structures):
            raise ValueError("across is arms, with one column each; one of structures and of metrics is wanted")
        return self


class Smoke(Section):
    """What ``--smoke`` changes: the same path on little data, with small networks, for few epochs."""

    note: str = ""
    """What stands for what, for the reader of the table."""
    base: dict = {}
    """Merged over every arm, last."""
    arms: dict[Name, dict | None] = {}
    """Merged over one arm, after that; null leaves the arm out."""


class Experiment(Section):
    """The whole of ``params/<experiment>.yaml``."""

    title: str
    """The question."""
    source: str
    """Paper and table."""
    data: str
    """What the published figures were made with."""
    base: dict = {}
    """What all arms have of ``params.yaml``; index.roots are given on the command line."""
    arms: Annotated[dict[Name, dict], Field(min_length=1)]
    """Name → what is merged over ``base``."""
    smoke: Smoke = Smoke()
    table: Table = Table()

    @model_validator(mode="after")
    def _names_are_known(self) -> "Experiment":
        joined = set(self.arms) | set(self.table.join)
        named = {
            "smoke.arms": (self.smoke.arms, set(self.arms)),
            "table.labels": (self.table.labels, joined),
            "table.join": ([arm for arms in self.table.join.values() for arm in arms], set(self.arms)),
        }
        for key, (names, known) in named.items():
            if unknown := sorted(set(names) - known):
                raise ValueError(f"{key} names {unknown[0]}, which is no arm; {', '.join(sorted(known))} are")
        if self.table.reference and self.table.by == "none" and self.table.reference not in joined:
            raise ValueError(f"table.reference is {self.table.reference}, which is no arm; one of {', '.join(sorted(joined))} is wanted")
        return self

    def settings(self, *, smoke: bool) -> dict[str, dict]:
        """Arm → what it says of ``params.yaml``."""
        found = {}
        for name, own in self.arms.items():
            if smoke and self.smoke.arms.get(name, {}) is None:
                continue
            layers = [self.base, own, *([self.smoke.base, self.smoke.arms.get(name, {})] if smoke else [])]
            found[name] = {}
            for layer in layers:
                found[name] = merged(found[name], layer)
        return found


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment's file; anything wrong is an :class:`InputError` that names the file and the key."""
    return load_settings(path, Experiment)


def arm_params(path: Path, experiment: Experiment, *, smoke: bool, given: dict) -> dict[str, Params]:
    """Arm → its settings with what is ``given`` merged over them; InputError for a wrong one, or an arm of more than one network."""
    found = {}
    for name, settings in experiment.settings(smoke=smoke).items():
        found[name] = checked(merged(settings, given), Params, f"{path}: arms.{name}")
        if len(found[name].networks) != 1:
            raise InputError(f"{path}: arms.{name}: networks are {', '.join(found[name].networks)}; one is wanted, an arm for each")
    if not found:
        raise InputError(f"{path}: smoke.arms leaves out every arm; at least one is wanted")
    return found


def merged(first: dict, second: dict) -> dict:
    """``second`` over ``first``, section by section; anything but a section is replaced.

    >>> merged({"train": {"seed": 0, "visits": 2}, "networks": ["unet"]}, {"train": {"visits": None}, "networks": ["lod_brain"]})
    {'train': {'seed': 0, 'visits': None}, 'networks': ['lod_brain']}
    """
    both = {key: merged(first[key], value) for key, value in second.items() if isinstance(value, dict) and isinstance(first.get(key), dict)}
    return first | second | both
