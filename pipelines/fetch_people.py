"""Who a ``participants.tsv`` speaks of: its lines by subject, and its lines of people who were withdrawn, which do not stay.

Tables of FCP-INDI write 50642 for the folder sub-0050642, and have ``participant_id`` in any column.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from data_registry.files import replacing
from data_registry.tsv import parse_tsv

ID = "participant_id"


def subject_of(name: str) -> str:
    """The label in a folder's name or a table's cell.

    >>> subject_of("sub-01"), subject_of("sub-01_ses-2"), subject_of("sub-01.anat")      # FreeSurfer's folders may be called so, and fsl_anat's
    ('01', '01', '01')
    """
    return name.strip().removeprefix("sub-").removesuffix(".anat").split("_")[0]


def rows_by_subject(content: bytes, where: str, subjects: Collection[str]) -> dict[str, dict]:
    """The last row of each of these subjects that has one; zeros that a table leaves out at the beginning of a label do not matter.

    >>> rows_by_subject(b"site\\tparticipant_id\\nCMU\\t50642\\n", "a table", {"0050642", "0050643"})
    {'0050642': {'site': 'CMU', 'participant_id': '50642'}}
    """
    _, rows = parse_tsv(content, where)
    rows = {subject_of(row[ID]): {key: value for key, value in row.items() if key is not None} for row in rows if row.get(ID)}
    meant = _meant(rows, subjects)
    return {meant[label]: row for label, row in rows.items() if label in meant}


def cells_of(table: bytes, subjects: Collection[str]) -> tuple[int, dict[int, str]]:
    """(column of ids, line → cell) of a table's lines that speak of these subjects, both counted from 1.

    >>> cells_of(b"age\\tparticipant_id\\n10\\tsub-1\\n30\\t10\\n", {"10"})
    (2, {3: '10'})
    """
    lines = [line.split("\t") for line in table.decode("utf-8-sig", errors="replace").split("\n")]
    column = next((number for number, cell in enumerate(lines[0]) if cell.strip() == ID), None)
    if column is None:
        return 0, {}
    cells = {number: line[column] for number, line in enumerate(lines[1:], 2) if len(line) > column}
    meant = _meant(map(subject_of, cells.values()), subjects)
    return column + 1, {number: cell for number, cell in cells.items() if subject_of(cell) in meant}


def drop_people(path: Path, subjects: Collection[str]) -> bool:
    """Write a table again without these subjects' lines, if it has any; its other bytes stay."""
    gone = cells_of(path.read_bytes(), subjects)[1]
    if gone:
        lines = path.read_bytes().split(b"\n")
        with replacing(path) as aside:
            aside.write_bytes(b"\n".join(line for number, line in enumerate(lines, 1) if number not in gone))
    return bool(gone)


def _meant(labels: Iterable[str], subjects: Collection[str]) -> dict[str, str]:
    """Label as a table writes it → subject; a label that is itself a subject's means nobody else."""
    labels = set(labels)
    short = {subject.lstrip("0"): subject for subject in subjects if subject not in labels}
    return {label: label if label in subjects else short[label.lstrip("0")] for label in labels if label in subjects or label.lstrip("0") in short}
