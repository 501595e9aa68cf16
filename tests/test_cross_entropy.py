"""NeuroNet's loss against arithmetic done by hand."""

import math

import pytest
import torch

from lod_model.cross_entropy import IGNORED, protocols_cross_entropy


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    """Logits (B, 2, 1, 1, n) whose softmax gives class 1 these probabilities, a row a scan."""
    p = torch.tensor(probabilities, dtype=torch.float64)[:, None, None]
    return torch.stack([(1 - p).log(), p.log()], 1)


def target_of(*classes: list[int]) -> torch.Tensor:
    return torch.tensor(classes, dtype=torch.uint8)[:, None, None]


def test_by_hand():
    logits = {"a": logits_of([0.5, 0.75, 0.9]), "b": logits_of([0.2, 0.2, 0.6])}
    targets = {"a": target_of([1, 1, 0]), "b": target_of([0, 1, IGNORED])}
    a = -(math.log(0.5) + math.log(0.75) + math.log(0.1)) / 3
    b = -(math.log(0.8) + math.log(0.2)) / 2                       # the third voxel counts neither above nor below the line
    assert protocols_cross_entropy(logits, targets).item() == pytest.approx((a + b) / 2)


def test_each_scan_averages_the_protocols_it_has():
    # scan 0 has both, scan 1 only b, scan 2 none: the mean is over scans 0 and 1
    logits = {"a": logits_of([0.5], [0.3], [0.3]), "b": logits_of([0.8], [0.1], [0.3])}
    targets = {"a": target_of([1], [IGNORED], [IGNORED]), "b": target_of([1], [1], [IGNORED])}
    of_scans = [-(math.log(0.5) + math.log(0.8)) / 2, -math.log(0.1)]
    assert protocols_cross_entropy(logits, targets).item() == pytest.approx(sum(of_scans) / 2)


def test_a_protocol_without_labels_costs_nothing_and_has_a_gradient_of_zero():
    weight = {name: torch.zeros(1, 2, 1, 2, 3, requires_grad=True) for name in ("a", "b")}
    target = torch.ones(1, 1, 2, 3, dtype=torch.long)
    loss = protocols_cross_entropy(weight, {"a": target})
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert weight["a"].grad.abs().sum() > 0 and weight["b"].grad.abs().sum() == 0
    torch.testing.assert_close(weight["a"].grad[0, :, 0, 0, 0], torch.tensor([0.5, -0.5]) / 6)   # (p − g) / voxels
    everywhere = {"a": target, "b": torch.full_like(target, IGNORED)}
    assert protocols_cross_entropy(weight, everywhere).item() == loss.item()


def test_nothing_labelled_is_zero_not_nan():
    logits = {"a": torch.full((2, 3, 1, 1, 2), 1e30, requires_grad=True)}
    loss = protocols_cross_entropy(logits, {"a": torch.full((2, 1, 1, 2), IGNORED)})
    loss.backward()
    assert loss.item() == 0 and logits["a"].grad.abs().sum() == 0
    assert protocols_cross_entropy(logits, {}).item() == 0


def test_half_precision_is_summed_in_single():
    logits = torch.zeros(1, 4, 32, 32, 32, dtype=torch.bfloat16)
    loss = protocols_cross_entropy({"a": logits}, {"a": torch.zeros(1, 32, 32, 32, dtype=torch.uint8)})
    assert loss.dtype is torch.float32 and loss.item() == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ({"c": torch.zeros(1, 1, 1, 2, dtype=torch.long)}, "target: protocol c, wanted some of a"),
        ({"a": torch.zeros(1, 1, 2, dtype=torch.long)}, r"target a: \(1, 1, 2\) torch.int64, wanted integers of \(1, 1, 1, 2\)"),
        ({"a": torch.zeros(1, 1, 1, 2)}, "wanted integers"),
        ({"a": torch.full((1, 1, 1, 2), 3)}, "target a: 2 voxels outside the classes 0 … 2"),
        ({"a": torch.tensor([[[[0, -1]]]])}, "target a: 1 voxels outside the classes 0 … 2, and not 255"),
    ],
)
def test_what_does_not_fit_is_refused(targets, words):
    with pytest.raises(ValueError, match=words):
        protocols_cross_entropy({"a": torch.zeros(1, 3, 1, 1, 2)}, targets)
