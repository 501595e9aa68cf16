"""Settings: the project's own file is valid, and each mistake is one line that names the key."""

from pathlib import Path

import pytest

from data_registry.errors import InputError
from data_registry.params import fingerprint, load_params

CHECKOUT = Path(__file__).parents[1]


def write(tmp_path, text: str) -> Path:
    (tmp_path / "params.yaml").write_text(text)
    return tmp_path / "params.yaml"


def test_the_projects_own_settings():
    params = load_params(CHECKOUT / "params.yaml")
    assert params.run_name("lod_brain") == "lod_brain-base-0"
    with pytest.raises(ValueError, match="frozen"):
        params.train.seed = 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("index: {roots: [a]}\nharmonize: {}\n", "harmonize is not a known key; experiment, networks, index, harmonise"),
        ("index: {roots: [a]}\ntrain: {epochs: 3}\n", "train.epochs is not a known key; protocol, recipe, seed, coarse"),
        ("index: {roots: [a]}\nharmonise: {grid: 1}\n", "harmonise.grid is 1"),
        ("index: {roots: [a]}\nharmonise: {grid: big}\n", "harmonise.grid is 'big': grid 'big' is not known"),
        ("index: {roots: [a]}\nharmonise: {block_protocols: [lod8]}\n", "protocol 'lod8' is not known; one of fastsurfer51"),
        ("index: {roots: [a]}\nharmonise: {intensity: n5}\n", "harmonise.intensity is 'n5': Input should be 'robust', 'n4', 'whitestripe' or"),
        ("index: {roots: [a]}\nharmonise: {interpolation: nearest}\n", "harmonise.interpolation is 'nearest': Input should be 'linear' or 'cubic'"),
        ("index: {roots: [a]}\ntrain: {standardise: z}\n", "train.standardise is 'z': Input should be 'none' or 'nyul'"),
        ("index: {roots: [a]}\nsplit: {folds: 0}\n", "split.folds is 0"),
        ("index: {roots: [a]}\nsplit: {key: planet}\n", "split.key is 'planet'"),
        ("index: {roots: [a]}\ntrain: {fine_patch: 0}\n", "train.fine_patch is 0"),
        ("index: {roots: [a]}\ntrain: {coarse_level: melted}\n", "train.coarse_level is 'melted': Input should be 'trained' or 'frozen'"),
        ("index: {roots: [a]}\ntrain: {whole_epochs: 2}\n", "whole_epochs is 2; 0 without fine_patch is wanted"),
        ("index: {roots: [a]}\ntrain: {fine_patch: 8, whole_epochs: 51}\n", "whole_epochs is 51; at most the 50 of fine.epochs is wanted"),
        ("index: {roots: [a]}\nresources: {launcher: pbs}\n", "resources.launcher is 'pbs': Input should be 'local' or 'slurm'"),
        ("index: {roots: [a]}\nresources: {slurm: {time: 3}}\n", "resources.slurm.time is not a known key; partition, account, options"),
        ("index: {roots: [a]}\nresources: {slurm: {train: {gpu: 1}}}\n", "resources.slurm.train.gpu is not a known key; hours, nodes"),
        ("index: {roots: [a]}\nresources: {slurm: {warning_s: 2000}}\n", "sync.hours is 1.0; at least twice warning_s, 2000 s, is wanted"),
        ("experiment: base\n", "index is missing"),
        ("index: [\n", "not valid YAML"),
    ],
)
def test_mistakes(tmp_path, text, words):
    with pytest.raises(InputError) as caught:
        load_params(write(tmp_path, text))
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "params.yaml")) and "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="params.yaml: No such file"):
        load_params(tmp_path / "params.yaml")


def test_fingerprints_see_settings():
    first = load_params(CHECKOUT / "params.yaml").train
    assert fingerprint(first) == fingerprint(first.model_copy())
    assert fingerprint(first) != fingerprint(first.model_copy(update={"seed": 1}))
