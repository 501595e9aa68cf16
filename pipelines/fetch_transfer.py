"""Files from a route into a database's folder: each resumed, verified, and in its place only when right.

A file on its way stands in ``.fetching/``, named after its path and version, so that another version never goes on from it; then it is
compared with the size and the checksums that the route gives, and renamed. ``fetched.tsv`` gets a line for each, in the order in which they
came; of two of one path the later counts. It has a manifest's columns: a folder served over HTTP can be fetched from again.
"""

import contextlib
import fcntl
import hashlib
import os
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from data_registry.errors import InputError
from data_registry.files import sha256
from pipelines.fetch_choice import File
from pipelines.fetch_routes import Changed, Cut, Damaged, Entry, Route, RouteError, wait_s
from pipelines.progress import Bytes

LEDGER = "fetched.tsv"
COLUMNS = ("path", "bytes", "sha256", "version", "fetched", "route")
LAST_S = 2.0
"""For files that are about to end when a run is stopped."""
ASIDE = ".fetching"


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Nobody else fetches into ``root`` meanwhile."""
    (root / ASIDE).mkdir(parents=True, exist_ok=True)
    with open(root / ASIDE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{root}: another fetch is at work there; one at a time is wanted") from None
        yield


def tidy(root: Path) -> None:
    """Remove what stands aside, once all files are in their place: it belongs to versions that are no more."""
    for path in (root / ASIDE).iterdir():
        path.unlink()
    (root / ASIDE).rmdir()


class Ledger:
    """``fetched.tsv`` of a folder, and the files there that it vouches for."""

    def __init__(self, root: Path, address: str, *, read_only: bool = False) -> None:
        self.root, self.address, self.rows, self._read_only, self._lock = root, address, {}, read_only, threading.Lock()
        if (root / LEDGER).is_file():
            lines = (root / LEDGER).read_text(encoding="utf-8", errors="replace").split("\n")
            if lines[0].split("\t") != list(COLUMNS):
                raise InputError(f"{root / LEDGER}: is no list of fetched files; another folder, or none of that name in it, is wanted")
            cells = (line.split("\t") for line in lines[1:-1])  # the last was cut off, or is empty
            self.rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in cells if len(row) == len(COLUMNS)}

    def has(self, file: File, *, verify: bool) -> bool:
        """Is this version here? The size is looked at; with ``verify`` the bytes are hashed too.

        What came by other means, or from another route, is told by the checksum that the route gives, if it gives one, and then recorded.
        """
        row, path, entry = self.rows.get(file.path), self.root / file.path, file.entry
        same = row is not None and (row["version"], row["route"]) == (entry.version, self.address)
        if not path.is_file() or str(path.stat().st_size) != (row["bytes"] if same else str(entry.bytes)):
            return False
        if same or (row and row["sha256"] == entry.sha256):
            return not verify or sha256(path) == row["sha256"]
        if (row and row["route"] == self.address) or not (entry.sha256 or entry.md5) or _wrong(path, file):
            return False
        self.add(file, sha256(path))
        return True

    def is_another(self, file: File) -> bool:
        """Was an image of this path, but of another size, fetched from another route? Then the two are not one database."""
        row = self.rows.get(file.path)
        image = file.path.endswith((".nii", ".nii.gz"))
        return bool(row and image and row["route"] != self.address and row["bytes"] != str(file.entry.bytes))

    def add(self, file: File, digest: str) -> None:
        """A file is in its place."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        row = dict(zip(COLUMNS, (file.path, str(file.entry.bytes), digest, file.entry.version, now, self.address), strict=True))
        with self._lock:
            self.rows[file.path] = row
            if not self._read_only:
                self._append("\t".join(row.values()))

    def add_made(self, path: str) -> None:
        """A file that was put together here, or fetched and then changed: it stays until another version is at its source."""
        digest, row = sha256(self.root / path), self.rows.get(path)
        if not row or row["sha256"] != digest:
            self.add(File(Entry(path, (self.root / path).stat().st_size, row["version"] if row else digest), path), digest)

    def _append(self, line: str) -> None:
        with open(self.root / LEDGER, "a+b") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(size - 1, 0))
            before = "\t".join(COLUMNS) + "\n" if not size else "" if handle.read() == b"\n" else "\n"  # after a line that was cut off
            handle.write(f"{before}{line}\n".encode())


def aside_of(root: Path, file: File) -> Path:
    """Where a version of a file stands while on its way."""
    name = "\0".join((file.path, file.entry.version, str(file.entry.bytes)))
    return root / ASIDE / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.part"


def transfer(route: Route, files: Sequence[File], ledger: Ledger, *, tries: int, workers: int) -> dict[str, str]:
    """Fetch ``files``; why some could not be had, by path.

    Raises :class:`InputError` when the connection is gone, that is when as many files in a row as there are workers came to no end, and
    OSError when this machine's disk refuses. What is complete, and what has come of the others, stays for the next time.
    """
    if not files:
        return {}
    waiting, ended, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    for file in files:
        waiting.put(file)
    here = sum(path.stat().st_size for file in files if (path := aside_of(ledger.root, file)).is_file())
    with Bytes("fetch", sum(file.entry.bytes for file in files) - here) as progress:
        one = _Fetching(route, ledger, tries, stop, progress)
        threads = [threading.Thread(target=one.work, args=(waiting, ended), daemon=True) for _ in range(min(workers, len(files)))]
        for thread in threads:
            thread.start()
        faults, done, cut_in_a_row = {}, 0, 0
        try:
            for _ in files:
                file, error = ended.get()
                if error is not None and not isinstance(error, RouteError):
                    raise error
                cut_in_a_row = cut_in_a_row + 1 if isinstance(error, Cut) else 0
                done += error is None
                if error is not None:
                    faults[file.path] = str(error)
                if cut_in_a_row >= min(workers, len(files)):
                    raise InputError(f"{route.address}: {error}; {done} of {len(files)} files came and are kept, the same command goes on")
        finally:
            stop.set()
            for thread in threads:  # else they write beside who fetches next; for a connection that hangs nobody waits
                thread.join(LAST_S / len(threads))
    return faults


class _Fetching:
    """What the workers share."""

    def __init__(self, route: Route, ledger: Ledger, tries: int, stop: threading.Event, progress: Bytes) -> None:
        self.route, self.ledger, self.tries, self.stop, self.progress = route, ledger, tries, stop, progress

    def work(self, waiting: queue.SimpleQueue, ended: queue.SimpleQueue) -> None:
        """Until nothing waits: fetch, and say how it ended."""
        while not self.stop.is_set():
            try:
                file = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._fetch(file)
                ended.put((file, None))
            except BaseException as error:
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = str(self.ledger.root / file.path)
                ended.put((file, error))

    def _fetch(self, file: File) -> None:
        if file.entry.fault:
            raise RouteError(file.entry.fault)
        part, place = aside_of(self.ledger.root, file), self.ledger.root / file.path
        failed = reached = 0
        while True:
            try:
                self._bring(file, part)
                break
            except (Cut, Damaged) as error:
                size = part.stat().st_size
                failed, reached = (1, size) if size > reached and isinstance(error, Cut) else (failed + 1, reached)
                if failed > self.tries or self.stop.is_set():
                    raise
                if isinstance(error, Damaged):
                    self._forget(part)
                self.stop.wait(wait_s(failed))
            except Changed as error:
                self._forget(part)
                raise Changed(f"{error}; the same command fetches it as it is now") from None
        if fault := not_what_its_name_says(part, file.path):
            self._forget(part)
            raise RouteError(fault)
        digest = sha256(part)
        with open(part, "rb+") as handle:
            os.fsync(handle.fileno())
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)
        self.ledger.add(file, digest)

    def _bring(self, file: File, part: Path) -> None:
        """Go on with ``part`` until it is whole and right."""
        with open(part, "ab") as handle:
            size = handle.tell()
            if size < file.entry.bytes:
                for chunk in self.route.read(file.entry, size):
                    if self.stop.is_set():
                        raise Cut("stopped")
                    handle.write(chunk)
                    size += len(chunk)
                    self.progress.add(len(chunk))
                    if size > file.entry.bytes:
                        break
        if size < file.entry.bytes:
            raise Cut(f"the connection ended after {size} of {file.entry.bytes} bytes")
        if wrong := _wrong(part, file):
            raise Damaged(wrong)

    def _forget(self, part: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.progress.add(-part.stat().st_size)
            part.unlink()


def _wrong(path: Path, file: File) -> str | None:
    """How bytes differ from what the route says of them."""
    entry, size = file.entry, path.stat().st_size
    if size != entry.bytes:
        return f"{size} bytes came; {entry.bytes} are wanted"
    for name, wanted, of in (("SHA-256", entry.sha256, sha256), ("MD5", entry.md5, _md5)):
        if wanted and (came := of(path)) != wanted:
            return f"{name} {came} came; {wanted} is wanted"
    return None


def _md5(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def not_what_its_name_says(path: Path, name: str) -> str | None:
    """Why the bytes at ``path`` are no file of this name: git-annex's pointer, a page of HTML, or else; None if they may be one.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     file.write(b"/annex/objects/MD5E-s9--d41d8c.nii.gz") and file.flush()
    ...     not_what_its_name_says(Path(file.name), "sub-1_T1w.nii.gz")
    "git-annex's pointer instead of the file; a place that has the content is wanted"
    """
    with open(path, "rb") as handle:
        head = handle.read(512)
    if re.match(rb"(\.\./)*(\.git)?/?annex/objects/|(\.\./)*\.git/annex/objects/", head):
        return "git-annex's pointer instead of the file; a place that has the content is wanted"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a page of HTML or XML instead of the file, as servers send for errors and logins"
    if name.endswith((".gz", ".mgz")) and head[:2] != b"\x1f\x8b":
        return f"begins with {head[:4].hex() or 'nothing'}; gzip's 1f8b is wanted"
    if name.endswith(".nii") and head[:4] not in (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c"):
        return f"begins with {head[:4].hex() or 'nothing'}; a NIfTI header's size, 348 or 540, is wanted"
    return None
