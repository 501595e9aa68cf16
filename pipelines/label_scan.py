"""One scan through a labelling tool: run aside, watched, checked against its T1w, and renamed to where index finds it.

The tool works in a folder of its own, ``derivatives/.labelling/<tool>/``, on the file system of the result. It leads a process group that
ends with its time, and also with whoever started it, however that died: a shell in the group waits for the end of a pipe.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_registry.conform import Conformed, conform, labels_to_grid
from data_registry.errors import InputError
from data_registry.files import replacing
from data_registry.label_fit import check_fit
from data_registry.tissue_maps import load_label_map
from data_registry.volume import load_image
from pipelines.labellers import TOOLS, check_installed, environment, place

WORK = "derivatives/.labelling"
GRACE_S = 10.0  # between asking a tool to stop and ending it
CHECK_GRID = "4mm"  # coarse, and enough to see whose brain it is and which way it lies
SAYS_WHY = tuple(map(re.compile, (r"^([\w.]*Error|ERROR|error): .*[^:]$", r"exited with ERRORS", r"")))
"""Lines that say why a tool failed, the more telling first; one that ends in a colon only points to others."""
WATCHED = 'exec 3<&0 </dev/null; (read _ <&3; kill -s KILL 0) & exec "$@" 3<&-'


@dataclass(frozen=True)
class Work:
    """A scan to be labelled; all paths absolute."""

    tool: str
    scan: dict
    """Its row of the scans table."""
    name: str
    """The T1w's, without its suffixes: the subject's name for the tool."""
    t1w: Path
    base: Path
    """The database, or its folder in index.labels."""
    log: Path
    threads: int
    limit_s: float


def label_scan(work: Work) -> None:
    """Make the label map of one scan; :class:`InputError` with one line if there is none in the end. What a finished run has made stays."""
    tool, aside = TOOLS[work.tool], work.base / WORK / work.tool
    target, wanted = place(tool, work.base, work.scan, work.name)
    made = aside / f"{work.name}.made"
    with _alone(aside, work):
        if wanted.is_file():
            return
        if target.exists():
            raise InputError(f"{target}: begun by another hand, without {wanted.name}; its end, or its removal, is wanted")
        t1w = conform(load_image(work.t1w), grid=CHECK_GRID)  # refused now, and not after a day of work
        if not made.is_dir():
            _make(made, work)
        try:
            _check(made / tool.made(work.name), t1w)
        except InputError as error:
            raise InputError(f"{error}; once {made} is removed, the tool runs anew") from None
        _describe(work.base / tool.home, work.tool)
        target.parent.mkdir(parents=True, exist_ok=True)
        (made / target.name).rename(target)
        shutil.rmtree(made, ignore_errors=True)


def _make(made: Path, work: Work) -> None:
    """Run the tool in a folder that is renamed to ``made`` when it has ended well."""
    tool = TOOLS[work.tool]
    check_installed(work.tool)
    for left in made.parent.glob(f"{work.name}.begun-*"):  # by a run that was killed: the tools begin anew
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{work.name}.begun-", dir=made.parent))
    try:
        _run([tool.program, *tool.command(str(work.t1w), work.name, folder, work.threads)], work, folder)
        if not (folder / tool.made(work.name)).is_file():
            raise InputError(f"{tool.program} ended well without {tool.made(work.name)}; see {work.log}")
        folder.rename(made)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(aside: Path, work: Work) -> Iterator[None]:
    """Refuse a scan that another process is at; the lock ends with the process."""
    aside.mkdir(parents=True, exist_ok=True)
    with open(aside / f"{work.name}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{lock.name}: another run is at this scan; its end is wanted") from None
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _run(command: list[str], work: Work, folder: Path) -> None:
    """Run a tool to its end, its words in the scan's log; :class:`InputError` if it fails or its time is up. Nothing of its group survives."""
    work.log.parent.mkdir(parents=True, exist_ok=True)
    with open(work.log, "ab") as log:
        log.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            ["/bin/sh", "-c", WATCHED, "sh", *command],
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
            env=environment(work.tool, folder, work.threads), start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(work.limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            raise InputError(f"{command[0]} was stopped after {work.limit_s / 3600:.3g} hours (--limit-hours); see {work.log}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdin.close()
            process.wait()
    if status:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        raise InputError(f"{command[0]} {how}: {_why(work.log.read_bytes()[begin:])} ({work.log})")


def _why(said: bytes) -> str:
    """The line in which a tool says what is wrong: its last error, which others may follow (where to report it), else its last line.

    >>> _why(b"ERROR: cannot find aseg\\nrecon-all -s 01 exited with ERRORS\\nTo report a problem, see ...\\n"), _why(b"a\\nb\\n"), _why(b"")
    ('ERROR: cannot find aseg', 'b', 'it said nothing')
    """
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    for pattern in SAYS_WHY:
        if found := [line for line in lines if pattern.search(line)]:
            return found[-1][:200]
    return "it said nothing"


def _check(result: Path, t1w: Conformed) -> None:
    """What harmonise would refuse is no result: ids that cannot be read, or labels that do not lie on the T1w."""
    labels = load_label_map(result)
    labels_to_grid(labels, t1w.placement, method="nearest")
    check_fit(labels, t1w.data, t1w.placement)


def _describe(home: Path, tool: str) -> None:
    """BIDS wants to know what a derivative is."""
    path = home / "dataset_description.json"
    if not path.exists():
        content = {"Name": tool, "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": TOOLS[tool].program}]}
        with replacing(path) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
