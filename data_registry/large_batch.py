"""How a training follows a batch that is larger than its recipe's, as many GPUs ask for."""

import math
from typing import Annotated, Literal

from pydantic import Field

from data_registry.jobs import Count, Section


class LargeBatch(Section):
    """``train.large_batch``. A recipe's learning rate is meant for its batch, LOD-Brain's of one scan, which 64 GPUs cannot share: 1,049
    scans are 16 steps an epoch for them. All of this is idle while the factor is 1."""

    factor: Count | Literal["processes"] = "processes"
    """How many times the recipe's batch a step takes. processes: the least by which every process has a sample, so 1 as long as the batch
    can be shared: the result then does not depend on the number of processes. A fold keeps the factor that it began with, on any number.
    A number makes the result a function of the settings alone; processes without a sample are then idle."""
    rule: Literal["sqrt", "linear", "none"] = "sqrt"
    """How the learning rate follows the factor. sqrt: as its root, which keeps the noise of Adam's steps over an epoch (Malladi et al. 2022);
    all optimisers here are Adam's. linear: SGD's rule (Goyal et al. 2017); with Adam it goes too far."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a stage's steps over which the learning rate rises from the recipe's own to the larger one: 5 epochs of 50, Goyal et al.'s, for
    Adam's moments are wrong at first. The schedule one_cycle, which begins low, has none."""
    least_steps: Count = 100
    """Of an epoch, or as many as the recipe's batch would have, if these are fewer: an epoch then comes to each scan several times. Ten
    epochs without a better validation loss, upon which a stage ends, are thus at least the 1,000 steps that Adam's second moment remembers."""

    def factor_for(self, batch_size: int, processes: int) -> int:
        """Times the recipe's batch.

        >>> [LargeBatch().factor_for(1, n) for n in (1, 8, 64)], [LargeBatch().factor_for(16, n) for n in (1, 8, 64)]
        ([1, 8, 64], [1, 1, 4])
        """
        return max(1, math.ceil(processes / batch_size)) if self.factor == "processes" else self.factor

    def rate(self, factor: int) -> float:
        """What the learning rate is multiplied by.

        >>> LargeBatch().rate(64), LargeBatch(rule="linear").rate(64)
        (8.0, 64.0)
        """
        return {"sqrt": math.sqrt(factor), "linear": float(factor), "none": 1.0}[self.rule]

    def warming(self, factor: int, step: int, steps: int) -> float:
        """Which part of that it is before a step, from 0, of a stage of so many.

        >>> [round(LargeBatch().warming(64, step, 1000), 3) for step in (0, 49, 99, 100)]
        [0.134, 0.562, 1.0, 1.0]
        """
        done = min(1.0, (step + 1) / max(self.warm_up * steps, 1))
        return (1 + (self.rate(factor) - 1) * done) / self.rate(factor)

    def samples(self, samples: int, batch_size: int, factor: int) -> int:
        """Of an epoch that has ``samples`` with the recipe's own batch.

        >>> [LargeBatch().samples(1049, 1, factor) for factor in (1, 8, 64)], LargeBatch().samples(12, 1, 8)
        ([1049, 1049, 6400], 96)
        """
        if factor == 1:
            return samples
        return max(samples, min(self.least_steps, math.ceil(samples / batch_size)) * batch_size * factor)
