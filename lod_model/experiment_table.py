"""The table of an experiment, with rows and columns as the paper has them: ``table.tsv`` and ``table.md`` beside ``experiment.json``.

    python -m lod_model.experiment_table runs/vinn_ablation

How figures are combined, stated once: a scan that several folds scored counts with its mean over them; then comes the mean over its
structures, where they are defined; then the mean over scans. An arm is compared with the reference on the scans that both scored, by
Wilcoxon's signed-rank test (two-sided) over people, a person with several scans being one pair; external with internal scans likewise, or,
where no scan is both, by Mann and Whitney's test. All tests of a table are adjusted by Benjamini and Hochberg.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from data_registry import protocol as protocols
from data_registry.errors import InputError, run_stage
from data_registry.experiment import Experiment, Table
from data_registry.files import replacing
from data_registry.params import checked
from data_registry.people import people_by_split
from data_registry.schema import read_table
from data_registry.split import resolution
from lod_model.report_figures import number, signed
from lod_model.tracking import git_revision

METRICS = {"dice": ("DSC", 4, "in both maps"), "asd": ("ASD (mm)", 3, "in either map")}
"""Its name in the table, digits, and where a structure must be missing for it not to be defined."""
ALL = "all structures"
CELL = (
    "arm", "part", "structures", "metric", "scans", "people", "mean", "deviation", "trained", "published", "difference", "pairs", "p", "p_adjusted",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """``experiment.json``, as ``pipelines.experiment`` leaves it."""

    name: str
    arms: tuple[str, ...]
    """Those that were run."""
    roots: tuple[str, ...]
    full: str
    """The command of the full run where this was a smoke run; else empty."""
    published: str
    experiment: Experiment

    @property
    def table(self) -> Table:
        """How the table is made."""
        return self.experiment.table

    def column(self, arm: str) -> str:
        """The arm as the table has it: one of several joined, or itself."""
        return next((name for name, members in self.table.join.items() if arm in members), arm)

    def label(self, arm: str) -> str:
        """What the table calls it."""
        return self.table.labels.get(arm, arm.replace("_", " "))


def main() -> None:
    """Make the table of a folder's arms."""
    parser = argparse.ArgumentParser(prog="python -m lod_model.experiment_table", description=main.__doc__)
    parser.add_argument("out", type=Path, help="the folder of experiment.json")
    out = parser.parse_args().out
    plan = load_plan(out)
    scores = pd.concat([scores_of(out / "arms" / arm, plan.column(arm), plan.table) for arm in plan.arms], ignore_index=True)
    found = cells(scores, plan.table, read_published(plan.published))
    head, notes = stamp(plan), described(out, plan, scores, found)
    with replacing(out / "table.tsv") as aside:
        text = "".join(f"# {line}\n" for line in [*head, *notes])
        aside.write_text(text + numbers(found, plan).to_csv(sep="\t", index=False, na_rep="n/a", float_format="%.6g"), encoding="utf-8")
    with replacing(out / "table.md") as aside:
        aside.write_text(markdown(found, plan, head, notes), encoding="utf-8")


def load_plan(out: Path) -> Plan:
    """Read ``experiment.json``; InputError where it is missing or another version's."""
    path = out / "experiment.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        experiment = checked(content.pop("experiment"), Experiment, str(path))
        return Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}, experiment=experiment)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a folder of `python -m pipelines.experiment` is wanted") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not what `python -m pipelines.experiment` writes ({error!r}); run it again") from None


def scores_of(folder: Path, arm: str, table: Table) -> pd.DataFrame:
    """Of one arm's folder, by arm, part, structures, metric and scan: value, share of structures undefined, person, and whether the arm was
    trained on scans of the part."""
    results = read_table(folder / "tables" / "results.parquet", "results").to_pandas()
    own = results[results.seed.notna() & results.role.isin(table.roles) & results.metric.isin(table.metrics)]  # no atlas, no reference weights
    if table.by != "protocol":
        own = own[~own.run.str.contains("+", regex=False)]  # a further output of the same network
    if own.empty:
        raise InputError(f"{folder / 'tables' / 'results.parquet'}: no score of {' or '.join(table.roles)}; another split, or table.roles, is wanted")
    samples = read_table(folder / "tables" / "samples.parquet", "samples").to_pandas().set_index("scan_id")
    scans, split = (read_table(folder / "tables" / f"{name}.parquet", name) for name in ("scans", "split"))
    people = people_by_split(scans.select(["scan_id", "person"]).to_pylist(), split.select(["scan_id", "person"]).to_pylist())
    parts = {
        "none": lambda: "", "role": lambda: own.role.str.removesuffix("_test"), "protocol": lambda: own.protocol,
        "resolution": lambda: own.scan_id.map(samples.native_affine.map(resolution)) + " mm",
    }  # fmt: skip
    own = own.assign(part=parts[table.by]())
    groups = {(name, s): g for name in own.protocol.unique() for s, g in zip(*_structures(name), strict=True)}
    own["group"] = [groups[key] for key in zip(own.protocol, own.structure, strict=True)]
    found = []
    for kind in table.structures:
        chosen = own[(own.group == "cortex") == (kind == "cortical")] if kind in ("cortical", "subcortical") else own
        columns = chosen.structure if kind == "each" else ALL if kind == "all" else kind
        by_structure = chosen.assign(structures=columns).groupby(["part", "structures", "metric", "scan_id", "structure"], sort=False)
        by_structure = by_structure.value.mean().reset_index()
        by_scan = by_structure.groupby(["part", "structures", "metric", "scan_id"], sort=False)
        found.append(by_scan.agg(value=("value", "mean"), undefined=("value", _missing)).reset_index())
    scores = pd.concat(found, ignore_index=True).assign(arm=arm)
    scores["person"] = scores.scan_id.map(people).fillna(scores.scan_id)
    split = split.to_pandas()
    trained = split[split.role == "train"].scan_id.map(samples.native_affine.map(resolution)) + " mm"
    scores["trained"] = scores.part.isin(trained)
    return scores


def _structures(protocol: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and groups of a protocol's foreground classes."""
    table = protocols.load(protocol)
    return table.foreground, table.groups[1:]


def _missing(values: pd.Series) -> float:
    return float(values.isna().mean())


def cells(scores: pd.DataFrame, table: Table, published: dict[tuple[str, str], float]) -> pd.DataFrame:
    """A row an arm × part × structures × metric: scans, people, mean, deviation, and against the reference difference, pairs, p, p_adjusted."""
    by_cell = dict(iter(scores.dropna(subset="value").groupby(["arm", "part", "structures", "metric"], sort=False)))
    rows = []
    for (arm, part, structures, metric), own in by_cell.items():
        row = {"arm": arm, "part": part, "structures": structures, "metric": metric, "scans": own.scan_id.nunique(), "people": own.person.nunique(),
               "mean": own.value.mean(), "deviation": own.value.std(), "trained": own.trained.any()}  # fmt: skip
        if (part, arm) in published and (structures, metric) == (ALL, "dice"):
            row["published"] = published[part, arm]
        other = _reference(arm, part, table)
        if (*other, structures, metric) in by_cell and other != (arm, part):
            row |= compared(own, by_cell[*other, structures, metric], paired=other[0] != arm)
        rows.append(row)
    found = pd.DataFrame(rows, columns=CELL)
    asked = found.p.notna()
    if asked.any():
        found.loc[asked, "p_adjusted"] = stats.false_discovery_control(found.p[asked])
    return found


def compared(own: pd.DataFrame, other: pd.DataFrame, *, paired: bool) -> dict[str, float]:
    """Mean difference own − other over people, how many pairs of them, and p; of unpaired people only where that is allowed and nobody is both."""
    shared = own.merge(other[["scan_id", "value"]], on="scan_id", suffixes=("", "_other"))
    by_person = (shared.value - shared.value_other).groupby(shared.person).mean()
    if len(by_person) or paired:
        p = float(stats.wilcoxon(by_person).pvalue) if (by_person != 0).any() else np.nan
        return {"difference": by_person.mean(), "pairs": len(by_person), "p": p}
    one, two = (scores.groupby("person").value.mean() for scores in (own, other))
    return {"difference": one.mean() - two.mean(), "pairs": 0, "p": float(stats.mannwhitneyu(one, two).pvalue)}


def _reference(arm: str, part: str, table: Table) -> tuple[str, str]:
    """What a cell is compared with: the same part of the reference arm, or the reference part of the same arm."""
    return (arm, table.reference) if table.by == "role" and table.reference in ("internal", "external") else (table.reference, part)


def read_published(path: str) -> dict[tuple[str, str], float]:
    """(part, arm) → the paper's Dice, from a TSV of these three columns whose first line is a remark."""
    if not path:
        return {}
    try:
        rows = pd.read_csv(path, sep="\t", comment="#")
        return {(str(part), str(arm)): float(value) for part, arm, value in rows.iloc[:, :3].itertuples(index=False)}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; a TSV of part, arm and figure is wanted (table.published)") from None


# ---------------------------------------------------------------------------------------------------------------------
# Text


def stamp(plan: Plan) -> list[str]:
    """What stands above everything else: nothing, or that this was a smoke run."""
    note = plan.experiment.smoke.note
    return [f"SMOKE: run to see that it runs; its figures mean nothing. {note}".strip(), f"The full run: {plan.full}"] if plan.full else []


def described(out: Path, plan: Plan, scores: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """Under which split, from which data and code the table came."""
    said = [f"Source: {plan.experiment.source}. Its figures were made with {plan.experiment.data}; this table with {', '.join(plan.roots)}."]
    arms: dict[str, list[str]] = {}
    for arm in plan.arms:
        split = json.loads((out / "arms" / arm / "tables" / "split.json").read_text(encoding="utf-8"))
        train = "–".join(str(n) for n in sorted({fold["counts"]["train"] for fold in split["folds"]}))
        folds = len(split["folds"])
        line = f"split {split['split_hash'][:12]} by {split['key']}, {folds} fold{'s' * (folds > 1)}, {train} training scans a fold"
        arms.setdefault(line, []).append(plan.label(arm))
    said += [f"{line} ({', '.join(names)})" if len(arms) > 1 else line for line, names in arms.items()]
    roles = " and ".join({"internal_test": "unseen people", "external_test": "held-out groups"}[role] for role in plan.table.roles)
    said.append(f"Scored: {scores.scan_id.nunique()} scans of {scores.person.nunique()} people, {roles}; commit {git_revision()}.")
    if plan.table.reference:
        test = "Mann-Whitney over people, as no scan is both" if ((found.pairs == 0) & found.p.notna()).any() else "Wilcoxon signed-rank over people"
        said.append(f"Differences are to {plan.label(plan.table.reference)}; p: {test}, Benjamini-Hochberg over the table.")
    missing = scores.groupby("metric").undefined.mean()
    for metric, share in missing[missing > 0].items():
        name, _, where = METRICS[metric]
        said.append(f"{name} is not defined for {share:.1%} of structures, missing {where}; means are over the others.")
    return said


def numbers(found: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The table in plain numbers."""

    def block(name: str, cell: pd.Series | None) -> dict[str, object]:
        figures = {"": "mean", " SD": "deviation", " published": "published", " difference": "difference", " p": "p", " p adjusted": "p_adjusted"}
        return {name + suffix: np.nan if cell is None else cell[column] for suffix, column in figures.items()}

    return _laid_out(found, plan, block).dropna(axis="columns", how="all")


def markdown(found: pd.DataFrame, plan: Plan, head: list[str], notes: list[str]) -> str:
    """The page: title, stamp, table, notes."""

    def block(name: str, cell: pd.Series | None) -> dict[str, object]:
        if cell is None:
            return {name: "–"}
        digits = METRICS[cell["metric"]][1]
        more = [f"{signed(cell.difference, digits)}, p {_p(cell.p_adjusted)}"] if np.isfinite(cell.difference) else []
        more += [f"published {number(cell.published, digits)}"] if np.isfinite(cell.published) else []
        return {name: number(cell["mean"], digits) + (f" ({'; '.join(more)})" if more else "")}

    rows = _laid_out(found, plan, block)
    rows = rows.drop(columns=[name for name in rows if (rows[name] == "–").all()])
    lines = [f"| {' | '.join(rows.columns)} |", f"|{' --- |' * len(rows.columns)}", *(f"| {' | '.join(map(str, row))} |" for row in rows.values)]
    above = [f"**{line}**" for line in head]
    return "\n\n".join([f"# {plan.experiment.title}", *above, "\n".join(lines), *notes]) + "\n"


def _laid_out(found: pd.DataFrame, plan: Plan, block) -> pd.DataFrame:
    """Rows and columns by the plan; ``block(name, cell or None)`` gives the columns of one cell."""
    arms = list(dict.fromkeys(plan.column(arm) for arm in plan.arms))
    parts = _parts(found, plan.table)
    by_key = {(row["arm"], row["part"], row["structures"], row["metric"]): row for _, row in found.iterrows()}
    columns = list(dict.fromkeys((row["structures"], row["metric"]) for _, row in found.iterrows()))
    rows = []
    by_arm = plan.table.across == "structures"
    for arm, part in [(arm, part) for arm in arms for part in parts] if by_arm else [(None, part) for part in parts]:
        own = found[(found.part == part) & ((found.arm == arm) | (arm is None))]
        if own.empty:
            continue
        row = ({"arm": plan.label(arm)} if by_arm else {}) | ({plan.table.by: part} if plan.table.by != "none" else {})
        if plan.table.by == "resolution":
            row["trained on"] = "yes" if own.trained.any() else "no"
        row["scans"] = own.scans.max()
        if by_arm:
            for structures, metric in columns:
                row |= block(f"{structures} {METRICS[metric][0]}", by_key.get((arm, part, structures, metric)))
        else:
            for name in arms:
                row |= block(plan.label(name), by_key.get((name, part, *columns[0])))
        rows.append(row)
    return pd.DataFrame(rows)


def _parts(found: pd.DataFrame, table: Table) -> list[str]:
    """In the order of the table: internal before external, resolutions by size, protocols as they come."""
    parts = list(dict.fromkeys(found.part))
    if table.by == "resolution":
        return sorted(parts, key=lambda part: float(part.removesuffix(" mm")))
    return sorted(parts, reverse=True) if table.by == "role" else parts


def _p(value: float) -> str:
    return "–" if not np.isfinite(value) else "< .001" if value < 0.001 else f"= {value:.3f}".replace("0.", ".", 1)


if __name__ == "__main__":
    run_stage(main)
