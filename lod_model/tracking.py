"""The one door to MLflow: experiment = the question, parent = run, child = fold.

A run is found again by its unique tag, so a stage that is run twice, requeued or resumed goes on in the same MLflow run. While a server does
not answer, what is logged goes to a file of this job, and from there to the server once it is back; no training waits for it or dies of it.

    python -m lod_model.tracking sync --from mlflow/ --to http://127.0.0.1:5000
    python -m lod_model.tracking runs --in http://127.0.0.1:5000 --data-hash 9f86d081…
"""

import argparse
import atexit
import contextlib
import logging
import os
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from data_registry.errors import InputError, run_stage
from lod_model.machine_figures import sampled
from lod_model.tracking_store import PARENT_TAG, Figure, Store, StoreError, sqlite_file
from lod_model.tracking_sync import merge

log = logging.getLogger("lodbrain.tracking")
LOCAL_FOLDER = Path("mlflow")
OFFLINE = "LODBRAIN_MLFLOW_OFFLINE"
"""Environment variable; any value: write to this job's own file, whatever ``resources.mlflow_uri`` says."""
PAUSE_S = 5.0
"""Between two tries to reach a server that did not answer; twenty times as long as a try where that is longer."""
LAST_TRIES_S = 20.0
"""How long a process that ends waits for a server that is away."""


def main() -> None:
    """MLflow's runs: merge those of SQLite files into one store; find those of some data."""
    parser = argparse.ArgumentParser(prog="python -m lod_model.tracking", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="sync|runs", dest="command")
    sync_parser = commands.add_parser("sync", description=sync.__doc__, help="merge SQLite files, as offline jobs write them, into a store")
    sync_parser.add_argument(
        "--from", dest="sources", nargs="+", type=Path, default=[LOCAL_FOLDER], metavar="FILE-or-FOLDER", help="SQLite files, or folders of them"
    )
    sync_parser.add_argument("--to", required=True, metavar="URI", help="http://host:port, or sqlite:///mlflow/mlflow.db")
    runs_parser = commands.add_parser("runs", description=runs.__doc__, help="find the runs that were made of some data, and what deletes them")
    runs_parser.add_argument("--in", dest="uri", required=True, metavar="URI", help="http://host:port, or sqlite:///mlflow/mlflow.db")
    runs_parser.add_argument("--data-hash", nargs="+", required=True, help="as the tag data_hash, and the provenance of weights, have it")
    arguments = parser.parse_args()
    if arguments.command == "sync":
        sync(arguments.sources, arguments.to)
    else:
        runs(arguments.uri, arguments.data_hash)


def runs(uri: str, data_hashes: Iterable[str]) -> None:
    """A line on stdout for each run that was made of this data: where, how many files, and the commands that delete it for good."""
    if (file := sqlite_file(uri)) and not file.is_file():
        raise InputError(f"{file}: no such file; a file of MLflow runs is wanted")
    store = _opened(uri)
    uri, behind = (store.uri, store.uri) if store.file else (store.name, "URI of the database behind it")
    purge = f"mlflow gc --tracking-uri {shlex.quote(uri)} --backend-store-uri {shlex.quote(behind)} --run-ids"
    try:
        for data_hash in data_hashes:
            for experiment, run in store.tagged("data_hash", data_hash):
                number, there = len(store.uploaded(run.info.run_id)), run.info.run_id
                delete = f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow runs delete --run-id {there} && "
                gone = run.info.lifecycle_stage != "active"
                about = f"{experiment}/{run.info.run_name}{' (deleted, its files stand)' * gone}, {number} files"
                print(f"{about}: {delete * (not gone)}{purge} {there}", flush=True)
    except StoreError as error:
        raise InputError(f"{store.name}: {error}; a store that answers is wanted") from None


def sync(sources: Iterable[Path], uri: str) -> None:
    """Merge files, or all ``*.db`` below folders, into the store at ``uri``; a line each on stdout. InputError if it does not answer."""
    target = sqlite_file(uri)
    files = [file for source in sources for file in _files(source) if file.absolute() != target]
    for file in dict.fromkeys(files):
        try:
            source = Store(f"sqlite:///{file}")
            source.experiments()
        except StoreError as error:
            raise InputError(f"{file}: {error}; a file of MLflow runs is wanted") from None
        try:
            done = merge(source, Store(uri))
        except StoreError as error:
            raise InputError(f"{uri}: {error}; nothing is lost, run the same command again once it answers") from None
        news = ", ".join(f"{done[what]} {what}" for what in ("figures", "params", "tags", "files", "ends", "without key") if done[what])
        print(f"{file}: {done['runs']} runs, {done['new']} new; {news or 'nothing to send'}", flush=True)


class Tracker:
    """Runs of one experiment, each named by its unique key. ``uri`` None is SQLite in ``mlflow/`` of the current folder, a file a SLURM job."""

    def __init__(self, experiment: str, *, uri: str | None = None) -> None:
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._experiment, self._lock = experiment, threading.RLock()
        self._runs: dict[str, tuple[str, str | None, dict[str, str]]] = {}
        self._ids: dict[tuple[str, str], str] = {}
        self._begun: dict[str, int] = {}
        self._server: Store | None = None
        self._local: Store | None = None
        self._try_at: float | None = None  # a moment: the server is away until then at least
        if OFFLINE in os.environ or not uri and "SLURM_JOB_ID" in os.environ:
            self._local_uri = _uri(_job_file())
        elif not uri or sqlite_file(uri):
            self._local_uri = uri or _uri(LOCAL_FOLDER / "mlflow.db")
        else:
            self._server, self._local_uri = _opened(uri), _uri(_job_file())
            atexit.register(self.close)

    def run(self, key: str, *, name: str, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """The run with this unique key, made if there is none yet, as the other methods want it; ``parent`` is another one."""
        self._runs.setdefault(key, (name, parent, {"git": git_revision(), **_slurm_job(parent is not None), **(tags or {})}))
        self._write(key, lambda _store, _run: None)
        return key

    def params(self, run: str, values: Mapping[str, object]) -> None:
        """Settings of a run; those that stand already are left."""
        self._write(run, lambda store, there: store.add_params(there, values))

    def metrics(self, run: str, values: Mapping[str, float], *, step: int = 0) -> None:
        """Figures of a run at a step; NaN and None are left out."""
        now = _now()
        figures = [Figure(name, float(value), now, step) for name, value in values.items() if value is not None and value == value]
        self._write(run, lambda store, there: store.add(there, figures=figures))

    def record(self, run: str, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """The outcome of a run: what it was made under (a tag that stands is replaced), its figures, and that it has ended."""
        self._write(run, lambda store, there: store.add(there, tags=tags))
        self.metrics(run, metrics)
        self.finish(run)

    def artifacts(self, run: str, paths: Iterable[Path]) -> None:
        """Files of a run."""
        for path in paths:
            self._write(run, lambda store, there, path=path: store.upload(there, path))

    def finish(self, run: str, *, failed: bool = False) -> None:
        """Mark a run as ended."""
        now = _now()
        self._write(run, lambda store, there: store.set_status(there, "FAILED" if failed else "FINISHED", end=now))

    @contextlib.contextmanager
    def underway(self, run: str, *, machine: bool = False) -> Iterator[None]:
        """A run while it is made, again perhaps: running, failed if the block fails (not if it is asked to stop); ``machine``: with its figures."""
        self._write(run, lambda store, there: store.set_status(there, "RUNNING"))

        def keep(values: dict[str, float]) -> None:
            now = _now()
            figures = [Figure(name, value, now, (now - self._begun[run]) // 1000) for name, value in values.items()]  # step: seconds
            self._write(run, lambda store, there: store.add(there, figures=figures))

        try:
            with sampled(keep) if machine else contextlib.nullcontext():
                yield
        except SystemExit:  # it was asked to stop, and goes on later
            raise
        except BaseException:
            self.finish(run, failed=True)
            raise

    def close(self) -> None:
        """Send what was kept while the server was away; if it stays so, say how to send it later."""
        atexit.unregister(self.close)
        with self._lock:
            until = time.monotonic() + LAST_TRIES_S
            while self._try_at is not None:
                self._try_at = 0
                if self._is_back() or time.monotonic() > until:
                    break
                time.sleep(min(PAUSE_S, 1))
            if self._try_at is not None:
                sending = f"python -m lod_model.tracking sync --from {self._local.file} --to {self._server.uri}"
                log.warning("MLflow server %s: still away; send what is in %s later: %s", self._server.name, self._local.file, sending)

    def _write(self, run: str, write: Callable[[Store, str], None]) -> None:
        """To the server or, while it is away, to this job's file. Each write may be repeated: it leaves the same behind."""
        with self._lock:
            if self._server is not None and self._is_back():
                try:
                    return write(self._server, self._id(self._server, run))
                except StoreError as error:
                    self._keep_apart(error)
            if self._local is None:
                self._local = _opened(self._local_uri)
            try:
                write(self._local, self._id(self._local, run))
            except StoreError as error:
                raise InputError(f"{self._local.name}: {error}; a file for MLflow's runs is wanted") from None

    def _is_back(self) -> bool:
        """That the server answers, as far as is known; one that was away is first sent what was kept."""
        if self._try_at is None:
            return True
        if (begin := time.monotonic()) < self._try_at:
            return False
        try:
            if self._local is not None:
                merge(self._local, self._server)
        except StoreError:
            end = time.monotonic()
            self._try_at = end + max(PAUSE_S, 20 * (end - begin))
            return False
        self._try_at = None
        log.warning("MLflow server %s: back, and has what was kept", self._server.name)
        return True

    def _keep_apart(self, error: StoreError) -> None:
        self._ids = {(store, run): there for (store, run), there in self._ids.items() if store != self._server.uri}
        self._try_at = time.monotonic() + PAUSE_S
        file = sqlite_file(self._local_uri)
        log.warning("MLflow server %s: %s; what is logged goes to %s until it is back", self._server.name, error, file)

    def _id(self, store: Store, run: str) -> str:
        """MLflow's id of a run in a store; made there, with its parent, if there is none."""
        if (store.uri, run) not in self._ids:
            name, parent, tags = self._runs[run]
            if parent:
                tags = {**tags, PARENT_TAG: self._id(store, parent)}
            found = store.find(self._experiment, run)
            if found is None or found.info.lifecycle_stage != "active":
                found = store.make(self._experiment, run, name=name, tags=tags)
            self._ids[store.uri, run] = found.info.run_id
            self._begun[run] = min(found.info.start_time, self._begun.get(run, found.info.start_time))
        return self._ids[store.uri, run]


def git_revision() -> str:
    """The checkout's commit, marked if tracked files differ from it; that of an image, which has none, is ``LODBRAIN_REVISION``; or ``unknown``."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LODBRAIN_REVISION", "unknown")
    return answer.stdout.strip()


def _slurm_job(is_child: bool) -> dict[str, str]:
    """The tag that names the SLURM job as ``sacct`` does: a parent's its array, which its children share, a child's its own."""
    job, array, task = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    if array is None:
        return {"slurm_job": job} if job else {}
    return {"slurm_job": f"{array}_{task}" if is_child else array}


def _job_file() -> Path:
    """Of this job alone: of SLURM's, the same after a requeue, else of this process."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    name = f"{socket.gethostname()}-{os.getpid()}" if job is None else f"slurm-{job}" if step is None else f"slurm-{job}.{step}"
    return LOCAL_FOLDER / "jobs" / f"{name}.db"


def _opened(uri: str) -> Store:
    try:
        return Store(uri)
    except StoreError as error:
        raise InputError(f"{uri}: {error}; the URI of an MLflow server is wanted, or null (resources.mlflow_uri)") from None


def _uri(path: Path) -> str:
    return f"sqlite:///{path.absolute()}"


def _now() -> int:
    return time.time_ns() // 1_000_000


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if found := sorted(source.rglob("*.db")):
        return found
    raise InputError(f"{source}: no such file, or a folder without one; SQLite files of MLflow runs (*.db) are wanted")


if __name__ == "__main__":
    run_stage(main)
