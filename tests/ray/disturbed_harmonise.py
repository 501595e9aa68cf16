"""The stage harmonise, with scans that take half a second and, as the test's environment says, one that kills its worker."""

import os
import time

from data_registry.errors import run_stage
from pipelines import harmonise

POISON, TRACE = os.environ.get("TEST_POISON"), os.environ.get("TEST_TRACE")
undisturbed = harmonise.harmonise_scan


def disturbed(scan, root, settings):
    start = time.time()
    if scan["scan_id"] == POISON:
        trace(scan, start)
        os._exit(1)
    time.sleep(0.5)
    result = undisturbed(scan, root, settings)
    trace(scan, start)
    return result


def trace(scan, start):
    """A line a scan: which, on which node (the worker's parent is its raylet), from when to when."""
    with open(TRACE, "a") as file:
        file.write(f"{scan['scan_id']} {os.getppid()} {start} {time.time()}\n")


if __name__ == "__main__":
    from ray import cloudpickle

    harmonise.harmonise_scan = disturbed
    cloudpickle.register_pickle_by_value(harmonise)  # the workers get this module as it is now
    run_stage(harmonise.main)
