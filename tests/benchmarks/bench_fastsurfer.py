"""Time of one batch of slices through FastSurferVINN: as this project has it against the same network written out plainly in PyTorch.

    python tests/benchmarks/bench_fastsurfer.py [--slices 4] [--side 256] [--voxel-mm 1.0] [--repeats 3] [--threads 1] [--training]

``stacked`` is contiguous, one layer after another, with maxout as the maximum over a stack of two tensors; ``plain`` the same with
``torch.maximum``. Both carry the weights of ours. ``ours`` runs as it does in ``segment_views``; ``ours bf16`` under autocast. All take turns
in one process. Columns: seconds of the fastest turn, that of ``plain`` and of ``stacked`` over it, GMAC/s, and the share of pixels with another
class than by ``plain`` (random weights, so classes are noise and nearly equal ones many). ``--training`` times a forward and a backward pass.
"""

import argparse
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lod_model.networks.fastsurfer_vinn import FastSurferVINNConfig, FastSurferVINNView


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--voxel-mm", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--training", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = FastSurferVINNView(FastSurferVINNConfig(), 79)
    x = torch.rand(args.slices, 7, args.side, args.side)
    scale = torch.full((args.slices,), 1 / args.voxel_mm)
    for norm in filter(lambda m: isinstance(m, torch.nn.BatchNorm2d), net.modules()):
        norm.momentum = 1.0
    with torch.no_grad():   # running statistics become the data's
        net(x, scale)
    net.train(args.training)
    passes = {
        "stacked": lambda: written_out(net, x, 1 / args.voxel_mm, lambda a, b: torch.max(torch.stack((a, b), 4), 4)[0]),
        "plain": lambda: written_out(net, x, 1 / args.voxel_mm, torch.maximum),
        "ours": lambda: net(x, scale),
        "ours bf16": lambda: in_bf16(net, x, scale),
    }
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        passes["plain"]()
    gmac = counter.get_total_flops() / 2e9
    seconds, classes = compare(passes, args.repeats, training=args.training)
    print(f"{args.slices} slices of {args.side}², {gmac:.0f} GMAC forward, {args.threads} threads, {'training' if args.training else 'inference'}")
    print(f"{'':10}{'best s':>9}{'plain/':>8}{'stacked/':>10}{'GMAC/s':>8}{'≠ plain':>10}")
    for name, best in seconds.items():
        rates = f"{seconds['plain'] / best:8.2f}{seconds['stacked'] / best:10.2f}{gmac * (3 if args.training else 1) / best:8.0f}"
        print(f"{name:10}{best:9.2f}{rates}{(classes[name] != classes['plain']).float().mean():10.1e}")


def compare(passes: dict, repeats: int, *, training: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Fastest seconds and predicted classes of each, in turns; the first turn does not count."""
    seconds, classes = dict.fromkeys(passes, float("inf")), {}
    for turn in range(repeats + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(training):
                out = run()
                if training:
                    out.float().square().mean().backward()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
            classes[name] = out.detach().argmax(1)
            del out
    return seconds, classes


def in_bf16(net: FastSurferVINNView, x: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(x, scale)


def written_out(net: FastSurferVINNView, x: Tensor, scale: float, maxout) -> Tensor:
    """The network with these weights, a line a layer; one scale, at most 1 or without anything to cut."""

    def block(b, x, best=None):
        for i, (conv, norm) in enumerate(zip(b.convs, b.norms, strict=True)):
            x = norm(conv(x))
            if i < len(b.convs) - 1:
                best = x if best is None else maxout(x, best)
                x = b.prelu(best)
        return x

    def dense(b, x):
        return block(b, b.prelu(x), x)

    native = block(net.native, net.native.entry_norm(x))
    side, inner = x.shape[-1], net.config.inner_size
    inside = min(inner, int(side / scale))
    outside = min(side, int(inner * scale))
    x = F.interpolate(native[:, :, :outside, :outside], size=(inside, inside), mode="bilinear", align_corners=False)
    x = F.pad(x, (0, inner - inside, 0, inner - inside))
    skips = []
    for i, b in enumerate(net.unet.encoder):
        skip = block(b, b.entry_norm(x)) if i == 0 else dense(b, x)
        x, indices = F.max_pool2d(skip, 2, return_indices=True)
        skips.append((skip, indices))
    x = dense(net.unet.bottom, x)
    for b in net.unet.decoder:
        skip, indices = skips.pop()
        x = dense(b, maxout(F.max_unpool2d(x, indices, 2), skip))
    x = F.interpolate(x[:, :, :inside, :inside], size=(outside, outside), mode="bilinear", align_corners=False)
    x = F.pad(x, (0, side - outside, 0, side - outside))
    return net.classifier(block(net.output, net.output.prelu(torch.cat((x, native), 1))))


if __name__ == "__main__":
    main()
