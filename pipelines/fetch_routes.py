"""What the routes of :mod:`pipelines.fetch_sources` have in common: they list and read entries, and say what goes wrong with one.

That is a :class:`RouteError`, whose class says whether to try again.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

BACKOFF_S, LONGEST_WAIT_S = 1.0, 30.0


class RouteError(Exception):
    """A file cannot be had; the message is a clause that says why."""


class Cut(RouteError):
    """The connection failed, or was too slow: the next attempt goes on from there."""


class Damaged(RouteError):
    """Other bytes came than were wanted: the next attempt starts afresh."""


class Changed(RouteError):
    """The file is no longer the one that was listed."""


@dataclass(frozen=True)
class Entry:
    """A file or folder of a route."""

    path: str
    """From the route's root, parts joined by ``/``."""
    bytes: int = 0
    version: str = ""
    """Another one means other bytes: the ETag, the manifest's checksum, the time of change."""
    md5: str | None = None
    sha256: str | None = None
    is_folder: bool = False
    fault: str | None = None
    """Why it cannot be read, where the listing tells."""


def wait_s(failed: int) -> float:
    """Seconds before another try, after so many that failed."""
    return min(BACKOFF_S * 2 ** (failed - 1), LONGEST_WAIT_S)


class Route(Protocol):
    """What the three have in common."""

    address: str

    def ls(self, folder: str) -> list[Entry]:
        """What stands in a folder (``""``: the root) by name; nothing if there is no such folder. Raises :class:`RouteError`."""

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on, in chunks. Raises :class:`RouteError`."""


class Patient:
    """A route that is asked again where the connection fails: for listings and small tables, which are read whole."""

    def __init__(self, route: Route, tries: int) -> None:
        self.route, self.tries, self.address = route, tries, route.address

    def ls(self, folder: str) -> list[Entry]:
        """See :class:`Route`."""
        return self._insist(lambda: self.route.ls(folder))

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """See :class:`Route`; at once."""
        return iter(self._insist(lambda: list(self.route.read(entry, start))))

    def _insist(self, ask: Callable[[], list]) -> list:
        for failed in range(1, self.tries + 1):
            try:
                return ask()
            except Cut:
                time.sleep(wait_s(failed))
        return ask()


def safe(path: str) -> bool:
    """May a file of this relative path be written below a folder?

    >>> safe("sub-1/anat/sub-1_T1w.nii.gz"), safe("../x"), safe("/etc/x"), safe("sub-1//x"), safe("a\\tb")
    (True, False, False, False, False)
    """
    return all(part not in ("", ".", "..") for part in path.split("/")) and path.isprintable() and "\\" not in path
