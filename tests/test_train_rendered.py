"""Training on renderings alone: steps that do what they say, stopped and resumed alike, weights that segment uses."""

import numpy as np
import pytest
import torch
from small_heads import box_heads

from data_registry.errors import InputError
from data_registry.params import load_settings
from data_registry.volume import save_volume
from lod_model import train_rendered, weights
from lod_model.render import Anatomy
from lod_model.train_rendered import Recipe, Renderings, Stage, _loss, _window, build_stage, load_anatomies, train

TINY = {"widths": [2, 2, 4], "groups": 2}
RECIPE = Recipe(
    config=TINY, voxel_mm=8, seed=3,
    stages=(
        Stage(name="coarse", level="coarse", steps=3, learning_rate=0.01, samples=2),
        Stage(name="fine", steps=3, learning_rate=0.01, window=16, samples=2),
        Stage(name="whole", steps=2, learning_rate=0.01, samples=2),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def heads() -> list[Anatomy]:
    return box_heads(2)


def test_a_stopped_training_ends_with_the_same_weights(heads, tmp_path, monkeypatch):
    """Once undisturbed; once saved at every step and stopped in the middle of each stage; on another number of workers."""
    straight = weights.load(train(RECIPE, heads, tmp_path / "straight"))
    monkeypatch.setattr(train_rendered, "SAVE_SECONDS", -1)
    for stop_at in (("coarse", 2), ("fine", 1), ("whole", 1)):
        real = train_rendered._step

        def step(network, stage, *rest, left=[stop_at[1]], stop=stop_at[0], real=real):  # noqa: B006
            if stage.name == stop:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            return real(network, stage, *rest)

        monkeypatch.setattr(train_rendered, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, heads, tmp_path / "stopped")
        monkeypatch.setattr(train_rendered, "_step", real)
    resumed = weights.load(train(RECIPE, heads, tmp_path / "stopped", workers=1))
    assert resumed.hash == straight.hash
    assert (straight.grid, straight.protocol, straight.name) == ("8mm", "lod7", "lod_brain")
    assert straight.provenance["anatomies"] == ["box-0", "box-1"] and straight.provenance["recipe"]["seed"] == 3
    log = [line.split("\t")[:2] for line in (tmp_path / "straight" / "log.tsv").read_text().splitlines()]
    assert log == [["coarse", "3"], ["fine", "3"], ["whole", "2"]]
    again = weights.load(train(RECIPE, heads, tmp_path / "straight"))
    assert again.hash == straight.hash, "a finished training is not trained again"


def test_later_stages_may_change_what_is_done_may_not(heads, tmp_path):
    train(RECIPE.model_copy(update={"stages": RECIPE.stages[:1]}), heads, tmp_path)
    train(RECIPE.model_copy(update={"stages": RECIPE.stages[:2]}), heads, tmp_path)
    with pytest.raises(InputError, match="state.pt: of another recipe"):
        train(RECIPE.model_copy(update={"seed": 4}), heads, tmp_path)


def test_training_lowers_the_loss(heads, tmp_path):
    stages = (Stage(name="only", steps=50, learning_rate=0.02, samples=1),)
    recipe = Recipe(config=TINY, voxel_mm=8, stages=stages, rendering={"strength": 0, "stripped": 0})
    notes = []
    network = build_stage(recipe, recipe.stages[0])
    samples = [Renderings(heads, recipe, recipe.stages[0])[n] for n in range(2)]

    class Repeated(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, step):
            return samples[step % 2]

    stage = recipe.stages[0].model_copy(update={"steps": 100})
    train_rendered.fit(network, stage, Repeated(), recipe=recipe, note=lambda *figures: notes.append(figures))
    assert [note[0] for note in notes] == [50, 100] and notes[1][3] < 0.9 * notes[0][3]


def test_the_sample_of_a_step_is_its_own(heads):
    samples = Renderings(heads, RECIPE, RECIPE.stages[1])
    a, b, c = samples[0], samples[0], samples[1]
    assert torch.equal(a["image"], b["image"]) and not torch.equal(a["image"], c["image"])
    assert torch.allclose(a["fractions"].sum(0), torch.ones(32, 32, 32)) and a["image"].shape == (1, 32, 32, 32)
    assert abs(float(a["image"].mean())) < 1e-4 and abs(float(a["image"].std()) - 1) < 1e-2


def test_loss_by_hand():
    """Two voxels, three classes of which one is not there; p = (1/3, 1/3, 1/3) everywhere."""
    logits = torch.zeros(1, 3, 1, 1, 2)
    fractions = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0]]).view(1, 3, 1, 1, 2)
    loss, dice = _loss(logits, fractions, 0.5)
    first, second = 2 * 0.5 / (2 / 9 + 1.25), 2 * (1 / 6) / (2 / 9 + 0.25)
    assert torch.allclose(dice[:2], torch.tensor([first, second])) and dice[2].isnan()
    assert float(loss) == pytest.approx(1 - (first + second) / 2 + 0.5 * np.log(3), abs=1e-5)


def test_a_window_holds_the_brain_where_it_can():
    counts = np.zeros((7, 64, 64, 64), dtype=np.uint8)
    counts[0] = 8
    counts[0, 20:40, 5:30, 30:62], counts[3, 20:40, 5:30, 30:62] = 0, 8
    firsts = np.array([_window(counts, 40, np.random.default_rng(seed), step=8) for seed in range(60)])
    assert (firsts % 8 == 0).all() and firsts.min() >= 0 and (firsts + 40).max() <= 64
    for axis, (low, high) in enumerate(((20, 40), (5, 30), (30, 62))):
        assert (firsts[:, axis] <= low).all() and (firsts[:, axis] + 40 >= high).all()
    assert len(np.unique(firsts[:, 0])) > 1
    wide = np.array([_window(counts, 16, np.random.default_rng(seed), step=8) for seed in range(60)])
    assert (wide[:, 2] >= 24).all() and len(np.unique(wide[:, 2])) > 1, "a window smaller than the brain stays within it"


def test_windows_fit_every_number_of_levels():
    """Three levels want windows from and to multiples of 32 voxels."""
    stage = Stage(name="fine", steps=6, learning_rate=1e-3, window=32)
    recipe = RECIPE.model_copy(update={"config": {"widths": [2, 2, 2, 2], "groups": 2, "levels": 3}, "voxel_mm": 4, "stages": (stage,)})
    samples = Renderings(box_heads(2), recipe, stage)
    assert all((samples[step]["window"] % 32 == 0).all() for step in range(6))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stages: [{name: a, steps: 0, learning_rate: 1}]", "stages.0.steps is 0"),
        ("voxels: 2\nstages: []", "voxels is not a known key; network, "),
        ("rendering: {noise: 1}\nstages: []", "rendering: noise is not known; rotation_degrees, "),
        ("{", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_line(tmp_path, text, line):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=line) as error:
        load_settings(tmp_path / "recipe.yaml", Recipe)
    assert "\n" not in str(error.value)


def test_the_packaged_recipe_is_right():
    recipe = load_settings("params/rendered.yaml", Recipe)
    assert [build_stage(recipe, stage).config.levels for stage in recipe.stages] == [1, 2, 2, 2]


def test_wrong_input_is_one_line(heads, tmp_path):
    with pytest.raises(InputError, match="no label maps; .* wanted"):
        load_anatomies(tmp_path)
    save_volume(tmp_path / "a.nii.gz", np.ones((8, 8, 8), dtype=np.uint8), np.eye(4))
    stage = RECIPE.stages[1].model_copy(update={"window": 12})
    with pytest.raises(InputError, match="window 12; a multiple of 8 up to 32 is wanted"):
        train(RECIPE.model_copy(update={"stages": (stage,)}), heads, tmp_path / "out")
