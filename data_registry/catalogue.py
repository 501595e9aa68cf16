"""The catalogue of databases: one YAML a database in ``catalogue/``, its sites inside; this module reads and checks them.

BIDS has no field for the site, so each database states the rule that gives a scan its site. Places and scanners are curated across
databases, never matched by name alone. A value nobody published is null.

A database that is not in the catalogue is one site named after it (and one place, one scanner): :func:`unknown_database`.
"""

import functools
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_registry.errors import InputError

NAME_PATTERN = r"[A-Za-z0-9_-]+"
_FOLDER = Path(__file__).parent / "catalogue"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteRule(_Entry):
    """How a scan of a database gets its site; exactly one of the four."""

    participants: str | None = None
    """A column of participants.tsv."""
    sidecar: str | None = None
    """A field of the T1w's JSON sidecar."""
    prefix: str | None = None
    """A regular expression whose first group, in the subject's label, is the site."""
    single: str | None = None
    """The only site."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "SiteRule":
        if len(self.model_fields_set) != 1:
            raise ValueError("exactly one of participants, sidecar, prefix, single is wanted")
        return self


class Site(_Entry):
    """A site as its database names it."""

    place: str
    """The institution, the same name across databases."""
    scanner: str | None = None
    """One machine at a place, the same name across databases; null if unknown."""
    manufacturer: str | None = None
    model: str | None = None
    field_strength_tesla: Annotated[float, Field(gt=0, lt=12)] | None = None


class SamePeople(_Entry):
    """Another database that has scans of people of this one."""

    database: str
    subject: str | None = None
    """A regular expression that matches the whole label of such a subject here; null if nobody published how the names match."""
    theirs: str | None = None
    """Their label there, with ``\\1`` … for the groups of ``subject``."""

    @model_validator(mode="after")
    def _names_match(self) -> "SamePeople":
        if (self.subject is None) != (self.theirs is None):
            raise ValueError("subject and theirs are wanted both, or neither")
        try:
            groups = re.compile(self.subject or "").groups
            re.compile("()" * groups).match("").expand(self.theirs or "")
        except (re.error, IndexError) as error:
            raise ValueError(f"subject is no regular expression, or theirs has a group that it lacks ({error})") from None
        return self


class Database(_Entry):
    """A database and its sites."""

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    """As its folder is called."""
    title: str
    licence: str | None = None
    access: Literal["open", "registration", "agreement"] | None = None
    citation: str | None = None
    source: str | None = None
    """Where the values above were read."""
    family_column: str | None = None
    """The column of participants.tsv that relatives share; null if the database has none."""
    same_people: tuple[SamePeople, ...] = ()
    """Other databases with scans of its people; one side need say so."""
    site_rule: SiteRule
    sites: dict[str, Site]
    defaced: bool | None = None
    known: bool = True
    """False for a database that is not in the catalogue."""


_MANUFACTURERS = {
    "siemens": "Siemens", "philips": "Philips", "phillips": "Philips", "ge": "GE", "general electric": "GE", "toshiba": "Canon", "canon": "Canon",
    "hitachi": "Hitachi", "uih": "United Imaging", "united imaging": "United Imaging", "bruker": "Bruker",
}  # fmt: skip


def canonical_manufacturer(name: str | None) -> str | None:
    """One spelling a maker; a name that is not known stays as it came.

    >>> canonical_manufacturer("SIEMENS"), canonical_manufacturer("GE MEDICAL SYSTEMS"), canonical_manufacturer("Gefen")
    ('Siemens', 'GE', 'Gefen')
    """
    lower = (name or "").lower()
    return next((maker for alias, maker in _MANUFACTURERS.items() if re.match(rf"{alias}\b", lower)), name)


def unknown_database(name: str) -> Database:
    """The stated default: one site named after the database.

    >>> list(unknown_database("pilot").sites)
    ['pilot']
    """
    return Database(
        name=name, title=name, site_rule=SiteRule(single=name), sites={name: Site(place=name, scanner=name)}, known=False
    )


@functools.cache
def catalogue() -> dict[str, Database]:
    """All databases of the catalogue, by name."""
    return {database.name: database for database in map(load_database, sorted(_FOLDER.glob("*.yaml")))}


def find_database(name: str) -> Database:
    """The catalogue's entry, or the stated default."""
    return catalogue().get(name) or unknown_database(name)


def load_database(path: Path) -> Database:
    """Read and check one YAML; an :class:`InputError` names the file, the site, the field, what came and what was wanted."""
    try:
        return Database.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']} (came: {e['input']!r:.80})" for e in error.errors())
        raise InputError(f"{path}: {'; '.join(lines)}") from None
