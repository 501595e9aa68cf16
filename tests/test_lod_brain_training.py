"""LOD-Brain in training: the coarse level at its own grid, the finest on a window, checkpoints, frozen levels."""

import pytest
import torch
from small_networks import made, noise
from torch.nn import functional as F

from lod_model.losses import block_dice_loss, dice_loss
from lod_model.networks.group_norm import GroupNorm
from lod_model.networks.lod_brain import LODBrain, LODBrainConfig, Plain

COARSE = LODBrainConfig(levels=1, coarse_pool=4)
RELEASED = LODBrainConfig()
DEEP = LODBrainConfig(classes=3, widths=(2, 4, 4, 8), levels=2)
THREE = LODBrainConfig(classes=3, widths=(2, 4, 4, 8), levels=3)


def blobs(classes: int, side: int) -> torch.Tensor:
    """(1, side, side, side) labels in smooth patches, so that blocks of 4³ hold several classes and none holds them evenly."""
    rough = F.interpolate(noise(1, classes, 6, 6, 6, seed=5), size=(side,) * 3, mode="trilinear")
    return rough.argmax(1)


# What training computes in another way


def _grown(*inputs: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in inputs]


def _same(ours: torch.Tensor, theirs: torch.Tensor, pairs: list) -> None:
    """Values and, after a backward pass with the same weights of the voxels, the gradients of each pair."""
    weights = noise(*ours.shape, seed=9, dtype=torch.float64)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-8)


def test_stem_doubling_and_folded_head_are_what_they_stand_for():
    net = made(LODBrainConfig(classes=3, widths=(2, 4, 8))).double()
    level, up = net.levels[1], net.levels[1].decoder[0].resample
    x, y, features = _grown(*(noise(2, c, 6, 4, 8, dtype=torch.float64) for c in (1, up.in_channels, 8)))
    w, b, v, a = _grown(level.stem.weight, level.stem.bias, up.weight, up.bias)
    _same(level.stem(x), F.conv3d(x2 := _grown(x)[0], w, b, padding=1), [(x, x2), (level.stem.weight, w), (level.stem.bias, b)])
    _same(up(y), F.conv_transpose3d(y2 := _grown(y)[0], v, a, stride=2), [(y, y2), (up.weight, v), (up.bias, a)])
    for level, with_bias in ((net.levels[0], False), (net.levels[1], True)):
        net.zero_grad(set_to_none=True)
        f, f2, w, b, h, c = _grown(features, features, level.out.weight, level.out.bias, net.head.weight, net.head.bias)
        written = F.conv3d(F.conv3d(f2, w, b, padding=1), h, c if with_bias else None)
        pairs = [(f, f2), (level.out.weight, w), (level.out.bias, b), (net.head.weight, h)]
        _same(net._logits(level, f), written, pairs + [(net.head.bias, c)] * with_bias)


# The coarse level at its own grid


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_the_coarse_stage_has_the_full_resolution_gradient(dtype, tolerance):
    """Loss and every parameter's gradient, without dropout: the pooled image and class fractions against the full image and hard labels."""
    x, target = noise(1, 1, 48, 48, 48, dtype=dtype), blobs(7, 48)
    fractions = F.avg_pool3d(F.one_hot(target, 7).movedim(-1, 1).to(dtype), 4)
    assert ((fractions > 0) & (fractions < 1)).any(1).float().mean() > 0.3                       # blocks of mixed classes
    losses, gradients = [], []
    for stored in (True, False):
        net = made(COARSE).to(dtype).train()
        for block in (m for m in net.modules() if isinstance(m, Plain)):
            block.dropout = 0.0
        loss = block_dice_loss(net.forward_coarse(F.max_pool3d(x, 4)), fractions, 64) if stored else dice_loss(net(x), target)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    largest = max(g.abs().max() for g in gradients[1].values())
    for name, wanted in gradients[1].items():
        # a bias before a norm of one channel a group cancels: its gradient is rounding, small beside the others
        scale = wanted.abs().max() if wanted.abs().max() > 1e-5 * largest else largest
        assert (gradients[0][name] - wanted).abs().max() <= tolerance * scale, name


# Windows, checkpoints, frozen levels


def box(*bounds: tuple[int, int]) -> list[slice]:
    return [slice(*b) for b in bounds]


@pytest.mark.parametrize("config", [RELEASED, DEEP, THREE])
def test_the_window_that_is_the_whole_image_changes_nothing(config):
    m = config.multiple
    net, x = made(config), noise(2, 1, 2 * m, m, 2 * m)
    whole = box((0, 2 * m), (0, m), (0, 2 * m))
    assert torch.equal(net.forward_window(x, whole), net(x))
    with torch.no_grad():
        assert torch.equal(net.forward_window(x, whole), net(x))


@pytest.mark.parametrize("config", [RELEASED, DEEP, THREE])
def test_a_window_differs_from_the_whole_by_its_moments_alone(config, monkeypatch):
    """With the finest level's norms replaced by identities the answers are the whole image's, in float64 to the last digits; with one
    voxel of halo less than the convolutions reach they are not."""
    net, m = made(config).double(), config.multiple
    x = noise(1, 1, 3 * m, 2 * m, m, dtype=torch.float64)
    window = box((m, 2 * m), (m, 2 * m), (0, m))
    moved = net.forward_window(x, window) - net(x)[:, :, *window]
    assert moved.abs().max() > 1e-4
    monkeypatch.setattr(GroupNorm, "forward", lambda self, x, *, inplace=False: x * 0.5)
    expected = net(x)[:, :, *window]
    torch.testing.assert_close(net.forward_window(x, window), expected, atol=1e-12, rtol=0)
    monkeypatch.setattr(LODBrainConfig, "halo", config.halo - 2 ** (len(config.widths) - config.levels))
    assert (net.forward_window(x, window) - expected).abs().max() > 1e-9


def test_gradients_of_a_window_reach_every_level():
    net, x = made(RELEASED).train(), noise(1, 1, 24, 24, 24)
    logits = net.forward_window(x, box((0, 8), (8, 24), (16, 24)))
    assert logits.shape == (1, 7, 8, 16, 8)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("window", [box((0, 4), (0, 8), (0, 8)), box((8, 24), (0, 8), (0, 8)), box((0, 8), (0, 8)), box((8, 8), (0, 8), (0, 8)),
                                    [slice(None)] * 3, box((-8, 8), (0, 8), (0, 8))])  # fmt: skip
def test_a_window_that_does_not_fit_is_refused(window):
    with pytest.raises(ValueError, match="window: .* wanted three slices within 16 × 16 × 16 voxels, from and to multiples of 8"):
        LODBrain(RELEASED).forward_window(torch.zeros(1, 1, 16, 16, 16), window)


def test_one_level_has_no_windows():
    with pytest.raises(ValueError, match="1 level, wanted at least 2"):
        LODBrain(COARSE).forward_window(torch.zeros(1, 1, 16, 16, 16), box((0, 16), (0, 16), (0, 16)))


@pytest.mark.parametrize("half", [False, True])
def test_checkpointing_changes_no_gradient(half):
    """Same seed, dropout and all: bit for bit, though the insides of every block are computed twice. 32 voxels a side: oneDNN's bfloat16
    gradient of a 3³ kernel over 2³ voxels, which 16 would lead to, holds what memory held before."""
    calls, gradients, drawn, x = [], [], [], noise(1, 1, 32, 32, 32)
    for on in (False, True):
        net = made(LODBrainConfig(dropout=0.5)).train()
        net.checkpoint_blocks(on)
        calls.append(0)
        for block in (m for m in net.modules() if isinstance(m, Plain)):
            block.conv.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = net(x)
        logits.float().square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
        drawn.append(torch.rand(()).item())
    assert calls == [6, 12] and drawn[0] == drawn[1]                          # the way back has drawn from no generator
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_frozen_level_keeps_no_graph_and_drops_nothing():
    coarse, fine = made(COARSE, seed=1), made(LODBrainConfig(dropout=0.5), seed=2)
    fine.load_coarse(coarse, freeze=True)
    fine.train()
    assert not fine.levels[0].training and fine.levels[1].training
    seen = []
    fine.levels[0].register_forward_hook(lambda module, given, result: seen.append(result[0]))
    x = noise(1, 1, 16, 16, 16)
    fine(x).square().mean().backward()
    fine(x)
    assert not seen[0].requires_grad and torch.equal(seen[0], seen[1])
    assert all(p.grad is None for p in fine.levels[0].parameters())
    assert all(p.grad is not None for p in [*fine.levels[1].parameters(), *fine.head.parameters()])


def test_bf16_gradients_are_right_where_a_block_sees_two_voxels_a_side():
    net, x = made(RELEASED), noise(1, 1, 16, 16, 16)
    target = noise(1, 7, 16, 16, 16, seed=3)

    def gradients(half: bool) -> torch.Tensor:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = net(x)
        (out.float() * target).sum().backward()
        return net.levels[0].bridge.conv.weight.grad.clone()

    exact = gradients(half=False)
    for _ in range(5):
        half = gradients(half=True)
        assert half.isfinite().all() and (half - exact).norm() < 0.1 * exact.norm()
