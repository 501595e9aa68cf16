"""The report's tables as pure functions: results, scans, samples and split in, data frames out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_registry.split import ROLES
from lod_model.report_figures import MEAN

_KEYS = ["run", "role", "scan_id", "place", "structure"]


@dataclass(frozen=True)
class Inputs:
    """What the report reads."""

    results: pd.DataFrame
    scans: pd.DataFrame
    samples: pd.DataFrame
    split: pd.DataFrame
    proof: dict
    """``split.json``: split_hash, key, folds, proof, notes."""
    cases: tuple[Path, ...]


def per_scan(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By metric, one row a run × role × scan × structure: the mean over folds; Dice also has the mean of structures."""
    frames = {}
    for metric in ("dice", "hd95", "volume", "reference_volume"):
        by_scan = results[results.metric == metric].groupby(_KEYS, sort=False, as_index=False)
        frames[metric] = by_scan.agg(value=("value", "mean"), folds=("fold", "nunique"))
    dice = frames["dice"]
    mean = dice.groupby(_KEYS[:-1], sort=False, as_index=False).agg(value=("value", "mean"), folds=("folds", "max")).assign(structure=MEAN)
    frames["dice"] = pd.concat([mean, dice], ignore_index=True)
    return frames


def dice_by_place(dice: pd.DataFrame) -> pd.DataFrame:
    """Dice of the scans of held-out places: run, place, structure, median, mean, n (scans where it is defined)."""
    external = dice[dice.role == "external_test"]
    figures_of = external.groupby(["run", "place", "structure"], sort=False).value
    return figures_of.agg(median="median", mean="mean", n="count").reset_index().sort_values(["run", "place"], kind="stable", ignore_index=True)


def internal_external(dice: pd.DataFrame, scans: pd.DataFrame) -> pd.DataFrame:
    """Scans scored both ways: run, scan_id, person, place, structure, internal, external, difference (external − internal), internal_folds."""
    internal = dice[dice.role == "internal_test"].rename(columns={"value": "internal", "folds": "internal_folds"})
    external = dice[dice.role == "external_test"].rename(columns={"value": "external"})
    both = external.drop(columns=["role", "folds"]).merge(internal[["run", "scan_id", "structure", "internal", "internal_folds"]])
    both = both.dropna(subset=["internal", "external"]).merge(scans[["scan_id", "person"]], how="left")
    both["person"] = both.person.fillna(both.scan_id)
    both["difference"] = both.external - both.internal
    return both[["run", "scan_id", "person", "place", "structure", "internal", "external", "difference", "internal_folds"]]


def paired_tests(pairs: pd.DataFrame) -> pd.DataFrame:
    """Of one run, by structure: scans, people, medians, median difference and its quartiles, p, and p adjusted over the structures.

    p is NaN where no difference is other than 0. The mean of structures is one question of its own and is not adjusted.
    """
    from scipy import stats

    rows = []
    for structure, group in pairs.groupby("structure", sort=False):
        by_person = group.groupby("person").difference.mean()
        p = float(stats.wilcoxon(by_person).pvalue) if (by_person != 0).any() else np.nan
        low, high = group.difference.quantile([0.25, 0.75])
        rows.append({"structure": structure, "scans": len(group), "people": len(by_person), "internal": group.internal.median(),
                     "external": group.external.median(), "difference": group.difference.median(), "low": low, "high": high, "p": p})  # fmt: skip
    table = pd.DataFrame(rows, columns=["structure", "scans", "people", "internal", "external", "difference", "low", "high", "p"])
    asked = (table.structure != MEAN) & table.p.notna()
    table["p_adjusted"] = np.nan
    if asked.any():
        table.loc[asked, "p_adjusted"] = stats.false_discovery_control(table.p[asked])
    return table


def beside_atlas(dice: pd.DataFrame, run: str, atlas: str) -> pd.DataFrame:
    """Mean Dice of a run and of the atlas by held-out place, over the scans that both scored: place, run, atlas, scans."""
    external = dice[(dice.role == "external_test") & (dice.structure == MEAN)]
    mine, floor = (external[external.run == name][["scan_id", "place", "value"]] for name in (run, atlas))
    both = mine.merge(floor, on=["scan_id", "place"], suffixes=("_run", "_atlas")).dropna()
    return both.groupby("place", as_index=False).agg(run=("value_run", "mean"), atlas=("value_atlas", "mean"), scans=("scan_id", "size"))


def fold_table(split: pd.DataFrame, proof: dict) -> pd.DataFrame:
    """A row a fold: what is held out, scans in each role (counted in the split's table), notes."""
    notes = {fold["fold"]: fold for fold in proof["folds"]}
    rows = []
    for fold, group in split.groupby("fold"):
        said = notes.get(fold, {"held_out": sorted(group[group.role == "external_test"].group.unique())})
        counts = group.role.value_counts()
        rows.append({"fold": fold, "held_out": ", ".join(said["held_out"]), **{role: int(counts.get(role, 0)) for role in ROLES},
                     "notes": "; ".join(said.get("notes", []))})  # fmt: skip
    return pd.DataFrame(rows, columns=["fold", "held_out", *ROLES, "notes"])


def quarantine(scans: pd.DataFrame, samples: pd.DataFrame, split: pd.DataFrame, proof: dict) -> pd.DataFrame:
    """Every scan that no fold uses: scan_id, database, site, the stage that set it aside, reason."""
    index = scans[scans.reason.notna()].assign(stage="index")
    harmonise = samples[(samples.status != "ok") & ~samples.scan_id.isin(index.scan_id)].assign(stage="harmonise")
    known = {*index.scan_id, *samples.scan_id}
    absent = scans[~scans.scan_id.isin(known)].assign(stage="harmonise", reason="no sample was made of it")
    usable = samples[(samples.status == "ok") & ~samples.scan_id.isin(index.scan_id)]
    used = set(split[split.role != "excluded"].scan_id)
    why = dict(note.split(": ", 1) for note in proof.get("notes", []) if ": " in note)  # the split names a scan that it leaves out
    why |= split[split.role == "excluded"].dropna(subset=["reason"]).set_index("scan_id").reason.to_dict()
    unused = usable[~usable.scan_id.isin(used)].assign(stage="split")
    unused["reason"] = unused.scan_id.map(why).fillna("no role in any fold")
    columns = ["scan_id", "database", "site", "stage", "reason"]
    table = pd.concat([part[columns] for part in (index, harmonise, absent, unused)], ignore_index=True)
    table["reason"] = table.reason.fillna("no reason given").map(lambda reason: " ".join(reason.split()))
    return table.sort_values("scan_id", ignore_index=True)


def site_table(inputs: Inputs, unused: pd.DataFrame) -> pd.DataFrame:
    """A row a site: place, scans, people, ages (years), field strengths (T), manufacturers, scans used and set aside."""
    scans = inputs.scans.assign(unused=inputs.scans.scan_id.isin(unused.scan_id))
    rows = []
    for (database, site), group in scans.groupby(["database", "site"]):
        ages = group.age_years.dropna()
        rows.append({
            "database": database, "site": site, "place": ", ".join(sorted(group.place.dropna().unique())), "scans": len(group),
            "people": group.person.fillna(group.scan_id).nunique(), "used": int((~group.unused).sum()), "unused": int(group.unused.sum()),
            "age_years": f"{ages.min():.0f}–{ages.max():.0f}" if len(ages) else "", "maker": ", ".join(sorted(group.manufacturer.dropna().unique())),
            "field": ", ".join(f"{tesla:g}" for tesla in sorted(group.field_strength_tesla.dropna().unique())),
        })  # fmt: skip
    return pd.DataFrame(rows)


def volume_bias(volumes: pd.DataFrame) -> list[dict]:
    """By structure: mean of predicted − reference (mL), the same as a share of the mean reference (%), 1.96 SD (mL), correlation, scans."""
    rows = []
    for structure, group in volumes.groupby("structure", sort=False):
        difference = group.y - group.x
        varies = len(group) > 2 and group.x.std() > 0 and group.y.std() > 0
        rows.append({"structure": structure, "scans": len(group), "reference": group.x.mean(), "predicted": group.y.mean(), "bias": difference.mean(),
                     "bias_percent": 100 * difference.mean() / group.x.mean() if group.x.mean() else np.nan, "spread": 1.96 * difference.std(),
                     "correlation": group.x.corr(group.y) if varies else np.nan})  # fmt: skip
    return rows
