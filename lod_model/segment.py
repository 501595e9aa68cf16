"""A T1w → its segmentation on the scan's own grid, with everything a reader needs beside it; the batch never stops for one bad scan.

Outputs of ``sub-01_ses-1_T1w.nii.gz``, all in one folder (names after BIDS derivatives; any other ``scan.mgz`` gives ``scan_desc-…``):

- ``sub-01_ses-1_desc-lodbrain_dseg.nii.gz``  class indices, uint8, the scan's own grid and affine
- ``…_dseg.tsv``      index, name, colour of each class;  ``…_lut.txt``  the same as a FreeSurfer colour table
- ``…_volumes.tsv``   volume of each class, mL, on the scan's own grid
- ``…_overlay.png``   three slices with the labels
- ``…_dseg.json``     what was read, what made it, the verdict with its reasons, and the outputs' hashes; written last

A refused scan leaves the JSON alone, with verdict ``fail``. A name belongs to one input: where two inputs, in one call or in an earlier
one into the same folder, would share it, the names of their folders (or their full file names) are put in front.
"""

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from data_registry import protocol as protocols
from data_registry.conform import conform, parse_grid, probabilities_to_native
from data_registry.errors import InputError
from data_registry.files import replacing, sha256
from data_registry.protocol import Protocol
from data_registry.volume import SUFFIXES, Volume, load_image, save_volume
from lod_model import postprocess as cleaning
from lod_model import weights as weight_files
from lod_model.engine import compile_network
from lod_model.overlay import write_overlay
from lod_model.predict import best_device, predict
from lod_model.verdict import MAX_CUT_CM2, cut_cm2, judge, volumes_ml

_LOG = logging.getLogger(__name__)
_DESCRIPTION = "lodbrain"
_OUTPUTS = ("dseg.nii.gz", "dseg.tsv", "lut.txt", "volumes.tsv", "overlay.png")
_SIDECAR = "dseg.json"
_SKIPPED_FOLDERS = ("derivatives", "sourcedata")


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    path: Path
    verdict: str
    """pass, review or fail."""
    reasons: tuple[str, ...]
    seconds: float
    dseg: Path | None = None
    """The label map; None if the scan was refused."""


def segment(
    paths: Iterable[str | os.PathLike],
    *,
    out: str | os.PathLike,
    weights: str | os.PathLike | weight_files.Weights,
    postprocess: str = "components",
    threads: int | None = None,
    engine: Literal["plain", "fast"] = "plain",
    on_done: Callable[[Outcome, int], None] = lambda outcome, total: None,
) -> list[Outcome]:
    """Segment scans, or all T1w below folders, into the folder ``out``; one :class:`Outcome` an input, in order.

    ``on_done`` hears of each as it is finished, with the number of all. ``engine`` fast computes LOD-Brain on the CPU by
    :mod:`lod_model.engine`. An earlier result of the same input is replaced; nothing else is ever overwritten. Raises
    :class:`InputError` if nothing can be done: no input exists, bad weights, no place to write.
    """
    if postprocess not in cleaning.METHODS:
        raise InputError(f"postprocess {postprocess!r} is not known; one of {', '.join(cleaning.METHODS)} is wanted")
    scans, problems = find_scans(paths)
    if not scans:
        raise InputError("; ".join(problems.values()) or "no scan is given; T1w files or folders that hold them are wanted")
    out = _made_folder(out)
    loaded = weights if isinstance(weights, weight_files.Weights) else usable_weights(weights)
    if engine == "fast":
        loaded = replace(loaded, network=compile_network(loaded.network))
    else:
        loaded.network.to(best_device())
    total = len(scans) + len(problems)
    outcomes = []
    for path, line in problems.items():
        outcomes.append(Outcome(path, "fail", (line,), 0.0))
        on_done(outcomes[-1], total)
    for path, name in output_names(scans, out).items():
        outcomes.append(_attempt(path, out / name, loaded, postprocess, threads))
        on_done(outcomes[-1], total)
    return outcomes


def usable_weights(path: str | os.PathLike) -> weight_files.Weights:
    """Weights whose protocol and grid are known here; anything else is an :class:`InputError` before the first scan is read."""
    loaded = weight_files.load(path)
    parse_grid(loaded.grid)
    protocol, classes = protocols.load(loaded.protocol), loaded.network.config.classes
    if classes != protocol.classes:
        raise InputError(f"{path}: the network has {classes} classes; {protocol.classes} are wanted for its protocol {protocol.name}")
    return loaded


def find_scans(paths: Iterable[str | os.PathLike]) -> tuple[list[Path], dict[Path, str]]:
    """The scans that ``paths`` name, each once, and for each path that names none the line that says why.

    A file stands for itself. A folder stands for every ``*_T1w.nii`` and ``*_T1w.nii.gz`` below it, in order of their names, hidden
    folders, ``derivatives`` and ``sourcedata`` left out.
    """
    scans: dict[Path, None] = {}
    problems: dict[Path, str] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = _t1w_below(path)
            if not found:
                problems[path] = f"{path}: no *_T1w.nii or *_T1w.nii.gz in this folder; a T1w file or a BIDS folder is wanted"
            scans.update(dict.fromkeys(found))
        elif path.exists():
            scans[Path(os.path.abspath(path))] = None  # not resolved: a link's own name says more than git-annex's hash
        else:
            problems[path] = f"{path}: no such file or folder; a T1w file or a BIDS folder is wanted"
    return list(scans), problems


def _t1w_below(folder: Path) -> list[Path]:
    found = []
    for root, folders, files in os.walk(os.path.abspath(folder)):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("."))
        found += [Path(root, name) for name in sorted(files) if name.endswith(("_T1w.nii", "_T1w.nii.gz")) and not name.startswith(".")]
    return found


def output_names(scans: Sequence[Path], out: Path) -> dict[Path, str]:
    """What each input's outputs begin with; no two alike (whatever the case), whatever the order of ``scans``.

    >>> names = output_names([Path("/a/sub-1_T1w.nii"), Path("/b/sub-1_T1w.nii"), Path("/c/x.mgz")], Path("/none"))
    >>> list(names.values())
    ['a_sub-1_desc-lodbrain', 'b_sub-1_desc-lodbrain', 'x_desc-lodbrain']
    """
    candidates = {path: _candidates(path) for path in scans}
    inputs = {os.path.realpath(path) for path in scans}
    level = dict.fromkeys(scans, 0)
    while True:
        names = {path: candidates[path][level[path]] for path in scans}
        shared = Counter(name.casefold() for name in names.values())
        again = [
            path
            for path, name in names.items()
            if level[path] + 1 < len(candidates[path]) and (shared[name.casefold()] > 1 or _taken(out / name, path, inputs))
        ]
        if not again:
            return names
        for path in again:
            level[path] += 1


def _candidates(path: Path) -> list[str]:
    """Names for an input from the shortest on; the last one is its path's alone."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    full = path.name.replace(".", "-")
    stem = path.name[: len(path.name) - len(suffix)].removesuffix("_T1w")
    parts = [part for part in path.parts[1:-1] if part != "anat" and part not in stem.split("_")]
    fronts = [_plain("-".join(parts[-count:])) for count in range(1, len(parts) + 1)]
    unique = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    stems = [stem, *(f"{front}_{stem}" for front in fronts), full, *(f"{front}_{full}" for front in fronts), f"{unique}_{full}"]
    return [f"{_plain(name)}_desc-{_DESCRIPTION}" for name in stems]


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_+" else "-" for letter in name)


def _taken(front: Path, scan: Path, inputs: set[str]) -> bool:
    """Whether files of this name are another scan's result, or one of the inputs themselves."""
    if any(os.path.realpath(_file(front, output)) in inputs for output in (*_OUTPUTS, _SIDECAR)):
        return True
    try:
        return json.loads(_file(front, _SIDECAR).read_text(encoding="utf-8"))["input"] != str(scan)
    except (OSError, ValueError, KeyError, TypeError):  # no result, or none that was completed
        return False


def _file(front: Path, output: str) -> Path:
    return front.with_name(f"{front.name}_{output}")


def _made_folder(out: str | os.PathLike) -> Path:
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; a folder to write to is wanted") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"{out}: not writable; a folder to write to is wanted")
    return out


def _attempt(path: Path, front: Path, weights: weight_files.Weights, postprocess: str, threads: int | None) -> Outcome:
    """One scan; whatever goes wrong is its own outcome."""
    start = time.perf_counter()
    sidecar = {
        "input": str(path),
        "input_sha256": None,
        "weights": weights.name,
        "weights_hash": weights.hash,
        "weights_file": str(weights.path) if weights.path else None,
        "grid": weights.grid,
        "protocol": weights.protocol,
        "postprocess": postprocess,
        "software": f"lodbrain {version('lodbrain')}",
    }
    try:
        _file(front, _SIDECAR).unlink(missing_ok=True)  # from here on an earlier result is no longer complete
        sidecar["input_sha256"] = sha256(path)
        sidecar |= _segment_one(path, front, weights, postprocess, threads)
        outcome = Outcome(path, sidecar["verdict"], tuple(sidecar["reasons"]), time.perf_counter() - start, _file(front, "dseg.nii.gz"))
        _write_sidecar(front, sidecar, outcome)
    except Exception as error:  # the batch goes on
        outcome = Outcome(path, "fail", (_line(path, error),), time.perf_counter() - start)
        _LOG.debug("%s", path, exc_info=error)
        _leave_refusal(front, sidecar, outcome)
    return outcome


def _line(path: Path, error: Exception) -> str:
    """One line that begins with the file's name."""
    if isinstance(error, MemoryError):
        text = "not enough memory"
    elif isinstance(error, InputError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if text.startswith(str(path)) else f"{path}: {text}"


def _leave_refusal(front: Path, sidecar: dict, outcome: Outcome) -> None:
    """No label map of an earlier run may stand beside a refusal."""
    try:
        for output in _OUTPUTS:
            _file(front, output).unlink(missing_ok=True)
        _write_sidecar(front, sidecar, outcome)
    except OSError as error:  # e.g. a full disk: the caller still hears of the refusal
        _LOG.debug("%s", front, exc_info=error)


def _write_sidecar(front: Path, sidecar: dict, outcome: Outcome) -> None:
    content = sidecar | {"verdict": outcome.verdict, "reasons": list(outcome.reasons), "seconds": round(outcome.seconds, 2)}
    _write_text(_file(front, _SIDECAR), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _segment_one(path: Path, front: Path, weights: weight_files.Weights, postprocess: str, threads: int | None) -> dict:
    """Write one scan's outputs but the sidecar; returns what the sidecar says of them."""
    protocol = protocols.load(weights.protocol)
    scan = load_image(path)
    classes, warnings, grave = classes_of(scan, weights=weights, postprocess=postprocess, threads=threads)
    verdict = judge(classes, scan, protocol, warnings=grave)
    volumes = volumes_ml(classes, scan, protocol)
    save_volume(_file(front, "dseg.nii.gz"), classes, scan.affine)
    _write_text(_file(front, "dseg.tsv"), _label_table(protocol))
    _write_text(_file(front, "lut.txt"), _colour_table(protocol))
    _write_text(_file(front, "volumes.tsv"), _volume_table(protocol, volumes))
    write_overlay(_file(front, "overlay.png"), scan, classes, protocol=protocol, volumes=volumes, verdict=verdict.verdict, notes=verdict.reasons)
    return {
        "protocol_version": protocol.version,
        "voxel_mm": [round(float(edge), 6) for edge in scan.voxel_mm],
        "orientation": scan.orientation,
        "warnings": list(warnings),
        "verdict": verdict.verdict,
        "reasons": list(verdict.reasons),
        "volumes_ml": {name: round(ml, 3) for name, ml in volumes.items()},
        "outputs_sha256": {_file(front, output).name: sha256(_file(front, output)) for output in _OUTPUTS},
    }


def classes_of(
    scan: Volume, *, weights: weight_files.Weights, postprocess: str = "none", threads: int | None = None
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Class indices (I, J, K) uint8 of a scan on its own grid, all warnings of reading and conforming, and those that touch the labels.

    That the scan is larger than the grid touches the labels only if they reach the grid's edge: beyond it is mostly air.
    """
    conformed = conform(scan, grid=weights.grid)
    probabilities = predict(weights.network, conformed.data, threads=threads)  # (C, D, H, W)
    probabilities = cleaning.postprocess(probabilities, method=postprocess)
    on_grid = Volume(cleaning.hard_classes(probabilities), conformed.placement.affine)
    at_edge = max(cut_cm2(on_grid.data, on_grid).values()) > MAX_CUT_CM2
    native = probabilities_to_native(probabilities, conformed.placement)
    return native, conformed.warnings, conformed.warnings if at_edge else scan.warnings


def _write_text(path: Path, content: str) -> None:
    with replacing(path) as aside:
        aside.write_text(content, encoding="utf-8")


def _label_table(protocol: Protocol) -> str:
    """BIDS' table of a discrete segmentation."""
    rows = zip(protocol.class_names, protocol.colours, strict=True)
    lines = [f"{index}\t{name}\t#{r:02x}{g:02x}{b:02x}" for index, (name, (r, g, b)) in enumerate(rows)]
    return "\n".join(["index\tname\tcolor", *lines]) + "\n"


def _colour_table(protocol: Protocol) -> str:
    """FreeSurfer's look-up table: index, name without spaces, R, G, B, A."""
    rows = zip(protocol.class_names, protocol.colours, strict=True)
    lines = [f"{index:<5d} {name.replace(' ', '-'):<32s} {r:3d} {g:3d} {b:3d} 0" for index, (name, (r, g, b)) in enumerate(rows)]
    return "\n".join([f"# {protocol.name} version {protocol.version}: index, name, R, G, B, A", *lines]) + "\n"


def _volume_table(protocol: Protocol, volumes: dict[str, float]) -> str:
    lines = [f"{index}\t{name}\t{volumes[name]:.3f}" for index, name in enumerate(protocol.class_names) if index]
    return "\n".join(["index\tname\tvolume_ml", *lines]) + "\n"
