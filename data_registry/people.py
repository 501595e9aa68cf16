"""Who is who: the same person in two databases, by the catalogue's rules and by tables of people who are known.

A person's name is ``<database>/<subject>``, or ``person:<name>`` where a table knows them. ``pipelines.index`` adds what
equal files say, ``pipelines.people`` what equal voxels and likeness say; all of them end in one function, :func:`merge_people`.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_registry.catalogue import catalogue
from data_registry.catalogue_schema import Database, SamePeople
from data_registry.errors import InputError
from data_registry.tsv import read_tsv

log = logging.getLogger("lodbrain.people")
COLUMNS = ("database", "subject", "person")
KNOWN = "person:"
ABSENT = "~"
"""Sorts after all other names, so that nobody who is there is called by it."""


def read_people(tables: Sequence[Path]) -> dict[tuple[str, str], str]:
    """(database, subject) → person, of tables with these three columns. Raises :class:`InputError` for a table that cannot be read or a
    subject with two names."""
    known: dict[tuple[str, str], str] = {}
    for table in tables:
        header, rows = read_tsv(table)
        if set(COLUMNS) - set(header):
            raise InputError(f"{table}: its columns are {', '.join(header) or 'none'}; {', '.join(COLUMNS)} are wanted")
        for line, row in enumerate(rows, 2):
            database, subject, person = ((row[column] or "").strip() for column in COLUMNS)
            if not (database and subject and person):
                raise InputError(f"{table}, line {line}: one of {', '.join(COLUMNS)} is empty; all three are wanted")
            key = database, subject.removeprefix("sub-")
            if known.setdefault(key, person) != person:
                raise InputError(f"{table}, line {line}: sub-{key[1]} of {database} is {person}, and {known[key]} before; one person is wanted")
    return known


def name_people(rows: list[dict], databases: Mapping[str, Database], known: Mapping[tuple[str, str], str]) -> None:
    """Give one name to all people in ``rows``, of the scans table, who are one by a catalogue rule or by the table ``known``.

    Raises :class:`InputError` for a rule that names a database which is neither in the catalogue nor among ``databases``.
    """
    of_subject = {(row["database"], row["subject"]): row["person"] for row in rows}
    ties = []
    for name, database in databases.items():
        for rule in database.same_people:
            if rule.database not in databases and rule.database not in catalogue():
                raise InputError(f"catalogue/{name}.yaml: same_people names {rule.database}, which is no database of the catalogue")
            if rule.subject is None:
                continue
            found = _matched(name, rule, of_subject)
            if rule.database in databases and all(max(tie).startswith(ABSENT) for tie in found):
                said = name, rule.subject, rule.database, rule.theirs
                log.warning("same_people of %s: no subject matches %r with one of %s, %r; the rule is idle", *said)
            ties += found
    ties += [{_name(key, of_subject), KNOWN + person} for key, person in known.items()]
    if absent := [key for key in known if key not in of_subject and (key[0] in databases or key[0] not in catalogue())]:
        log.warning("%d subjects of index.people are not there, e.g. sub-%s of %s", len(absent), absent[0][1], absent[0][0])
    merge_people(rows, ties)
    person_of = {(row["database"], row["subject"]): row["person"] for row in rows}
    for key, person in known.items():
        if (became := person_of.get(key, KNOWN + person)) != KNOWN + person:
            log.warning("sub-%s of %s: %s by index.people, but one with %s by bytes or a rule", key[1], key[0], person, became.removeprefix(KNOWN))


def _matched(name: str, rule: SamePeople, of_subject: Mapping[tuple[str, str], str]) -> list[set[str]]:
    """Of each subject of database ``name`` whom the rule matches, their person and the one that it leads to."""
    return [
        {person, _name((rule.database, match.expand(rule.theirs)), of_subject)}
        for (database, subject), person in of_subject.items()
        if database == name and (match := re.fullmatch(rule.subject, subject))
    ]


def _name(key: tuple[str, str], of_subject: Mapping[tuple[str, str], str]) -> str:
    """The person of a (database, subject), also of one who is not there: two who are said to be them are one."""
    return of_subject.get(key, ABSENT + "/".join(key))


def merge_people(rows: list[dict], ties: Iterable[set[str]]) -> None:
    """Give one ``person`` to all ``rows`` of people who are tied, directly or through others: the name from a table, else the first by name."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.get(name, name)) != name:
            parent[name] = parent.get(above, above)
            name = above
        return name

    for tie in ties:
        first, *others = sorted(map(root, tie), key=_rank)
        for other in others:
            one, two = sorted((root(first), root(other)), key=_rank)
            if one != two:
                parent[two] = one
    for row in rows:
        row["person"] = root(row["person"])


def merge_families(rows: Iterable[dict]) -> None:
    """Give ``rows`` of a person the family that any of them names, and families that a person ties together one name.

    >>> stated = [("a/1", None), ("a/1", "b/F"), ("c/1", "b/F"), ("c/1", "a/G"), ("d/1", None)]
    >>> rows = [{"person": person, "family": family} for person, family in stated]
    >>> merge_families(rows)
    >>> [row["family"] for row in rows]
    ['a/G', 'a/G', 'a/G', 'a/G', None]
    """
    of_person: dict[str, set[str]] = {}
    for row in rows:
        if row["family"]:
            of_person.setdefault(row["person"], set()).add(row["family"])
    named = [{"row": row, "person": min(of_person[row["person"]])} for row in rows if row["person"] in of_person]
    merge_people(named, of_person.values())
    for one in named:
        one["row"]["family"] = one["person"]


def _rank(name: str) -> tuple[bool, str]:
    return not name.startswith(KNOWN), name


def known_apart(one: str, two: str) -> bool:
    """Whether tables name both, and differently.

    >>> known_apart("person:a", "person:b"), known_apart("person:a", "db/01")
    (True, False)
    """
    return one.startswith(KNOWN) and two.startswith(KNOWN) and one != two


def people_by_split(scans: Iterable[Mapping], split: Iterable[Mapping]) -> dict[str, str | None]:
    """scan_id → person for all ``scans``, with the names of the ``split``, which also knows voxels and likeness; also for scans without a role.

    >>> scans = [{"scan_id": s, "person": p} for s, p in (("a_1", "a/1"), ("b_1", "b/1"), ("b_1_second", "b/1"), ("c_1", "c/1"))]
    >>> people_by_split(scans, [{"scan_id": "a_1", "person": "a/1"}, {"scan_id": "b_1", "person": "a/1"}])
    {'a_1': 'a/1', 'b_1': 'a/1', 'b_1_second': 'a/1', 'c_1': 'c/1'}
    """
    indexed = {scan["scan_id"]: scan["person"] for scan in scans}
    became = {indexed[row["scan_id"]]: row["person"] for row in split if row["scan_id"] in indexed}
    return {scan_id: became.get(person, person) for scan_id, person in indexed.items()}


def share_people(one: str, two: str, databases: Mapping[str, Database]) -> bool:
    """Whether the catalogue says that two databases have people in common."""
    return any(rule.database == b for a, b in ((one, two), (two, one)) if a in databases for rule in databases[a].same_people)
