"""The one door to Ray: run a function over items with a bounded number in flight."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

IN_FLIGHT_PER_CPU = 2  # enough to keep every worker busy, few enough that results never pile up


def run_bounded(function: Callable[..., Any], items: Sequence[tuple], *, workers: int, address: str | None) -> Iterator[tuple[int, Any]]:
    """Yield ``(index, result)`` of ``function(*item)`` as they finish; a result is the exception if a task could not be run.

    ``address`` names an existing Ray cluster; None joins the one of a surrounding Ray job or starts ``workers`` CPUs on this machine.
    A task runs at least once: it must write aside and rename.
    """
    import ray

    with _cluster(ray, workers=workers, address=address):
        remote = ray.remote(num_cpus=1, max_retries=2)(function)
        limit = IN_FLIGHT_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting, running = iter(enumerate(items)), {}
        while True:
            while len(running) < limit and (entry := next(waiting, None)) is not None:
                running[remote.remote(*entry[1])] = entry[0]
            if not running:
                return
            for reference in ray.wait(list(running), num_returns=1)[0]:
                index = running.pop(reference)
                try:
                    yield index, ray.get(reference)
                except ray.exceptions.RayError as error:  # the worker died or the task raised: the caller decides
                    yield index, error


class _cluster:
    """A Ray cluster for the length of the block; one that was there already is left running."""

    def __init__(self, ray, *, workers: int, address: str | None) -> None:
        self.ray, self.workers, self.address = ray, workers, address

    def __enter__(self) -> None:
        self.owned = not self.ray.is_initialized()
        if not self.owned:
            return
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self.address or os.environ.get("RAY_ADDRESS"):
            self.ray.init(address=self.address, **quiet)
            return
        # a private cluster on loopback: no token, no dashboard, nothing sent home
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        self.ray.init(num_cpus=self.workers, include_dashboard=False, object_store_memory=200_000_000, _node_ip_address="127.0.0.1", **quiet)

    def __exit__(self, *_: object) -> None:
        if self.owned:
            self.ray.shutdown()
