"""Off a terminal, the state of a stage is a line of the log every so often, and one at the end."""

import logging
import time

from pipelines import progress


def test_lines_come_while_nothing_finishes(monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO), progress.Scans("harmonise", 4) as scans:
        while len(caplog.messages) < 2:
            time.sleep(0.01)
        scans.done, scans.quarantined = 4, 1
    assert caplog.messages[0] == "harmonise 0/4 scans, 0.0 scans/s, time left unknown, 0 quarantined, 0 retries"
    assert caplog.messages[-1].startswith("harmonise 4/4 scans, ") and caplog.messages[-1].endswith(", 0:00:00 left, 1 quarantined, 0 retries")
