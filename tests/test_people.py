"""Who is who: rules, tables, voxels and likeness, each by itself; one head in two databases through index, harmonise and split."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy._core import _multiarray_umath as umath
from scipy import ndimage

from data_registry import catalogue as catalogues
from data_registry import split as rules
from data_registry.brain_pose import template_maps
from data_registry.catalogue import load_database
from data_registry.catalogue_schema import Database, SamePeople, Site, SiteRule
from data_registry.errors import InputError
from data_registry.intensity import Preparation, above_air
from data_registry.likeness import NUMBERS, blocks, describe, likeness, pairs_above, sure_above
from data_registry.params import Harmonise, load_params
from data_registry.people import known_apart, merge_people, name_people, read_people
from data_registry.schema import read_table, write_table
from data_registry.shard_store import FolderStore
from data_registry.volume import load_image, save_volume
from pipelines import harmonise, index, people, split


def database(name: str, *same: SamePeople) -> Database:
    return Database(name=name, title=name, site_rule=SiteRule(single=name), sites={name: Site(place=name)}, same_people=same)


def scan(database: str, subject: str, **changes) -> dict:
    row = {"scan_id": f"{database}_sub-{subject}", "database": database, "subject": subject, "person": f"{database}/{subject}"}
    return row | {"sex": "F", "age_years": 30.0} | changes


def persons(rows: list[dict]) -> list[str]:
    return [row["person"] for row in rows]


def test_a_rule_of_the_catalogue_says_how_names_match():
    same = SamePeople(database="one", subject=r"NYU0*(\d+)[ab]", theirs=r"\1")
    rows = [scan("one", "12"), scan("one", "13"), scan("two", "NYU0012a"), scan("two", "NYU0012b"), scan("two", "NYU0013"), scan("two", "UM12a")]
    name_people(rows, {"one": database("one"), "two": database("two", same)}, {})
    assert persons(rows) == ["one/12", "one/13", "one/12", "one/12", "two/NYU0013", "two/UM12a"]


def test_a_rule_that_matches_nobody_or_names_nothing(caplog):
    rows = [scan("one", "12"), scan("two", "x")]
    idle = SamePeople(database="one", subject=r"y(\d+)", theirs=r"\1")
    name_people(rows, {"one": database("one"), "two": database("two", idle, SamePeople(database="one"))}, {})
    assert len(caplog.records) == 1 and "same_people of two: no subject matches 'y(\\\\d+)' with one of one" in caplog.text
    with pytest.raises(InputError, match="catalogue/two.yaml: same_people names nowhere, which is no database of the catalogue"):
        name_people(rows, {"two": database("two", SamePeople(database="nowhere"))}, {})
    caplog.clear()
    name_people(rows, {"two": database("two", SamePeople(database="georgetown", subject="x", theirs="y"))}, {})  # not here, but known
    assert not caplog.records and persons(rows) == ["one/12", "two/x"]


def test_rules_reach_through_who_is_not_there():
    """12 of one was withdrawn, 13 is known by a table alone; two and three have scans of both."""
    one = [SamePeople(database="one", subject=r"\w(\d+)", theirs=r"\1")]
    rows = [scan(name, f"{name[0]}{number}") for number in (12, 13, 14) for name in ("two", "three")] + [scan("one", "15"), scan("four", "7")]
    databases = {name: database(name, *one * (name[0] == "t")) for name in ("one", "two", "three", "four")}
    name_people(rows[:-2], databases, {})
    assert persons(rows) == [f"three/t{number}" for number in (12, 12, 13, 13, 14, 14)] + ["one/15", "four/7"]
    name_people(rows, databases, {("one", "13"): "anna", ("four", "7"): "anna"})
    assert persons(rows)[2:4] == ["person:anna"] * 2 and rows[-1]["person"] == "person:anna"


def test_every_rule_of_the_catalogue_names_a_database_of_it():
    for entry in catalogues.catalogue().values():
        assert {rule.database for rule in entry.same_people} <= set(catalogues.catalogue()) - {entry.name}, entry.name


@pytest.mark.parametrize(("rule", "words"), [
    ("{database: b, subject: x}", "wanted both, or neither"),
    ("{database: b, subject: '(', theirs: x}", "no regular expression"),
    ('{database: b, subject: "(.)", theirs: "\\\\2"}', "a group that it lacks"),
    ("{databse: b}", "databse"),
])  # fmt: skip
def test_a_broken_rule_names_file_and_field(tmp_path, rule, words):
    path = tmp_path / "bad.yaml"
    path.write_text(f"name: bad\ntitle: t\nsame_people: [{rule}]\nsite_rule: {{single: a}}\nsites: {{a: {{place: P}}}}\n")
    with pytest.raises(InputError, match=r"bad.yaml: same_people\.0") as error:
        load_database(path)
    assert words in str(error.value)


def table(tmp_path, *lines: str):
    path = tmp_path / "people.tsv"
    path.write_text("\n".join(["database\tsubject\tperson\tnote", *(line.replace(" ", "\t") + "\t" for line in lines)]) + "\n")
    return path


def test_a_table_says_who_is_one_and_who_is_not(tmp_path, caplog):
    lines = ("one sub-12 anna", "two 7 anna", "two 8 berta", "two 99 cleo", "georgetown 1 dora", "tow 7 eva")
    known = read_people([table(tmp_path, *lines)])
    rows = [scan("one", "12"), scan("two", "7"), scan("two", "8"), scan("two", "9", person="two/7")]
    name_people(rows, {"one": database("one"), "two": database("two")}, known)
    assert persons(rows) == ["person:anna", "person:anna", "person:berta", "person:anna"]  # the last one's bytes are those of two/7
    assert known_apart(rows[0]["person"], rows[2]["person"])
    assert "2 subjects of index.people are not there, e.g. sub-99 of two" in caplog.text  # georgetown is known, tow is nothing
    rows = [scan("two", "7", person="p"), scan("two", "8", person="p")]
    name_people(rows, {"two": database("two")}, known)
    assert persons(rows) == ["person:anna"] * 2 and "berta by index.people, but one with anna by bytes or a rule" in caplog.text


@pytest.mark.parametrize(("lines", "words"), [
    (["one 12 anna", "one sub-12 berta"], "line 3: sub-12 of one is berta, and anna before"),
    (["one  anna"], "line 2: one of database, subject, person is empty"),
])  # fmt: skip
def test_a_table_that_is_wrong(tmp_path, lines, words):
    with pytest.raises(InputError, match=words):
        read_people([table(tmp_path, *lines)])
    with pytest.raises(InputError, match="none.tsv: cannot be read"):
        read_people([tmp_path / "none.tsv"])
    (tmp_path / "x.tsv").write_text("a\tb\n")
    with pytest.raises(InputError, match="its columns are a, b; database, subject, person are wanted"):
        read_people([tmp_path / "x.tsv"])


def test_ties_reach_through_others():
    rows = [scan("d", str(number)) for number in range(6)]
    merge_people(rows, [{"d/4", "d/3"}, {"d/1", "d/2"}, {"d/3", "d/2"}, {"d/5"}])
    assert persons(rows) == ["d/0", "d/1", "d/1", "d/1", "d/1", "d/5"]


def described(row: dict, numbers: str | None, voxels: str | None = None) -> dict:
    return {"scan_id": row["scan_id"], "likeness": numbers, "voxels_sha256": voxels or row["scan_id"]}


@pytest.mark.parametrize(("other", "noise", "verdict", "why"), [
    (scan("b", "2"), 0.1, "merged", "same sex, ages within 3 years"),
    (scan("b", "2", age_years=None), 0.1, "review", "nothing else is known of both"),
    (scan("c", "2", age_years=None), 0.1, "merged", "the catalogue says that their databases share people"),
    (scan("c", "2", sex="M"), 0.1, "review", "sexes differ"),
    (scan("b", "2", age_years=34.0), 0.1, "review", "ages differ by more than 3 years"),
    (scan("a", "2"), 0.1, "review", "two subjects of one database"),
    (scan("b", "2"), 0.8, "review", "below 0.85; same sex, ages within 3 years"),
    (scan("b", "2"), 1.5, None, None),
    (scan("b", "2", person="person:y"), 0.1, None, None),
    (scan("b", "2", person="person:x"), 0.1, None, None),
])  # fmt: skip
def test_alike_is_one_person_only_if_something_else_agrees(other, noise, verdict, why):
    rng = np.random.default_rng(0)
    first = rng.normal(0, 32, NUMBERS)
    rows = [scan("a", "1", person="person:x" if other["person"].startswith("person") else "a/1"), dict(other), scan("b", "3")]
    numbers = [first, first + noise * rng.normal(0, 32, NUMBERS), rng.normal(0, 32, NUMBERS)]
    samples = [described(row, np.clip(n, -127, 127).astype(np.int8).tobytes().hex()) for row, n in zip(rows, numbers, strict=True)]
    before = persons(rows)
    findings, summary = people.find_people(rows, samples, {"c": database("c", SamePeople(database="a"))})
    assert [(finding["verdict"], finding["why"]) for finding in findings] == ([(verdict, why)] if verdict else [])
    assert persons(rows) == ([before[0], before[0], before[2]] if verdict == "merged" else before)
    suspected = min(before[:2]) if verdict == "review" else None
    assert [row["suspected"] for row in rows] == [suspected, suspected, None]
    assert (summary["scans_compared"], summary["pairs"], summary["review"]) == (3, 3, int(verdict == "review"))


def test_same_voxels_are_one_person(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [scan("a", "1"), scan("b", "1", sex="M"), scan("b", "1", scan_id="b_sub-1_ses-2")]
    rows += [scan("c", "5", person="person:x"), scan("d", "6", person="person:y")]
    samples = [described(row, None, voxels) for row, voxels in zip(rows, ("v", "v", "w", "u", "u"), strict=True)]
    findings, summary = people.find_people(rows, samples, {})
    assert persons(rows) == ["a/1", "a/1", "a/1", "person:x", "person:y"] and summary["scans_not_described"] == 5
    people.write_findings(findings)
    merged, review = (line.split("\t") for line in (tmp_path / "tables/people.tsv").read_text().splitlines()[1:])
    assert merged[:5] == ["merged", "1.0", "the same voxels", "a_sub-1", "b_sub-1"] and review[0] == "review"


def test_ties_reach_through_scans_that_get_no_role(tmp_path, monkeypatch):
    """b/1, without labels, is a/1 by one scan and c/1 by another; e/1, without labels, is d/1 by voxels and of e/2's family."""
    monkeypatch.chdir(tmp_path)
    seen = [("a", "1", "v", None), ("b", "1", "v", None), ("b", "1", "w", None), ("c", "1", "w", None),
            ("d", "1", "u", None), ("e", "1", "u", "e/F"), ("e", "2", "t", "e/F"), *((name, "9", name, None) for name in "acde")]  # fmt: skip
    rows = [scan(name, who, scan_id=f"{name}{who}{place}", site=name, place=name, scanner=name, family=family)
            for place, (name, who, _, family) in enumerate(seen)]  # fmt: skip
    samples = [described(row, None, voxels) for row, (*_, voxels, _) in zip(rows, seen, strict=True)]
    for row in samples:
        sources = [] if row["scan_id"] in ("b11", "b12", "e15") else ["aseg"]
        row |= {"status": "ok", "native_affine": np.eye(4).ravel().tolist(), "label_sources": sources}
    write_table(split.SCANS_TABLE, "scans", rows)
    write_table(split.SAMPLES_TABLE, "samples", samples)
    (tmp_path / "params.yaml").write_text("index: {roots: [roots]}\nsplit: {folds: 2}\n")
    split.main()
    roles = read_table(split.SPLIT_TABLE, "split").to_pylist()
    for fold in (0, 1):
        role = {row["scan_id"]: row["role"] for row in roles if row["fold"] == fold}
        assert len(role) == 8
        for one, two in (("a10", "c13"), ("d14", "e26")):
            assert len({role[one], role[two]} - {"excluded"}) == 1, role


def test_pairs_in_blocks_are_those_of_one_product():
    numbers = np.random.default_rng(1).integers(-9, 9, (23, 40)).astype(np.int8)
    unit = numbers / np.linalg.norm(numbers.astype(float), axis=1, keepdims=True)
    whole = unit @ unit.T
    upper = whole[np.triu_indices(23, 1)]
    found, (mean, deviation) = pairs_above(numbers, 0.2)
    assert {(i, j) for i, j, _ in found} == {(i, j) for i in range(23) for j in range(i + 1, 23) if whole[i, j] >= 0.2}
    assert (mean, deviation) == (pytest.approx(upper.mean(), abs=1e-6), pytest.approx(upper.std(), abs=1e-6))
    for first, values in blocks(numbers, rows=5):
        assert np.allclose(values, whole[first : first + 5, first:], atol=1e-6)
    assert pairs_above(numbers[:1], 0.2)[0] == [] and sure_above(10**6) > sure_above(10) > 0


@functools.cache
def head(person: int) -> np.ndarray:
    """(64, 64, 64) float32, LIA, 4 mm: the template's brain, with folds of this person's own, in a skull of bone and fat."""
    template = template_maps()[0]
    folds = ndimage.gaussian_filter(np.random.default_rng(person).normal(size=template.shape), 1.0)
    brain = np.where(template > 0.1, template * (1 + 0.25 * folds / folds.std()).clip(0.2), 0)
    out = np.zeros((64, 64, 64), np.float32)
    start = [(64 - n) // 2 for n in brain.shape]
    out[tuple(slice(s, s + n) for s, n in zip(start, brain.shape, strict=True))] = brain
    inner = ndimage.binary_dilation(out > 0.1, iterations=2)
    out[ndimage.binary_dilation(inner, iterations=2) & ~inner] = 1.2
    return out


def again(data: np.ndarray, seed: int, *, degrees: float = 8, voxels: float = 3) -> np.ndarray:
    """Another scan of the same head: turned, moved, smaller as heads are, shaded, noisy; uint8."""
    rng = np.random.default_rng(seed)
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) / 0.87
    moved = ndimage.affine_transform(data, turn, offset=31.5 - turn @ np.full(3, 31.5) + rng.uniform(-voxels, voxels, 3), order=1)
    slope = np.linspace(0.7, 1.3, 64)
    shaded = moved * slope[:, None, None] * slope[::-1][:, None]
    return np.clip(110 * shaded + rng.normal(0, 3, shaded.shape), 0, 255).astype(np.uint8)


def test_the_same_head_is_alike_and_another_or_its_mirror_is_not():
    first = describe(again(head(1), 0, degrees=0), 4.0)
    assert first.dtype == np.int8 and first.shape == (NUMBERS,)
    assert likeness(first, describe(again(head(1), 1), 4.0)) > people.SAME
    assert likeness(first, describe(again(head(2), 0, degrees=0), 4.0)) < people.REVIEW
    assert likeness(first, describe(again(head(1), 0, degrees=0)[::-1], 4.0)) < people.REVIEW
    fine = np.repeat(np.repeat(np.repeat(again(head(1), 0, degrees=0), 2, 0), 2, 1), 2, 2)
    assert likeness(first, describe(fine, 2.0)) > 0.999


def test_threads_and_processor_do_not_change_a_bit(tmp_path):
    """A shard has the numbers in it, and its bytes depend on its scans alone. BLAS sums in another order, numpy does without wide registers."""
    np.save(tmp_path / "head.npy", again(head(1), 0))
    code = (
        "import sys, numpy as np; from data_registry.brain_pose import flat, register; from data_registry.likeness import describe\n"
        "data = np.load(sys.argv[1]); print(describe(data, 4.0).tolist(), register(flat(data.astype(np.float32))).tolist())"
    )
    features = " ".join(name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name])
    other = {"OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": features}
    said = [
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "head.npy")], env=os.environ | changed, capture_output=True, text=True, check=True)
        for changed in ({"OPENBLAS_NUM_THREADS": "1"}, other)
    ]
    assert len(said[0].stdout) > 1000 and said[0].stdout == said[1].stdout


def test_a_head_is_found_in_air_with_a_grey_level_of_its_own():
    picture = again(head(1), 0)
    striped = (100 + 0.5 * picture).astype(np.uint8)  # as WhiteStripe leaves it
    assert describe(striped, 4.0) is None
    assert likeness(describe(picture, 4.0), describe(above_air(striped, Preparation("n4_whitestripe")), 4.0)) > 0.95


def test_what_is_no_head_is_not_described():
    assert describe(np.zeros((64, 64, 64), np.uint8), 4.0) is None
    assert describe(np.full((64, 64, 64), 9, np.uint8), 4.0) is None
    assert describe(np.random.default_rng(0).integers(0, 255, (64, 64, 64)).astype(np.uint8), 4.0) is None
    assert describe(again(head(1), 0), 8.0) is None  # too coarse a grid


def put(root, name: str, subject: str, data: np.ndarray, affine: np.ndarray) -> None:
    folder = root / name / f"sub-{subject}"
    save_volume(folder / f"anat/sub-{subject}_T1w.nii.gz", data, affine)
    labels = np.where(data > 60, 2, 0).astype(np.int32)
    save_volume(root / name / f"derivatives/freesurfer/sub-{subject}/mri/aparc+aseg.mgz", labels, affine)
    with open(root / name / "participants.tsv", "a") as handle:
        handle.write(f"sub-{subject}\tF\t{30 + int(subject)}\n")


def test_one_head_in_two_databases_is_in_one_role(tmp_path, monkeypatch):
    """alpha/01 was scanned again for beta; alpha/02 is in gamma with other bytes, another type and another origin."""
    monkeypatch.chdir(tmp_path)
    root, affine = tmp_path / "roots", np.array([[-4.0, 0, 0, 126], [0, 0, 4, -126], [0, -4, 0, 126], [0, 0, 0, 1]])
    for name in ("alpha", "beta", "gamma"):
        (root / name).mkdir(parents=True)
        (root / name / "dataset_description.json").write_text(json.dumps({"Name": name, "BIDSVersion": "1.10.0"}))
        (root / name / "participants.tsv").write_text("participant_id\tsex\tage\n")
    for number, (name, subject) in enumerate((("alpha", "01"), ("alpha", "02"), ("alpha", "03"), ("beta", "02"), ("beta", "03"), ("gamma", "03"))):
        put(root, name, subject, again(head(number), number), affine)
    put(root, "beta", "01", again(head(0), 50, degrees=-6), affine)
    copy = load_image(root / "alpha/sub-02/anat/sub-02_T1w.nii.gz")
    put(root, "gamma", "02", copy.data.astype(np.int32), copy.affine + np.array([[0, 0, 0, 7]] * 3 + [[0] * 4]))
    (tmp_path / "params.yaml").write_text("index: {roots: [roots]}\nharmonise: {grid: 4mm}\nsplit: {folds: 3}\n")
    index.main()
    scans = read_table(index.SCANS_TABLE, "scans").to_pylist()
    assert len({row["person"] for row in scans}) == len({row["t1w_sha256"] for row in scans}) == 8  # neither bytes nor names tell
    samples, store = [], FolderStore(tmp_path / "shards")
    store.root.mkdir()
    for item in harmonise.plan_shards(scans, Harmonise(grid="4mm")):
        harmonise.make_shard(store, item, {name: str(root / name) for name in ("alpha", "beta", "gamma")}, Harmonise(grid="4mm"))
        samples += harmonise.collect(store, item["shard"])
    write_table(harmonise.SAMPLES_TABLE, "samples", samples)
    split.main()
    rows = read_table(split.SPLIT_TABLE, "split").to_pylist()
    person = {row["scan_id"]: row["person"] for row in rows}
    assert person["beta_sub-01"] == person["alpha_sub-01"] and person["gamma_sub-02"] == person["alpha_sub-02"] and len(set(person.values())) == 6
    for fold in range(3):
        role = {row["scan_id"]: row["role"] for row in rows if row["fold"] == fold}
        for one, two in (("alpha_sub-01", "beta_sub-01"), ("alpha_sub-02", "gamma_sub-02")):
            assert len({role[one], role[two]} - {"excluded"}) == 1, (fold, role)
    said = json.loads(split.SPLIT_PROOF.read_text())
    assert (said["people"]["merged"], said["people"]["scans_compared"]) == (2, 8)
    assert [entry["overlaps"] for entry in said["proof"] if entry["guard"] == "person"] == [0, 0, 0]
    settings = load_params().split
    apart, _ = rules.compile_split(scans, settings)  # by index alone, the same heads stand on both sides
    together = [row | {"person": person[row["scan_id"]]} for row in scans]
    assert any(entry["overlaps"] for entry in rules.prove(apart, together, settings) if entry["guard"] == "person")
