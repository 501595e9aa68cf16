"""What one scan's segmentation leaves in a folder: the names, none shared by two inputs, and what stands in the files.

See :mod:`lod_model.segment` for the list. Every file exists only when complete; the sidecar is written last.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_registry.errors import InputError
from data_registry.files import replacing, sha256
from data_registry.protocol import Protocol
from data_registry.volume import SUFFIXES, Volume, save_volume
from lod_model.verdict import Verdict

_LOG = logging.getLogger(__name__)
DESCRIPTION = "lodbrain"
OUTPUTS = ("dseg.nii.gz", "dseg.tsv", "lut.txt", "volumes.tsv", "overlay.png")
SIDECAR = "dseg.json"


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
    return [f"{_plain(name)}_desc-{DESCRIPTION}" for name in stems]


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_+" else "-" for letter in name)


def _taken(front: Path, scan: Path, inputs: set[str]) -> bool:
    """Whether files of this name are another scan's result, or one of the inputs themselves."""
    if any(os.path.realpath(output_file(front, output)) in inputs for output in (*OUTPUTS, SIDECAR)):
        return True
    try:
        return json.loads(output_file(front, SIDECAR).read_text(encoding="utf-8"))["input"] != str(scan)
    except (OSError, ValueError, KeyError, TypeError):  # no result, or none that was completed
        return False


def output_file(front: Path, output: str) -> Path:
    return front.with_name(f"{front.name}_{output}")


def protocol_front(front: Path, protocol: str, protocols: Sequence[str]) -> Path:
    """What a label map's files begin with: the scan's, and BIDS' entity ``seg`` where there are several maps.

    >>> protocol_front(Path("sub-1_desc-lodbrain"), "fsl_fast", ("fsl_fast", "spm_tissue")).name
    'sub-1_seg-fslfast_desc-lodbrain'
    """
    if len(protocols) == 1:
        return front
    stem = front.name.removesuffix(f"_desc-{DESCRIPTION}")
    return front.with_name(f"{stem}_seg-{protocol.replace('_', '')}_desc-{DESCRIPTION}")


def made_folder(out: str | os.PathLike) -> Path:
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; a folder to write to is wanted") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"{out}: not writable; a folder to write to is wanted")
    return out


def write_outputs(front: Path, scan: Volume, classes: np.ndarray, *, protocol: Protocol, volumes: Mapping[str, float], verdict: Verdict) -> dict:
    """Write all but the sidecar of ``classes`` (I, J, K) on the scan's own grid; each output's SHA-256 by its name."""
    from lod_model.overlay import write_overlay  # matplotlib: its import passes while the network computes

    save_volume(output_file(front, "dseg.nii.gz"), protocol.written[classes], scan.affine)
    _write_text(output_file(front, "dseg.tsv"), _label_table(protocol))
    _write_text(output_file(front, "lut.txt"), _colour_table(protocol))
    _write_text(output_file(front, "volumes.tsv"), _volume_table(protocol, volumes))
    picture = output_file(front, "overlay.png")
    write_overlay(picture, scan, classes, protocol=protocol, volumes=volumes, verdict=verdict.verdict, notes=verdict.reasons)
    return {output_file(front, output).name: sha256(output_file(front, output)) for output in OUTPUTS}


def write_sidecar(front: Path, content: dict) -> None:
    _write_text(output_file(front, SIDECAR), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def leave_refusal(front: Path, sidecar: dict, *, protocols: Sequence[str]) -> None:
    """No label map of an earlier run may stand beside a refusal."""
    try:
        for own in {front, *(protocol_front(front, protocol, protocols) for protocol in protocols)}:
            for output in OUTPUTS:
                output_file(own, output).unlink(missing_ok=True)
        write_sidecar(front, sidecar)
    except OSError as error:  # e.g. a full disk: the caller still hears of the refusal
        _LOG.debug("%s", front, exc_info=error)


def _write_text(path: Path, content: str) -> None:
    with replacing(path) as aside:
        aside.write_text(content, encoding="utf-8")


def _label_table(protocol: Protocol) -> str:
    """BIDS' table of a discrete segmentation."""
    rows = zip(protocol.written, protocol.class_names, protocol.colours, strict=True)
    lines = [f"{index}\t{name}\t#{r:02x}{g:02x}{b:02x}" for index, name, (r, g, b) in rows]
    return "\n".join(["index\tname\tcolor", *lines]) + "\n"


def _colour_table(protocol: Protocol) -> str:
    """FreeSurfer's look-up table: index, name without spaces, R, G, B, A."""
    rows = zip(protocol.written, protocol.class_names, protocol.colours, strict=True)
    lines = [f"{index:<5d} {name.replace(' ', '-'):<32s} {r:3d} {g:3d} {b:3d} 0" for index, name, (r, g, b) in rows]
    return "\n".join([f"# {protocol.name} version {protocol.version}: index, name, R, G, B, A", *lines]) + "\n"


def _volume_table(protocol: Protocol, volumes: dict[str, float]) -> str:
    lines = [f"{protocol.written[index]}\t{name}\t{volumes[name]:.3f}" for index, name in enumerate(protocol.class_names) if index]
    return "\n".join(["index\tname\tvolume_ml", *lines]) + "\n"
