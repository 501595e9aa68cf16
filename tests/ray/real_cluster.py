"""A real Ray cluster on loopback: `ray start` for a head without CPUs and for two nodes, each with an address of its own in 127/8.

Some of Ray's servers listen on all interfaces: hence a token that nobody else knows. Every process that was started, and whatever they
started in turn, is a descendant of this one (orphans too: it is their subreaper), and is ended by its id.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAD, NODES = "127.0.0.2", ("127.0.0.3", "127.0.0.4")
NODE_MEMORY = 1_500_000_000  # bytes: one task of harmonise at a time, not two
START_S = 60
HEALTH_CHECKS = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4", "RAY_health_check_initial_delay_ms": "2000"}


class Cluster:
    """Head and nodes, from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        self.before = set(descendants())
        self.folder = tempfile.TemporaryDirectory(prefix="lr", dir="/tmp")  # short: Ray's sockets stand in it
        self.port, self.dashboard_port = free_port(), free_port()
        self.address, self.dashboard = f"{HEAD}:{self.port}", f"http://127.0.0.1:{self.dashboard_port}"
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is the one on the head's path
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | own | HEALTH_CHECKS | {"PATH": path}

    def start(self) -> None:
        """The head, then the nodes."""
        self.start_head()
        for node in NODES:
            self.start_node(node)

    def start_head(self, *options: str) -> None:
        """The head, which has no CPUs."""
        self._ray("--head", *options, f"--port={self.port}", f"--dashboard-port={self.dashboard_port}", "--dashboard-host=127.0.0.1", "--num-cpus=0",
                  f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder.name}",
                  address=HEAD)  # fmt: skip

    def start_node(self, address: str) -> None:
        """One more node: 2 CPUs."""
        self._ray(f"--address={self.address}", "--num-cpus=2", f"--dashboard-agent-listen-port={free_port()}", address=address)

    def kill_node(self, raylet: int, *, last: bool) -> str:
        """kill -9 of a raylet and of all below it, the raylet first or, as a scheduler may, last. Returns the node's address."""
        address = next(word for word in command(raylet) if word.startswith("--node_ip_address=")).partition("=")[2]
        children = descendants(raylet)
        workers = [pid for pid in children if command(pid)[:1] and command(pid)[0].startswith("ray::") and "Agent" not in command(pid)[0]]
        if last:
            kill(*workers)
            time.sleep(1)  # in which it tells of their deaths
        kill(raylet, *children)
        return address

    def stop(self) -> None:
        """End all that came of the cluster."""
        until = time.monotonic() + START_S
        while started := set(descendants()) - self.before:
            assert time.monotonic() < until, f"still there: {[command(pid) for pid in started]}"
            kill(*started)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.1)
        self.folder.cleanup()

    def _ray(self, *arguments: str, address: str) -> None:
        log = Path(self.folder.name, f"{address}-{time.monotonic_ns()}.log")
        sizes = ["--object-store-memory=80000000", f"--memory={NODE_MEMORY}"]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                ["ray", "start", "--block", f"--node-ip-address={address}", *sizes, *arguments],
                env=self.environment, cwd=self.folder.name, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + START_S
        while "block forever" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, f"`ray start` did not come up:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)


def kill(*pids: int) -> None:
    """kill -9, of those that have not gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(of: int | None = None) -> list[int]:
    """Ids of all processes below one, by default this one; parents first."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [of or os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def command(pid: int) -> list[str]:
    """The words of a process's command line; none if it has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def free_port() -> int:
    """A port that is free now, outside the range that Ray's workers take."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := probe.getsockname()[1]) > 20000:
                return port
