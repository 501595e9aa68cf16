"""Experiments: the arms share what they can and go on where they were stopped, the table is right by hand, every preset is valid."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from small_heads import CHECKOUT, add_subject, run

from data_registry.errors import InputError
from data_registry.experiment import Experiment, Table, arm_params, load_experiment
from data_registry.files import sha256
from data_registry.schema import read_table, write_table
from lod_model import experiment_table, networks
from lod_model.begin import check_fits, grown
from lod_model.experiment_table import cells, compared, load_plan, numbers
from lod_model.feeding import Feeding
from pipelines.experiment import _shards

PRESETS = sorted(path for path in (CHECKOUT / "params").glob("*.yaml") if "arms" in (text := path.read_text()) and "\nsource:" in text)
STAGE = {"epochs": 1, "learning_rate": 0.01}
SMALL = {
    "title": "Two levels or one?", "source": "a paper, table 1", "data": "many scans",
    "base": {"harmonise": {"grid": "16mm"}, "split": {"holdout": ["beta"], "internal_share": 0.4}, "train": {"coarse": STAGE, "fine": STAGE}},
    "arms": {"two": {}, "one": {"train": {"network": {"lod_brain": {"levels": 1}}}}, "far_too_long": {"train": {"fine": {"epochs": 10000}}}},
    "smoke": {"note": "Of shells.", "base": {"train": {"network": {"lod_brain": {"widths": [2, 4, 4]}}}}, "arms": {"far_too_long": None}},
    "table": {"by": "role", "roles": ["internal_test", "external_test"], "metrics": ["dice", "asd"], "reference": "two", "labels": {"one": "One"}},
}  # fmt: skip


def given(*roots: Path) -> dict:
    return {"index": {"roots": [str(root) for root in roots]}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A smoke run on two places of three people, of one arm and then of two."""
    folder = tmp_path_factory.mktemp("experiment")
    for number, name in enumerate(("alpha", "beta")):
        for subject in range(3):
            add_subject(folder / "data" / name, f"{subject:02d}", seed=10 * number + subject)
    first = SMALL | {"smoke": SMALL["smoke"] | {"arms": {"far_too_long": None, "one": None}}}
    for name, settings in (("first.txt", first), ("second.txt", SMALL)):
        (folder / "levels.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        done = experiment(folder)
        assert done.returncode == 0, done.stderr
        (folder / name).write_text(done.stdout + done.stderr)
    return folder


def experiment(folder: Path, *more: str):
    arguments = [str(folder / "levels.yaml"), "--data", str(folder / "data"), "--out", str(folder / "out"), "--smoke", *more]
    return run(CHECKOUT, "pipelines.experiment", *arguments)


def test_arms_share_one_set_of_shards(made):
    (data,) = (made / "out" / "data").iterdir()
    assert len(list((data / "shards").rglob("*.parquet"))) and sorted(p.name for p in (made / "out" / "arms").iterdir()) == ["one", "two"]
    for arm in ("one", "two"):
        folder = made / "out" / "arms" / arm
        assert not (folder / "shards").exists() and sha256(folder / "tables/samples.parquet") == sha256(data / "tables/samples.parquet")
        results = read_table(folder / "tables/results.parquet", "results").to_pandas()
        assert set(results.run) == {f"lod_brain-levels_{arm}-0", f"atlas-levels_{arm}-0"} and results.split_hash.nunique() == 1
    assert {p.name for p in (made / "out" / "mlflow").iterdir()} >= {"mlflow.db"}


def test_the_table_says_what_it_is(made):
    page, said = (made / "out/table.md").read_text(), (made / "second.txt").read_text()
    assert page in said and page.startswith("# Two levels or one?\n\n**SMOKE: run to see that it runs; its figures mean nothing. Of shells.**")
    assert f"python -m pipelines.experiment {made}/levels.yaml --data DATA**" in page
    head = [line for line in (made / "out/table.tsv").read_text().splitlines() if line.startswith("# ")]
    assert head[0].startswith("# SMOKE") and "5 scans of 5 people, unseen people and held-out groups" in page
    split = json.loads((made / "out/arms/one/tables/split.json").read_text())["split_hash"]
    assert f"split {split[:12]} by place, 1 fold, 1 training scans a fold" in page and "commit " in page and "far too long" not in page
    table = pd.read_csv(made / "out/table.tsv", sep="\t", comment="#")
    assert table[["arm", "role"]].values.tolist() == [["two", "internal"], ["two", "external"], ["One", "internal"], ["One", "external"]]
    results = read_table(made / "out/arms/one/tables/results.parquet", "results").to_pandas()
    own = results[(results.network == "lod_brain") & (results.role == "external_test")]
    for metric, column in (("dice", "all structures DSC"), ("asd", "all structures ASD (mm)")):
        by_hand = own[own.metric == metric].groupby("scan_id").value.mean().mean()
        assert table[column][3] == pytest.approx(by_hand, rel=1e-4)


def test_what_is_finished_is_not_run_again(made):
    first, second = ((made / name).read_text() for name in ("first.txt", "second.txt"))
    assert "arm 1 of 1, two: evaluate" in first and "arm 1 of 2, two: finished before" in second and "arm 2 of 2, one: evaluate" in second
    assert (made / "out/arms/two/log.txt").read_text().count("lod_model.train") == 1
    done = json.loads((made / "out/arms/two/arm.json").read_text())
    assert done["network"] == "lod_brain" and len(done["fingerprint"]) == 64


def test_a_stage_that_fails_is_one_line(made):
    (made / "broken.yaml").write_text(yaml.safe_dump(SMALL | {"arms": {"two": {"split": {"train_people": 50}}}, "smoke": {}, "table": {}}))
    done = run(CHECKOUT, "pipelines.experiment", str(made / "broken.yaml"), "--data", str(made / "data"), "--out", str(made / "out"))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: arm 1 of 1, two: split ended with status 2: split.train_people is 50: fold 0 has")
    assert line.endswith(f"(all it said: {made}/out/arms/two/log.txt; finished work is kept)")


@pytest.mark.parametrize(
    ("chosen", "place"), [("shards", "/out/data/a1/shards"), ("s3://bucket/", "s3://bucket/a1"), ("/lab/shards", "/lab/shards/a1")]
)
def test_each_data_has_its_shards_apart(chosen, place):
    assert _shards(chosen, Path("/out/data/a1")) == place


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {}}, "arms: Dictionary should have at least 1 item"),
        ({"tables": {}}, "tables is not a known key; title, source, data, base, arms, smoke, table are"),
        ({"arms": {"two": {"train": {"epoch": 1}}}, "smoke": {}, "table": {}}, "arms.two: train.epoch is not a known key"),
        ({"arms": {"two": {"networks": ["unet", "lod_brain"]}}, "smoke": {}, "table": {}}, "arms.two: networks are unet, lod_brain; one is wanted"),
        ({"table": {"labels": {"three": "3"}}}, "table.labels names three, which is no arm; far_too_long, one, two are"),
        ({"table": {"join": {"both": ["one", "three"]}}}, "table.join names three, which is no arm"),
        ({"table": {"reference": "three"}}, "table.reference is three, which is no arm"),
        ({"table": {"across": "arms", "metrics": ["dice", "asd"]}}, "one of structures and of metrics is wanted"),
        ({"smoke": {"arms": {"one": None, "two": None, "far_too_long": None}}}, "smoke.arms leaves out every arm"),
    ],
)
def test_mistakes(tmp_path, change, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(SMALL | change))
    with pytest.raises(InputError) as caught:
        arm_params(path, load_experiment(path), smoke=True, given=given(tmp_path))
    assert words in str(caught.value) and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_without_data_the_full_run_says_what_it_wants(tmp_path):
    done = run(CHECKOUT, "pipelines.experiment", str(CHECKOUT / "params/neuronet.yaml"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "--data is missing; BIDS databases with labels are wanted (UK Biobank" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("smoke", [False, True], ids=["full", "smoke"])
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_holds(path, smoke):
    """Its arms are settings, differ, and each has a network that can be built and a paper's figure where it says so."""
    found = load_experiment(path)
    arms = arm_params(path, found, smoke=smoke, given=given(Path("data")))
    assert len({params.model_dump_json() for params in arms.values()}) == len(arms)
    for params in arms.values():
        (name,) = params.networks
        check_fits(name, grown(name, "fine", None, params), params)
        assert set(networks.outputs(name, params.train.protocols)) <= {*params.harmonise.stored_protocols}
    published = experiment_table.read_published(str(path.parent / found.table.published) if found.table.published else "")
    assert {arm for _, arm in published} <= set(found.arms) | set(found.table.join)


def test_there_are_nine_presets():
    assert [path.stem for path in PRESETS] == [
        "lod_brain_levels", "lod_brain_sites", "lod_brain_training_size", "neuronet", "vinn_ablation", "vinn_loss", "vinn_resolutions",
        "vinn_sampling", "vinn_training_size",
    ]  # fmt: skip


def test_a_network_trains_by_anothers_recipe():
    """CNN*: VINN's kernels, optimiser and loss."""
    path = CHECKOUT / "params/vinn_ablation.yaml"
    params = arm_params(path, load_experiment(path), smoke=True, given=given(Path("data")))["cnn"]
    fed = Feeding("fastsurfer_cnn", None, "fine", params.train)
    assert (fed.recipe.optimiser, fed.recipe.weight_decay, fed.recipe.schedule, fed.recipe.inner_scale) == ("adamw", 1e-4, "warm_restarts", 0)
    full = arm_params(path, load_experiment(path), smoke=False, given=given(Path("data")))["cnn"]
    assert grown("fastsurfer_cnn", "fine", None, full).config.kernels == (3, 3, 3, 3)
    wrong = params.model_copy(update={"train": params.train.model_copy(update={"recipe": "vinn"})})
    with pytest.raises(InputError, match="train.recipe: 'vinn' is none; shared, own or one of fastsurfer_cnn"):
        check_fits("fastsurfer_cnn", None, wrong)


def scores(*rows: tuple) -> pd.DataFrame:
    """arm, part, scan, person, value, of one column."""
    frame = pd.DataFrame(rows, columns=["arm", "part", "scan_id", "person", "value"])
    return frame.assign(structures="all structures", metric="dice", trained=True, undefined=0.0)


def test_a_person_in_two_databases_counts_once(tmp_path):
    """Whom index has as two, and the split, who compared the heads, as one."""
    about = {"database": "db", "site": "A", "place": "A"}
    rows = [about | {"scan_id": name, "person": name} for name in ("a", "b", "c")]
    split = [{"fold": 0, "scan_id": name, "role": "external_test", "group": "A", "person": person} for name, person in zip("abc", "aac", strict=True)]
    results = [about | {"run": "unet-base-0", "network": "unet", "protocol": "lod7", "seed": 0, "fold": 0, "role": "external_test", "scan_id": name,
               "structure": "brainstem", "metric": "dice", "value": 0.9, "unit": "1"} for name in "abc"]  # fmt: skip
    samples = [{"scan_id": name, "status": "ok", "native_affine": np.eye(4).ravel().tolist()} for name in "abc"]
    for name, table in {"scans": rows, "split": split, "results": results, "samples": samples}.items():
        write_table(tmp_path / f"tables/{name}.parquet", name, table)
    found = experiment_table.scores_of(tmp_path, "one", Table())
    assert found.set_index("scan_id").person.to_dict() == {"a": "a", "b": "a", "c": "c"}


def test_cells_by_hand():
    """Six people, one with two scans; every difference is negative: p is 2/2⁶, by hand. The other arm's equal scores have no p."""
    rows = [("a", "x", f"s{i}", f"p{min(i, 5)}", 0.5) for i in range(7)]
    rows += [("b", "x", f"s{i}", f"p{min(i, 5)}", 0.5 - 0.01 * (i + 1)) for i in range(7)]
    rows += [("c", "x", f"s{i}", f"p{min(i, 5)}", 0.5) for i in range(6)]
    rows += [("a", "y", "s0", "p0", 0.25), ("d", "y", "s9", "p9", 0.75)]
    found = cells(scores(*rows), Table(reference="a", by="resolution"), {("x", "b"): 0.4}).set_index(["arm", "part"])
    b = found.loc["b", "x"]
    assert (b.scans, b.people, b.pairs, b.published) == (7, 6, 6, 0.4)
    assert b["mean"] == pytest.approx(0.46) and b.difference == pytest.approx(-(0.01 + 0.02 + 0.03 + 0.04 + 0.05 + 0.065) / 6)
    assert b.p == b.p_adjusted == pytest.approx(2 / 64)
    assert found.loc["c", "x"].difference == 0 and np.isnan(found.loc["c", "x"].p) and found.loc["c", "x"].scans == 6
    assert found.loc[("a", "x")].isna().difference and found.loc[("d", "y")].isna().p  # the reference; no scan in common


def test_benjamini_hochberg_is_over_the_whole_table():
    rows = [(arm, "x", f"s{i}", f"p{i}", value * (i + 1)) for arm, value in (("a", 0.05), ("b", 0.04), ("c", 0.06)) for i in range(8)]
    rows += [("d", "x", f"s{i}", f"p{i}", 0.05 * (i + 1) + (0.01, -0.02)[i % 2] * (i + 1)) for i in range(8)]
    found = cells(scores(*rows), Table(reference="a"), {}).set_index("arm")
    p = found.p.dropna().sort_values()
    assert list(p.index[:2]) == ["b", "c"] and p.iloc[0] == pytest.approx(2 / 2**8)
    assert found.p_adjusted["b"] == pytest.approx(p.iloc[0] * 3 / 2) and found.p_adjusted["d"] == pytest.approx(p.iloc[2])


def test_external_against_internal():
    """The same scans are pairs; where none is both, people stand against people."""
    paired = scores(*[("a", part, f"s{i}", f"p{i}", start + 0.01 * i) for part, start in (("internal", 0.5), ("external", 0.4)) for i in range(5)])
    table = Table(reference="internal", by="role")
    row = cells(paired, table, {}).set_index("part").loc["external"]
    assert row.difference == pytest.approx(-0.1) and row.pairs == 5 and row.p == pytest.approx(2 / 32)
    apart = paired.assign(scan_id=paired.part + paired.scan_id, person=paired.part + paired.person)
    row = cells(apart, table, {}).set_index("part").loc["external"]
    assert row.difference == pytest.approx(-0.1) and row.pairs == 0 and row.p == pytest.approx(2 / 252)  # all of 5 below all of 5: 2 / (10 over 5)
    assert np.isnan(compared(apart[apart.part == "internal"], apart[apart.part == "external"], paired=True)["p"])


def test_arms_across_beside_the_paper(tmp_path):
    """NeuroNet's form: a row a protocol, a column a variant of one or several arms."""
    arms = {"s1": {}, "s2": {}, "all": {}}
    table = {"by": "protocol", "across": "arms", "join": {"single": ["s1", "s2"]}, "reference": "single", "labels": {"all": "all targets"}}
    content = Experiment(title="t", source="s", data="d", arms=arms, table=table).model_dump(mode="json")
    plan = {"name": "n", "arms": ["s1", "s2", "all"], "roots": ["r"], "full": "", "published": "", "experiment": content}
    (tmp_path / "experiment.json").write_text(json.dumps(plan))
    plan = load_plan(tmp_path)
    rows = [("single", "fast", "s0", "p0", 0.9), ("single", "first", "s0", "p0", 0.8), ("all", "fast", "s0", "p0", 0.95)]
    found = cells(scores(*rows), plan.table, {("fast", "single"): 0.9356, ("first", "all"): 0.8881})
    made = numbers(found, plan)
    compared_columns = [f"all targets{more}" for more in ("", " difference", " p", " p adjusted")]
    assert list(made) == ["protocol", "scans", "single", "single published", *compared_columns]
    assert made["all targets"].tolist() == [0.95, pytest.approx(np.nan, nan_ok=True)] and made["single published"][0] == 0.9356
    page = experiment_table.markdown(found, plan, [], [])
    assert "| fast | 1 | 0.9000 (published 0.9356) | 0.9500 (+0.0500, p = 1.000) |\n| first | 1 | 0.8000 | – |" in page
    with pytest.raises(InputError, match="experiment.json: No such file"):
        load_plan(tmp_path / "none")
