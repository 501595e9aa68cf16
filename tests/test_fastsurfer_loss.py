"""FastSurfer's loss and pixel weights: against its public code on small random cases, against arithmetic by hand, and what is left out."""

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from data_registry.protocol import IGNORED, load
from lod_model.fastsurfer_loss import combined_loss
from lod_model.pixel_weights import PARTS, pixel_weights

CORTEX = load("fastsurfer79").cortex


@pytest.fixture(scope="module")
def losses(test_data) -> dict[str, np.ndarray]:
    return dict(np.load(test_data / "reference_networks/fastsurfer_losses.npz"))


def certain(p: list[float]) -> torch.Tensor:
    """Logits (1, 2, 1, n) whose softmax gives class 1 the probabilities p."""
    p = torch.tensor(p, dtype=torch.float64)
    return torch.stack([(1 - p).log(), p.log()])[None, :, None]


# Loss


@pytest.mark.parametrize("case", ["A_1_1", "B_1_1", "A_0.5_2"])  # target B lacks a class
def test_loss_and_gradient_of_the_public_code(losses, case):
    target, *weights = case.split("_")
    logits = torch.tensor(losses["logits"], requires_grad=True)
    arguments = torch.tensor(losses[f"target_{target}"]), torch.tensor(losses["pixel_weight"])
    loss = combined_loss(logits, *arguments, dice_weight=float(weights[0]), ce_weight=float(weights[1]))
    loss.total.backward()
    assert [value.item() for value in loss] == pytest.approx(losses[f"combined/{case}/total_dice_ce"].tolist(), abs=1e-6)
    expected = losses[f"combined/{case}/grad_logits"]
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=0, atol=1e-7)


def test_parts_of_the_public_code(losses):
    logits, target = torch.tensor(losses["logits"]), torch.tensor(losses["target_A"])
    assert combined_loss(logits, target).dice.item() == pytest.approx(losses["dice/plain_A"].item(), abs=1e-6)
    assert combined_loss(logits, target).ce.item() == pytest.approx(losses["ce_map_A"].mean(), abs=1e-6)
    without = torch.where(target == 0, IGNORED, target)  # its ignore_index, and background still a class
    assert combined_loss(logits, without).dice.item() == pytest.approx(losses["dice/ignore_index_0_A"].item(), abs=1e-6)
    assert combined_loss(logits, without).ce.item() == pytest.approx(losses["ce_map_A"][losses["target_A"] != 0].mean(), abs=1e-6)


def test_by_hand():
    # class 1: p = .5 .75 .25, g = 1 1 0: Σpg 1.25, Σp 1.5, Σg 2;  class 0: p = .5 .25 .75, g = 0 0 1: Σpg .75, Σp 1.5, Σg 1
    target, weight = torch.tensor([[[1, 1, 0]]]), torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64)
    loss = combined_loss(certain([0.5, 0.75, 0.25]), target, weight)
    dice = 1 - (2.5 / 3.501 + 1.5 / 2.501) / 2
    ce = (np.log(2) + 2 * np.log(4 / 3) + 3 * np.log(4 / 3)) / 3  # over three pixels, not over Σweight = 6
    assert [value.item() for value in loss] == pytest.approx([dice + ce, dice, ce], abs=1e-12)
    assert combined_loss(certain([0.5, 0.75, 0.25]), target, weight, dice_weight=0).total.item() == pytest.approx(ce)
    assert combined_loss(certain([0.5, 0.75, 0.25]), target, weight, ce_weight=0).total.item() == pytest.approx(dice)


def test_what_is_left_out_might_as_well_not_be_there():
    generator = torch.Generator().manual_seed(0)
    logits, weight = torch.randn(2, 5, 6, 8, generator=generator), torch.rand(2, 6, 8, generator=generator)
    target = torch.randint(0, 5, (2, 6, 8), generator=generator, dtype=torch.uint8)
    target[:, :, 5:] = IGNORED
    whole, cut = logits.clone().requires_grad_(), logits[..., :5].clone().requires_grad_()
    one, other = combined_loss(whole, target, weight), combined_loss(cut, target[..., :5], weight[..., :5])
    assert [value.item() for value in one] == pytest.approx([value.item() for value in other], abs=1e-6)
    one.total.backward(), other.total.backward()
    assert not whole.grad[..., 5:].any() and cut.grad.abs().max() > 1e-3
    torch.testing.assert_close(whole.grad[..., :5], cut.grad)


def test_nothing_to_learn_from():
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss = combined_loss(logits, torch.full((1, 2, 2), IGNORED))
    loss.total.backward()
    assert (loss.ce.item(), loss.dice.item()) == (0, 1) and not logits.grad.any()


def test_half_precision_and_autocast_are_summed_in_single():
    logits, target = torch.randn(2, 5, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.arange(512).view(2, 16, 16) % 5
    alone = combined_loss(logits.float(), target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = combined_loss(logits.requires_grad_(), target)
    assert all(value.dtype is torch.float32 and value.item() == other.item() for value, other in zip(loss, alone, strict=True))
    loss.total.backward()
    assert logits.grad.dtype is torch.bfloat16 and logits.grad.any()


def test_a_class_of_a_million_pixels_is_not_rounded_away():
    target = torch.zeros(16, 256, 256, dtype=torch.uint8)
    loss = combined_loss(torch.tensor([4.6, 0.0])[None, :, None, None].expand(16, 2, 256, 256), target)
    p, n = 1 / (1 + np.exp(-4.6)), 2**20
    assert loss.dice.item() == pytest.approx(1 - p * n / (p * n + n + 1e-3), abs=1e-5)
    assert loss.ce.item() == pytest.approx(-np.log(p), rel=1e-4)


@pytest.mark.parametrize(
    ("target", "weight", "words"),
    [
        (torch.full((1, 2, 2), 3), None, "4 pixels outside the classes 0 … 2"),
        (torch.full((1, 2, 2), -1), None, "4 pixels outside"),
        (torch.zeros(1, 2, 2), None, "wanted integers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, r"target: \(1, 2, 3\)"),
        (torch.zeros(1, 2, 2, dtype=torch.long), torch.ones(2, 2), r"weight: \(2, 2\), wanted \(1, 2, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(target, weight, words):
    with pytest.raises(ValueError, match=words):
        combined_loss(torch.zeros(1, 3, 2, 2), target, weight)


# Pixel weights

VARIANTS = ("median_only", "gradient", "gradient_edge3_cap2", "hires_no_cortex", "hires_cortex", "hires_cortex_even", "hires_float", "hires_only",
            "hires_mean_filter")  # fmt: skip


@pytest.mark.parametrize("name", [*(f"ctx33/{name}" for name in VARIANTS), "ctx19/gradient", "ctx19/hires_cortex"])
def test_weights_of_the_public_code(test_data, name):
    reference = np.load(test_data / "reference_networks/fastsurfer_weight_masks.npz")
    asked = {"gradient": True, "cortex_mask": True, "mean_filter": False, "max_hires_weight": None, "max_edge_weight": 5, "max_weight": 5}
    asked |= json.loads(str(reference["config"]))["variants"][name]
    hires = asked["max_hires_weight"]
    chosen = {"median": True, "hires": hires, "gm": hires and asked["cortex_mask"]} | {part: asked[part] for part in ("gradient", "mean_filter")}
    labels = reference[asked["labels"]]
    weights = pixel_weights(
        labels, np.arange(labels.max() + 1) > asked["ctx_thresh"], parts={part for part, there in chosen.items() if there},
        most=asked["max_weight"], gradient=asked["max_edge_weight"], hires=hires or 0, gm=(hires or 0) // 2,
    )  # fmt: skip
    np.testing.assert_allclose(weights, reference[f"weights/{name}"], rtol=0, atol=2e-6)


def test_weights_by_hand():
    """A strand of white matter (1) in cortex (2), five slices alike; the middle one.

    Counts 80, 5, 40: median 40, weights 0.5, 5 (8 at most 5), 1. The label changes everywhere but in the corners and on the strand, whose
    neighbours on opposite sides are equal. The closing of the cortex adds the strand; all cortex is at the brain's surface.
    """
    one = np.array([[0, 0, 0, 0, 0], [0, 2, 2, 2, 0], [0, 2, 1, 2, 0], [0, 2, 2, 2, 0], [0, 0, 0, 0, 0]], np.uint8)
    classes, cortex = np.repeat(one[None], 5, axis=0), np.array([False, False, True])
    corner, air, ring, strand = 0.5, 0.5 + 4, 1 + 4 + 2, 5 + 4
    expected = [[corner, air, air, air, corner], [air, ring, ring, ring, air], [air, ring, strand, ring, air]]
    assert pixel_weights(classes, cortex)[2].tolist() == [*expected, expected[1], expected[0]]
    alone = {"median": (0.5, 0.5, 1, 5), "gradient": (1, 5, 5, 1), "hires": (1, 1, 1, 5), "gm": (1, 1, 3, 1)}
    assert set(alone) == set(PARTS)
    for part, values in alone.items():
        found = pixel_weights(classes, cortex, parts=[part])[2]
        assert (found[0, 0], found[0, 1], found[1, 1], found[2, 2]) == values
    with pytest.raises(ValueError, match="parts: cortex not known; median, gradient, hires, gm, mean_filter are wanted"):
        pixel_weights(classes, cortex, parts=["median", "cortex"])


def in_full(classes: np.ndarray, *, mean: bool) -> np.ndarray:
    """The same by SciPy, on all voxels and whatever classes there are."""
    present, counts = np.unique(classes[classes != IGNORED], return_counts=True)
    table = np.zeros(256)
    table[present] = np.minimum(np.median(counts) / counts, 5)
    cortex, brain, block = classes > 33, classes > 0, np.ones((3, 3, 3))
    weights = table[classes] + 4 * (np.hypot(*(np.hypot(*np.gradient(classes.astype(float))[:2]), np.gradient(classes.astype(float))[2])) > 0)
    weights += 4 * (cortex ^ ndimage.binary_closing(cortex, block)) + 2 * ((brain ^ ndimage.binary_erosion(brain, block)) & cortex)
    weights = ndimage.uniform_filter(weights, 3) if mean else weights
    weights[classes == IGNORED] = 0
    return weights


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("corner", [(0, 0, 0), (1, 2, 3), (6, 5, 4), (3, 9, 0)])  # (8, 6, 8) voxels on faces of the volume, near them, away
def test_outside_the_box_of_labels_nothing_is_missed(corner, mean):
    classes = np.zeros((14, 15, 12), np.uint8)
    generator = np.random.default_rng(0)
    blob = generator.choice(np.array([0, 1, 5, 34, 35, 70, IGNORED], np.uint8), (4, 3, 4)).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    classes[tuple(slice(start, start + n) for start, n in zip(corner, blob.shape, strict=True))] = blob
    found = pixel_weights(classes, CORTEX, parts=(*PARTS, "mean_filter") if mean else PARTS)
    assert found.dtype == np.float32 and (found[classes == IGNORED] == 0).all()
    np.testing.assert_allclose(found, in_full(classes, mean=mean), rtol=0, atol=2e-6)


def test_empty_and_flat_volumes():
    assert (pixel_weights(np.zeros((4, 5, 6), np.uint8), CORTEX) == 1).all()
    assert not pixel_weights(np.full((3, 3, 3), IGNORED, np.uint8), CORTEX).any()
    assert pixel_weights(np.full((1, 1, 2), 1, np.uint8), CORTEX).tolist() == [[[1, 1]]]
