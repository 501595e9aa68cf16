"""Tables of text, read and written in one way: UTF-8, a header, cells parted by tabs."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_registry.errors import InputError
from data_registry.files import replacing


def read_tsv(path: Path) -> tuple[list[str], list[dict]]:
    """Header and rows of a file, as :func:`parse_tsv`. Raises :class:`InputError` for one that cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a table in UTF-8 with tabs is wanted") from None
    return parse_tsv(content, str(path))


def parse_tsv(content: bytes, where: str) -> tuple[list[str], list[dict]]:
    """Header and rows, each a dict by column; a second column of one name becomes ``<name> (2)``, so that neither hides the other.

    Raises :class:`InputError`, which begins with ``where``, for bytes that are no such table.

    >>> parse_tsv(b"id\\tage\\tage\\n01\\t30\\t31\\n", "a table")
    (['id', 'age', 'age (2)'], [{'id': '01', 'age': '30', 'age (2)': '31'}])
    """
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter="\t")
        names = list(reader.fieldnames or [])
        counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
        reader.fieldnames = [name + f" ({count})" * (count > 1) for name, count in zip(names, counts, strict=True)]
        return list(reader.fieldnames), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: cannot be read ({error}); a table in UTF-8 with tabs is wanted") from None


def write_tsv(path: Path, columns: Sequence[str], rows: Iterable[Mapping], *, missing: str = "") -> None:
    """Write rows, whole or not at all; ``missing`` stands for a cell that is None or absent."""
    with replacing(path) as aside, open(aside, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([missing if row.get(column) is None else row[column] for column in columns] for row in rows)
