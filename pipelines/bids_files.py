"""The T1w of a BIDS database and the sidecars that speak of each, found in one walk; a subject's folder that gives none is named."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class T1w(NamedTuple):
    """A T1w's file; paths are relative to the database's root."""

    path: str
    subject: str
    session: str
    """Empty if the name has none."""
    sidecars: tuple[str, ...]
    """By BIDS's inheritance: the nearer to the scan, the later, and the nearer goes first where they do not agree."""


def find_t1w(root: Path) -> tuple[list[T1w], dict[str, str]]:
    """All ``_T1w.nii[.gz]`` at any depth below ``root/sub-<label>``, by path; and the folders ``sub-*`` that give none, each with the reason."""
    with os.scandir(root) as entries:
        top = sorted((entry.name, entry.is_dir()) for entry in entries)
    found, without = [], {}
    told = [name for name, is_folder in top if name.endswith("T1w.json") and not is_folder]
    for folder in (name for name, is_folder in top if name.startswith("sub-") and is_folder):
        if not re.fullmatch(r"sub-[A-Za-z0-9]+", folder):
            without[folder] = "a name that is no subject's"
            continue
        there = list(_below(root, folder, _general_first(told)))
        found += there
        if not there:
            without[folder] = "a folder without a T1w"
    return sorted(found), without


def read_object(path: Path) -> dict:
    """A JSON file's fields. Raises :class:`OSError`, and :class:`ValueError` for what holds no fields."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, where fields and their values are wanted")
    return content


def _below(root: Path, folder: str, inherited: list[str]) -> Iterator[T1w]:
    with os.scandir(root / folder) as entries:
        content = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    files = [name for name, is_folder in content if not is_folder]
    told = inherited + _general_first(f"{folder}/{name}" for name in files if name.endswith("T1w.json"))
    for name in files:
        if name.startswith("sub-") and name.endswith(("_T1w.nii", "_T1w.nii.gz")):
            parts = name.split(".nii")[0].split("_")
            entities = dict(part.split("-", 1) for part in parts if "-" in part)
            sidecars = tuple(path for path in told if set(_stem(path).split("_")) <= set(parts))
            yield T1w(f"{folder}/{name}", entities["sub"], entities.get("ses", ""), sidecars)
    for name, is_folder in content:
        if is_folder:
            yield from _below(root, f"{folder}/{name}", told)


def _general_first(paths: Iterable[str]) -> list[str]:
    return sorted(paths, key=lambda path: (path.count("_"), path))


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".json")
