"""What of a withdrawn person or database is left where no command of this project reaches, each with what purges it.

Nothing here changes anything. Weights are recognised by what they record: a fold's ``seen.tsv`` names its scans; other files name only
databases, so they *may* have seen a person. Places that cannot be looked into are named all the same.
"""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_registry.errors import InputError
from data_registry.ledgers import Withdrawn, read_rows
from data_registry.params import Params
from data_registry.schema import read_table
from pipelines.fetch_joined import as_named_in
from pipelines.fetch_people import cells_of
from pipelines.fetch_transfer import ASIDE, LEDGER
from pipelines.index import find_databases, labels_folder
from pipelines.people import PEOPLE_TABLE
from pipelines.split import SPLIT_TABLE
from pipelines.withdraw_dvc import in_dvc

PASSED_OVER = {".git", ".dvc", ".venv", "shards", "cache", "mlflow", "__pycache__"}
WEIGHTS = (".pt", ".ckpt", ".safetensors", ".onnx")
TRACKING_S = 300


@dataclass(frozen=True)
class Gone:
    """What is withdrawn, and where the project had it before."""

    database: str
    subjects: tuple[str, ...]
    reason: str
    these: Withdrawn
    scans: tuple[dict, ...]
    """Their rows of the scans table."""
    others: tuple[dict, ...]
    """The rows of those who stay."""
    shards: tuple[str, ...]
    shard_hashes: frozenset[str]
    data_hash: str | None
    """Of the samples that had them, as runs are tagged with it."""
    same_people: tuple[str, ...] = ()
    """As :func:`same_people` found them before anything was removed."""


def left_elsewhere(gone: Gone, params: Params) -> Iterator[str]:
    """Headings and lines, for a person to read and to act on."""
    (weights, hashes), dvc = _weights(gone), list(in_dvc(gone.database, gone.these))
    sections = {
        "The same person in another database, or under another name, not withdrawn by this": list(gone.same_people),
        "Raw files, and labels made of them; index passes over both": _raw_files(gone, params),
        "Weights that saw them; delete these first, with every copy that was given on: `dvc repro` then trains anew without": weights,
        "Runs in MLflow, whose reports hold pictures and scores": _mlflow(params, hashes | {gone.data_hash} - {None}),
        "DVC's cache and remotes, once `dvc repro` has noted what is left; `dvc checkout` of an old dvc.lock brings them back": dvc,
        "The object store of shards, and other machines' copies of them": list(_object_store(gone, params)),
        "Other projects below this one": _projects(gone),
        "Out of sight of this command": list(_out_of_sight(gone)),
    }
    for heading, lines in sections.items():
        if lines:
            yield f"\n{heading}:"
            yield from (f"  {line}" for line in lines)


def _again(gone: Gone, database: str | None = None, subjects: tuple[str, ...] | None = None) -> str:
    """The command that does the same elsewhere."""
    subjects = gone.subjects if subjects is None else subjects
    return shlex.join(["python", "-m", "pipelines.withdraw", database or gone.database, *(["--subject", *subjects] if subjects else []),
                       "--reason", gone.reason])  # fmt: skip


def same_people(gone: Gone) -> tuple[str, ...]:
    """Others who are, or may be, the same: by the tables of scans and of the split, by the bytes of a file, by suspicion. Reads what goes later."""
    scan_ids, digests = {row["scan_id"] for row in gone.scans}, {row["t1w_sha256"] for row in gone.scans} - {None}
    people = {row["person"] for row in gone.scans} | {f"{gone.database}/{subject}" for subject in gone.subjects}
    held = read_table(SPLIT_TABLE, "split").select(["scan_id", "person"]).to_pylist() if SPLIT_TABLE.is_file() else []
    people |= {row["person"] for row in held if row["scan_id"] in scan_ids}
    named = {row["scan_id"]: row["person"] for row in held}
    found: dict[tuple[str, str], list[str]] = {}
    for row in gone.others:
        if {row["person"], named.get(row["scan_id"])} & people or row["t1w_sha256"] in digests:
            found.setdefault((row["database"], row["subject"]), []).append(row["scan_id"])
    lines = [f"{', '.join(scans)}: {_again(gone, database, (subject,))}" for (database, subject), scans in sorted(found.items())]
    for row in read_rows(PEOPLE_TABLE, ("verdict", "likeness", "scan_a", "scan_b")):
        pair = {row["scan_a"], row["scan_b"]}
        if row["verdict"] == "review" and len(pair & scan_ids) == 1:
            lines.append(f"{min(pair - scan_ids)} may be: a likeness of {row['likeness']} to {min(pair & scan_ids)}, which nobody has looked at")
    return tuple(lines)


def _raw_files(gone: Gone, params: Params) -> list[str]:
    lines, folders = [], []
    for root in params.index.roots:
        try:
            folders += filter(None, [find_databases([Path(root)]).get(gone.database)])
        except InputError as error:
            lines.append(f"cannot be looked into: {error}")
    labels = labels_folder(params.index)
    fetched = Path("data", gone.database)  # as fetch puts it, index reading it or not
    folders += [fetched] if fetched.is_dir() and fetched.resolve() not in [folder.resolve() for folder in folders] else []
    folders += [labels / gone.database] if labels and (labels / gone.database).is_dir() else []
    if not gone.subjects:
        return lines + [line for folder in folders for line in _removal(folder)]
    names = [f"sub-{subject}{rest}" for subject in gone.subjects for rest in ("", "_*")]
    for folder in folders:
        there = sorted({path for name in names for below in ("", "*/", "*/*/") for path in folder.glob(below + name)})
        lines += [line for path in there if not any(other in path.parents for other in there) for line in _removal(path)]
        if (folder / ASIDE).is_dir():
            lines.append(f"rm -r {shlex.quote(str(folder / ASIDE))} (files on their way when a fetch was stopped, theirs maybe among them)")
        for table in (path for name in ("participants.tsv", "sourcedata/*/participants.tsv") for path in sorted(folder.glob(name))):
            column, cells = cells_of(table.read_bytes(), as_named_in(table.parent.name if table.parent != folder else "", gone.subjects))
            if cells:
                others = " && ".join(f"${column} != {json.dumps(cell, ensure_ascii=False)}" for cell in sorted(set(cells.values())))
                lines.append(_filtered(f"awk -F'\\t' {shlex.quote(others)}", table))
        for subject in gone.subjects:
            theirs = re.compile(rf"sub-{re.escape(subject)}[/_]")
            if (folder / LEDGER).is_file() and theirs.search((folder / LEDGER).read_text(encoding="utf-8", errors="replace")):
                lines.append(_filtered(f"grep -vE {shlex.quote(theirs.pattern)}", folder / LEDGER))
    return lines


def _removal(path: Path) -> Iterator[str]:
    """What removes a file or folder together with what links lead to, as DataLad's do: without links' targets the images would stay."""
    if path.is_symlink():
        yield from _removal(path.resolve()) if path.exists() else ()
        yield f"rm {shlex.quote(str(path))}"
        return
    within = [Path(folder, name) for folder, folders, files in os.walk(path) for name in (*folders, *files)]
    targets = {link.resolve() for link in within if link.is_symlink()}
    away = sorted(str(target) for target in targets if path.resolve() not in target.parents)
    for annex in dict.fromkeys(target.split("/.git/annex/")[0] for target in away if "/.git/annex/" in target):
        there = shlex.quote(os.path.relpath(path.resolve(), annex))
        yield f"git -C {shlex.quote(annex)} annex drop --force {there}  # the images, before the links to them; elsewhere: --from REMOTE"
    if others := [target for target in away if "/.git/annex/" not in target and os.path.exists(target)]:
        leads = f"find {shlex.quote(str(path))} -type l -exec sh -c 'rm -rf \"$(readlink -f \"$1\")\"' - {{}} ';'"
        yield f"{leads}  # {len(others)} that links in it lead to, as {others[0]}"
    yield f"rm -r {shlex.quote(str(path))}"


def _filtered(program: str, table: Path) -> str:
    path = shlex.quote(str(table))
    return f"{program} {path} > {path}.new && mv {path}.new {path}"


def _weights(gone: Gone) -> tuple[list[str], frozenset[str]]:
    """A line for each file or fold of weights below the project that saw them or may have, and the hashes of the data they were trained on."""
    lines, hashes = [], set()
    for folder, _, files in _walked():
        if "seen.tsv" in files:
            seen = [row for row in read_rows(folder / "seen.tsv", ("scan_id", "role")) if gone.these.has_scan(row["scan_id"])]
            if seen:
                roles = ", ".join(f"{sum(row['role'] == role for row in seen)} scans for {role}" for role in ("train", "val"))
                lines.append(f"{folder} saw {roles}: rm -r {shlex.quote(str(folder))}")
                hashes |= _data_hash(folder / "fold.json")
            continue
        if begun := [name for name in files if name.startswith("started-")]:
            lines.append(f"{folder} is not finished and may have seen them ({begun[0][:20]}…): rm -r {shlex.quote(str(folder))}")
            continue
        for path in sorted(folder / name for name in files if name.endswith(WEIGHTS)):
            if _is_trained_on(path, gone.database):
                lines.append(f"{path} names {gone.database} and may have seen them: rm {shlex.quote(str(path))}")
                hashes |= _data_hash(folder / "fold.json")
    return lines, frozenset(hashes)


def _walked() -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, folders in it, files in it) of the project, without what has its own section; links are not followed."""
    for name, folders, files in os.walk("."):
        folders[:] = sorted(set(folders) - PASSED_OVER)
        yield Path(name), folders, sorted(files)


def _is_trained_on(path: Path, database: str) -> bool:
    """Whether a file of weights speaks of this database; its tensors are not read."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                said = b"".join(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
        else:
            with open(path, "rb") as file:  # safetensors: eight bytes of length, then JSON
                length = int.from_bytes(file.read(8), "little")
                said = file.read(length) if path.suffix == ".safetensors" else path.read_bytes()
    except (OSError, zipfile.BadZipFile, OverflowError, MemoryError):
        return True  # it cannot be ruled out
    name = database.encode()
    site = re.search(rb"(?<![A-Za-z0-9_-])" + re.escape(name) + rb"\.", said)  # <database>.<site>, as trained_on has them
    return site is not None or b'"%s"' % name in said or struct.pack("<cI", b"X", len(name)) + name in said  # a string of JSON, of a pickle


def _data_hash(fold: Path) -> set[str]:
    try:
        return {json.loads(fold.read_text(encoding="utf-8"))["data"]["data_hash"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _mlflow(params: Params, hashes: frozenset[str] | set[str]) -> list[str]:
    """Runs that carry one of the hashes, as ``lod_model.tracking`` tells; where it cannot, the command that will."""
    stores = [f"sqlite:///{path}" for path in sorted(Path("mlflow").rglob("*.db"))]
    stores += filter(None, (params.resources.mlflow_uri, os.environ.get("MLFLOW_TRACKING_URI")))
    lines = []
    for store in dict.fromkeys(stores) if hashes else ():
        command = ["python", "-m", "lod_model.tracking", "runs", "--in", store, "--data-hash", *sorted(hashes)]
        try:
            done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=TRACKING_S, check=False)
            failed = done.stderr.strip().splitlines()[-1:] or ["no reason given"] if done.returncode else []
        except (OSError, subprocess.TimeoutExpired) as error:
            done, failed = None, [str(error).splitlines()[0]]
        if failed:
            lines.append(f"{store} cannot be asked ({failed[0]}); later: {shlex.join(command)}")
        else:
            lines += done.stdout.splitlines()
    return lines


def _object_store(gone: Gone, params: Params) -> Iterator[str]:
    url = params.resources.shards.rstrip("/")
    if "://" not in url:
        return
    if match := re.fullmatch(r"s3://([^/]+)/?(.*)", url):
        for folder in sorted({shard.rsplit("/", 1)[0] for shard in gone.shards}):
            prefix = "/".join(filter(None, (match[2], folder))) + "/"
            yield f"versions, where the bucket keeps them: aws s3api list-object-versions --bucket {match[1]} --prefix {shlex.quote(prefix)}"
        if gone.shards:
            yield f"  and each older than this: aws s3api delete-object --bucket {match[1]} --key KEY --version-id ID"
    else:
        yield f"versions and backups of {url}, where it keeps any"
    copies = " ".join(f"{params.resources.cache_folder}/{digest}.parquet" for digest in sorted(gone.shard_hashes))
    if copies:
        yield f"on every other machine that has trained: rm -f {copies}"


def _projects(gone: Gone) -> list[str]:
    """Projects below this one that speak of the database."""
    lines = []
    for folder, _, files in _walked():
        if folder != Path() and "params.yaml" in files and (folder / "tables").is_dir():
            lines.append(f"(cd {shlex.quote(str(folder))} && {_again(gone)})")
    return lines


def _out_of_sight(gone: Gone) -> Iterator[str]:
    yield f"other clones and projects: git pull, then {_again(gone)}"
    origins = subprocess.run(["git", "remote", "-v"], capture_output=True, text=True, check=False) if Path(".git").exists() else None
    for origin in sorted({line.split()[1] for line in origins.stdout.splitlines()}) if origins else ():
        yield f"  of {origin}"
    yield "runs in MLflow from before the data or the split last changed, which are tagged with another data_hash: look through the older ones"
    yield "runs on MLflow servers that neither params.yaml nor MLFLOW_TRACKING_URI names; deleted runs until `mlflow gc`"
    yield "weights that were exported, published or given on; what `lodbrain segment` made of these scans; pictures in articles and slides"
    yield "backups and snapshots of this disk; logs (logs/, SLURM's, Ray's), which name scans and hold no image"
