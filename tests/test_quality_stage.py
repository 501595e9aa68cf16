"""The stage quality: its table, its pages, and what the split makes of it."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_heads import CHECKOUT, add_subject, run

from data_registry.errors import InputError
from data_registry.files import sha256
from data_registry.ledgers import Tombstone, Withdrawn, bury
from data_registry.params import Harmonise
from data_registry.schema import read_table, write_table
from data_registry.shard_store import FolderStore
from pipelines import harmonise, split
from pipelines import quality as stage
from pipelines.quality_page import SIDE, thumbnail, write_pages


def test_the_picture_has_the_left_on_the_right():
    t1w, ids = np.zeros((64, 64, 64), np.uint8), np.zeros((64, 64, 64), np.uint16)
    t1w[10:54, 10:54, 10:54] = 60
    t1w[44:54, 26:38, 42:54] = 250                                                  # left, middle, anterior
    t1w[28:36, 10:20, 10:20] = 250                                                  # superior, posterior, in the middle between the sides
    ids[20:44, 20:44, 20:40] = 2
    picture = np.array(Image.open(io.BytesIO(thumbnail(t1w, None))).convert("L")).astype(int)
    assert picture.shape == (SIDE, 3 * SIDE)
    axial, sagittal = picture[:, :SIDE], picture[:, 2 * SIDE :]
    row, column = np.argwhere(axial > 200).mean(0)
    assert column > 0.6 * SIDE and row < 0.4 * SIDE                                 # on the right, and anterior is up
    row, column = np.argwhere(sagittal > 200).mean(0)
    assert row < 0.4 * SIDE and column > 0.6 * SIDE                                 # superior is up, posterior on the right
    outlined = np.array(Image.open(io.BytesIO(thumbnail(t1w, ids)))).astype(int)
    assert ((outlined[..., 0] - outlined[..., 2]) > 100).sum() > 200 and thumbnail(t1w, ids) == thumbnail(t1w, ids)


def row(name: str, site: str = "s", verdict: str = "pass", **more) -> dict:
    about = {"scan_id": name, "database": "db", "site": site, "verdict": verdict}
    return about | {"reasons": [], "suspicion": 0.0, "beside": {}, "warnings": None} | more


def test_pages_stay_small_sorted_and_offline(tmp_path):
    (tmp_path / "site=db.gone.html").write_text("")
    table = [row(f"a{k:03d}", site=f"x/{k % 3}") for k in range(150)]
    table += [row("<b>", verdict="fail", suspicion=120.0, reasons=["5 < 6 & more"], efc=0.5, cjv=0.9, beside={"cjv": 4.2})]
    write_pages(tmp_path, table, {one["scan_id"]: "AAAA" for one in table}, [{"scan_id": "lost", "database": "db", "site": "s", "reason": "cut"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality.html", "site=db.s.html", *(f"site=db.x%2F{k}.html" for k in range(3))]
    page = (tmp_path / "quality.html").read_text()
    assert page.count('<li class="scan"') == 20 and page.index("&lt;b&gt;: fail") < page.index("a000: pass") and "<b>:" not in page
    assert "5 &lt; 6 &amp; more" in page and "4.2&sigma;" in page and "lost" in page and 'href="site%3Ddb.x%252F0.html"' in page
    assert "//" not in page.replace("</", "").split("<script>")[0] and "src=\"data:image/jpeg" in page
    assert (tmp_path / "site=db.x%2F0.html").read_text().count('<li class="scan"') == 50
    before = {path.name: sha256(path) for path in tmp_path.iterdir()}
    write_pages(tmp_path, table, {one["scan_id"]: "AAAA" for one in table}, [{"scan_id": "lost", "database": "db", "site": "s", "reason": "cut"}])
    assert before == {path.name: sha256(path) for path in tmp_path.iterdir()}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of two people at one site, harmonised without Ray."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("index: {roots: [roots]}\nharmonise: {grid: 6mm}\nsplit: {folds: 1, quality: exclude_fail}\n")
    Path("shards").mkdir()
    scans = []
    for subject in ("00", "01", "02"):
        add_subject(tmp_path / "roots/db", subject, seed=int(subject))
        label = {"source": "aparc_aseg", "path": f"derivatives/freesurfer/sub-{subject}/mri/aparc+aseg.mgz", "sha256": subject}
        scans.append({"scan_id": f"db_sub-{subject}", "database": "db", "site": "db", "place": "db", "subject": subject,
                      "person": f"db_{subject}", "t1w_path": f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz", "t1w_sha256": subject,
                      "labels": [label], "reason": None})  # fmt: skip
    settings, store = Harmonise(grid="6mm", shards_per_site=7), FolderStore(tmp_path / "shards")
    samples = []
    for item in harmonise.plan_shards(scans, settings):
        harmonise.make_shard(store, item, {"db": str(tmp_path / "roots/db")}, settings)
        samples += harmonise.collect(store, item["shard"])
    write_table(harmonise.SAMPLES_TABLE, "samples", samples)
    write_table(stage.SCANS_TABLE, "scans", scans)
    return tmp_path


def test_the_stage_looks_at_what_is_new(project, monkeypatch):
    looked, look = [], stage.look_at_shard
    monkeypatch.setattr(stage, "look_at_shard", lambda store, item: looked.append(item["shard"]) or look(store, item))
    (stage.FOUND / "old.json").parent.mkdir(parents=True)
    (stage.FOUND / "old.json").write_text("[]")
    stage.main()
    shards = len(looked)
    first, page = sha256(stage.QUALITY_TABLE), sha256(stage.PAGES / "quality.html")
    assert shards == len(list(stage.FOUND.iterdir())) > 1                           # and what no shard asks for is gone
    gone, damaged, *_ = stage.FOUND.glob("*.json")
    gone.unlink()
    damaged.write_text(damaged.read_text()[:99])                                    # it is a cache: made anew
    stage.main()
    assert len(looked) == shards + 2 and (sha256(stage.QUALITY_TABLE), sha256(stage.PAGES / "quality.html")) == (first, page)
    rows = read_table(stage.QUALITY_TABLE, "quality").to_pylist()
    assert [one["scan_id"] for one in rows] == ["db_sub-00", "db_sub-01", "db_sub-02"] and {one["verdict"] for one in rows} <= {"review", "fail"}
    assert all(one["volumes_ml"] and one["efc"] > 0 for one in rows)
    found = json.loads(next(stage.FOUND.iterdir()).read_text())
    assert base64.b64decode(found[0]["picture"])[:2] == b"\xff\xd8"


@pytest.mark.parametrize("module", ["pipelines.index", "pipelines.quality", "pipelines.split", "lod_model.evaluate", "lod_model.report"])
def test_a_stage_without_arguments_refuses_them_and_has_a_help(module):
    wrong, told = run(CHECKOUT, module, "--folds", "3"), run(CHECKOUT, module, "--help")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1] == f"python -m {module}: error: unrecognized arguments: --folds 3"
    assert told.returncode == 0 and f"python -m {module}" in told.stdout and "Stage" in told.stdout


def test_who_is_withdrawn_is_forgotten(project):
    stage.main()
    kept = len(list(stage.FOUND.iterdir()))
    stone = Tombstone("db", "00", "2026-01-31", "asked for it")
    (stage.FOUND / "damaged.json").write_text('[{"scan_id": "db_sub-00"')              # whoever is in it
    assert stage.forget(Withdrawn([stone])) == 2 and len(list(stage.FOUND.iterdir())) == kept - 1
    bury([stone])
    stage.main()                                                                    # whatever the samples table still says
    assert [one["scan_id"] for one in read_table(stage.QUALITY_TABLE, "quality").to_pylist()] == ["db_sub-01", "db_sub-02"]
    assert not any(b"db_sub-00" in path.read_bytes() for folder in (stage.PAGES, stage.FOUND) for path in folder.iterdir())


def test_the_split_leaves_out_what_fails_only_if_asked(project):
    stage.main()
    rows = read_table(stage.QUALITY_TABLE, "quality").to_pylist()
    for one, verdict in zip(rows, ("fail", "pass", "review"), strict=True):
        one |= {"verdict": verdict, "reasons": ["it is dark"] if verdict != "pass" else []}
    write_table(stage.QUALITY_TABLE, "quality", rows)
    split.main()
    assert {one["scan_id"] for one in read_table(split.SPLIT_TABLE, "split").to_pylist()} == {"db_sub-01", "db_sub-02"}
    notes = json.loads(split.SPLIT_PROOF.read_text())["notes"]
    assert "db_sub-00: left out, its quality fails: it is dark" in notes
    assert "tables/people.tsv: 3 of 3 scans are compared with none by their heads (likeness off, grid too coarse, or no brain found)" in notes
    write_table(stage.QUALITY_TABLE, "quality", [rows[0], rows[1] | {"shard_sha256": "other"}, rows[2]])
    with pytest.raises(InputError, match="not about db_sub-01 as it stands in tables/samples.parquet; run `python -m pipelines.quality` again"):
        split.main()
    write_table(stage.QUALITY_TABLE, "quality", [one | {"verdict": "fail", "reasons": ["x"]} for one in rows])
    with pytest.raises(InputError, match="the verdict on all 3 labelled scans is fail"):
        split.main()
    os.remove(stage.QUALITY_TABLE)
    Path("params.yaml").write_text("index: {roots: [roots]}\nsplit: {folds: 1}\n")
    split.main()                                                                    # who only reports needs no table
    assert len(read_table(split.SPLIT_TABLE, "split")) == 3
