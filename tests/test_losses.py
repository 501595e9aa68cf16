"""The Dice loss against arithmetic done by hand, and its block form against the full one."""

import pytest
import torch

from data_registry.protocol import IGNORED
from data_registry.shards import block_counts
from lod_model.losses import block_dice_loss, block_soft_dice, dice_loss, soft_dice


def certain(p: list[float]) -> torch.Tensor:
    """Logits (1, 2, 1, 1, n) whose softmax gives class 1 the probabilities p."""
    p = torch.tensor(p, dtype=torch.float64)
    return torch.stack([(1 - p).log(), p.log()])[None, :, None, None]


def test_by_hand():
    # class 1: p = .5 .75 .25, g = 1 1 0: Σpg 1.25, Σp² .25 + .5625 + .0625 = .875, Σg² 2
    # class 0: p = .5 .25 .75, g = 0 0 1: Σpg .75,  Σp² .25 + .0625 + .5625 = .875, Σg² 1
    logits, target = certain([0.5, 0.75, 0.25]), torch.tensor([[[[1, 1, 0]]]])
    expected = torch.tensor([[1.5 / 1.875, 2.5 / 2.875]], dtype=torch.float64)
    torch.testing.assert_close(soft_dice(logits, target), expected, atol=1e-6, rtol=0)
    assert dice_loss(logits, target).item() == pytest.approx(1 - (1.5 / 1.875 + 2.5 / 2.875) / 2, abs=1e-6)


def test_blocks_by_hand():
    # one block of K = 4 voxels, three of class 1; p = .25, .75: class 1 2·4·.75·.75 / (4·.5625 + 4·.75), class 0 2·4·.25·.25 / (4·.0625 + 4·.25)
    logits, fractions = certain([0.75]), torch.tensor([0.25, 0.75], dtype=torch.float64).view(1, 2, 1, 1, 1)
    expected = torch.tensor([[0.5 / 1.25, 4.5 / 5.25]], dtype=torch.float64)
    torch.testing.assert_close(block_soft_dice(logits, fractions, 4), expected, atol=1e-6, rtol=0)


def test_scans_are_scored_one_by_one_then_averaged():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(3, 4, 4, 6, 2, generator=generator), torch.randint(0, 4, (3, 4, 6, 2), generator=generator)
    alone = [dice_loss(logits[i : i + 1], target[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(dice_loss(logits, target), torch.stack(alone).mean())


def test_an_absent_class_scores_nothing_and_an_all_wrong_one_too():
    right_but_for_an_absent_class = certain([0.0, 0.0])
    assert soft_dice(right_but_for_an_absent_class, torch.zeros(1, 1, 1, 2, dtype=torch.uint8)).tolist()[0] == pytest.approx([1, 0])
    assert dice_loss(certain([1.0]), torch.zeros(1, 1, 1, 1, dtype=torch.int16)).item() == pytest.approx(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_blocks_equal_full_resolution_with_gradient(dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    classes, factor = 7, 4
    logits = torch.randn(2, classes, 3, 4, 2, generator=generator, dtype=dtype)
    target = torch.randint(0, classes, (2, 12, 16, 8), generator=generator)
    onehot = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).to(dtype)
    fractions = torch.nn.functional.avg_pool3d(onehot, factor)
    coarse, fine = (logits.clone().requires_grad_() for _ in range(2))
    on_blocks = block_dice_loss(coarse, fractions, factor**3)
    on_voxels = dice_loss(torch.nn.functional.interpolate(fine, scale_factor=factor, mode="nearest"), target)
    on_blocks.backward()
    on_voxels.backward()
    assert on_blocks.item() == pytest.approx(on_voxels.item(), abs=tolerance)
    assert fine.grad.abs().max() > 1e-4
    torch.testing.assert_close(coarse.grad, fine.grad, atol=tolerance, rtol=0)


def test_voxels_left_out_might_as_well_not_be_there_in_blocks_too():
    generator = torch.Generator().manual_seed(3)
    logits, target = torch.randn(2, 5, 3, 2, 2, generator=generator), torch.randint(0, 5, (2, 12, 8, 8), generator=generator, dtype=torch.uint8)
    target[:, :8][torch.rand(2, 8, 8, 8, generator=generator) < 0.4] = IGNORED
    counts = torch.stack([torch.from_numpy(block_counts(one.numpy(), 4, 5)) for one in target])
    upsampled = torch.nn.functional.interpolate(logits, scale_factor=4, mode="nearest")
    on_voxels = soft_dice(upsampled, target)
    torch.testing.assert_close(block_soft_dice(logits, counts / 64, 64), on_voxels)
    kept = target[0] != IGNORED                                                        # (12, 8, 8)
    alone = soft_dice(upsampled[:1, :, kept][..., None, None], target[:1, kept][..., None, None])
    torch.testing.assert_close(on_voxels[:1], alone)
    assert dice_loss(logits, torch.full((2, 3, 2, 2), IGNORED), over="present").item() == 1


def test_agrees_with_one_hot():
    generator = torch.Generator().manual_seed(2)
    logits, target = torch.randn(2, 5, 6, 4, 4, generator=generator), torch.randint(0, 5, (2, 6, 4, 4), generator=generator)
    p, g = logits.softmax(1), torch.nn.functional.one_hot(target, 5).movedim(-1, 1).float()
    dice = 2 * (p * g).sum((2, 3, 4)) / ((p * p).sum((2, 3, 4)) + (g * g).sum((2, 3, 4)) + 1e-6)
    torch.testing.assert_close(dice_loss(logits, target), 1 - dice.mean())


def test_half_precision_is_summed_in_single():
    logits, target = torch.zeros(1, 2, 32, 32, 32, dtype=torch.bfloat16), torch.zeros(1, 32, 32, 32, dtype=torch.uint8)
    loss = dice_loss(logits, target)   # class 0: 2·n/2 / (n/4 + n) = .8
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dice_loss(torch.zeros(1, 3, 2, 2, 2), torch.full((1, 2, 2, 2), 3)), "8 voxels outside the classes 0 … 2"),
        (lambda: dice_loss(torch.zeros(1, 3, 2, 2, 2), torch.full((1, 2, 2, 2), -1)), "8 voxels outside"),
        (lambda: dice_loss(torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=torch.long)), "target: .* wanted integers"),
        (lambda: dice_loss(torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 2, 2, 2)), "wanted integers"),
        (lambda: block_dice_loss(torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 3, 2, 2, 1), 64), "fractions: "),
        (lambda: block_dice_loss(torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2), 0), "voxels_per_block: 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
