"""Stage *report*: results, split and data → one HTML file that opens offline, and the tables behind it as TSV.

Reads ``tables/`` (results, scans, samples, split as Parquet, ``split.json``, ``cases/*.npz``), writes ``reports/``. How figures are
combined, stated once:

- A scan scored in several folds (an unseen person of training places in more than one) counts once, with its mean over those folds.
- The mean of structures is per scan, over the structures that are defined there; it is called ``mean`` beside the structures' names.
- Internal beside external compares the same scans: scored when their place was held out, and when other places were. A person with
  several scans is one pair of the test (Wilcoxon signed-rank, two-sided; Benjamini–Hochberg over the structures of a run).
"""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from data_registry import protocol as protocols
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.params import Params, load_params
from data_registry.people import people_by_split
from data_registry.schema import read_table
from lod_model import report_figures as figures
from lod_model.report_figures import MEAN, number, p_value, signed
from lod_model.report_tables import (
    Inputs,
    beside_atlas,
    dice_by_place,
    fold_table,
    internal_external,
    paired_tests,
    per_scan,
    quarantine,
    site_table,
    volume_bias,
)
from lod_model.runs import run_key, training_identity
from lod_model.tracking import Tracker

ATLAS = "atlas"
"""Name of the network that stands for the majority-label atlas of a fold's training scans."""
MAX_CASES = 8
log = logging.getLogger(__name__)


def main() -> None:
    """Write the report of the project in the current folder."""
    params = load_params()
    path = write_report(Path(), params)
    tracker = Tracker(params.experiment, uri=params.resources.mlflow_uri)
    for network in params.networks:
        run = params.run_name(network)
        parent = tracker.run(run_key(run, training_identity(network, params)), name=run)
        tracker.artifacts(parent, sorted(path.parent.iterdir()))
        tracker.finish(parent)
    print(f"report: {path}")


def write_report(folder: Path, params: Params) -> Path:
    """Write ``reports/`` below ``folder`` from its ``tables/``; the path of the HTML file.

    Raises :class:`InputError` for a missing table, a table without results, and results of another split than the one that stands there.
    """
    inputs = load_inputs(folder)
    scores = per_scan(inputs.results)
    pairs = internal_external(scores["dice"], inputs.scans)
    runs = describe_runs(inputs, scores, pairs, params)
    tables = {
        "dice_by_place": dice_by_place(scores["dice"]),
        "internal_external": pairs.drop(columns="person"),
        "folds": fold_table(inputs.split, inputs.proof),
        "quarantine": quarantine(inputs.scans, inputs.samples, inputs.split, inputs.proof),
    }
    for name, table in tables.items():
        with replacing(folder / "reports" / f"{name}.tsv") as aside:
            table.to_csv(aside, sep="\t", index=False, na_rep="n/a", float_format="%.6g")
    path = folder / "reports" / "report.html"
    with replacing(path) as aside:
        aside.write_text(_html(inputs, scores, runs, pairs, tables, params), encoding="utf-8")
    return path


def load_inputs(folder: Path) -> Inputs:
    """Read everything the report needs; refuse what is missing or does not belong together."""
    tables = folder / "tables"
    results = read_table(tables / "results.parquet", "results").to_pandas()
    scans = read_table(tables / "scans.parquet", "scans").drop_columns(["labels"]).to_pandas()
    samples = read_table(tables / "samples.parquet", "samples").select(["scan_id", "database", "site", "status", "reason"]).to_pandas()
    split = read_table(tables / "split.parquet", "split").to_pandas()
    scans["person"] = scans.scan_id.map(people_by_split(scans[["scan_id", "person"]].to_dict("records"), split.to_dict("records")))
    if results.empty:
        raise InputError(f"{tables / 'results.parquet'}: no rows; scores of at least one scan are wanted (run the evaluate stage)")
    path = tables / "split.json"
    try:
        proof = json.loads(path.read_text(encoding="utf-8"))
        split_hash = proof["split_hash"]
        _ = [(fold["fold"], fold["held_out"]) for fold in proof["folds"]], [(row["fold"], row["guard"], row["overlaps"]) for row in proof["proof"]]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the split's hash and proof are wanted (run the split stage)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the split's hash, folds and proof ({error!r}); run the split stage again") from None
    for other in sorted(set(results.split_hash) - {split_hash}):
        came = f"{tables / 'results.parquet'}: scores of split {other[:12]}"
        raise InputError(f"{came}; those of split {split_hash[:12]} are wanted (run the evaluate stage again)")
    return Inputs(results, scans, samples, split, proof, tuple(sorted((tables / "cases").glob("*.npz"))))


def describe_runs(inputs: Inputs, scores: dict[str, pd.DataFrame], pairs: pd.DataFrame, params: Params) -> list[dict]:
    """What each run is and how it did on held-out places, the run the report speaks of first, baselines last.

    That run is the first of ``networks`` in the settings that has results, else a trained one, else what there is.
    """
    wanted = [params.run_name(network) for network in params.networks]
    runs = []
    for run, rows in inputs.results.groupby("run"):
        network = rows.network.iloc[0]
        kind = "baseline" if network == ATLAS else "reference weights" if rows.seed.isna().all() else "trained"
        order = (("trained", "reference weights", "baseline").index(kind), wanted.index(run) if run in wanted else len(wanted), run)
        hashes = rows.drop_duplicates("fold").sort_values("fold")[["fold", "weights_hash"]].to_dict("records")
        runs.append({"run": run, "network": network, "protocol": rows.protocol.iloc[0], "kind": kind, "order": order, "weights": hashes})
    expected = inputs.split[inputs.split.role == "external_test"].scan_id.nunique()
    for run in runs:
        dice = scores["dice"][(scores["dice"].run == run["run"]) & (scores["dice"].structure == MEAN)].dropna(subset=["value"])
        external, internal = dice[dice.role == "external_test"], dice[dice.role == "internal_test"]
        same = pairs[(pairs.run == run["run"]) & (pairs.structure == MEAN)]
        paired = paired_tests(same)
        hd95 = scores["hd95"][(scores["hd95"].run == run["run"]) & (scores["hd95"].role == "external_test")]
        atlas = next((other["run"] for other in runs if other["kind"] == "baseline" and other["protocol"] == run["protocol"]), None)
        places = beside_atlas(scores["dice"], run["run"], atlas) if atlas and run["kind"] != "baseline" else pd.DataFrame()
        run.update(
            external=external.value.mean(), external_sd=external.value.std(), external_scans=len(external), expected=expected,
            places=external.place.nunique(), internal=internal.value.mean(), internal_scans=len(internal),
            difference=same.difference.mean(), pairs=len(same), p=paired.p.iloc[0] if len(paired) else np.nan,
            hd95=hd95.value.median(), atlas=atlas if len(places) else None, places_compared=len(places),
            not_better=list(places[places.run <= places.atlas].place) if len(places) else [], beside_atlas=places.to_dict("records"),
        )  # fmt: skip
    return sorted(runs, key=lambda run: run["order"])


def verdict(run: dict) -> str:
    """One sentence: how the run does at held-out places, on unseen people of training places, and beside the atlas."""
    if not run["external_scans"]:
        said = f"{run['run']} has no score at a held-out place"
    else:
        said = f"{run['run']} reaches a mean Dice of {number(run['external'])} on {_count(run['external_scans'], 'scan')}"
        said += f" of {_count(run['places'], 'held-out place')}"
    if 0 < run["external_scans"] < run["expected"]:
        said += f" ({run['expected'] - run['external_scans']} more have no score)"
    if run["internal_scans"]:
        said += f" and {number(run['internal'])} on {_count(run['internal_scans'], 'scan')} of unseen people at training places"
    else:
        said += "; no scan was scored as an unseen person of a training place"
    if run["kind"] == "reference weights":
        said += " (the same weights both times)"
    elif run["pairs"]:
        said += f"; for the {_count(run['pairs'], 'scan')} scored both ways the mean difference is {signed(run['difference'])}"
        said += f" (p\u00a0{p_value(run['p'])})"
    if run["kind"] == "baseline":
        return said + "; it is itself the majority-label atlas."
    if not run["atlas"]:
        return said + "; there is no majority-label atlas to compare it with."
    compared, better = run["places_compared"], run["places_compared"] - len(run["not_better"])
    if not run["not_better"]:
        return said + f"; it beats the majority-label atlas at every place ({better} of {compared})."
    return said + f"; it beats the majority-label atlas at {better} of {_count(compared, 'place')}, not at {', '.join(run['not_better'])}."


def _count(number_of: int, noun: str) -> str:
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"


def _run_section(run: dict, scores: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> dict:
    """Figures and tables of one run."""
    colours = _colours(run["protocol"])
    external = {name: frame[(frame.run == run["run"]) & (frame.role == "external_test")] for name, frame in scores.items()}
    dice, hd95 = external["dice"], external["hd95"]
    panels = figures.panel_names(dice.groupby("structure", sort=False).value.median(), worst_is_low=True)
    section = dict.fromkeys(["dice_figure", "tests", "pairs_figure", "differences_figure", "hd95_figure", "hd95_medians", "volumes", "volume_figure"])
    section |= {"run": run, "structures": dice.structure.nunique() - 1, "panels": len(panels) - 1, "dice_medians": _medians(dice)}
    if len(dice):
        floor = scores["dice"][(scores["dice"].run == run["atlas"]) & (scores["dice"].role == "external_test")] if run["atlas"] else None
        section["dice_figure"] = figures.strip_by_place(dice, colours, panels=panels, label="Dice", baseline=floor)
    mine = pairs[pairs.run == run["run"]]
    if len(mine) and run["kind"] != "reference weights":
        tests = paired_tests(mine)
        by_name = tests.set_index("structure")
        notes = {name: f"median {signed(row.difference)}\np {p_value(row.p if name == MEAN else row.p_adjusted)}" for name, row in by_name.iterrows()}
        shown = [name for name in panels if name in by_name.index]
        section["tests"] = tests.to_dict("records")
        section["pairs_figure"] = figures.scatter_panels(
            mine.rename(columns={"internal": "x", "external": "y"}), colours, panels=shown, notes=notes,
            x_label="Dice, its place in training", y_label="Dice, its place held out")  # fmt: skip
        section["differences_figure"] = figures.strip_of_differences(
            mine.rename(columns={"difference": "value"}), colours, panels=shown, label="Dice held out − Dice with its place in training, same scan",
            notes={name: note.replace("\n", ", ") for name, note in notes.items()})  # fmt: skip
    if hd95.value.notna().any():
        worst = figures.panel_names(hd95.groupby("structure", sort=False).value.median(), worst_is_low=False)
        section["hd95_figure"] = figures.strip_by_place(hd95, colours, panels=worst, label="HD95, mm")
        section["hd95_medians"] = _medians(hd95)
    volumes = external["reference_volume"].rename(columns={"value": "x"}).merge(
        external["volume"].rename(columns={"value": "y"})[["scan_id", "structure", "y"]]).dropna(subset=["x", "y"])  # fmt: skip
    if len(volumes):
        section["volumes"] = volume_bias(volumes)
        notes = {row["structure"]: f"bias {signed(row['bias'], 1)} mL\n({signed(row['bias_percent'], 1)} %)" for row in section["volumes"]}
        shown = [name for name in panels if name in notes]
        section["volume_figure"] = figures.scatter_panels(
            volumes, colours, panels=shown, notes=notes, x_label="reference, mL", y_label="predicted, mL")  # fmt: skip
    return section


def _medians(frame: pd.DataFrame) -> dict:
    """Median by place and structure for a table: structures, rows of (place, scans, values)."""
    structures = list(dict.fromkeys(frame.structure))
    wide = frame.groupby(["place", "structure"]).value.median().unstack().reindex(columns=structures)
    scans = frame.groupby("place").scan_id.nunique()
    return {"structures": structures, "rows": [(place, int(scans[place]), list(row)) for place, row in zip(wide.index, wide.to_numpy(), strict=True)]}


def _colours(protocol: str) -> dict[str, str]:
    """Hex colour by structure."""
    table = protocols.load(protocol)
    return {name: "#{:02x}{:02x}{:02x}".format(*rgb) for name, rgb in zip(table.class_names, table.colours, strict=True)}


def _case_sections(inputs: Inputs, scores: dict[str, pd.DataFrame], runs: list[dict]) -> list[dict]:
    """The worst stored cases, those of the first run first, each with its overlay and its scores by structure, worst first."""
    protocol_of = {run["run"]: run["protocol"] for run in runs}
    order, ranked = list(protocol_of), []
    for path in inputs.cases:  # one at a time: a case at 1 mm is 50 MB
        case = figures.load_case(path)
        if case.run in protocol_of:
            ranked.append((order.index(case.run), case.dice, path))
        else:
            log.warning("%s: run %s has no results; the case is left out of the report", path, case.run)
    sections = []
    for _, _, path in sorted(ranked)[:MAX_CASES]:
        case = figures.load_case(path)
        dice, hd95 = (f[(f.run == case.run) & (f.scan_id == case.scan_id) & (f.role == "external_test")] for f in (scores["dice"], scores["hd95"]))
        dice, hd95 = dice[dice.structure != MEAN].sort_values("value"), hd95.set_index("structure").value
        colours = _colours(protocol_of[case.run])
        sections.append({
            "case": {name: getattr(case, name) for name in ("scan_id", "place", "run", "fold", "voxel_mm", "dice")},
            "image": figures.overlay(case, list(colours.values())),
            "rows": [(row.structure, row.value, hd95.get(row.structure, np.nan)) for row in dice.itertuples()],
            "colours": dict(list(colours.items())[1:]),
        })  # fmt: skip
    return sections


def _html(inputs: Inputs, scores: dict, runs: list[dict], pairs: pd.DataFrame, tables: dict[str, pd.DataFrame], params: Params) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lod_model", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, signed=signed, p_value=p_value)
    cases = _case_sections(inputs, scores, runs)
    leaks = [row for row in inputs.proof["proof"] if row["overlaps"]]
    guards = list(dict.fromkeys(row["guard"] for row in inputs.proof["proof"]))
    return environment.get_template("report.html.j2").render(
        experiment=params.experiment,
        verdict=verdict(runs[0]),
        runs=runs,
        sections=[_run_section(run, scores, pairs) for run in runs if run["kind"] != "baseline" or len(runs) == 1],
        cases=cases,
        stored_cases=len(inputs.cases),
        split={"hash": inputs.proof["split_hash"], "key": inputs.proof.get("key", params.split.key), "notes": inputs.proof.get("notes", [])},
        folds=tables["folds"].to_dict("records"),
        leaks=leaks,
        guards=guards,
        proof={(row["guard"], row["fold"]): row for row in inputs.proof["proof"]},
        sites=site_table(inputs, tables["quarantine"]).to_dict("records"),
        quarantine=tables["quarantine"].to_dict("records"),
        settings=yaml.safe_dump(params.model_dump(mode="json", exclude={"resources"}), sort_keys=False, default_flow_style=None, allow_unicode=True),
        mean=MEAN,
    )


if __name__ == "__main__":
    run_stage(main, about=__doc__)
