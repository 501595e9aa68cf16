"""Who trains together: one process, or all tasks of an `srun` or of `torchrun`, each with a GPU of its own; and how they agree.

What is decided (which folds, where to go on) the first process decides and the others are told, so that a shared file system which shows
them different things does no harm. What is said, the first one says.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from data_registry.errors import InputError

Made = TypeVar("Made")
PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others: as long as one reads from a slow disk, or the first one writes. A dead one is mostly noticed at once,
by its closed connection."""
FAILED = 2
"""Exit status of processes that end because of what the first one says."""


@dataclass(frozen=True)
class Group:
    """This process's place among all, and on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launcher: str = ""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


_group = Group()


def group() -> Group:
    """As it is at the moment: one process alone, but within :func:`together`."""
    return _group


def found(environment: Mapping[str, str]) -> Group:
    """What the environment says. torchrun comes first: it may be what srun has started. A lone process in a job of SLURM is alone.

    >>> found({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"})
    Group(rank=3, world=4, local_rank=1, launcher='srun')
    >>> found({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}).world      # not within an srun
    1
    """
    for launcher, names in (("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")), ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))):
        if all(name in environment for name in names) and int(environment[names[1]]) > 1:
            return Group(*(int(environment[name]) for name in names), launcher)
    return Group()


@contextlib.contextmanager
def together() -> Iterator[Group]:
    """Within the block this process is one of those that the environment tells of. InputError where they do not find, or lose, each other."""
    global _group
    place = found(os.environ)
    if place.world == 1:
        yield _group
        return
    import torch
    from torch import distributed

    if place.launcher == "srun":
        from lightning_fabric.plugins.environments import SLURMEnvironment

        meeting = SLURMEnvironment(auto_requeue=False)
        os.environ |= {"MASTER_ADDR": meeting.main_address, "MASTER_PORT": str(meeting.main_port)}  # the first node, a port by the job's number
    if torch.cuda.is_available():
        torch.cuda.set_device(_gpu(place))
    try:
        # What is on a GPU goes by NCCL; flags and messages by gloo, which sees a dead process at once, and waits for no GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=PATIENCE)
    except distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(f"process {place.rank} of {place.world} did not meet the others at {where}: {_first_line(error)}") from None
    _group = place
    if not place.is_first:
        logging.getLogger("lodbrain").setLevel(logging.WARNING)
    try:
        all_can(_own_gpu)
        yield place
        distributed.destroy_process_group()
    except Exception as error:
        if not is_loss(error):
            raise
        end = f"process {place.rank} of {place.world}: another one has ended ({_first_line(error)})"
        raise InputError(f"{end}; what it said tells why, and the same command goes on from the last checkpoint") from None
    finally:
        _group = Group()


def is_loss(error: BaseException) -> bool:
    """Whether another process is away."""
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer"))


def from_first(make: Callable[[], Made]) -> Made:
    """What the first process makes, and all get; its InputError or OSError ends all. Nobody goes on before it is made."""
    if _group.world == 1:
        return make()
    from torch import distributed

    answer, failure = [None, False], None
    if _group.is_first:
        try:
            answer = [make(), False]
        except (InputError, OSError) as error:
            answer, failure = [None, True], error
    distributed.broadcast_object_list(answer, 0)
    if answer[1]:
        end_together(failure)
    return answer[0]


def all_can(make: Callable[[], Made]) -> Made:
    """What each process makes for itself; an InputError or OSError of any ends all."""
    if _group.world == 1:
        return make()
    made, said = None, None
    try:
        made = make()
    except (InputError, OSError) as error:
        said = str(error) if isinstance(error, InputError) else f"{error.filename or 'a file'}: {error.strerror or error}"
    if reasons := [reason for reason in gathered(said) if reason is not None]:
        end_together(InputError(reasons[0]))
    return made


def end_together(error: BaseException | None) -> None:
    """End all processes, which all come here: the first by this error, the others quietly, after it."""
    if _group.is_first:
        raise error
    await_first()
    raise SystemExit(FAILED)


def await_first() -> None:
    """In all processes but the first: until that has ended. An srun kills all others soon after one has ended, and the first writes files."""
    from torch import distributed

    if not _group.is_first:
        with contextlib.suppress(RuntimeError):
            distributed.barrier()  # to which the first one never comes


def gathered(thing: Made) -> list[Made]:
    """Those of all processes, by rank."""
    if _group.world == 1:
        return [thing]
    from torch import distributed

    things = [None] * _group.world
    distributed.all_gather_object(things, thing)
    return things


def summed(tensor):
    """The sum over processes of a tensor that all have in one shape, without gradients."""
    if _group.world == 1:
        return tensor.detach()
    from torch import distributed

    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total


def any_of(flag: bool) -> bool:
    """Whether it is set in any process."""
    import torch

    return bool(summed(torch.tensor(int(flag))))


def trainer_options(*, synchronised: bool) -> dict:
    """For Lightning's Trainer, to which every process is a node with one device; ``synchronised``: batch norms over all processes."""
    if _group.world == 1:
        return {"devices": 1, "num_nodes": 1}
    import torch
    from pytorch_lightning.strategies import DDPStrategy

    # The search for unused parameters costs little beside 3-D convolutions. MONAI's networks may have some; and without it the gradients'
    # order in memory changes after the first step, and with it, between more than two processes, the rounding of sums: a resumed training
    # would not be bit for bit the same.
    strategy = DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=True, timeout=PATIENCE)
    on_gpu = torch.cuda.is_available()
    devices = [torch.cuda.current_device()] if on_gpu else 1
    return {
        "accelerator": "gpu" if on_gpu else "cpu", "devices": devices, "num_nodes": _group.world, "strategy": strategy,
        "use_distributed_sampler": False, "sync_batchnorm": synchronised,
    }  # fmt: skip


def environment():
    """For Lightning's Trainer, which alone would take a lone process in a job of SLURM for one of many."""
    from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment

    if _group.world == 1:
        return LightningEnvironment()

    class Nodes(ClusterEnvironment):
        """The processes of :func:`group`, each a node of one process."""

        creates_processes_externally = True
        main_address, main_port = property(lambda _: os.environ["MASTER_ADDR"]), property(lambda _: int(os.environ["MASTER_PORT"]))
        detect = staticmethod(lambda: False)

        def world_size(self) -> int:
            return _group.world

        def global_rank(self) -> int:
            return _group.rank

        def node_rank(self) -> int:
            return _group.rank

        def local_rank(self) -> int:
            return 0

        def set_world_size(self, size: int) -> None:
            assert size == _group.world

        def set_global_rank(self, rank: int) -> None:
            assert rank == _group.rank

    return Nodes()


def _gpu(place: Group) -> int:
    """Number, of those this process sees; SLURM may show each task its own alone."""
    import torch

    seen = torch.cuda.device_count()
    if 1 < seen <= place.local_rank:
        raise InputError(f"process {place.local_rank + 1} of a machine with {seen} GPUs; as many processes as GPUs, or fewer, are wanted")
    return place.local_rank % seen


def _own_gpu() -> None:
    """InputError where two processes have one GPU."""
    import torch

    if not torch.cuda.is_available():
        return
    own = (socket.gethostname(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    others = gathered(own)
    if others.count(own) > 1:
        raise InputError(f"{own[0]}: {others.count(own)} processes on one GPU; as many processes as GPUs, or fewer, are wanted")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
