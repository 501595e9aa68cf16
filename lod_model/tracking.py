"""The one door to MLflow: experiment = the question, parent = run, child = fold.

A run is found again by its unique tag, so a stage that is run twice, requeued or resumed goes on in the same MLflow run.
"""

import logging
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

KEY_TAG = "lodbrain.key"
LOCAL_FOLDER = Path("mlflow")


class Tracker:
    """Runs of one experiment. ``uri`` None is SQLite in ``mlflow/`` of the current folder."""

    def __init__(self, experiment: str, *, uri: str | None = None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # else a line for each table of a new store
        artifacts = None
        if uri is None and not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
            LOCAL_FOLDER.mkdir(exist_ok=True)
            uri = f"sqlite:///{(LOCAL_FOLDER / 'mlflow.db').resolve()}"
            artifacts = (LOCAL_FOLDER / "artifacts").resolve().as_uri()
        self.uri = uri
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = found.experiment_id if found else self._client.create_experiment(experiment, artifact_location=artifacts)

    def run(self, key: str, *, name: str, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """The id of the run with this unique key; made if there is none yet."""
        runs = self._client.search_runs([self._experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        if runs:
            return runs[0].info.run_id
        tags = {KEY_TAG: key, "git": git_revision(), **(tags or {})}
        if parent:
            tags["mlflow.parentRunId"] = parent
        if job := os.environ.get("SLURM_JOB_ID"):
            tags["slurm_job"] = job
        return self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id

    def params(self, run: str, values: Mapping[str, object]) -> None:
        """Settings of a run; MLflow refuses to change one, so those that stand already are left."""
        from mlflow.entities import Param

        known = self._client.get_run(run).data.params
        self._client.log_batch(run, params=[Param(k, str(v)) for k, v in values.items() if k not in known])

    def metrics(self, run: str, values: Mapping[str, float], *, step: int = 0) -> None:
        """Figures of a run at a step; NaN and None are left out."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(run, metrics=[Metric(k, float(v), now, step) for k, v in values.items() if v is not None and v == v])

    def record(self, run: str, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """The outcome of a run: what it was made under (a tag that stands is replaced), its figures, and that it has ended."""
        from mlflow.entities import RunTag

        self._client.log_batch(run, tags=[RunTag(k, str(v)) for k, v in tags.items()])
        self.metrics(run, metrics)
        self.finish(run)

    def artifacts(self, run: str, paths: Iterable[Path]) -> None:
        """Files of a run."""
        for path in paths:
            self._client.log_artifact(run, str(path))

    def finish(self, run: str, *, failed: bool = False) -> None:
        """Mark a run as ended."""
        self._client.set_terminated(run, "FAILED" if failed else "FINISHED")


def git_revision() -> str:
    """The checkout's commit, marked if tracked files differ from it; ``unknown`` outside git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
