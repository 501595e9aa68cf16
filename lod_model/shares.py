"""Which samples of an epoch a step takes, and which of these one of several processes.

The order of an epoch is a pure function of (seed, epoch), and batch number g is its samples from g·B to (g + 1)·B, whoever computes them. So the
position in a training is the number of samples consumed, and any number of processes goes on from there with the same batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from lod_model.data import EpochOrder


@dataclass(frozen=True)
class Part:
    """A part of a batch, and a process's share of it: samples from ``start`` to ``stop`` of an epoch."""

    start: int
    stop: int
    together: int
    """Samples of the part, of all processes."""
    batch: int
    """Samples of the batch that it is a part of."""

    @property
    def own(self) -> int:
        return self.stop - self.start


class Shares(Sampler[list[tuple[int, int]]]):
    """A loader's batch sampler: of each batch of ``batch_size`` samples, taken in ``parts``, the share of process ``rank`` of ``world``.

    All processes take as many steps: where an epoch's last batch, or a batch too small for all, leaves none for one of them, it is given a
    sample nevertheless, and its :class:`Part` says that it has none of its own.

    >>> from types import SimpleNamespace
    >>> order = EpochOrder([SimpleNamespace(database="a", site="b")] * 7, seed=0)
    >>> [[[index for _, index in batch] for batch in Shares(order, 4, rank=rank, world=2)] for rank in range(2)]
    [[[2, 4], [5]], [[3, 6], [0, 1]]]
    """

    def __init__(self, order: EpochOrder, batch_size: int, *, parts: int = 1, rank: int = 0, world: int = 1) -> None:
        assert batch_size >= 1 and parts >= 1 and 0 <= rank < world
        self.sampler = order  # whose set_epoch Lightning calls
        self.batch_size, self.parts, self.rank, self.world = batch_size, parts, rank, world
        self.keys: list[tuple[int, int] | None] = []

    def __len__(self) -> int:
        return self.parts * -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        left = list(self.sampler)
        skipped = len(self.sampler) - len(left)
        assert not left or skipped % self.batch_size == 0, "a training goes on in batches of another size"
        self.keys = [None] * skipped + left
        first = -(-skipped // self.batch_size) * self.parts
        for part in map(self.part, range(first, len(self))):
            yield self.keys[part.start : part.stop] or [self.key_of(part)]

    def key_of(self, part: Part) -> tuple[int, int]:
        """The first sample of a share; of one without samples, that which it is given instead."""
        return self.keys[min(part.start, len(self.keys) - 1)]

    def part(self, index: int) -> Part:
        """What number ``index`` of the epoch is, counted from the epoch's beginning, after a resume too."""
        batch, number = divmod(index, self.parts)
        begin = batch * self.batch_size
        whole = min(self.batch_size, len(self.sampler) - begin)
        first, last = (begin + whole * n // self.parts for n in (number, number + 1))
        start, stop = (first + (last - first) * n // self.world for n in (self.rank, self.rank + 1))
        return Part(start, stop, last - first, whole)

    def consumed(self, index: int) -> int | None:
        """Samples consumed, by all processes, when number ``index`` is done; None amid a batch."""
        batch, number = divmod(index, self.parts)
        return min((batch + 1) * self.batch_size, len(self.sampler)) if number == self.parts - 1 else None

    def scans(self, index: int) -> list[str]:
        """Ids of the scans of this process's share."""
        part = self.part(index)
        return [self.sampler.scans[key[1]].scan_id for key in self.keys[part.start : part.stop]]

    def resume_at(self, epoch: int, consumed: int) -> None:
        """See :meth:`EpochOrder.resume_at`."""
        self.sampler.resume_at(epoch, consumed)


class WholeBatches(Shares):
    """For validation: whole batches, dealt out to the processes, so that a loss which looks at a batch as a whole is as on one process."""

    def __len__(self) -> int:
        return -(-super().__len__() // self.world)

    def part(self, index: int) -> Part:
        start = min((index * self.world + self.rank) * self.batch_size, len(self.sampler))
        stop = min(start + self.batch_size, len(self.sampler))
        return Part(start, stop, stop - start, stop - start)
