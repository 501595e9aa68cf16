"""The report against tables whose figures are known by hand."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_registry import protocol
from data_registry.errors import InputError
from data_registry.params import load_params
from data_registry.schema import read_table, write_table
from lod_model import report, report_figures, report_tables

PLACES = ("Bergen", "Cádiz", "Delft", "Évora")
FOLDS = (("Bergen", "Cádiz"), ("Delft", "Évora"))
STRUCTURES = protocol.load("lod7").foreground
LOSS = {"Bergen": 0.01, "Cádiz": 0.02, "Delft": 0.03, "Évora": 0.04}
"""What a scan's Dice loses when its place is held out."""
RUNS = ("lod_brain-base-0", "unet-base-0", "atlas-base-0")
SPLIT_HASH = "0f" * 32


def scan_id(place: str, number: int) -> str:
    return f"db_sub-{place[0]}{number}"


def dice_of(place: str, number: int, structure: int, role: str, run: str) -> float:
    """0.90 for scan 0, 0.88, 0.86 for the next ones; 0.01 less a structure; less the place's loss if held out; run b 0.05 less."""
    worse = {"unet-base-0": 0.05, "atlas-base-0": 0.4}.get(run, 0.0)
    return 0.9 - 0.02 * number - 0.01 * structure - (LOSS[place] if role == "external_test" else 0.0) - worse


def write_project(folder: Path, *, runs=RUNS, roles=("internal_test", "external_test"), folds=FOLDS) -> None:
    """Four places with three usable scans each, one scan set aside by index and one by harmonise; two folds."""
    tables = folder / "tables"
    used = [(place, number) for place in PLACES for number in range(3)]
    where = {"database": "db", "site": "S1"}
    scans = [{**where, "scan_id": scan_id(p, n), "site": p.upper(), "place": p, "person": scan_id(p, n), "age_years": 20.0 + n} for p, n in used]
    scans.append({**where, "scan_id": "db_sub-sheared", "place": "Bergen", "reason": "sheared by <4> degrees"})
    scans.append({**where, "scan_id": "db_sub-blank", "place": "Bergen", "person": "x"})
    samples = [{**where, "scan_id": scan_id(p, n), "status": "ok"} for p, n in used]
    samples.append({**where, "scan_id": "db_sub-blank", "status": "quarantined", "reason": "no voxel is labelled"})
    split, results = [], []
    for fold, held_out in enumerate(folds):
        for place, number in used:
            role = "external_test" if place in held_out else ("train", "val", "internal_test")[number]
            split.append({"fold": fold, "scan_id": scan_id(place, number), "role": role, "group": place, "person": scan_id(place, number)})
            for run in runs if role in roles else ():
                common = {"run": run, "network": run.split("-")[0], "protocol": "lod7", "seed": None if run.startswith("atlas") else 0, "fold": fold,
                          "role": role, "scan_id": scan_id(place, number), "database": "db", "site": place.upper(), "place": place,
                          "split_hash": SPLIT_HASH, "weights_hash": f"{fold}a"}  # fmt: skip
                for index, structure in enumerate(STRUCTURES):
                    figures = {("dice", "1"): dice_of(place, number, index, role, run), ("hd95", "mm"): None if index == 5 else 1.5 + number,
                               ("volume", "mL"): 11.0 * (index + 1), ("reference_volume", "mL"): 10.0 * (index + 1)}  # fmt: skip
                    results += [{**common, "structure": structure, "metric": m, "unit": unit, "value": value} for (m, unit), value in figures.items()]
    for name, rows in {"scans": scans, "samples": samples, "split": split, "results": results}.items():
        write_table(tables / f"{name}.parquet", name, rows, metadata={"split_hash": SPLIT_HASH})
    proof = {"split_hash": SPLIT_HASH, "key": "place", "notes": ["two folds of four places"],
             "folds": [{"fold": fold, "held_out": list(held), "counts": {}, "notes": []} for fold, held in enumerate(folds)],
             "proof": [{"fold": fold, "guard": guard, "overlaps": 0, "checked": 12} for fold in range(len(folds)) for guard in ("person", "scanner")],
             }  # fmt: skip
    (tables / "split.json").write_text(json.dumps(proof), encoding="utf-8")
    (folder / "params.yaml").write_text("experiment: base\nnetworks: [lod_brain, unet]\nindex: {roots: [bids]}\n")


def write_case(folder: Path, *, run: str = "lod_brain-base-0") -> None:
    t1w = np.random.default_rng(0).integers(0, 255, (16, 16, 16)).astype(np.uint8)
    reference, predicted = np.zeros((2, 16, 16, 16), dtype=np.uint8)
    reference[4:9, 4:12, 4:12], predicted[5:10, 4:12, 4:12] = 1, 1
    (folder / "tables/cases").mkdir(exist_ok=True)
    np.savez_compressed(folder / "tables/cases/worst.npz", t1w=t1w, reference=reference, predicted=predicted, scan_id=scan_id("Évora", 2), run=run,
                        fold=1, place="Évora", dice=0.795, voxel_mm=4.0)  # fmt: skip


def written(folder: Path) -> str:
    return report.write_report(folder, load_params(folder / "params.yaml")).read_text(encoding="utf-8")


def rows_of(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    write_case(folder)
    return folder, written(folder)


def test_dice_by_place_is_the_median_and_mean_of_held_out_scans(project):
    rows = {(r["run"], r["place"], r["structure"]): r for r in rows_of(project[0] / "reports/dice_by_place.tsv")}
    assert len(rows) == 3 * 4 * 7
    # Évora held out: 0.90, 0.88, 0.86 less 0.04, structure 0
    row = rows["lod_brain-base-0", "Évora", "grey matter"]
    assert (float(row["median"]), float(row["mean"]), row["n"]) == (pytest.approx(0.84), pytest.approx(0.84), "3")
    # The mean of six structures is 0.025 lower than structure 0; the other run 0.05 lower still
    assert float(rows["unet-base-0", "Évora", "mean"]["median"]) == pytest.approx(0.84 - 0.025 - 0.05)


def test_internal_external_pairs_the_same_scan(project):
    rows = [r for r in rows_of(project[0] / "reports/internal_external.tsv") if r["run"] == "lod_brain-base-0"]
    assert {r["scan_id"] for r in rows} == {scan_id(place, 2) for place in PLACES}  # scan 2 of each place is the internal one
    assert len(rows) == 4 * 7
    for row in rows:
        assert float(row["difference"]) == pytest.approx(-LOSS[row["place"]], abs=1e-6)
        assert float(row["external"]) - float(row["internal"]) == pytest.approx(float(row["difference"]), abs=2e-6)
        assert row["internal_folds"] == "1"


def test_folds_and_quarantine(project):
    folds = rows_of(project[0] / "reports/folds.tsv")
    assert [f["held_out"] for f in folds] == ["Bergen, Cádiz", "Delft, Évora"]
    assert [[f[role] for role in report_tables.ROLES] for f in folds] == [["2", "2", "2", "6", "0"]] * 2
    left_out = {r["scan_id"]: (r["stage"], r["reason"]) for r in rows_of(project[0] / "reports/quarantine.tsv")}
    assert left_out == {"db_sub-sheared": ("index", "sheared by <4> degrees"), "db_sub-blank": ("harmonise", "no voxel is labelled")}
    for name in left_out:
        assert name in project[1]


def test_html_is_one_file_that_fetches_nothing(project):
    html = project[1]
    addresses = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']([^"']*)""", html) + re.findall(r"url\(([^)]*)\)", html)
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "http:" not in html and "https:" not in html and "<script" not in html and "@import" not in html
    # five figures of each of two runs (Dice, pairs, differences, HD95, volumes), and the case
    assert html.count('src="data:image/png;base64,') == 11
    assert {path.name for path in (project[0] / "reports").iterdir()} == {
        "report.html", "dice_by_place.tsv", "internal_external.tsv", "folds.tsv", "quarantine.tsv"}  # fmt: skip


def test_verdict_says_the_figures_in_one_sentence(project):
    # External: scans 0.90, 0.88, 0.86 − 0.025 − mean loss 0.025 = 0.83; internal: scan 2 = 0.86 − 0.025; four differences, exact p = 2/16
    expected = (
        "lod_brain-base-0 reaches a mean Dice of 0.830 on 12 scans of 4 held-out places and 0.835 on 4 scans of unseen people at training places; "
        "for the 4 scans scored both ways the mean difference is −0.025 (p\u00a0=\u00a00.125); "
        "it beats the majority-label atlas at every place (4 of 4)."
    )
    assert f'<p class="verdict">{expected}</p>' in project[1]
    assert "with 4 people no p below 0.05 is possible" in project[1]


def test_what_users_wrote_is_escaped(project):
    assert "sheared by &lt;4&gt; degrees" in project[1]


def test_the_same_tables_give_the_same_bytes(project):
    before = {path.name: path.read_bytes() for path in (project[0] / "reports").iterdir()}
    written(project[0])
    assert before == {path.name: path.read_bytes() for path in (project[0] / "reports").iterdir()}


def test_one_place_no_internal_scans_no_atlas_no_cases(tmp_path):
    write_project(tmp_path, runs=("lod_brain-base-0",), roles=("external_test",), folds=(("Bergen",),))
    html = written(tmp_path)
    assert "no scan was scored as an unseen person of a training place; there is no majority-label atlas" in html
    assert "3 scans of 1 held-out place;" in html
    assert "No case was stored." in html and "No scan was scored both ways." in html
    assert rows_of(tmp_path / "reports/internal_external.tsv") == []


def test_a_worse_place_is_named_and_a_leak_is_the_first_thing_said(tmp_path):
    write_project(tmp_path, runs=("lod_brain-base-0", "atlas-base-0"))
    frame = pd.read_parquet(tmp_path / "tables/results.parquet")
    frame.loc[(frame.network == "atlas") & (frame.place == "Delft") & (frame.metric == "dice"), "value"] = 0.99
    write_table(tmp_path / "tables/results.parquet", "results", frame.astype(object).where(frame.notna(), None).to_dict("records"))
    proof = json.loads((tmp_path / "tables/split.json").read_text(encoding="utf-8"))
    proof["proof"][0]["overlaps"] = 2
    (tmp_path / "tables/split.json").write_text(json.dumps(proof), encoding="utf-8")
    html = written(tmp_path)
    assert "it beats the majority-label atlas at 3 of 4 places, not at Delft." in html
    assert html.index("The split leaks.") < html.index('class="verdict"')


def test_who_turned_out_to_be_one_person_is_one_pair(tmp_path):
    """By likeness, after index: the split's name counts, for a scan without a role too."""
    write_project(tmp_path)
    table = tmp_path / "tables/split.parquet"
    split = read_table(table, "split").to_pylist()
    other, own = scan_id(PLACES[1], 2), scan_id(PLACES[0], 2)
    write_table(table, "split", [row | {"person": own} if row["scan_id"] == other else row for row in split], metadata={"split_hash": SPLIT_HASH})
    inputs = report.load_inputs(tmp_path)
    pairs = report.internal_external(report_tables.per_scan(inputs.results)["dice"], inputs.scans)
    tests = report.paired_tests(pairs[pairs.run == "lod_brain-base-0"]).set_index("structure")
    assert (tests.scans["mean"], tests.people["mean"]) == (4, 3)


def test_tests_take_one_pair_a_person_and_adjust_over_structures():
    def pairs(structure, differences, people):
        return pd.DataFrame({"structure": structure, "scan_id": range(len(people)), "person": people, "internal": 0.9, "external": 0.9,
                             "difference": differences})  # fmt: skip

    six = list("abcdef")
    table = report.paired_tests(pd.concat([
        pairs("mean", [-1, -2, -3, -4, -5, -6], six), pairs("one", [-1, -2, -3, -4, -5, -6], six), pairs("two", [-1, -2, -3, -4, 5, -6], six),
        pairs("equal", [0.0] * 6, six), pairs("twice", [-1, -3, -3, -4], ["a", "a", "b", "c"]),
    ])).set_index("structure")  # fmt: skip
    assert table.p["one"] == pytest.approx(2 / 64)  # all six of one sign: 2 of 2⁶ sign patterns
    assert np.isnan(table.p["equal"]) and np.isnan(table.p_adjusted["equal"])
    assert (table.scans["twice"], table.people["twice"], table.p["twice"]) == (4, 3, pytest.approx(2 / 8))
    # Three p in order: 2/64 · 3/1; the next two at least that
    assert np.isnan(table.p_adjusted["mean"]) and table.p_adjusted["one"] == pytest.approx(3 * 2 / 64)


def test_slices_put_the_patients_right_at_the_left_and_up_at_the_top():
    volume = np.zeros((3, 3, 3), dtype=np.uint8)
    volume[0, 1, 1], volume[1, 0, 1], volume[1, 1, 2] = 1, 2, 3  # rightmost, most superior, most anterior voxel
    box = (slice(0, 3),) * 3
    coronal, axial, sagittal = (report_figures._plane(volume, box, view=view, index=1) for view in report_figures._VIEWS)
    assert coronal.tolist() == [[0, 2, 0], [1, 0, 0], [0, 0, 0]]
    assert axial.tolist() == [[0, 3, 0], [1, 0, 0], [0, 0, 0]]
    assert sagittal.tolist() == [[0, 2, 0], [0, 0, 3], [0, 0, 0]]


def test_many_structures_show_the_worst():
    medians = pd.Series({"mean": 0.5} | {f"s{i}": i / 100 for i in range(40, 0, -1)})
    assert report_figures.panel_names(medians, worst_is_low=True) == ["mean"] + [f"s{i}" for i in range(1, 12)]


@pytest.mark.parametrize(("name", "reason"), [
    ("results.parquet", "no such file; the table results is wanted"),
    ("split.json", "No such file or directory; the split's hash and proof are wanted"),
])  # fmt: skip
def test_a_missing_input_is_one_line(tmp_path, name, reason):
    write_project(tmp_path)
    (tmp_path / "tables" / name).unlink()
    with pytest.raises(InputError, match=reason):
        written(tmp_path)
    assert not (tmp_path / "reports").exists()


def test_scores_of_another_split_are_refused(tmp_path):
    write_project(tmp_path)
    path = tmp_path / "tables/split.json"
    path.write_text(path.read_text(encoding="utf-8").replace(SPLIT_HASH, "ab" * 32), encoding="utf-8")
    with pytest.raises(InputError, match="scores of split 0f0f0f0f0f0f; those of split abababababab are wanted"):
        written(tmp_path)


def test_a_damaged_case_is_named(tmp_path):
    write_project(tmp_path)
    (tmp_path / "tables/cases").mkdir()
    (tmp_path / "tables/cases/bad.npz").write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"bad\.npz: not a readable case"):
        written(tmp_path)


def test_the_command_ends_with_one_line_each_way(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "lod_model.report"]
    write_project(tmp_path, runs=("lod_brain-base-0",), roles=("external_test",), folds=(("Bergen",),))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "report: reports/report.html"
    (tmp_path / "tables/scans.parquet").unlink()
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: tables/scans.parquet: no such file") and failed.stderr.count("\n") == 1
