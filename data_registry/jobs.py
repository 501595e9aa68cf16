"""What a section of settings is, and the one that says what jobs ask SLURM for."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Settings: frozen, an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Job(Section):
    """What the jobs of one kind ask for."""

    hours: Annotated[float, Field(gt=0)] = 24
    """Of wall time. A training that meets its end is requeued and goes on."""
    nodes: Count = 1
    tasks_per_node: Count = 1
    """Processes; harmonise has one a node, whatever stands here."""
    cpus: Count = 1
    """Of a task."""
    mem_gb: Count | None = None
    """Of a node, in GiB; null: the partition's default."""
    gres: str | None = None
    """Of a node, e.g. gpu:1."""
    partition: str | None = None
    """null: that of all jobs."""


class Slurm(Section):
    """``resources.slurm``: the jobs of ``python -m lod_model.launch`` and, where ``resources.launcher`` is slurm, of the stage train."""

    partition: str | None = None
    """null: the cluster's default."""
    account: str | None = None
    options: tuple[str, ...] = ()
    """More of sbatch's, e.g. --qos=long, for all jobs."""
    setup: tuple[str, ...] = ()
    """Lines of shell before each job's command, e.g. module load cuda. The environment of who submits comes along."""
    at_once: Count = 16
    """Tasks of an array that may run at a time."""
    warning_s: Count = 120
    """How long before its time is up a job is told to save and stop."""
    label: Job = Job(mem_gb=16)
    """A task a scan; its hours are those of --limit-hours, and half of one."""
    harmonise: Job = Job()
    train: Job = Job()
    evaluate: Job = Job()
    sync: Job = Job(hours=1)

    @model_validator(mode="after")
    def _there_is_time_to_work(self) -> "Slurm":
        for name in ("harmonise", "train", "evaluate", "sync"):
            if 2 * self.warning_s > 3600 * getattr(self, name).hours:
                raise ValueError(f"{name}.hours is {getattr(self, name).hours}; at least twice warning_s, {self.warning_s} s, is wanted")
        return self
