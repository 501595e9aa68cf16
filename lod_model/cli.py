"""The command ``lodbrain``. Results go to stdout, diagnostics to stderr; what is wrong with the input is one line and exit status 2.

Heavy libraries are imported inside the commands, so that ``--help`` answers at once.
"""

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_registry.errors import InputError, run_stage
from lod_model.cli_sites import sites_app

if TYPE_CHECKING:
    from torch.nn import Module

    from lod_model.segment import Outcome

app = typer.Typer(
    help="Brain MRI segmentation that holds when the scanner changes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
weights_app = typer.Typer(help="List weights and look at them, import and export them.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(weights_app, name="weights")
app.add_typer(sites_app, name="sites")


class Postprocess(StrEnum):
    """As in :mod:`lod_model.postprocess`, which is too heavy to import for ``--help``."""

    none = "none"
    components = "components"
    release = "release"


class Engine(StrEnum):
    """As in :mod:`lod_model.predict`."""

    fast = "fast"
    fast_bf16 = "fast-bf16"
    plain = "plain"


@app.command()
def segment(
    scans: Annotated[list[str], typer.Argument(metavar="SCAN...", help="T1w files (.nii[.gz], .mgz, .mgh), or folders with *_T1w.nii[.gz] below.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the outputs; made if absent.")],
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint, imported weights or the authors' .h5; default: the packaged model.", envvar="LODBRAIN_WEIGHTS")
    ] = None,
    postprocess: Annotated[
        Postprocess, typer.Option(help="none; components: keep the largest one (of nuclei alone all); release: as the authors do.")
    ] = Postprocess.components,
    engine: Annotated[Engine, typer.Option(help="fast: the same labels; fast-bf16: faster, some voxels differ; plain: as written.")] = Engine.fast,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch chooses.")] = None,
) -> None:
    """Segment T1w scans; labels come on each scan's own grid.

    Each scan gets a line on stdout: label map, verdict (pass, review or fail), seconds, reasons. A scan that cannot be used gets one
    on stderr, and the others go on. Exit status: 0 all were segmented, 1 some were refused, 2 nothing could be done.
    """
    with _heavy_imports():
        from lod_model.segment import segment as segment_scans
        from lod_model.weights import default

    if engine is Engine.fast_bf16:
        print("fast-bf16: some 0.01 to 0.05 % of the voxels get another class than by --engine fast", file=sys.stderr)
    with _progress() as advance:
        chosen = {"postprocess": postprocess.value, "engine": engine.value, "threads": threads}
        outcomes = segment_scans(scans, out=out, weights=weights or default(), on_done=advance, **chosen)
    refused = sum(outcome.dseg is None for outcome in outcomes)
    if len(outcomes) > 1:
        counts = ", ".join(f"{sum(o.verdict == v and o.dseg is not None for o in outcomes)} {v}" for v in ("pass", "review", "fail"))
        print(f"{len(outcomes)} scans: {counts}, {refused} refused", file=sys.stderr)
    raise typer.Exit(1 if refused else 0)


@contextlib.contextmanager
def _heavy_imports() -> Iterator[None]:
    """Garbage is not looked for among what is imported, now or at the end: a third of a second in torch's two hundred thousand objects."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _progress() -> Iterator:
    """A callback that writes an outcome's line and, on a terminal, moves a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("segmenting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task("scans", total=None)

    def advance(outcome: "Outcome", total: int) -> None:
        bar.stop()  # the line must not be drawn into the bar
        _print_outcome(outcome)
        bar.update(task, total=total, advance=1)
        bar.start()

    with bar:
        yield advance


def _print_outcome(outcome: "Outcome") -> None:
    if outcome.dseg is None:
        print(f"error: {'; '.join(outcome.reasons)}", file=sys.stderr, flush=True)
    else:
        print("\t".join([str(outcome.dseg), outcome.verdict, f"{outcome.seconds:.1f} s", "; ".join(outcome.reasons)]).rstrip(), flush=True)


@app.command()
def networks(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="These, e.g. monai:DynUNet; by default all but MONAI's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list of objects.")] = False,
) -> None:
    """List the networks in their default configurations.

    GMAC: multiply-accumulates of the convolutions of one pass at the stated grid, in thousand millions, as the network is written here.
    """
    from data_registry import protocol
    from lod_model import networks as known
    from lod_model.export import grid_side
    from lod_model.networks.cost import macs

    rows, grid = [], "1mm"
    for name in names or known.names():
        network = known.build(name)
        rows.append({
            "name": name,
            "parameters": _parameters(network),
            "protocols": list(getattr(network.config, "protocols", protocol.names())),
            "grid": grid,
            "side": grid_side(grid),
            "gmac": round(macs(network, grid_side(grid)) / 1e9, 1),
            "multiple": network.config.multiple,
            "stages": ["fine"] if known.build_coarse(name) is None else ["coarse", "fine"],
            "config": network.config.to_dict(),
        })  # fmt: skip
    _print_rows(rows, ("name", "parameters", "protocols", "grid", "side", "gmac", "multiple", "stages"), as_json=as_json)


@weights_app.command("list")
def list_weights(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Also the weights in these folders.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list of objects, with the whole hash and provenance.")] = False,
) -> None:
    """List the weights that come with the project, the default first, and those in folders.

    A file that cannot be used gets a line on stderr, and exit status 1.
    """
    from lod_model import weights

    paths = weights.packaged()
    for folder in folders or ():
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; one with weights is wanted")
        paths += sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".h5", ".safetensors"))
    rows, unusable = [], 0
    for path in paths:
        try:
            rows.append(_facts(path))
        except InputError as error:
            unusable += 1
            print(f"error: {error}", file=sys.stderr)
    columns = ("name", "network", "protocol", "grid", "parameters", "hash", "licence", "path")
    _print_rows(rows if as_json else [row | {"hash": row["hash"][:12]} for row in rows], columns, as_json=as_json)
    if not paths:
        print("no weights are packaged", file=sys.stderr)
    raise typer.Exit(1 if unusable else 0)


@weights_app.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The authors' Keras weights (.h5), one or two levels, or our .safetensors.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="By default FILE.pt beside FILE.")] = None,
) -> None:
    """Turn the authors' published Keras weights, or exported safetensors, into a checkpoint."""
    from lod_model import weights
    from lod_model.segment import usable_weights

    out = _new_file(out or file.with_suffix(".pt"))
    found = usable_weights(file)
    with _writing(out):
        about = {"name": found.name, "protocol": found.protocol, "grid": found.grid, "preparation": found.preparation}
        weights.save(out, found.network, **about, provenance=found.provenance)


@weights_app.command("export")
def export_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Weights of any kind that `segment` takes.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="OUT.safetensors or OUT.onnx.")],
    side: Annotated[int | None, typer.Option(min=1, help="ONNX: voxels along each side, fixed; by default those of the weights' grid.")] = None,
) -> None:
    """Write weights for other programs: safetensors, or ONNX of the network as written.

    ONNX is opset 18, float32, from `image` (1, 1, S, S, S), z-scored over all voxels, to `logits` (1, C, S, S, S). At 256 voxels a runtime
    may need over 20 GB; `lodbrain segment` does not.
    """
    if out.suffix not in (".safetensors", ".onnx"):
        raise InputError(f"{out}: suffix {out.suffix!r}; .safetensors or .onnx is wanted")
    if side is not None and out.suffix != ".onnx":
        raise InputError(f"--side {side}: is of ONNX alone; {out} is wanted as .onnx, or no --side")
    from lod_model import export
    from lod_model.segment import usable_weights

    found = usable_weights(file)
    with _writing(_new_file(out)):
        if out.suffix == ".onnx":
            export.write_onnx(out, found, side=side)
        else:
            export.write_safetensors(out, found)


@weights_app.command("info")
def weights_info(
    file: Annotated[Path, typer.Argument(help="Weights of any kind that `segment` takes.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with the whole configuration and provenance.")] = False,
    as_bibtex: Annotated[bool, typer.Option("--bibtex", help="What to cite, as BibTeX, and nothing else.")] = False,
) -> None:
    """Say what weights are, which databases trained and chose them, what to cite, and whether their licences let the weights be shared."""
    from lod_model import lineage

    if as_json and as_bibtex:
        raise InputError("--json and --bibtex: one of the two is wanted")
    facts = _facts(file)
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    elif as_bibtex:
        print("\n".join(lineage.bibtex(facts["lineage"])))
    else:
        for name in ("name", "network", "protocol", "grid", "parameters", "hash", "path", "card"):
            if facts[name] is not None:
                print(f"{name}\t{_cell(facts[name])}")
        print("\n".join(lineage.in_lines(facts["lineage"])))


def _facts(path: Path) -> dict:
    from lod_model import lineage
    from lod_model.segment import usable_weights

    found, card = usable_weights(path), path.with_suffix(".md")
    return {
        "name": path.stem,
        "network": found.name,
        "protocol": found.protocol,
        "grid": found.grid,
        "preparation": asdict(found.preparation),
        "parameters": _parameters(found.network),
        "hash": found.hash,
        "licence": found.provenance.get("licence"),
        "path": str(path),
        "config": found.network.config.to_dict(),
        "card": str(card) if card.is_file() else None,
        "provenance": found.provenance,
        "lineage": lineage.lineage(found.provenance, path.with_name("seen.tsv")),
    }


def _parameters(network: "Module") -> int | dict[str, int]:
    """How many; of a network with one for each view, by view."""
    return network.parameter_counts() if hasattr(network, "parameter_counts") else sum(p.numel() for p in network.parameters())


def _print_rows(rows: list[dict], columns: tuple[str, ...], *, as_json: bool) -> None:
    """Rows as JSON, or these columns of them as lines with tabs below a header."""
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    print("\t".join(columns))
    for row in rows:
        print("\t".join(_cell(row[column]) for column in columns))


def _cell(value: object) -> str:
    if isinstance(value, list | dict):
        return ", ".join(value if isinstance(value, list) else (f"{key} {number}" for key, number in value.items()))
    return "-" if value is None else str(value)


def _new_file(path: Path) -> Path:
    if path.exists():
        raise InputError(f"{path}: exists already; a new file is wanted (-o)")
    return path


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says where the file is once it stands; a place that cannot be written to is one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; a place to write to is wanted") from None
    print(path)


def main() -> None:
    """Entry point of the console command."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without é shows ?
    run_stage(app)
