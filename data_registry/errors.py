"""The one error a user meets: a line that names the file or site, the field, what came and what was wanted."""

import argparse
import logging
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """The user's input cannot be used; the message is one complete line."""


def run_stage(main: Callable[[], None], *, about: str | None = None) -> None:
    """Run a command's ``main``; an :class:`InputError` or an error of the file system becomes one line on stderr and exit status 2.

    ``about``: of a command without arguments what ``--help`` says; whatever else stands behind it is refused and not passed over.
    """
    if about is not None:
        module = sys.modules["__main__"].__spec__  # None of a file that is run by its path
        name = f"python -m {module.name}" if module else None
        argparse.ArgumentParser(prog=name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("lodbrain").setLevel(logging.INFO)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written there would fail again
        print("error: stopped, as who read the output is gone; what is complete is kept, run the same command again to go on", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; a place that can be read and written is wanted", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what is complete is kept, run the same command again to go on", file=sys.stderr)
        sys.exit(130)
