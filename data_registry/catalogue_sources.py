"""Where the catalogue's values were read: each is sourced, unverified or missing.

``documents`` of a YAML gives addresses short names, ``sources`` says which field was read in which, ``unverified`` lists fields that no
document at hand confirms. Fields are written with dots; ``*`` stands for anything, and the more specific pattern wins:
``sites.NYU.model`` over ``sites.*.model``. Licence, access, route and field strength must be sourced or unverified.
"""

import functools
import re
from collections.abc import Iterable
from typing import Literal

from data_registry.catalogue_schema import Database, Site

Standing = Literal["sourced", "unverified", "missing"]

DATABASE_FIELDS = ("licence", "access", "route", "redistribute", "state", "citation", "doi", "labels", "defaced")
SITE_FIELDS = ("place", "manufacturer", "model", "field_strength_tesla", "voxel_mm", "scans", "age_years", "sexes")
WEIGHTS = "redistribute.weights"
MUST_BE_SOURCED = ("licence", "access", "route", "field_strength_tesla")
"""A value of these with neither a source nor the mark "unverified" is refused."""


def value_of(database: Database, site: str | None, field: str) -> object:
    """The value of a field; None also for a part, such as ``age_years``, none of whose own fields is filled."""
    value = getattr(database if site is None else database.sites[site], field)
    empty = hasattr(value, "model_fields_set") and all(part is None for part in value.__dict__.values())
    return None if empty else value


def standing(database: Database, site: str | None, field: str) -> tuple[Standing, str | None]:
    """How well a value is known, and where it was read: an address, or the database's ``source``.

    >>> from data_registry.catalogue import catalogue
    >>> standing(catalogue()["ixi2mm"], "HH", "field_strength_tesla")
    ('sourced', 'https://github.com/CBICA/CCL_NMF_Prediction')
    """
    if value_of(database, site, field) is None:
        return "missing", None
    path = field if site is None else f"sites.{site}.{field}"
    source, doubt = _match(path, database.sources), _match(path, database.unverified)
    if doubt and (not source or _specificity(doubt) > _specificity(source)):
        return "unverified", None
    if source:
        return "sourced", database.documents.get(database.sources[source])
    return ("sourced", database.source) if database.source else ("unverified", None)


def weights_may_be_shared(database: Database) -> tuple[bool | None, str | None]:
    """``redistribute.weights`` and where it was read; nothing if no document says so."""
    document = database.sources.get(WEIGHTS, database.sources.get("redistribute"))
    known = WEIGHTS in database.sources or standing(database, None, "redistribute")[0] == "sourced"
    may = database.redistribute.weights if known else None
    return may, None if may is None else database.documents.get(document, database.source)


def _match(path: str, patterns: Iterable[str]) -> str | None:
    """The most specific pattern that matches a field."""
    if path in patterns:
        return path
    return max((pattern for pattern in patterns if "*" in pattern and _compiled(pattern).fullmatch(path)), key=_specificity, default=None)


def _specificity(pattern: str) -> int:
    return len(pattern.replace("*", ""))


@functools.cache
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))))


def faults(database: Database) -> list[str]:
    """What is wrong with a database's sources, a line each."""
    known = ", ".join(database.documents) or "none is defined"
    found = [
        f"sources.{field}: {document!r} came; a document is wanted: {known}"
        for field, document in database.sources.items() if document not in database.documents
    ]  # fmt: skip
    unused = [name for name in database.documents if name not in database.sources.values()]
    found += [
        f"sources.{field}: {document!r} came, a letter; that is a source of {WEIGHTS} alone, and one that others can read is wanted"
        for field, document in database.sources.items() if database.documents.get(document, "").startswith("letter ") and field != WEIGHTS
    ]  # fmt: skip
    found += [f"documents.{name}: is named by no field; one that was read in it is wanted in sources" for name in unused]
    paths = [f"sites.{site}.{field}" for site in database.sites for field in Site.model_fields]
    for place, patterns in (("sources", database.sources), ("unverified", database.unverified)):
        for pattern in patterns:
            top = (pattern in Database.model_fields and pattern != "sites") or pattern == WEIGHTS
            if not top and not any(_match(path, (pattern,)) for path in paths):
                found.append(f"{place}: {pattern!r} came, no field of {database.name}; one as licence, sites.*.model, sites.<name>.model is wanted")
    both = sorted(set(database.sources) & set(database.unverified))
    return found + [f"unverified: {field!r} came, which has a source too; one of the two is wanted" for field in both] + _unsourced(database)


def _unsourced(database: Database) -> list[str]:
    found = []
    for field in () if database.source else MUST_BE_SOURCED:
        for site in [None] if field in Database.model_fields else database.sites:
            path, value = field if site is None else f"sites.{site}.{field}", value_of(database, site, field)
            if value is not None and not _match(path, database.sources) and not _match(path, database.unverified):
                found.append(f"{path}: {value!r} came without a source; its document in sources, or the field in unverified, is wanted")
    return found
