"""``lodbrain sites``: what the catalogue knows of databases and their sites, and whether a YAML is right.

The catalogue is read inside the commands, so that ``lodbrain --help`` answers at once.
"""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_registry.errors import InputError
from data_registry.files import replacing

if TYPE_CHECKING:
    from data_registry.catalogue_schema import Database

WIDE = 200
"""Columns of a table that is not for a terminal."""

sites_app = typer.Typer(help="Databases and their sites: list, look at, check, count.", no_args_is_help=True, rich_markup_mode=None)


class Form(StrEnum):
    """How a list is written."""

    table = "table"
    tsv = "tsv"
    json = "json"
    parquet = "parquet"


_Out = Annotated[Path | None, typer.Option("-o", "--out", help="A new file instead of stdout; parquet wants one.")]
_All = Annotated[bool, typer.Option("--all", help="Also the small databases of test data.")]


@sites_app.command("list")
def list_sites(
    country: Annotated[str | None, typer.Option(help="As in `Germany`.")] = None,
    field_strength: Annotated[float | None, typer.Option(help="Tesla, as in 1.5.")] = None,
    access: Annotated[str | None, typer.Option(help="open, registration or agreement.")] = None,
    manufacturer: Annotated[str | None, typer.Option(help="As in `Siemens`.")] = None,
    model: Annotated[str | None, typer.Option(help="As in `TrioTim`.")] = None,
    place: Annotated[str | None, typer.Option(help="An institution, in all databases it stands in.")] = None,
    database: Annotated[str | None, typer.Option(help="As in `abide1`.")] = None,
    state: Annotated[str | None, typer.Option(help="available, embargoed or withdrawn.")] = None,
    used_by: Annotated[str | None, typer.Option(help="LOD-Brain, FastSurferVINN or NeuroNet.")] = None,
    form: Annotated[Form, typer.Option("--format", help="table; or all columns as tsv, json, parquet.")] = Form.table,
    out: _Out = None,
    everything: _All = False,
) -> None:
    """List sites, a line each; options narrow the list.

    A star marks what no document confirms. Columns of tsv, json and parquet stand in data_registry/schema.py.
    """
    from data_registry import catalogue_table

    rows = catalogue_table.site_rows(_databases(everything=everything or database is not None))
    wanted = {"country": country, "field_strength_tesla": field_strength, "access": access, "manufacturer": manufacturer, "model": model}
    rows = catalogue_table.select(rows, **wanted, place=place, database=database, state=state, used_by=used_by)
    if not rows:
        raise InputError("no site has all of these; fewer options are wanted")
    if form is Form.parquet and out is None:
        raise InputError("--format parquet: is no text; a file is wanted (-o)")
    if out is not None:
        if out.exists():
            raise InputError(f"{out}: exists already; a new file is wanted (-o)")
        if form is Form.table:
            with replacing(out) as aside:
                aside.write_text(_drawn(_table(rows)), encoding="utf-8")
        else:
            catalogue_table.write(out, rows, form.value)
        print(out)
    elif form is Form.table:
        print(_drawn(_table(rows)), end="")
        print(f"{_plural(len(rows), 'site')} of {_plural(len({row['database'] for row in rows}), 'database')}", file=sys.stderr)
    else:
        print(catalogue_table.as_tsv(rows) if form is Form.tsv else catalogue_table.as_json(rows), end="")


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _databases(*, everything: bool) -> list["Database"]:
    from data_registry.catalogue import catalogue

    return [database for database in catalogue().values() if everything or database.corpus]


def _table(rows: Iterable[dict], *, folded: bool = False):
    """As wide as the terminal: a narrow one gets no countries and no terms of access; there, if not ``folded``, models stand without their
    makers, universities as U., and long names are cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from data_registry.catalogue_table import SHORT

    shown = {"database": 0, "site": 0, "place": 0, "country": 110, "scanner": 0, "T": 0, "scans": 0, "age": 0, "access": 90}
    columns, brief = [name for name, least in shown.items() if _width() >= least], _width() < shown["country"] and not folded
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        justify = "right" if name in ("T", "scans", "age") else "left"
        widest = {"site": 12, "scanner": 11}.get(name) if brief else None
        table.add_column(name, justify=justify, max_width=widest, no_wrap=name not in ("place", "scanner"))  # these two give way
    short = SHORT | {None: "-"}
    for row in rows:
        star = dict.fromkeys(row["unverified"], "*")
        place = re.sub(r"University( of)?\b", "U.", row["place"]) if brief else row["place"]
        scanner = " ".join(filter(None, (None if brief and row["model"] else row["manufacturer"], row["model"]))) or "-"
        cells = {
            "database": row["database"], "site": row["site"].removeprefix("ABIDEII-"),
            "place": place + star.get("place", ""),
            "country": short.get(row["country"], row["country"]),
            "scanner": scanner + star.get("model", star.get("manufacturer", "")),
            "T": _number(row["field_strength_tesla"]) + star.get("field_strength_tesla", ""),
            "scans": _number(row["scans"]) + star.get("scans", ""), "age": _age(row) + star.get("age_mean_years", ""),
            "access": short.get(row["access"], row["access"]) + star.get("access", ""),
        }  # fmt: skip
        table.add_row(*(cells[name] if folded else Text(cells[name], no_wrap=True, overflow="ellipsis") for name in columns))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _age(row: dict) -> str:
    low, high = row["age_min_years"], row["age_max_years"]
    if low is not None and high is not None:
        return f"{low:.0f}–{high:.0f}"
    return "-" if row["age_mean_years"] is None else f"{row['age_mean_years']:.0f}"


def _width() -> int:
    """Of the terminal; wide where there is none, so that nothing is cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE


def _drawn(part: object) -> str:
    from rich.console import Console

    console = Console(width=_width(), highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


@sites_app.command("show")
def show_database(
    name: Annotated[str, typer.Argument(help="A database, as in `abide1`.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, each value with its standing and its source.")] = False,
) -> None:
    """Show a database in full: terms, route, citation, sites, each with where it was read."""
    from data_registry.catalogue import catalogue
    from data_registry.catalogue_sources import DATABASE_FIELDS, SITE_FIELDS, WEIGHTS, standing, value_of, weights_may_be_shared
    from data_registry.catalogue_table import site_rows

    if name not in catalogue():
        raise InputError(f"{name}: no such database; one of {', '.join(catalogue())} is wanted")
    database = catalogue()[name]

    def known(site: str | None, field: str) -> dict:
        how, where = standing(database, site, field)
        value = value_of(database, site, field)
        return {"value": value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value, "standing": how, "source": where}

    of_database = {field: known(None, field) for field in DATABASE_FIELDS}
    if WEIGHTS in database.sources and (value := of_database["redistribute"]["value"]):  # read elsewhere than the rest, as in a letter
        may, where = weights_may_be_shared(database)
        rest = {part: given for part, given in value.items() if part != "weights"}
        of_database["redistribute"] |= {"value": rest} if rest else {"value": None, "standing": "missing", "source": None}
        of_database[WEIGHTS] = {"value": may, "standing": "sourced", "source": where}
    if as_json:
        sites = {site: {field: known(site, field) for field in SITE_FIELDS} for site in database.sites}
        print(json.dumps({**database.model_dump(), "standing": {**of_database, "sites": sites}}, indent=2, ensure_ascii=False))
        return
    print("\n".join(_folded(line, 14) for line in _lines_about(database, of_database)) + "\n")
    print(_drawn(_table(site_rows([database]), folded=True)), end="")
    for document, address in database.documents.items():
        fields = ", ".join(field for field, of in database.sources.items() if of == document)
        print(f"{document}: {address}\n" + _folded(f"    {fields}", 4))
    print("* no document at hand confirms it", file=sys.stderr)


def _lines_about(database: "Database", known: dict[str, dict]) -> list[str]:
    """A database in lines, but for its sites; ``known``: value, standing and source by field."""
    called = {address: document for document, address in database.documents.items()}
    lines = [f"{database.name}: {database.title}", ""]
    for field, about in known.items():
        value = about["value"]
        text = "-" if value is None else ", ".join(f"{k} {_said(v)}" for k, v in value.items()) if isinstance(value, dict) else _said(value)
        star, read = " *" * (about["standing"] == "unverified"), called.get(about["source"], about["source"])
        lines.append(f"{field:<13} {text}{star}" + (f"  [{read}]" if read else ""))
    for field in ("note", "subjects", "scans", "family_column"):
        if getattr(database, field) is not None:
            lines.append(f"{field:<13} {getattr(database, field)}")
    rule, column = next((kind, value) for kind, value in database.site_rule if value is not None)
    lines.append(f"{'site rule':<13} {rule}: {column}")
    if database.lod_brain:
        lines.append(f"{'LOD-Brain':<13} {', '.join(f'{row} ({content.scans})' for row, content in database.lod_brain.items())}")
    return lines


def _folded(line: str, indent: int) -> str:
    """As wide as the terminal; whole where there is none."""
    if not sys.stdout.isatty():
        return line
    return textwrap.fill(line, _width(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _said(value: object) -> str:
    return "yes" if value is True else "no" if value is False else str(value)


@sites_app.command("check")
def check(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="YAMLs of your own; by default the project's.")] = None,
) -> None:
    """Check YAMLs: each alone, and against the other entries.

    A line each on stdout: file, site and field, what came, what is wanted. Exit status 1 if there is any.
    """
    from data_registry.catalogue import catalogue_files, read_database
    from data_registry.catalogue_check import findings

    own = files or []
    paths = own or catalogue_files()
    for path in own:
        if not path.is_file():
            raise InputError(f"{path}: no such file; a YAML of the catalogue is wanted")
    wrong, entries = [], []
    for path in paths:
        database, faults = read_database(path)
        wrong += [f"{path}: {fault}" for fault in faults]
        if database is not None:
            entries.append((str(path), database))
    known = {Path(path).resolve() for path in paths}
    others = [(str(path), database) for path in catalogue_files() if path.resolve() not in known and (database := read_database(path)[0])]
    mine = {name for name, _ in entries} | {"the catalogue"}
    wrong += [f"{name}: {what}" for name, what in findings(others + entries, whole=not own) if name in mine]
    for line in wrong:
        print(line)
    found = _plural(len(wrong), "fault") if wrong else "nothing is wrong"
    print(f"{_plural(len(paths), 'file')}: {found}", file=sys.stderr)
    raise typer.Exit(1 if wrong else 0)


@sites_app.command("stats")
def stats(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw the map: sites by field strength, maker and age (.png, .svg, .pdf).")] = None,
    everything: _All = False,
) -> None:
    """Count what there is, and the share of values that a document states; draw it."""
    from data_registry.catalogue_stats import stats as count

    if figure is not None and figure.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{figure}: suffix {figure.suffix!r}; .png, .svg or .pdf is wanted")
    databases = _databases(everything=everything)
    figures = count(databases)
    if figure is not None:
        from lod_model.sites_figure import draw

        draw(figure, databases)
    if as_json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        _print_stats(figures)
    if figure is not None:
        print(figure, file=sys.stderr if as_json else sys.stdout)


def _print_stats(figures: dict) -> None:
    from rich import box
    from rich.table import Table

    for name, value in figures.items():
        if not isinstance(value, dict):
            print(f"{name.replace('_', ' ').replace('lod brain', 'LOD-Brain'):<18} {value:>7}")
    for column, counted in figures["by"].items():
        print(_folded(f"{column.removesuffix('_tesla').replace('_', ' '):<18} {', '.join(f'{name}: {n}' for name, n in counted.items())}", 19))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("of", "field", "sourced", "unverified", "missing", "share"):
        table.add_column(name, justify="left" if name in ("of", "field") else "right")
    for of, fields in figures["filled"].items():
        for field, filled in fields.items():
            table.add_row(of, field, *(str(filled[name]) for name in ("sourced", "unverified", "missing")), f"{100 * filled['share']:.0f} %")
    print(_drawn(table), end="")
