"""Label protocols: which class each source id is. Tables in ``protocols/``, one file a protocol; this module only reads them.

FreeSurfer ids are the source of truth and stand in the shards; a protocol is applied on read. An id that the table does not name is
an error, never background. An id whose class is ``ignore`` cannot be told in the protocol: its voxels become :data:`IGNORED` and are no
part of a loss or a score.

The first line of a table says what it is, ``# what; key value; …``: ``version``; ``sources``; ``before``, a step of
:mod:`data_registry.fastsurfer_labels` that a label map goes through before the table; ``sagittal``, the protocol whose classes (and their
order) a sagittal view of this one has; ``writes``, whether label maps hold classes (the rule) or ids.
"""

import csv
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_registry.errors import InputError
from data_registry.fastsurfer_labels import STEPS

IGNORED = 255
"""The class of a voxel that a protocol leaves out. It is no class: :attr:`Protocol.classes` does not count it."""
_FOLDER = Path(__file__).parent / "protocols"
_UNNAMED = 65535  # no protocol has so many classes
_SIDE = re.compile(r"(?<![a-z])(left|right|lh|rh)(?![a-z])", re.IGNORECASE)  # a word of a class name


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
    """left, right or none for each class; none: a class of both sides, or of the middle."""
    groups: tuple[str, ...]
    """What kind of structure each class is, e.g. cortex."""
    ids: tuple[int, ...]
    """The source id that stands for each class: the first of its rows."""
    sources: tuple[str, ...]
    """Label sources whose ids the table speaks of, the preferred one first."""
    table: np.ndarray
    """(65536,) uint16: source id → class or IGNORED, or a mark for ids that the protocol does not name."""
    before: str = ""
    """The step that a label map goes through first; empty: none."""
    sagittal: str = ""
    """The protocol of the sagittal view, where its order is not the order here; see :func:`sagittal_classes`."""
    output: str = "classes"
    """What a written label map holds: the classes, or the ``ids`` that stand for them, as the tool writes them whose labels they are."""

    @property
    def classes(self) -> int:
        """How many classes, background included, ignored voxels not."""
        return len(self.class_names)

    @property
    def foreground(self) -> tuple[str, ...]:
        """Class names without the background."""
        return self.class_names[1:]

    @property
    def written(self) -> np.ndarray:
        """(classes,) the value of each class in a label map that is written for others.

        >>> load("lod7").written.tolist()[-1], load("fastsurfer95").written.tolist()[-1]
        (6, 2035)
        """
        kind = np.uint8 if self.output == "classes" or max(self.ids) < 256 else np.uint16
        return (np.arange(self.classes) if self.output == "classes" else np.array(self.ids)).astype(kind)

    @property
    def cortex(self) -> np.ndarray:
        """(classes,) bool: which classes are cortex."""
        return np.array([group == "cortex" for group in self.groups])

    def classes_of(self, ids: np.ndarray, *, where: str = "labels") -> np.ndarray:
        """Class indices (uint8, same shape) of source ids (unsigned integers); :data:`IGNORED` where the table says so.

        Of a label map (D, H, W) on a cubic grid, after the step ``before``, which looks from voxel to voxel: the map may be cut to a box
        that holds all labels, no further. Any other shape is a list of ids that are looked up as they are.

        >>> load("lod7").classes_of(np.array([0, 2, 1012, 16], dtype=np.uint16)).tolist()
        [0, 3, 1, 6]
        >>> ids = np.array([[[2, 251, 1001]]], dtype=np.uint16)      # corpus callosum; a parcel that DKT does not have
        >>> load("fastsurfer79").classes_of(ids).tolist(), load("fastsurfer79").classes_of(ids.ravel()).tolist()
        ([[[1, 1, 255]]], [1, 255, 255])
        >>> load("lod7").classes_of(np.array([9999], dtype=np.uint16), where="sub-01")
        Traceback (most recent call last):
        data_registry.errors.InputError: sub-01: label id 9999 (1 voxels) is not in protocol lod7; ids that its table names are wanted
        """
        mapped = self.table[STEPS[self.before](ids) if self.before and ids.ndim == 3 else ids]
        if mapped.size and mapped.max() == _UNNAMED:
            unnamed, counts = np.unique(ids[mapped == _UNNAMED], return_counts=True)
            shown = ", ".join(f"{i} ({n} voxels)" for i, n in zip(unnamed[:5], counts[:5], strict=True))
            raise InputError(f"{where}: label id {shown} is not in protocol {self.name}; ids that its table names are wanted")
        return mapped.astype(np.uint8)

    def mirrored(self) -> np.ndarray:
        """(classes,) class index after left and right change places; classes without sides stay.

        >>> load("lod7").mirrored().tolist()
        [0, 1, 2, 3, 4, 5, 6]
        >>> fastsurfer79 = load("fastsurfer79")
        >>> [fastsurfer79.class_names[fastsurfer79.mirrored()[c]] for c in (6, 34, 35)]
        ['Right-Thalamus', 'ctx-rh-caudalanteriorcingulate', 'ctx-caudalmiddlefrontal']
        """
        swap = {"left": "right", "right": "left"}
        stem = [_SIDE.sub("", name, count=1) if side in swap else name for name, side in zip(self.class_names, self.sides, strict=True)]
        index = {(s, side): i for i, (s, side) in enumerate(zip(stem, self.sides, strict=True))}
        return np.array([index[s, swap.get(side, side)] for s, side in zip(stem, self.sides, strict=True)])


def sagittal_classes(protocol: Protocol) -> tuple[np.ndarray, int]:
    """The class that a sagittal view sees of each class, (classes,), and how many it sees: left and right look alike there.

    They are numbered as they come, or as the protocol of the view numbers them. Logits (…, n) of that view become those of the protocol by
    ``logits[..., index]``.

    >>> sagittal_classes(load("lod7"))
    (array([0, 1, 2, 3, 4, 5, 6]), 7)
    >>> index, number = sagittal_classes(load("fastsurfer79"))
    >>> index[[1, 19, 34, 65]].tolist(), number         # white matter, caudal anterior cingulate; left, right
    ([5, 5, 20, 20], 51)
    """
    if protocol.sagittal:
        view = load(protocol.sagittal)
        return view.table[list(protocol.ids)].astype(np.int64), view.classes
    first, index = np.unique(np.minimum(np.arange(protocol.classes), protocol.mirrored()), return_inverse=True)
    return index, len(first)


@functools.cache
def load(name: str) -> Protocol:
    """The protocol of that name; an unknown name is an :class:`InputError` that lists the known ones."""
    path = _FOLDER / f"{name}.tsv"
    if name not in names():
        raise InputError(f"protocol {name!r} is not known; one of {', '.join(names())} is wanted")
    with open(path, encoding="utf-8") as handle:
        note = handle.readline()
        rows = list(csv.DictReader(handle, delimiter="\t"))
    table, classes = np.full(65536, _UNNAMED, dtype=np.uint16), {}
    for row in rows:
        index = IGNORED if row["class"] == "ignore" else int(row["class"])
        table[int(row["source_id"])] = index
        if row["class"] != "ignore":
            classes.setdefault(index, row)
    assert sorted(classes) == list(range(len(classes))), f"{path}: class indices have gaps"
    assert len(classes) <= IGNORED, f"{path}: {len(classes)} classes; a byte a voxel is left for {IGNORED}"
    assert table[0] == 0, f"{path}: id 0 is not the background"
    table.flags.writeable = False
    ordered = [classes[i] for i in range(len(classes))]
    return Protocol(
        name=name,
        version=_noted(note, "version"),
        class_names=tuple(row["class_name"] for row in ordered),
        colours=tuple((int(row["red"]), int(row["green"]), int(row["blue"])) for row in ordered),
        sides=tuple(row["side"] for row in ordered),
        groups=tuple(row["group"] for row in ordered),
        ids=tuple(int(row["source_id"]) for row in ordered),
        sources=tuple(_noted(note, "sources").split()),
        table=table,
        before=_noted(note, "before"),
        sagittal=_noted(note, "sagittal"),
        output=_noted(note, "writes") or "classes",
    )


def _noted(note: str, key: str) -> str:
    """The value of ``key`` in a table's first line, ``# what; key value; …``; empty if it is not there."""
    return next((part.strip().removeprefix(key).strip() for part in note.split(";")[1:] if part.strip().startswith(key)), "")


def names() -> tuple[str, ...]:
    """The protocols that have a table."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.tsv")))
