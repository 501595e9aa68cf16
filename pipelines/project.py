"""Set up a project folder and run the pipeline in it: what ``make demo`` does.

``--demo``: build the synthetic sites of ``params.yaml`` in this checkout and run here. ``--data FOLDER``: make a project of its own
below ``runs/`` for a folder of BIDS databases, with its own ``params.yaml``, tables, DVC state and MLflow store, and run there: no
tracked file is edited and no other result touched. ``--no-run`` only sets up.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import yaml

from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.params import load_params
from pipelines.index import find_databases

CHECKOUT = Path(__file__).parents[1]
DEMO_ROOT = "data/demo"
CODE = ("data_registry", "pipelines", "lod_model", "dvc.yaml")
NOT_IN_GIT = ("cache", "data", "tables", "shards", "checkpoints", "reports", "quality", "mlflow", "runs", "logs", ".dvc/cache", ".dvc/tmp", *CODE)
"""What a project makes, much of which names or shows people, and its links, which lead to a folder of this machine."""


def main() -> None:
    """Set up, reproduce, and end with where the results and the report are."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.project", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--demo", action="store_true", help="synthetic sites, in this checkout")
    what.add_argument("--data", type=Path, help="a folder of BIDS databases, or one database")
    parser.add_argument("--to", type=Path, help="the project's folder (default: runs/<name of DATA>-<hash of its path>)")
    parser.add_argument("--no-run", action="store_true", help="set up only")
    arguments = parser.parse_args()
    folder = _demo_project() if arguments.demo else data_project(arguments.data, arguments.to)
    if arguments.no_run:
        print(f"project: {folder}")
        return
    print(f"running `dvc repro` in {folder}", flush=True)
    status = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder, env=stage_environment(), check=False).returncode
    if status:
        raise InputError(f"`dvc repro` in {folder} ended with status {status}; the reason stands above, finished work is kept")
    print(f"results: {folder / 'tables' / 'results.parquet'}")
    print(f"report: {folder / 'reports' / 'report.html'}")


def _demo_project() -> Path:
    from pipelines.demo import build_sites

    params = load_params(CHECKOUT / "params.yaml")
    if params.index.roots != (DEMO_ROOT,):  # a project of its own by now: synthetic heads have no place in it
        raise InputError(f"params.yaml: index.roots is {', '.join(params.index.roots)}; for the demo {DEMO_ROOT} is wanted (or run `dvc repro`)")
    build_sites(CHECKOUT / DEMO_ROOT, workers=params.resources.workers)
    return CHECKOUT


def data_project(data: Path, to: Path | None = None) -> Path:
    """A project folder for ``data``; one that stands keeps its settings. Raises :class:`InputError` if there is nothing to work on."""
    data = Path(os.path.abspath(data))
    find_databases([data])
    folder = (to or CHECKOUT / "runs" / f"{data.name}-{hashlib.sha256(str(data).encode()).hexdigest()[:6]}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in CODE:
        link = folder / name
        if not link.exists():
            link.unlink(missing_ok=True)  # of another machine, or of a checkout that has moved
            link.symlink_to(CHECKOUT / name)
    if not (folder / ".gitignore").exists():
        with replacing(folder / ".gitignore") as aside:
            aside.write_text("".join(f"/{name}\n" for name in NOT_IN_GIT) + "/.dvc/config.local\n.aside-*\n", encoding="utf-8")
    if not (folder / "params.yaml").is_file():
        settings = yaml.safe_load((CHECKOUT / "params.yaml").read_text(encoding="utf-8"))
        settings["index"]["roots"] = [str(data)]
        weights = settings.get("evaluate", {}).get("reference_weights", [])
        settings["evaluate"] = settings.get("evaluate", {}) | {"reference_weights": [str((CHECKOUT / path).resolve()) for path in weights]}
        with replacing(folder / "params.yaml") as aside:
            aside.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    if not (folder / ".dvc").is_dir():
        subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=folder, env=stage_environment(), check=True)
        for key in ("core.analytics", "core.check_update"):
            subprocess.run([sys.executable, "-m", "dvc", "config", key, "false"], cwd=folder, env=stage_environment(), check=True)
    return folder


def stage_environment() -> dict[str, str]:
    """This environment with this interpreter first on the PATH, since the stages call ``python``, and the checkout first among modules."""
    modules = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"DVC_NO_ANALYTICS": "1", "PYTHONPATH": modules, "PATH": commands}


if __name__ == "__main__":
    run_stage(main)
