"""Scores of one weight file on labelled databases."""

import sys

import numpy as np
import pytest
import torch
from small_heads import add_subject

from data_registry.conform import labels_to_grid, place_grid
from data_registry.errors import InputError
from data_registry.protocol import load
from data_registry.volume import load_image, load_labels
from lod_model import score, weights
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    return weights.save(path, LODBrain(LODBrainConfig(widths=(2, 2, 4))), name="lod_brain", protocol="lod7", grid="8mm", provenance={})


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["score", *map(str, arguments)])
    score.main()


def test_a_perfect_segmentation_scores_one_a_wrong_one_less(tiny, tmp_path, monkeypatch, capsys):
    add_subject(tmp_path / "alpha", "01", seed=0)
    add_subject(tmp_path / "alpha", "02", seed=1)
    (tmp_path / "alpha/derivatives/freesurfer/sub-02/mri/aparc+aseg.mgz").unlink()
    placement = place_grid(load_image(tmp_path / "alpha/sub-01/anat/sub-01_T1w.nii.gz"), "1mm")
    labels = load_labels(tmp_path / "alpha/derivatives/freesurfer/sub-01/mri/aparc+aseg.mgz")
    truth = load("lod7").classes_of(labels_to_grid(labels, placement))
    mirrored = truth[::-1]
    for answer, right in ((truth, True), (mirrored, False)):
        monkeypatch.setattr(score, "classes_of", lambda scan, answer=answer, **_: (answer, (), ()))
        command(monkeypatch, "--weights", tiny, "--out", tmp_path / "scores.tsv", tmp_path / "alpha")
        out, err = capsys.readouterr()
        header, row = (line.split("\t") for line in out.splitlines())
        assert header[:2] == ["database", "scan"] and row[:2] == ["alpha", "sub-01_T1w"] and out == (tmp_path / "scores.tsv").read_text()
        values = np.array(row[2:], dtype=float)
        assert (values == 1).all() if right else (values < 1).all(), values
        assert "sub-02_T1w.nii.gz: no labels that lod7 speaks of; left out" in err


def test_nothing_to_score_is_one_line(tiny, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no T1w with labels that lod7 speaks of; BIDS databases are wanted"):
        command(monkeypatch, "--weights", tiny, tmp_path)
