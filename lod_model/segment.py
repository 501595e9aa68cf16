"""A T1w → its segmentation on the scan's own grid, with everything a reader needs beside it; the batch never stops for one bad scan.

Outputs of ``sub-01_ses-1_T1w.nii.gz``, all in one folder (names after BIDS derivatives; any other ``scan.mgz`` gives ``scan_desc-…``):

- ``sub-01_ses-1_desc-lodbrain_dseg.nii.gz``  class indices, uint8, the scan's own grid and affine
- ``…_dseg.tsv``      index, name, colour of each class;  ``…_lut.txt``  the same as a FreeSurfer colour table
- ``…_volumes.tsv``   volume of each class, mL, on the scan's own grid
- ``…_overlay.png``   three slices with the labels
- ``…_dseg.json``     what was read, what made it, the verdict with its reasons, and the outputs' hashes; written last

Where the weights have several label protocols, each has its own files, ``…_seg-<protocol>_desc-lodbrain_…`` (the protocol without
underscores); the JSON is one. A refused scan leaves the JSON alone, with verdict ``fail``. A name belongs to one input: where two inputs,
in one call or in an earlier one into the same folder, would share it, the names of their folders (or their full file names) are put in
front.
"""

import contextlib
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_registry import protocol as protocols
from data_registry.conform import Conformed, labels_to_native, parse_grid, probabilities_to_native
from data_registry.errors import InputError
from data_registry.files import sha256
from data_registry.intensity import prepare
from data_registry.quality_rules import MAX_CUT_CM2
from data_registry.volume import Volume, load_image
from lod_model import postprocess as cleaning
from lod_model import weights as weight_files
from lod_model.predict import ENGINES, output_protocol, predict_any, with_engine
from lod_model.segment_outputs import (
    SIDECAR,
    leave_refusal,
    made_folder,
    output_file,
    output_names,
    protocol_front,
    write_outputs,
    write_sidecar,
)  # fmt: skip
from lod_model.verdict import cut_cm2, judge, volumes_ml

_LOG = logging.getLogger(__name__)
_SKIPPED_FOLDERS = ("derivatives", "sourcedata")
_NICENESS = 5  # of the threads that read and write beside the network


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
    engine: Literal["fast", "fast-bf16", "plain"] = "fast",
    on_done: Callable[[Outcome, int], None] = lambda outcome, total: None,
) -> list[Outcome]:
    """Segment scans, or all T1w below folders, into the folder ``out``; one :class:`Outcome` an input, in order.

    The next scan is read, and the one before cleaned and written, while the network computes: three scans are in memory at most.
    ``on_done`` hears of each as it is finished, in order, with the number of all, from the thread that writes. ``engine`` is as in
    :func:`lod_model.predict.with_engine`. An earlier result of the same input is replaced; nothing else is ever overwritten. Raises
    :class:`InputError` if nothing can be done: no input exists, bad weights, no place to write.
    """
    if postprocess not in cleaning.METHODS:
        raise InputError(f"postprocess {postprocess!r} is not known; one of {', '.join(cleaning.METHODS)} is wanted")
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is not known; one of {', '.join(ENGINES)} is wanted")
    scans, problems = find_scans(paths)
    if not scans:
        raise InputError("; ".join(problems.values()) or "no scan is given; T1w files or folders that hold them are wanted")
    out = made_folder(out)
    loaded = weights if isinstance(weights, weight_files.Weights) else usable_weights(weights)
    network, computed_by = with_engine(loaded.network, engine)
    loaded = replace(loaded, network=network)
    total = len(scans) + len(problems)
    outcomes = []
    for path, line in problems.items():
        outcomes.append(Outcome(path, "fail", (line,), 0.0))
        on_done(outcomes[-1], total)
    about = _about(loaded, postprocess) | computed_by
    jobs = [_Job(path, out / name, about | {"input": str(path)}) for path, name in output_names(scans, out).items()]
    return outcomes + _run(jobs, loaded, postprocess=postprocess, threads=threads, on_done=lambda outcome: on_done(outcome, total))


def usable_weights(path: str | os.PathLike) -> weight_files.Weights:
    """Weights whose protocol and grid are known here; anything else is an :class:`InputError` before the first scan is read."""
    loaded = weight_files.load(path)
    parse_grid(loaded.grid)
    wanted = {name: protocols.load(name).classes for name in loaded.protocols}
    config = loaded.network.config
    came = config.protocols if hasattr(config, "protocols") else {loaded.protocols[0]: config.classes}
    if dict(came) != wanted:
        numbers = ", ".join(f"{number} of {name}" for name, number in wanted.items())
        raise InputError(f"{path}: the network has {', '.join(map(str, came.values()))} classes; {numbers} are wanted for its protocol")
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


def labels_of(
    scan: Volume, *, weights: weight_files.Weights, postprocess: str = "none", threads: int | None = None
) -> tuple[dict[str, np.ndarray], tuple[str, ...], tuple[str, ...]]:
    """Class indices (I, J, K) uint8 of a scan on its own grid, by protocol, all warnings of reading and conforming, and those that touch the labels.

    That the scan is larger than the grid touches the labels only if they reach the grid's edge: beyond it is mostly air.
    """
    conformed = prepare(scan, grid=weights.grid, preparation=weights.preparation)
    labels, grave = _native_labels(_asked(weights, conformed, threads), weights, scan, conformed, postprocess)
    return labels, conformed.warnings, grave


def classes_of(scan: Volume, *, weights: weight_files.Weights, **how) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """As :func:`labels_of`, the first label map alone."""
    labels, warnings, grave = labels_of(scan, weights=weights, **how)
    return next(iter(labels.values())), warnings, grave


def _asked(weights: weight_files.Weights, conformed: Conformed, threads: int | None) -> np.ndarray | dict[str, np.ndarray]:
    """What the network says on the grid: class probabilities, or label maps by protocol."""
    return predict_any(
        weights.network, conformed.data, protocols=weights.protocols, voxel_mm=conformed.placement.voxel_mm, threads=threads
    )  # fmt: skip


def _native_labels(
    found: np.ndarray | dict[str, np.ndarray], weights: weight_files.Weights, scan: Volume, conformed: Conformed, postprocess: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Label maps on the scan's own grid, and the warnings that touch them; changes probabilities in place.

    Probabilities are interpolated before the largest is taken; of label maps the nearest voxel is.
    """
    if isinstance(found, dict):
        on_grid = {
            name: cleaning.clean_labels(labels, method=cleaning.fitting(postprocess, protocols.load(name))) for name, labels in found.items()
        }
        native = {name: labels_to_native(labels, conformed.placement) for name, labels in on_grid.items()}
    else:
        probabilities = cleaning.postprocess(found, method=cleaning.fitting(postprocess, protocols.load(weights.protocols[0])))
        on_grid = {weights.protocols[0]: cleaning.hard_classes(probabilities)}
        native = {weights.protocols[0]: probabilities_to_native(probabilities, conformed.placement)}
    at_edge = any(max(cut_cm2(labels, Volume(labels, conformed.placement.affine)).values()) > MAX_CUT_CM2 for labels in on_grid.values())
    return native, conformed.warnings if at_edge else scan.warnings


# --- the batch: read ahead, compute, write behind -------------------------------------------------------------------------


@dataclass
class _Job:
    """A scan on its way; whatever goes wrong is its own ``error``, and the later stages leave it alone."""

    path: Path
    front: Path
    sidecar: dict[str, Any]
    seconds: float = 0.0
    error: Exception | None = None
    scan: Volume | None = field(default=None, repr=False)
    conformed: Conformed | None = field(default=None, repr=False)
    dseg: Path | None = None
    found: np.ndarray | dict[str, np.ndarray] | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def stage(self):
        """Time what is done inside and keep its error."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # the batch goes on
            self.error = error
            _LOG.debug("%s", self.path, exc_info=error)
        self.seconds += time.perf_counter() - start


def _run(
    jobs: Sequence[_Job], weights: weight_files.Weights, *, postprocess: str, threads: int | None, on_done: Callable[[Outcome], None]
) -> list[Outcome]:
    """All jobs through reading, the network and writing. However it ends, what the network has computed is written to its end."""
    outcomes, writing = [], None
    with _worker() as reader, _worker() as writer:
        writer.submit(importlib.import_module, "lod_model.overlay")
        reading = reader.submit(_read, jobs[0], weights)
        for job, after in zip(jobs, [*jobs[1:], None], strict=True):
            reading.result()
            if after:
                reading = reader.submit(_read, after, weights)
            _compute(job, weights, threads)
            if writing:
                outcomes.append(writing.result())
            writing = writer.submit(_finish, job, weights, postprocess, on_done)
        outcomes.append(writing.result())
    return outcomes


@contextlib.contextmanager
def _worker():
    """A thread that stands back when the network wants the processor; what it was given is done before the end."""
    worker = ThreadPoolExecutor(1, initializer=_stand_back)
    try:
        yield worker
    finally:
        worker.shutdown(wait=True)


def _stand_back() -> None:
    if sys.platform == "linux":  # elsewhere niceness is the process's
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS))


def _read(job: _Job, weights: weight_files.Weights) -> None:
    with job.stage():
        job.sidecar["input_sha256"] = sha256(job.path)
        job.scan = load_image(job.path)
        job.conformed = prepare(job.scan, grid=weights.grid, preparation=weights.preparation)


def _compute(job: _Job, weights: weight_files.Weights, threads: int | None) -> None:
    if job.error is None:
        with job.stage():
            start = time.perf_counter()
            job.found = _asked(weights, job.conformed, threads)
            job.sidecar["network_seconds"] = round(time.perf_counter() - start, 3)


def _finish(job: _Job, weights: weight_files.Weights, postprocess: str, on_done: Callable[[Outcome], None]) -> Outcome:
    """Clean, judge and write, or refuse."""
    if job.error is None:
        with job.stage():
            output_file(job.front, SIDECAR).unlink(missing_ok=True)  # from here on an earlier result is no longer complete
            job.sidecar |= _write(job, weights, postprocess)
    outcome = None
    if job.error is None:
        reasons, dseg = tuple(job.sidecar["reasons"]), job.dseg
        outcome = Outcome(job.path, job.sidecar["verdict"], reasons, job.seconds, dseg)
        with job.stage():
            write_sidecar(job.front, _said(job.sidecar, outcome))
    if job.error is not None:
        outcome = Outcome(job.path, "fail", (_line(job.path, job.error),), job.seconds)
        leave_refusal(job.front, _said(job.sidecar, outcome), protocols=_outputs(weights))
    job.scan = job.conformed = job.found = None
    on_done(outcome)
    return outcome


def _write(job: _Job, weights: weight_files.Weights, postprocess: str) -> dict:
    """Write one scan's outputs but the sidecar; returns what the sidecar says of them. Of several label maps, the worst verdict counts."""
    scan, outputs = job.scan, _outputs(weights)
    found, grave = _native_labels(job.found, weights, scan, job.conformed, postprocess)
    verdicts, volumes, hashes = {}, {}, {}
    for name, classes in found.items():
        protocol, front = protocols.load(name), protocol_front(job.front, name, outputs)
        verdicts[name] = judge(classes, scan, protocol, warnings=grave)
        volumes[name] = volumes_ml(classes, scan, protocol)
        hashes |= write_outputs(front, scan, classes, protocol=protocol, volumes=volumes[name], verdict=verdicts[name])
    job.dseg = output_file(protocol_front(job.front, outputs[0], outputs), "dseg.nii.gz")
    rounded = {name: {structure: round(ml, 3) for structure, ml in of.items()} for name, of in volumes.items()}
    many = len(found) > 1
    reasons = [f"{name}: {reason}" if many else reason for name, one in verdicts.items() for reason in one.reasons]
    return {
        "protocol": weight_files.joined(outputs),
        "protocol_version": " ".join(protocols.load(name).version for name in outputs),
        "voxel_mm": [round(float(edge), 6) for edge in scan.voxel_mm],
        "orientation": scan.orientation,
        "warnings": list(job.conformed.warnings),
        "verdict": max((one.verdict for one in verdicts.values()), key=("pass", "review", "fail").index),
        "reasons": list(dict.fromkeys(reasons)),
        "volumes_ml": rounded if many else rounded[outputs[0]],
        "outputs_sha256": hashes,
    }


def _outputs(weights: weight_files.Weights) -> tuple[str, ...]:
    """The protocols of the label maps."""
    return tuple(map(output_protocol, weights.protocols))


def _about(weights: weight_files.Weights, postprocess: str) -> dict:
    """The sidecar's beginning, the same for every scan."""
    return {
        "input": None,
        "input_sha256": None,
        "weights": weights.name,
        "weights_hash": weights.hash,
        "weights_file": str(weights.path) if weights.path else None,
        "grid": weights.grid,
        "preparation": asdict(weights.preparation),
        "protocol": weights.protocol,
        "postprocess": postprocess,
        "software": f"lodbrain {version('lodbrain')}",
    }


def _said(sidecar: dict, outcome: Outcome) -> dict:
    return sidecar | {"verdict": outcome.verdict, "reasons": list(outcome.reasons), "seconds": round(outcome.seconds, 2)}


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
