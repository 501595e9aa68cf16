"""Where a database's files come from: a bucket that is read anonymously, an HTTP address with a manifest, or a folder; all list and read alike.

HTTP has no listing, so a manifest stands in for it: a TSV with columns path, bytes (or size) and sha256 or md5, paths relative to its own
place. A folder's ``fetched.tsv`` is one.
"""

import csv
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_registry.errors import InputError
from pipelines.fetch_routes import Changed, Cut, Entry, Route, RouteError, safe

CHUNK_BYTES = 4 * 2**20
"""What a file on its way holds in memory, and a request to a bucket."""
MANIFEST = "manifest.tsv"
_UNREADABLE = "s3://bucket/prefix, https://host/folder with a manifest.tsv, or a folder is wanted"


def open_route(address: str, *, endpoint_url: str | None = None, timeout_s: float = 30, connections: int = 8) -> Route:
    """The route at an address; an :class:`InputError` says what is wrong with it.

    >>> open_route("/data/abide1/", timeout_s=1)
    Traceback (most recent call last):
    data_registry.errors.InputError: /data/abide1: no such folder; s3://bucket/prefix, https://host/folder with a manifest.tsv, or a folder is wanted
    """
    scheme = urllib.parse.urlsplit(address).scheme if "://" in address else ""
    if scheme == "s3" and urllib.parse.urlsplit(address).netloc:
        return BucketRoute(address.rstrip("/"), endpoint_url, timeout_s, connections)
    if scheme in ("http", "https"):
        return HttpRoute(address, timeout_s)
    if scheme not in ("", "file"):
        raise InputError(f"{address}: {scheme}:// is no route; {_UNREADABLE}")
    folder = Path(urllib.parse.unquote(urllib.parse.urlsplit(address).path) if scheme else address)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {_UNREADABLE}")
    return FolderRoute(folder)


class FolderRoute:
    """A folder of this machine or of a shared file system."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, os.path.abspath(folder)

    def ls(self, folder: str) -> list[Entry]:
        """See :class:`Route`; a link to what is not there, as git-annex leaves it, has a fault."""
        try:
            with os.scandir(self.folder / folder) as there:
                return sorted((self._entry(one, folder) for one in there), key=lambda entry: entry.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RouteError(f"{self.folder / folder}: {error.strerror}") from None

    def _entry(self, one: os.DirEntry, folder: str) -> Entry:
        path = f"{folder}/{one.name}".removeprefix("/")
        if one.is_dir():
            return Entry(path, is_folder=True)
        try:
            status = one.stat()
        except OSError:
            annex = one.is_symlink() and ".git/annex/objects" in os.readlink(one.path)
            return Entry(path, fault="a git-annex link without its content; `datalad get` there is wanted" if annex else "a link to nothing")
        return Entry(path, status.st_size, str(status.st_mtime_ns))

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """See :class:`Route`."""
        try:
            with open(self.folder / entry.path, "rb") as handle:
                status = os.fstat(handle.fileno())
                if (status.st_size, str(status.st_mtime_ns)) != (entry.bytes, entry.version):
                    raise Changed("it has changed since it was listed")
                handle.seek(start)
                while chunk := handle.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise RouteError(f"cannot be read ({error.strerror})") from None


class HttpRoute:
    """Files over HTTP, as a manifest lists them. A server without ranges sends what was here already once more."""

    def __init__(self, address: str, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(address)
        if parts.username or parts.password:
            raise InputError(f"{parts.scheme}://{parts.hostname}: a user or password stands in the address; an address without is wanted")
        manifest = address if parts.path.endswith(".tsv") else f"{address.rstrip('/')}/{MANIFEST}"
        self.base, self.timeout_s, self.address = manifest.rsplit("/", 1)[0], timeout_s, address
        try:
            with self._opened(manifest) as response:
                text = response.read().decode("utf-8-sig")
        except (RouteError, UnicodeDecodeError, OSError, http.client.HTTPException) as error:
            why = "HTTP has no listing, so a TSV with columns path, bytes and sha256 or md5 is wanted there; or a folder with what was downloaded"
            raise InputError(f"{manifest}: {error}; {why}") from None
        self.folders = defaultdict(dict)
        for entry in _manifest(manifest, text):
            while True:
                folder, _, name = entry.path.rpartition("/")
                self.folders[folder][name] = entry
                if not folder:
                    break
                entry = Entry(folder, is_folder=True)

    def ls(self, folder: str) -> list[Entry]:
        """See :class:`Route`."""
        return list(self.folders.get(folder, {}).values())

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """See :class:`Route`."""
        try:
            with self._opened(f"{self.base}/{urllib.parse.quote(entry.path)}", start) as response:
                partial = response.status == 206
                length = (response.headers.get("Content-Range" if partial else "Content-Length") or "").rpartition("/")[2]
                if length.isdigit() and int(length) != entry.bytes:
                    page = response.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))
                    raise RouteError(f"{length} bytes are offered{', an HTML page' * page}; {entry.bytes} are wanted")
                passed = 0 if partial else start
                while passed and (chunk := response.read(min(CHUNK_BYTES, passed))):
                    passed -= len(chunk)
                while chunk := response.read1(CHUNK_BYTES):
                    yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise Cut(_reason(error)) from None

    def _opened(self, url: str, start: int = 0) -> http.client.HTTPResponse:
        headers = {"User-Agent": "lodbrain"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                raise Changed("it is shorter now than the manifest says") from None
            again = error.code in (408, 429) or error.code >= 500
            raise (Cut if again else RouteError)(f"the server answers {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Cut(_reason(error)) from None


def _manifest(where: str, text: str) -> Iterator[Entry]:
    """Its rows; of two of one path the later counts. A row that cannot be used refuses the whole."""
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = rows.fieldnames or []
    size = "bytes" if "bytes" in columns else "size"
    if "path" not in columns or size not in columns or not {"sha256", "md5"} & set(columns):
        raise InputError(f"{where}: columns {', '.join(columns)[:200] or 'none'}; path, bytes and sha256 or md5, with tabs between, are wanted")
    for row in rows:
        path, sha256, md5 = row["path"] or "", (row.get("sha256") or "").lower(), (row.get("md5") or "").lower()
        if not safe(path):
            raise InputError(f"{where}, line {rows.line_num}: path {path!r} leads out of its folder or is no plain one; as sub-01/anat/… is wanted")
        if not re.fullmatch(r"\d+", row[size] or "") or not (re.fullmatch(r"[0-9a-f]{64}", sha256) or re.fullmatch(r"[0-9a-f]{32}", md5)):
            raise InputError(f"{where}, line {rows.line_num}: {path}: a whole number of bytes and a checksum in hexadecimal are wanted")
        yield Entry(path, int(row[size]), sha256 or md5, md5 or None, sha256 or None)


class BucketRoute:
    """A prefix of a bucket that anyone may read."""

    def __init__(self, address: str, endpoint_url: str | None, timeout_s: float, connections: int) -> None:
        try:
            import fsspec

            self.files = fsspec.filesystem(
                "s3", anon=True, endpoint_url=endpoint_url, skip_instance_cache=True, version_aware=False,
                config_kwargs={
                    "connect_timeout": timeout_s, "read_timeout": timeout_s, "max_pool_connections": 2 * connections,
                    "retries": {"total_max_attempts": 1},
                },
            )  # fmt: skip
        except ImportError:
            raise InputError(f"{address}: s3fs is not installed; `pip install -e '.[s3]'` is wanted") from None
        self.files.retries = 1  # tries are counted, and waited for, in one place: the transfer
        self.address, self.root = address, address.removeprefix("s3://")

    def ls(self, folder: str) -> list[Entry]:
        """See :class:`Route`."""
        try:
            there = self.files.ls(f"{self.root}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _bucket_error(error) from None
        entries = []
        for one in there:
            path = str(PurePosixPath(folder, one["name"].rstrip("/").rsplit("/", 1)[-1]))
            if one["name"].strip("/") == f"{self.root}/{folder}".strip("/"):
                continue  # the folder's own marker
            etag = one.get("ETag", "").strip('"')
            plain = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else None  # of an upload in parts it has a dash, and is no MD5 of the bytes
            entries.append(Entry(path, one.get("size") or 0, etag, plain, is_folder=one["type"] == "directory"))
        return entries

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """See :class:`Route`; each request names the ETag that was listed."""
        try:
            with self.files.open(f"{self.root}/{entry.path}", "rb", block_size=CHUNK_BYTES, cache_type="none") as handle:
                if handle.details.get("ETag", "").strip('"') != entry.version:
                    raise Changed("it has changed since it was listed")
                handle.seek(start)
                while chunk := handle.read(CHUNK_BYTES):
                    yield chunk
        except RouteError:
            raise
        except Exception as error:
            raise _bucket_error(error) from None


def _bucket_error(error: Exception) -> RouteError:
    """Each layer below has its own errors; only what is known to be final is final."""
    if type(error).__name__ == "FileExpired":
        return Changed("it has changed since it was listed")
    if isinstance(error, FileNotFoundError):
        return RouteError("it is not there, or its bucket is not")
    if isinstance(error, PermissionError):
        return RouteError("access is denied without credentials")
    return Cut(_reason(error))


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", None) or error).split())[:200] or type(error).__name__
