"""The one door to Ray: run a function over items, bounded in number and memory, through the deaths of workers and of nodes."""

import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_registry.errors import InputError

Death = Literal["worker", "memory", "node"]
"""What ended a task: its process; its process, for want of memory; the machine it ran on."""
IN_FLIGHT_PER_CPU = 2  # enough to keep every worker busy, few enough that results never pile up
GRACE_S = 20.0  # so long a worker's death may turn out to be its node's, whose end Ray notices by health checks within 15 s
POLL_S = 1.0
JOIN_S = 10.0


@dataclass
class _Task:
    index: int
    item: tuple
    memory: int
    nodes: frozenset = frozenset()  # alive when it was submitted
    death: Death | None = None
    died_s: float = 0.0
    result: Any = None


def run_bounded(
    function: Callable[..., Any],
    items: Sequence[tuple],
    *,
    memory: Sequence[int],
    again: Callable[[int, Death], tuple | None],
    workers: int,
    address: str | None,
    cpus: int = 1,
) -> Iterator[tuple[int, Any]]:
    """Yield ``(index, result)`` of ``function(*item)`` as they finish; a result is the exception if the function raised it.

    ``memory``: bytes that each item's task declares, so that no node is given more than it holds; ``cpus``: cores, likewise. When a task
    dies, ``again(index, death)`` says with which item to go on (None: not at all, the result is the exception); after a worker's death its
    task declares twice the memory, up to the largest node's, so that no neighbour's appetite kills it twice. A death counts as the worker's
    only if all nodes outlive it. A task may run more than once, even at the same time (a node thought dead): it must write aside and rename.

    The cluster is that of a surrounding Ray job (or of RAY_ADDRESS), else the one at ``address``, else ``workers`` CPUs of this machine.
    """
    import ray

    with _cluster(ray, workers=workers, address=address):
        remote = ray.remote(num_cpus=cpus, max_retries=0)(function)
        waiting = deque(_Task(index, item, size) for index, (item, size) in enumerate(zip(items, memory, strict=True)))
        running, dead = {}, []
        _refuse_what_fits_nowhere(max(memory, default=0), cpus, _nodes(ray))
        while waiting or running or dead:
            nodes = _nodes(ray)
            while waiting and len(running) < IN_FLIGHT_PER_CPU * max(1, sum(cpus for cpus, _ in nodes.values())):
                task = waiting.popleft()
                task.nodes = frozenset(nodes)
                size = min(task.memory, _largest(nodes) or task.memory)
                running[remote.options(memory=size).remote(*task.item)] = task
            for task in _finished(ray, running):
                if task.death:
                    task.nodes |= frozenset(nodes)  # it may have died on one that an autoscaler has added since
                    dead.append(task)
                else:
                    yield task.index, task.result
            for task in [task for task in dead if _is_clear(task)]:
                dead.remove(task)
                death = task.death if task.nodes <= set(_nodes(ray)) else "node"
                if (item := again(task.index, death)) is None:
                    yield task.index, task.result
                else:
                    waiting.appendleft(_Task(task.index, item, task.memory * (1 if death == "node" else 2)))


def _is_clear(task: _Task) -> bool:
    """Whether what ended a task will not turn out otherwise: on a machine alone, its end would have been the driver's."""
    return task.death == "node" or len(task.nodes) == 1 or time.monotonic() - task.died_s > GRACE_S


def _finished(ray, running: dict) -> Iterator[_Task]:
    """Take the tasks that have ended off ``running``, with their results or deaths."""
    if not running:
        time.sleep(POLL_S)
        return
    deaths = {ray.exceptions.NodeDiedError: "node", ray.exceptions.OutOfMemoryError: "memory", ray.exceptions.WorkerCrashedError: "worker"}
    for reference in ray.wait(list(running), num_returns=1, timeout=POLL_S)[0]:
        task = running.pop(reference)
        try:
            task.result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # the function raised
            task.result = error.cause or error
        except ray.exceptions.RayError as error:  # no death: e.g. a node without the job's environment
            task.result, task.death, task.died_s = error, deaths.get(type(error)), time.monotonic()
        yield task


def _nodes(ray) -> dict[str, tuple[int, int]]:
    """Living nodes: id → (CPUs, bytes of memory) that tasks may have there."""
    return {n["NodeID"]: (int(n["Resources"].get("CPU", 0)), int(n["Resources"].get("memory", 0))) for n in ray.nodes() if n["Alive"]}


def _largest(nodes: dict[str, tuple[int, int]]) -> int:
    return max((memory for cpus, memory in nodes.values() if cpus), default=0)


def _refuse_what_fits_nowhere(memory: int, cpus: int, nodes: dict[str, tuple[int, int]]) -> None:
    if 0 < (most := max((number for number, _ in nodes.values()), default=0)) < cpus:
        raise InputError(f"a task needs {cpus} CPUs and the largest node offers {most}; fewer threads, or more (resources.workers), are wanted")
    if 0 < (largest := _largest(nodes)) < memory:
        raise InputError(
            f"a task needs {memory / 1e9:.2f} GB and the largest node offers {largest / 1e9:.2f}; "
            "a larger node, or less (resources.task_gb in params.yaml), is wanted"
        )


def _code() -> dict:
    """So that tasks find this code wherever the stage was started; a job brings its own copy along."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}
    modules = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(modules)}}}


class _cluster:
    """A Ray cluster for the length of the block; one that was there already is left running."""

    def __init__(self, ray, *, workers: int, address: str | None) -> None:
        self.ray, self.workers, self.address = ray, workers, os.environ.get("RAY_ADDRESS") or address

    def __enter__(self) -> None:
        self.owned = not self.ray.is_initialized()
        if not self.owned:
            return
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False} | _code()
        if self.address:
            self._join(quiet)
            return
        # a private cluster on loopback: a token that nobody else knows, no dashboard, nothing sent home
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_AUTH_MODE" not in os.environ:  # then Ray asks for a token, and would write one to ~/.ray
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self.ray.init(num_cpus=self.workers, include_dashboard=False, object_store_memory=200_000_000, _node_ip_address="127.0.0.1", **quiet)

    def _join(self, quiet: dict) -> None:
        if self.address.startswith("http"):
            raise InputError(f"Ray address {self.address} is a dashboard's; `ray job submit --address {self.address}`, or host:port, is wanted")
        host, _, port = self.address.rpartition(":")
        try:
            if host and port.isdigit():
                socket.create_connection((host, int(port)), timeout=JOIN_S).close()  # Ray itself would try for minutes
            self.ray.init(address=self.address, **quiet)
        except (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:  # the last: no token, or another's
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"Ray cluster {self.address} cannot be joined ({reason}); a node of a running cluster is wanted") from None

    def __exit__(self, *_: object) -> None:
        if self.owned:
            self.ray.shutdown()
