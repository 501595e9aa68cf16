"""Faults that show only when the entries of a catalogue are compared with each other."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_registry.catalogue_schema import Database
from data_registry.readings import canonical_manufacturer, folded, letters_of_model, read_field_strength
from data_registry.tsv import read_tsv

_ROWS = Path(__file__).parent / "catalogue" / "lod_brain_rows.tsv"
ALIKE = 0.92
"""Similarity of two places' names, from 0 to 1, from which on they may be one place in two spellings."""

Entry = tuple[str, Database]
"""A file's name and what it says."""


def lod_brain_table() -> dict[str, int]:
    """LOD-Brain's published table of databases: id → scans.

    >>> len(lod_brain_table()), sum(lod_brain_table().values())
    (78, 26171)
    """
    return {row["id"]: int(row["scans"]) for row in read_tsv(_ROWS)[1]}


def findings(entries: Iterable[Entry], *, whole: bool) -> list[tuple[str, str]]:
    """(file, what is implausible), a line each; ``whole``: also report rows of LOD-Brain's table that no entry covers."""
    entries = list(entries)
    checks = (_names, _sums, _makers, _strengths, _scanners, _places, _models)
    found = [finding for check in checks for finding in check(entries)]
    return found + list(_lod_brain(entries, whole=whole))


def _names(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    count = Counter(database.name for _, database in entries)
    for file, database in entries:
        if Path(file).stem != database.name:
            yield file, f"name: {database.name!r} came; the file's name, {Path(file).stem!r}, is wanted"
        if count[database.name] > 1:
            yield file, f"name: {database.name!r} names {count[database.name]} databases; a name of its own is wanted"


def _sums(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    for file, database in entries:
        for field in ("subjects", "scans"):
            total, parts = getattr(database, field), sum(getattr(site, field) or 0 for site in database.sites.values())
            if total is not None and parts > total:
                yield file, f"{field}: {total} came, but its sites' make {parts}; no fewer are wanted"
        for where, age in [("", database.age_years)] + [(f"sites.{name}.", site.age_years) for name, site in database.sites.items()]:
            low, mean, high = (age.min, age.mean, age.max) if age else (None,) * 3
            in_order = [value for value in (low, mean, high) if value is not None]
            if in_order != sorted(in_order):
                yield file, f"{where}age_years: min {low}, mean {mean}, max {high} came; them in this order is wanted"


def _sites(entries: list[Entry]) -> Iterator[tuple[str, str, object]]:
    for file, database in entries:
        for name, site in database.sites.items():
            yield file, f"sites.{name}", site


def _makers(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    for file, where, site in _sites(entries):
        if canonical_manufacturer(site.manufacturer) != site.manufacturer:
            yield file, f"{where}.manufacturer: {site.manufacturer!r} came; {canonical_manufacturer(site.manufacturer)!r} is wanted"


def _strengths(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    """As index writes a sidecar's, which else would contradict it."""
    for file, where, site in _sites(entries):
        reading = read_field_strength(site.field_strength_tesla)
        if reading.kind == "rounded":
            yield file, f"{where}.field_strength_tesla: {site.field_strength_tesla:g} came; {reading.value}, as it is sold, is wanted"


def _scanners(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    """One machine stands at one place, and is of one model."""
    first: dict[tuple[str, str], tuple[str, str, object]] = {}
    for file, where, site in _sites(entries):
        for field in ("place", "manufacturer", "model", "field_strength_tesla"):
            value = getattr(site, field)
            if site.scanner and value is not None:
                other_file, other_where, other = first.setdefault((site.scanner, field), (file, where, value))
                if other != value:
                    wanted = f"{other!r}, as in {other_where} of {other_file}, is wanted"
                    yield file, f"{where}.{field}: {value!r} came for scanner {site.scanner}; {wanted}"


def _places(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    yield from _spelled_two_ways(entries, "place", _words, ALIKE)


def _models(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    yield from _spelled_two_ways(entries, "model", letters_of_model, 1.0)


def _words(name: str) -> str:
    """Without accents, punctuation, order and the little words.

    >>> _words("University of Montréal") == _words("Montreal, University")
    True
    """
    return " ".join(sorted(set(re.findall(r"\w+", folded(name))) - {"of", "the", "and", "at", "in", "for", "de"}))


def _spelled_two_ways(entries: list[Entry], field: str, plainly, alike: float) -> Iterator[tuple[str, str]]:
    first: dict[str, tuple[str, str, str]] = {}
    count = Counter(getattr(site, field) for _, _, site in _sites(entries))
    for file, where, site in _sites(entries):
        if getattr(site, field) is not None:
            first.setdefault(getattr(site, field), (file, where, plainly(getattr(site, field))))
    for name in sorted(first, key=lambda name: (count[name], name)):
        file, where, plain = first[name]
        for other, (_, _, other_plain) in first.items():
            more = (count[other], other) > (count[name], name)
            if more and (plain == other_plain or (alike < 1 and difflib.SequenceMatcher(None, plain, other_plain).ratio() >= alike)):
                yield file, f"{where}.{field}: {name!r} came; {other!r}, if it is the same, is wanted"
                break


def _lod_brain(entries: list[Entry], *, whole: bool) -> Iterator[tuple[str, str]]:
    table, where = lod_brain_table(), defaultdict(list)
    for file, database in entries:
        for row, content in database.lod_brain.items():
            where[row].append(file)
            if row not in table:
                yield file, f"lod_brain.{row}: is no row of LOD-Brain's table; one as {next(iter(table))} is wanted"
            elif content.scans != table[row]:
                yield file, f"lod_brain.{row}.scans: {content.scans} came; {table[row]}, as in LOD-Brain's table, is wanted"
    for row, files in where.items():
        for file in files[1:]:
            yield file, f"lod_brain.{row}: stands in {files[0]} too; it is wanted once"
    for row in table if whole else ():
        if row not in where:
            yield "the catalogue", f"lod_brain.{row}: is missing; a database that stands for it is wanted"
