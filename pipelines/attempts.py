"""How often a shard is tried, and which scan is left out for killing its workers.

A task keeps a journal, a small file in the project's folder that names the scan it is at. So when a worker dies, its death is put down
to a scan, and after ``tries`` deaths on one scan the shard is made without it. A node's death accuses no scan, however often, and
neither does a death between scans: too many of them end the shard, never a scan. Counts live as long as the run.
"""

import secrets
import shutil
from collections import Counter
from pathlib import Path

JOURNALS = Path("cache/harmonise")
NODE_DEATHS = 10  # of one shard, before it is taken for their cause
RUN = secrets.token_hex(4)  # no task of an earlier run writes into this one's journals


class Attempts:
    """The attempts of one shard. Each has its own journal: a task that goes on, on a node thought dead, writes into nobody else's."""

    def __init__(self, shard: str, tries: int) -> None:
        self.shard, self.tries = shard, tries
        self.number = self.node_deaths = 0
        self.deaths: Counter[str] = Counter()
        self.left_out: dict[str, str] = {}
        """Scans not to be tried again, with the reason."""
        self.why = ""
        """Why the shard was given up."""

    @property
    def journal(self) -> Path:
        """Of the current attempt; the task need not have begun it."""
        return JOURNALS.absolute() / f"{self.shard.replace('/', '.')}.{RUN}.{self.number}"

    def died(self, death: str) -> bool:
        """Take note of what ended the attempt (``worker``, ``memory`` or ``node``); whether there is to be another."""
        scan = self.journal.read_text(encoding="utf-8") if self.journal.exists() else ""
        self.number += 1
        if death == "node":
            self.node_deaths += 1
            self.why = f"{self.node_deaths} nodes died on it" + (f", the last at {scan}" if scan else "")
            return self.node_deaths < NODE_DEATHS
        self.deaths[scan] += 1
        if self.deaths[scan] < self.tries:
            return True
        if not scan:
            self.why = f"its worker died in {self.tries} tries, at no scan"
            return False
        self.left_out[scan] = f"kills its worker ({self.tries} tries{', the last out of memory' if death == 'memory' else ''})"
        return True


def clean() -> None:
    """Remove all journals."""
    shutil.rmtree(JOURNALS, ignore_errors=True)
