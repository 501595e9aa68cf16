"""Outputs that exist only when complete: written aside, flushed to disk, renamed."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``, with the same suffixes; renamed onto ``path`` when the block ends without an error.

    The rename gives ``path`` a new inode, so a file that DVC's cache is linked to is never written through.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "new" / "a.txt"
    >>> with replacing(target) as aside:
    ...     _ = aside.write_text("done")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('done', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.name[path.name.find(".") :] if "." in path.name else ""
    descriptor, name = tempfile.mkstemp(prefix=".aside-", suffix=suffix, dir=path.parent)
    os.close(descriptor)
    aside = Path(name)
    try:
        yield aside
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        aside.chmod(0o666 & ~_umask())
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # of a full disk
            error.filename = str(path)
        raise


def sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
