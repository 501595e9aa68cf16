"""The stage harmonise, with scans that take half a second and, as the test's environment says, one that kills its worker."""

import os
import time

from data_registry.errors import run_stage
from pipelines import harmonise, parallel

POISON, TRACE = os.environ.get("TEST_POISON"), os.environ.get("TEST_TRACE")
undisturbed = harmonise.harmonise_scan


def disturbed(scan, root, settings):
    trace("begin", scan)
    if scan["scan_id"] == POISON:
        os._exit(1)
    time.sleep(0.5)
    result = undisturbed(scan, root, settings)
    trace("end", scan)
    return result


def trace(what, scan):
    """A line: what, of which scan, on which node (the worker's parent is its raylet)."""
    with open(TRACE, "a") as file:
        file.write(f"{what} {scan['scan_id']} {os.getppid()}\n")


if __name__ == "__main__":
    from ray import cloudpickle

    parallel.GRACE_S = 8  # the test's cluster notices dead nodes sooner
    harmonise.harmonise_scan = disturbed
    cloudpickle.register_pickle_by_value(harmonise)  # the workers get this module as it is now
    run_stage(harmonise.main)
