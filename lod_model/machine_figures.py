"""What a training takes of its machine, beside its losses: cores, memory, GPUs.

MLflow has a monitor of its own, which ends for good when its server does not answer once, begins again at step 0 after a resume, and writes
a dozen figures and four a GPU. These are five, under its names where the meaning is the same, so that its page of system metrics shows them.
"""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

EVERY_S = 10.0
SAMPLES = 6
"""Samples whose mean is one figure: one a minute."""


@contextlib.contextmanager
def sampled(keep: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """While the block runs, ``keep`` gets figures every minute, from another thread, and the last ones at its end."""
    import psutil

    ended, usage, samples = threading.Event(), _Usage(), []

    def sample() -> None:
        with contextlib.suppress(psutil.Error, OSError, subprocess.SubprocessError, ValueError):  # a figure less is no reason to fail
            samples.append(usage.now())
        if samples and (len(samples) >= SAMPLES or ended.is_set()):
            keep({name: sum(one.get(name, 0) for one in samples) / len(samples) for name in samples[-1]})
            samples.clear()

    def watch() -> None:
        while not ended.wait(EVERY_S):
            sample()

    thread = threading.Thread(target=watch, daemon=True, name="machine figures")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sample()


class _Usage:
    """Of this process and all that it has started, since the last sample."""

    def __init__(self) -> None:
        self._at, self._seconds = time.monotonic(), self._cpu_seconds()

    def now(self) -> dict[str, float]:
        """cpu: 100 is one core. Megabytes: resident, of the processes; percentage: of the machine, by everyone."""
        import psutil

        at, seconds = time.monotonic(), self._cpu_seconds()
        cores = max(seconds - self._seconds, 0) / max(at - self._at, 1e-3)
        self._at, self._seconds = at, seconds
        resident = sum(_of(process, lambda p: p.memory_info().rss) for process in _processes())
        return {
            "system/cpu_utilization_percentage": 100 * cores,
            "system/memory_usage_megabytes": resident / 1e6,
            "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
            **_gpus(),
        }

    def _cpu_seconds(self) -> float:
        return sum(_of(process, lambda p: sum(p.cpu_times()[:2])) for process in _processes())


def _processes() -> list:
    import psutil

    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _of(process, figure: Callable) -> float:
    """A figure of a process, 0 if it has gone."""
    import psutil

    try:
        return figure(process)
    except psutil.Error:
        return 0.0


def _gpus() -> dict[str, float]:
    """Mean utilisation and memory together, of the GPUs that this process may see; nothing where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or not (command := shutil.which("nvidia-smi")):
        return {}
    query = [command, "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", *(["-i", visible] if visible else [])]
    lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip().splitlines()
    rows = [[float(cell) for cell in line.split(",")] for line in lines]
    utilisation, mebibytes = zip(*rows, strict=True)
    return {"system/gpu_utilization_percentage": sum(utilisation) / len(rows), "system/gpu_memory_usage_megabytes": sum(mebibytes) * 1.048576}
