"""The catalogue of databases: one YAML a database in ``catalogue/``, its sites inside; this module reads and checks them.

BIDS has no field for the site, so each database states the rule that gives a scan its site. Places and scanners are curated across
databases, never matched by name alone. A value nobody published is null; the others have their sources beside them
(:mod:`data_registry.catalogue_sources`).

A database that is not in the catalogue is one site named after it (and one place, one scanner): :func:`unknown_database`.
"""

import functools
from pathlib import Path

import yaml
from pydantic import ValidationError

from data_registry.catalogue_schema import Database, Site, SiteRule, fault
from data_registry.catalogue_sources import faults
from data_registry.errors import InputError

_FOLDER = Path(__file__).parent / "catalogue"


def unknown_database(name: str) -> Database:
    """The stated default: one site named after the database.

    >>> list(unknown_database("pilot").sites)
    ['pilot']
    """
    return Database(
        name=name, title=name, site_rule=SiteRule(single=name), sites={name: Site(place=name, scanner=name)}, known=False
    )


def catalogue_files() -> list[Path]:
    """The YAMLs that come with the project."""
    return sorted(_FOLDER.glob("*.yaml"))


@functools.cache
def catalogue() -> dict[str, Database]:
    """All databases of the catalogue, by name."""
    return {path.stem: load_database(path) for path in catalogue_files()}


@functools.cache
def find_database(name: str) -> Database:
    """The catalogue's entry, or the stated default; reads that one file only."""
    path = next((path for path in catalogue_files() if path.stem == name), None)
    return unknown_database(name) if path is None else load_database(path)


def load_database(path: Path) -> Database:
    """Read and check one YAML; an :class:`InputError` names the file, the site, the field, what came and what was wanted."""
    database, wrong = read_database(path)
    if database is None or wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
    return database


def read_database(path: Path) -> tuple[Database | None, list[str]]:
    """The database, or None if the file holds none, and one line for each fault, which begins with the field."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        database = Database.model_validate(content)
    except yaml.YAMLError as error:
        where = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        return None, [f"not valid YAML ({where})"]
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8 text ({error.reason} at byte {error.start})"]
    except OSError as error:
        return None, [f"cannot be read ({error.strerror}); a YAML is wanted"]
    except ValidationError as error:
        return None, [fault(one) for one in error.errors()]
    return database, faults(database)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """In C where libyaml is installed. A name that occurs twice is an error; YAML would silently take the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    content = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the name {key!r} is no text; quotes around it are wanted", key_node.start_mark)
        if key in content:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice; it is wanted once", key_node.start_mark)
        content[key] = loader.construct_object(value_node, deep=True)
    return content


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
