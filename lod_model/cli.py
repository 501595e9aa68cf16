"""The command ``lodbrain``. Results go to stdout, diagnostics to stderr; what is wrong with the input is one line and exit status 2.

Heavy libraries are imported inside the commands, so that ``--help`` answers at once.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_registry.errors import InputError, run_stage

if TYPE_CHECKING:
    from lod_model.segment import Outcome

app = typer.Typer(
    help="Brain MRI segmentation that holds when the scanner changes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
weights_app = typer.Typer(help="Look at weights, or import the authors' published ones.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(weights_app, name="weights")


class Postprocess(StrEnum):
    """As in :mod:`lod_model.postprocess`, which is too heavy to import for ``--help``."""

    none = "none"
    components = "components"
    release = "release"


class Engine(StrEnum):
    """As in :mod:`lod_model.segment`."""

    plain = "plain"
    fast = "fast"


@app.command()
def segment(
    scans: Annotated[list[str], typer.Argument(metavar="SCAN...", help="T1w files (.nii[.gz], .mgz, .mgh), or folders with *_T1w.nii[.gz] below.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the outputs; made if absent.")],
    weights: Annotated[Path | None, typer.Option(help="A checkpoint, imported weights, or the authors' .h5.", envvar="LODBRAIN_WEIGHTS")] = None,
    postprocess: Annotated[
        Postprocess, typer.Option(help="none; components: keep the largest component; release: as the authors do.")
    ] = Postprocess.components,
    engine: Annotated[Engine, typer.Option(help="plain: the network as written; fast: rewritten for CPUs, in slabs.")] = Engine.plain,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch chooses.")] = None,
) -> None:
    """Segment T1w scans; labels come on each scan's own grid.

    Each scan gets a line on stdout: label map, verdict (pass, review or fail), seconds, reasons. A scan that cannot be used gets one
    on stderr, and the others go on. Exit status: 0 all were segmented, 1 some were refused, 2 nothing could be done.
    """
    if weights is None:
        raise InputError(
            "--weights is not given and no model is packaged yet; the weights.pt of a training run, "
            "or weights made by `lodbrain weights import FILE.h5`, are wanted"
        )
    from lod_model.segment import segment as segment_scans

    with _progress() as advance:
        chosen = {"postprocess": postprocess.value, "engine": engine.value, "threads": threads}
        outcomes = segment_scans(scans, out=out, weights=weights, on_done=advance, **chosen)
    refused = sum(outcome.dseg is None for outcome in outcomes)
    if len(outcomes) > 1:
        counts = ", ".join(f"{sum(o.verdict == v and o.dseg is not None for o in outcomes)} {v}" for v in ("pass", "review", "fail"))
        print(f"{len(outcomes)} scans: {counts}, {refused} refused", file=sys.stderr)
    raise typer.Exit(1 if refused else 0)


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
def networks(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the networks and how many parameters each has in its default configuration."""
    from lod_model import networks as known

    rows = [{"network": name, "parameters": sum(p.numel() for p in known.build(name).parameters())} for name in known.names()]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(f"{row['network']}\t{row['parameters']}" for row in rows))


@weights_app.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE.h5", help="The authors' Keras weights, one or two levels.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="By default FILE.pt beside FILE.h5.")] = None,
) -> None:
    """Turn the authors' published Keras weights into ours."""
    from lod_model import weights
    from lod_model.segment import usable_weights

    out = out or file.with_suffix(".pt")
    if out.exists():
        raise InputError(f"{out}: exists already; a new file is wanted (-o)")
    found = usable_weights(file)
    try:
        weights.save(out, found.network, name=found.name, protocol=found.protocol, grid=found.grid, provenance=found.provenance)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; a place to write to is wanted") from None
    print(out)


@weights_app.command("info")
def weights_info(file: Annotated[Path, typer.Argument(help="Weights of any kind that `segment` takes.")]) -> None:
    """Say what weights are: network, protocol, grid, hash, provenance."""
    from lod_model.segment import usable_weights

    found = usable_weights(file)
    facts = {key: getattr(found, key) for key in ("name", "protocol", "grid", "hash", "provenance")}
    facts["parameters"] = sum(p.numel() for p in found.network.parameters())
    print(json.dumps(facts, indent=2, default=str))


def main() -> None:
    """Entry point of the console command."""
    run_stage(app)
