"""The comparison at equal compute: its arms cost the same, its scans keep apart, and it goes on where it was stopped."""

import csv

import numpy as np
import pytest
import yaml
from small_heads import CHECKOUT, box_heads

from data_registry.errors import InputError
from data_registry.params import load_settings
from lod_model import learning_curve, networks
from lod_model.learning_curve import Settings, interval, run, scans, step_macs
from lod_model.networks.cost import macs
from lod_model.tracking import Tracker
from lod_model.train_rendered import Stage

SMALL = {
    "voxel_mm": 8, "train_anatomies": 2, "training_sites": [1, 2], "test_sites": 2, "seeds": [0, 1], "tera_macs": 0.004,
    "arms": {
        "progressive": {"network": "lod_brain", "config": {"widths": [2, 2, 4], "groups": 2}, "stages": [
            {"name": "coarse", "level": "coarse", "share": 0.25, "learning_rate": 0.01},
            {"name": "fine", "level": "fine", "share": 0.75, "learning_rate": 0.01}]},
        "unet": {"network": "unet", "config": {"widths": [2, 4], "groups": 2}, "stages": [
            {"name": "fine", "level": "fine", "share": 1, "learning_rate": 0.01}]},
    },
}  # fmt: skip


def test_all_runs_are_made_once_and_cost_the_same(tmp_path, monkeypatch):
    settings, heads = Settings.model_validate(SMALL), box_heads(4)
    tracker = Tracker("learning_curve", uri=f"sqlite:///{tmp_path}/mlflow.db")
    real, made = learning_curve.train_and_test, []

    def counted(*arguments):
        made.append(arguments)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(learning_curve, "train_and_test", counted)
    with pytest.raises(KeyboardInterrupt):
        run(settings, heads, tmp_path, tracker=tracker)
    run(settings, heads, tmp_path, tracker=tracker)
    assert len(made) == 9, "eight runs and the one that was stopped"
    with open(tmp_path / "runs.tsv", encoding="utf-8") as file:
        assert file.readline().startswith("# ")
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len({(row["arm"], row["training_sites"], row["seed"]) for row in rows}) == 8
    assert all(abs(float(row["tera_macs"]) / settings.tera_macs - 1) < 0.1 for row in rows)
    assert all(0 <= float(row[role]) <= 1 for row in rows for role in ("seen", "unseen"))
    assert (tmp_path / "learning_curve.png").stat().st_size > 5000
    run(settings, heads, tmp_path, tracker=tracker)
    assert len(made) == 9
    with pytest.raises(InputError, match="runs.tsv: of other settings"):
        run(settings.model_copy(update={"tera_macs": 0.005}), heads, tmp_path, tracker=tracker)


def test_no_test_head_and_no_unseen_site_is_trained_on():
    settings, heads = Settings.model_validate(SMALL), box_heads(4)
    train, tests = scans(settings, heads, 2, 0)
    assert len(train) == 4 and len(tests["seen"]) == 2 and len(tests["unseen"]) == 4
    images = [sample.image.tobytes() for sample in (*train, *tests["seen"], *tests["unseen"])]
    assert len(set(images)) == len(images)
    again, _ = scans(settings, heads, 2, 0)
    other, _ = scans(settings, heads, 2, 1)
    assert np.array_equal(train[0].image, again[0].image) and not np.array_equal(train[0].image, other[0].image)


def test_steps_cost_what_their_levels_cost():
    whole = networks.build("lod_brain")
    fine = Stage(name="fine", steps=1, learning_rate=1)
    assert step_macs(whole, fine, 4) == 3 * macs(whole, 64)
    coarse = networks.build("lod_brain", {"levels": 1, "coarse_pool": 2})
    cost = step_macs(coarse, fine.model_copy(update={"level": "coarse"}), 4)
    alone = networks.build("lod_brain", {"levels": 1, "coarse_pool": 1})
    assert cost == 3 * macs(alone, 32) < step_macs(whole, fine, 4) / 5


def test_the_shipped_settings_are_right():
    settings = load_settings(CHECKOUT / "params/learning_curve.yaml", Settings)
    assert len(settings.seeds) >= 3 and all(abs(sum(s.share for s in arm.stages) - 1) < 1e-9 for arm in settings.arms.values())
    ratio = macs(networks.build("unet"), 64) / macs(networks.build("lod_brain"), 64)
    assert abs(ratio - 1) < 0.05


def test_interval_by_hand():
    """Three values 1 apart: deviation 1, t = 4.303, half width 4.303 / √3."""
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.3027 / 3**0.5, abs=1e-3) and np.isnan(interval([1.0])[1])


def test_wrong_settings_are_one_line(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"tera_mac": 1}))
    with pytest.raises(InputError, match="tera_mac is not a known key; voxel_mm, "):
        load_settings(path, Settings)
    with pytest.raises(InputError, match="the settings file is wanted"):
        load_settings(tmp_path / "none.yaml", Settings)
    with pytest.raises(InputError, match="train_anatomies is 2: of 2 label maps"):
        run(Settings.model_validate(SMALL), box_heads(2), tmp_path, tracker=None)
