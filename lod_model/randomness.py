"""Random numbers: torch's generator forked and seeded, draws from it, and fields of draws that are made later, perhaps on another device."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

PIECE = 2**20


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """torch's generator forked and seeded, and one thread: sums in another order would differ in their last bits between worker counts."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def uniform(low: float, high: float) -> float:
    """One draw from torch's current generator."""
    return low + (high - low) * float(torch.rand(()))


def chance(p: float) -> bool:
    """True with probability ``p``, from torch's current generator."""
    return float(torch.rand(())) < p


@dataclass(frozen=True)
class Fields:
    """Whole volumes of random numbers, made when they are asked for. ``start`` is a seed, or a state of torch's generator, (n,) uint8.

    On a CPU they are what that generator draws; another device has another generator, of which these are draws of the same distribution.
    """

    start: int | torch.Tensor

    @property
    def seed(self) -> int:
        """Of generators that cannot take the state, 63 bits that depend on all of it."""
        return self.start if isinstance(self.start, int) else int.from_bytes(hashlib.sha256(self.start.numpy()).digest()[:8], "big") >> 1

    def each(self, draw: Callable[..., torch.Tensor], like: torch.Tensor) -> Iterator[torch.Tensor]:
        """One field after the other, of the shape of ``like`` and on its device: float32 of ``draw``, torch.randn or torch.rand."""
        generator = torch.Generator(like.device)
        if like.device.type == "cpu" and not isinstance(self.start, int):
            generator.set_state(self.start)
        else:
            generator.manual_seed(self.seed)
        while True:
            yield draw(like.shape, generator=generator, device=like.device)


def normals_later(shape: tuple[int, ...], fields: int) -> Fields:
    """Of torch's current generator, which goes on as if so many fields of ``torch.randn`` had been drawn.

    >>> with reproducible(0):
    ...     later, after = normals_later((5, 7, 3), 2), torch.rand(())
    >>> with reproducible(0):
    ...     first, second, then = torch.randn(5, 7, 3), torch.randn(5, 7, 3), torch.rand(())
    >>> [torch.equal(x, y) for x, y in zip((first, second), later.each(torch.randn, first))], torch.equal(after, then)
    ([True, True], True)
    """
    later, number = Fields(torch.get_rng_state()), math.prod(shape)
    for _ in range(fields):
        if number < 16:
            torch.randn(number)
            continue
        # a normal number takes one uniform, of a rest the last 16 are drawn again; uniforms are made in half the time
        for first in range(0, number, PIECE):
            torch.rand(min(PIECE, number - first))
        if number % 16:
            torch.rand(16)
    return later
