"""A run, ``<network>-<experiment>-<seed>``, and its folds: where their weights stand, and the fingerprint by which a finished fold is known."""

import json
from pathlib import Path

from data_registry import protocol
from data_registry.params import Params, fingerprint
from data_registry.schema import table_metadata
from data_registry.split import data_hash

TABLES = Path("tables")
CHECKPOINTS = Path("checkpoints")
RECIPE_VERSION = 3
"""Part of every fold's fingerprint; raise it when a change of code changes what a training gives."""


def fold_folder(run: str, fold: int) -> Path:
    """Where a fold's weights stand, below the current folder."""
    return CHECKPOINTS / run / f"fold-{fold}"


def training_identity(network: str, params: Params) -> str:
    """Fingerprint of all that a run's weights depend on; read from the settings and the tables below the current folder."""
    versions = [protocol.load(name).version for name in params.train.protocols]
    versions = versions[0] if isinstance(params.train.protocol, str) else versions
    return fingerprint(RECIPE_VERSION, network, params.train, versions, params.harmonise.grid, tracking_tags())


def tracking_tags() -> dict[str, str]:
    """Hashes of the split and of the data, as MLflow's runs carry them."""
    return {"split_hash": table_metadata(TABLES / "split.parquet")["split_hash"], "data_hash": data_hash(TABLES)}


def run_key(run: str, identity: str, fold: int | None = None) -> str:
    """The unique tag in MLflow of a run, or of one of its folds."""
    return f"{run}/{identity[:16]}" + ("" if fold is None else f"/{fold}")


def finished(run: str, fold: int) -> str | None:
    """The fingerprint of a finished fold."""
    path = fold_folder(run, fold) / "fold.json"
    return json.loads(path.read_text(encoding="utf-8"))["fingerprint"] if path.is_file() else None
