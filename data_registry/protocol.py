"""Label protocols: which class each source id is. Tables in ``protocols/``, one file a protocol; this module only reads them.

FreeSurfer ids are the source of truth and stand in the shards; a protocol is applied on read. An id that the table does not name is
an error, never background.
"""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_registry.errors import InputError

_FOLDER = Path(__file__).parent / "protocols"
_UNNAMED = 65535  # no protocol has so many classes


@dataclass(frozen=True)
class Protocol:
    """A table source id → class, and what each class is called."""

    name: str
    version: str
    class_names: tuple[str, ...]
    """Position = class index; 0 is the background."""
    colours: tuple[tuple[int, int, int], ...]
    """RGB 0–255 of each class."""
    sides: tuple[str, ...]
    """left, right or none for each class."""
    sources: tuple[str, ...]
    """Label sources whose ids the table speaks of, the preferred one first."""
    table: np.ndarray
    """(65536,) uint16: source id → class, or a mark for ids that the protocol does not name."""

    @property
    def classes(self) -> int:
        """How many classes, background included."""
        return len(self.class_names)

    @property
    def foreground(self) -> tuple[str, ...]:
        """Class names without the background."""
        return self.class_names[1:]

    def classes_of(self, ids: np.ndarray, *, where: str = "labels") -> np.ndarray:
        """Class indices (uint8, same shape) of source ids (unsigned integers).

        >>> load("lod7").classes_of(np.array([0, 2, 1012, 16], dtype=np.uint16)).tolist()
        [0, 3, 1, 6]
        >>> load("lod7").classes_of(np.array([9999], dtype=np.uint16), where="sub-01")
        Traceback (most recent call last):
        data_registry.errors.InputError: sub-01: label id 9999 (1 voxels) is not in protocol lod7; ids that its table names are wanted
        """
        mapped = self.table[ids]
        if mapped.size and mapped.max() == _UNNAMED:
            unnamed, counts = np.unique(ids[mapped == _UNNAMED], return_counts=True)
            shown = ", ".join(f"{i} ({n} voxels)" for i, n in zip(unnamed[:5], counts[:5], strict=True))
            raise InputError(f"{where}: label id {shown} is not in protocol {self.name}; ids that its table names are wanted")
        return mapped.astype(np.uint8 if self.classes < 256 else np.uint16)

    def mirrored(self) -> np.ndarray:
        """(classes,) class index after left and right change places; classes without sides stay.

        >>> load("lod7").mirrored().tolist()
        [0, 1, 2, 3, 4, 5, 6]
        """
        swap = {"left": "right", "right": "left"}
        stem = [name.lower().replace(side, "", 1) for name, side in zip(self.class_names, self.sides, strict=True)]
        index = {(s, side): i for i, (s, side) in enumerate(zip(stem, self.sides, strict=True))}
        return np.array([index[s, swap.get(side, side)] for s, side in zip(stem, self.sides, strict=True)])


@functools.cache
def load(name: str) -> Protocol:
    """The protocol of that name; an unknown name is an :class:`InputError` that lists the known ones."""
    path = _FOLDER / f"{name}.tsv"
    if name not in names():
        raise InputError(f"protocol {name!r} is not known; one of {', '.join(names())} is wanted")
    with open(path, encoding="utf-8") as handle:
        note = handle.readline()
        rows = list(csv.DictReader(handle, delimiter="\t"))
    classes = {int(row["class"]): row for row in rows}
    assert sorted(classes) == list(range(len(classes))), f"{path}: class indices have gaps"
    table = np.full(65536, _UNNAMED, dtype=np.uint16)
    for row in rows:
        table[int(row["source_id"])] = int(row["class"])
    assert table[0] == 0, f"{path}: id 0 is not the background"
    table.flags.writeable = False
    ordered = [classes[i] for i in range(len(classes))]
    return Protocol(
        name=name,
        version=_noted(note, "version"),
        class_names=tuple(row["class_name"] for row in ordered),
        colours=tuple((int(row["red"]), int(row["green"]), int(row["blue"])) for row in ordered),
        sides=tuple(row["side"] for row in ordered),
        sources=tuple(_noted(note, "sources").split()),
        table=table,
    )


def _noted(note: str, key: str) -> str:
    """The value of ``key`` in a table's first line, ``# what; key value; …``."""
    return next(part.strip().removeprefix(key).strip() for part in note.split(";") if part.strip().startswith(key))


def names() -> tuple[str, ...]:
    """The protocols that have a table."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.tsv")))
