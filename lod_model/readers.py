"""The processes that read samples beside a training: what goes wrong in one of them is one line, as it would be without them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from data_registry.errors import InputError

_ENDED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal|exited unexpectedly)")


@contextmanager
def in_one_line() -> Iterator[None]:
    """Within the block, an InputError of a reader is that error, without the reader's traceback; the death of a reader is an InputError.

    PyTorch hands on a reader's error as one of the same kind whose message is a traceback; of a reader's death it tells by a
    RuntimeError wherever the training happens to be.
    """
    try:
        yield
    except InputError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:
            raise
        raise InputError(lines[-1].partition(": ")[2]) from None  # as in any traceback: kind, then message
    except RuntimeError as error:
        if not (ended := _ENDED.search(str(error))):
            raise
        raise InputError(
            f"a process that reads samples ({ended[1]}) has died, perhaps for want of memory; what is complete is kept, the same command "
            "goes on; more memory or fewer resources.loader_workers are wanted"
        ) from None
