"""Several databases of OpenNeuro as the folders of one, as AOMIC is published: their labels would mean different people, so each gets its number.

``sub-0001`` of ds002785 is ``sub-ds002785x0001`` here, in every path; the tables stay as they came.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import replace

from pipelines.fetch_routes import Entry, Route
from pipelines.fetch_sources import open_route


def open_joined(address: str, **settings) -> Route:
    """As :func:`open_route`; of several addresses with spaces between, each of OpenNeuro, the one that joins them."""
    addresses = re.split(r" (?=s3://)", address)
    if len(addresses) == 1:
        return open_route(address, **settings)
    return JoinedRoute(address, {one.rsplit("/", 1)[1]: open_route(one, **settings) for one in addresses})


class JoinedRoute:
    """Each route a folder."""

    def __init__(self, address: str, routes: dict[str, Route]) -> None:
        self.address, self.routes = address, routes

    def ls(self, folder: str) -> list[Entry]:
        """See :class:`Route`."""
        if not folder:
            return [Entry(name, is_folder=True) for name in self.routes]
        name, path = self._within(folder)
        named = ((entry, re.sub(r"\bsub-", f"sub-{prefix_of(name)}", entry.path)) for entry in self.routes[name].ls(path))
        return [replace(entry, path=f"{name}/{path}") for entry, path in named]

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """See :class:`Route`."""
        name, path = self._within(entry.path)
        return self.routes[name].read(replace(entry, path=path), start)

    def _within(self, path: str) -> tuple[str, str]:
        name, _, path = path.partition("/")
        return name, path.replace(f"sub-{prefix_of(name)}", "sub-")


def prefix_of(folder: str) -> str:
    """What the labels of a folder's people begin with.

    >>> prefix_of("ds002785"), prefix_of("NYU")
    ('ds002785x', '')
    """
    return f"{folder}x" if re.fullmatch(r"ds\d{6}", folder) else ""


def as_named_in(folder: str, subjects: Collection[str]) -> dict[str, str]:
    """Those of the subjects who may be of this folder: as its own tables call them → subject.

    >>> as_named_in("ds002785", ["ds002785x0001", "ds002790x0001"]), as_named_in("NYU", ["0050952"])
    ({'0001': 'ds002785x0001'}, {'0050952': '0050952'})
    """
    prefix = prefix_of(folder)
    return {subject.removeprefix(prefix): subject for subject in subjects if subject.startswith(prefix)}
