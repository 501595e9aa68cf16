"""How far a stage is: a bar on a terminal, elsewhere a line of the log every half minute."""

import logging
import sys
import threading
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger("lodbrain.progress")
EVERY_S = 30.0


class Scans:
    """Scans done of ``total``, their rate, the time left, and what went wrong. A context manager; times in seconds.

    >>> scans = Scans("harmonise", 40)
    >>> scans.done, scans.quarantined, scans.retries = 10, 1, 2
    >>> scans.line(after_s=5)
    'harmonise 10/40 scans, 2.0 scans/s, 0:00:15 left, 1 quarantined, 2 retries'
    """

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total = stage, total
        self.done = self.quarantined = self.retries = 0
        self.start_s, self._stop = time.monotonic(), threading.Event()

    def line(self, *, after_s: float) -> str:
        """All of it in words, ``after_s`` after the start."""
        rate = self.done / max(after_s, 1e-9)
        left = f"{timedelta(seconds=round((self.total - self.done) / rate))} left" if rate else "time left unknown"
        return f"{self.stage} {self.done}/{self.total} scans, {rate:.1f} scans/s, {left}, {self.quarantined} quarantined, {self.retries} retries"

    def __enter__(self) -> "Scans":
        self._thread = threading.Thread(target=self._bar if sys.stderr.isatty() else self._log, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _now(self) -> str:
        return self.line(after_s=time.monotonic() - self.start_s)

    def _log(self) -> None:
        while not self._stop.wait(EVERY_S):
            log.info("%s", self._now())
        log.info("%s", self._now())

    def _bar(self) -> None:
        with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
            bar = progress.add_task("", total=self.total)
            while not self._stop.wait(0.2):
                progress.update(bar, completed=self.done, description=self._now())
            progress.update(bar, completed=self.done, description=self._now())


class Bytes(Scans):
    """Bytes that have come, by several threads.

    >>> come = Bytes("fetch", 3_000_000_000)
    >>> come.add(500_000_000)
    >>> come.line(after_s=10)
    'fetch 0.50/3.00 GB, 50.0 MB/s, 0:00:50 left'
    """

    def __init__(self, stage: str, total: int) -> None:
        super().__init__(stage, total)
        self._adding = threading.Lock()

    def add(self, number: int) -> None:
        """So many more; fewer, where some have to come again."""
        with self._adding:
            self.done += number

    def line(self, *, after_s: float) -> str:
        """See :class:`Scans`."""
        rate = max(self.done, 0) / max(after_s, 1e-9)
        left = f"{timedelta(seconds=round((self.total - self.done) / rate))} left" if rate else "time left unknown"
        return f"{self.stage} {self.done / 1e9:.2f}/{self.total / 1e9:.2f} GB, {rate / 1e6:.1f} MB/s, {left}"
