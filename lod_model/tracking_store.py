"""One MLflow store, a server or an SQLite file: runs are found by their unique tag, and writing a thing twice leaves it there once.

The only module that imports mlflow. Times are milliseconds since 1970, as MLflow keeps them.
"""

import contextlib
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

KEY_TAG = "lodbrain.key"
PARENT_TAG = "mlflow.parentRunId"
EMPTY: Mapping[str, str] = MappingProxyType({})
SETTLE_S = 1.0
"""Two jobs that make the same parent at once see each other's after this long, and keep the same one."""


class StoreError(Exception):
    """The store did not answer, or refused; the message is the reason, in a line."""


class Figure(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    timestamp: int
    step: int


def _in_a_line(method: Callable) -> Callable:
    """What goes wrong between this machine and a store becomes a :class:`StoreError`."""

    @functools.wraps(method)
    def inner(*arguments, **settings):
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return method(*arguments, **settings)
        except (MlflowException, RequestException, SQLAlchemyError) as error:
            raise StoreError(_reason(str(error))) from error

    return inner


class Store:
    """The store at ``uri``. An SQLite file is made if there is none, its artifacts lie in a folder beside it."""

    @_in_a_line
    def __init__(self, uri: str) -> None:
        # What a server does not answer at once is kept and sent later: MLflow's own seven tries would hold a training up for minutes.
        for name, value in (("DISABLE_TELEMETRY", "true"), ("HTTP_REQUEST_MAX_RETRIES", "1"), ("HTTP_REQUEST_TIMEOUT", "10")):
            os.environ.setdefault(f"MLFLOW_{name}", value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # else a line for each table of a new file
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self.file = sqlite_file(uri)
        self.uri = f"sqlite:///{self.file}" if self.file else uri  # of an absolute path: MLflow keeps what it has opened by its URI
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=self.uri)
        self._experiments: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The store as messages show it, without a password."""
        if self.file:
            return str(self.file)
        parts = urlsplit(self.uri)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @_in_a_line
    def experiments(self) -> list[str]:
        """Names of the experiments that hold runs or may."""
        return [found.name for found in self._client.search_experiments()]

    @_in_a_line
    def runs(self, experiment: str) -> Iterator:
        """All runs that are not deleted, oldest first, parents before children."""
        found, token = [], None
        while token is None or token:
            page = self._client.search_runs([self._experiment(experiment)], max_results=1000, page_token=token)
            found, token = found + page, page.token or ""
        return iter(sorted(found, key=lambda run: (PARENT_TAG in run.data.tags, run.info.start_time)))

    @_in_a_line
    def find(self, experiment: str, key: str):
        """The run with this unique tag: the first made of several, a deleted one only where there is no other; None if there is none."""
        from mlflow.entities import ViewType

        found = self._client.search_runs([self._experiment(experiment)], f"tags.`{KEY_TAG}` = '{key}'", ViewType.ALL)
        return min(found, key=lambda run: (run.info.lifecycle_stage != "active", run.info.start_time, run.info.run_id), default=None)

    @_in_a_line
    def tagged(self, name: str, value: str) -> list[tuple[str, object]]:
        """(experiment, run) of all with this tag; deleted ones too, whose files are there until `mlflow gc`."""
        from mlflow.entities import ViewType

        found = []
        for experiment in self._client.search_experiments(view_type=ViewType.ALL):
            token = None
            while token is None or token:
                asked = [experiment.experiment_id], f"tags.`{name}` = '{value}'", ViewType.ALL
                page = self._client.search_runs(*asked, max_results=1000, page_token=token)
                found, token = found + [(experiment.name, run) for run in page], page.token or ""
        return found

    @_in_a_line
    def make(self, experiment: str, key: str, *, name: str, tags: Mapping[str, str], start: int | None = None):
        """A new run, or the one that another job has made meanwhile. ``tags`` of a child name its parent in this store."""
        made = self._client.create_run(self._experiment(experiment), start, {**tags, KEY_TAG: key}, name)
        if self.file is None:
            time.sleep(0 if PARENT_TAG in tags else SETTLE_S)
            kept = self.find(experiment, key)
            if kept.info.run_id != made.info.run_id:
                self._client.delete_run(made.info.run_id)
                return kept
        return made

    @_in_a_line
    def add(self, run: str, *, params: Mapping[str, str] = EMPTY, tags: Mapping[str, str] = EMPTY, figures: Iterable[Figure] = ()) -> None:
        """Settings, tags (one that stands is replaced) and figures, in as many requests as MLflow's limits ask for."""
        from mlflow.entities import Metric, Param, RunTag

        for some in _batches([Param(name, str(value)) for name, value in params.items()], 100):
            self._client.log_batch(run, params=some)
        for some in _batches([RunTag(name, str(value)) for name, value in tags.items()], 100):
            self._client.log_batch(run, tags=some)
        for some in _batches([Metric(*figure) for figure in figures], 1000):
            self._client.log_batch(run, metrics=some)

    @_in_a_line
    def add_params(self, run: str, values: Mapping[str, object]) -> None:
        """Settings; MLflow refuses to change one, so those that stand already are left."""
        known = self._client.get_run(run).data.params
        self.add(run, params={name: str(value) for name, value in values.items() if name not in known})

    @_in_a_line
    def history(self, run: str, name: str) -> list[Figure]:
        """All values of a metric."""
        return [Figure(name, metric.value, metric.timestamp, metric.step) for metric in self._client.get_metric_history(run, name)]

    @_in_a_line
    def set_status(self, run: str, status: str, *, end: int | None = None) -> None:
        """RUNNING, FINISHED, FAILED or KILLED; all but the first have an end, by default now."""
        if status == "RUNNING":
            self._client.update_run(run, status)
        else:
            self._client.set_terminated(run, status, end)

    @_in_a_line
    def upload(self, run: str, path: Path, *, folder: str = "") -> None:
        """A file of a run, into a folder of its artifacts."""
        self._client.log_artifact(run, str(path), folder or None)

    @_in_a_line
    def uploaded(self, run: str, folder: str = "") -> set[str]:
        """Paths of a run's files, below its artifacts."""
        found = set()
        for entry in self._client.list_artifacts(run, folder or None):
            found |= self.uploaded(run, entry.path) if entry.is_dir else {entry.path}
        return found

    def local_files(self, run) -> dict[str, Path]:
        """The same of a run in an SQLite file, with where they lie; also after file and artifacts were moved to another place together."""
        assert self.file is not None
        named = Path(urlsplit(run.info.artifact_uri).path)
        root = named if named.is_dir() else self.file.parent / "artifacts" / run.info.run_id / "artifacts"
        return {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}

    def _experiment(self, name: str) -> str:
        """Its id; made if there is none."""
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name) or self._made(name)
            if found.lifecycle_stage != "active":
                raise StoreError(f"its experiment {name} is deleted; restore it, or give this one another name")
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _made(self, name: str):
        from mlflow.exceptions import MlflowException

        beside = (self.file.parent / "artifacts").as_uri() if self.file else None
        with contextlib.suppress(MlflowException):  # another job has made it meanwhile; whatever else is wrong, the next line says too
            self._client.create_experiment(name, artifact_location=beside)
        return self._client.get_experiment_by_name(name)


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI, None for all others.

    >>> sqlite_file("sqlite:////lab/mlflow/jobs/slurm-7.db"), sqlite_file("http://lab:5000")
    (PosixPath('/lab/mlflow/jobs/slurm-7.db'), None)
    """
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _batches(things: list, size: int) -> Iterator[list]:
    for start in range(0, len(things), size):
        yield things[start : start + size]


def _reason(message: str) -> str:
    """Why, in a few words, out of the pages that a library writes.

    >>> _reason("API request to http://x failed with exception … (Caused by New('Failed: [Errno 111] Connection refused'))")
    'Connection refused'
    """
    if found := re.search(r"\[Errno -?\d+\] ([^'\")]+)", message):
        return found[1]
    if "timed out" in message or "timeout" in message:
        return "timed out"
    return " ".join(message.split())[:200]
