"""A project of two small sites, harmonised on this machine alone: what every other way must end in, byte by byte."""

import os
import subprocess
import sys
from pathlib import Path

from small_heads import CHECKOUT, add_subject

from data_registry.files import sha256

PARAMS = "index:\n  roots: [{roots}]\nharmonise: {{grid: 8mm, shards_per_site: 4}}\nresources: {{task_gb: null}}\n"
SUBJECTS = 8
WAIT_S = 120


def build_reference(folder: Path) -> Path:
    """Databases and project below ``folder``."""
    for number, site in enumerate(("alpha", "beta")):
        for subject in range(SUBJECTS):
            add_subject(folder / "roots" / site, f"{subject:02d}", seed=10 * number + subject)
    project = folder / "project"
    project.mkdir()
    (project / "params.yaml").write_text(PARAMS.format(roots=folder / "roots"))
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    for stage in ("index", "harmonise"):
        subprocess.run([sys.executable, "-m", f"pipelines.{stage}"], cwd=project, env=environment, check=True, timeout=WAIT_S)
    return project


def hashes(project: Path) -> dict[str, str]:
    """Of all shards, whatever lies beside them, and their table."""
    files = [path for path in project.rglob("shards/**/*") if path.is_file()] + [project / "tables/samples.parquet"]
    return {str(path.relative_to(project)): sha256(path) for path in files}
