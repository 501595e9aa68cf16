"""Peak memory of ``lodbrain segment`` with many classes on a real scan at 1 mm, and where its seconds go beside the network.

    python tests/benchmarks/bench_memory.py [--only lod_brain] [--threads 2] [--data ../shared/data]

The weights are random: the labels are noise, cost what they cost, and are the worst that sides, components and compression can meet. In the last
row no network speaks: the labels are the scan's own. Each row is a process of its own; its peak is that from its start to its end (VmHWM).
Wanted: at most 6 GiB. Seconds of the whole and of the network are those of the clock, sides included; the stages' their threads' own, so that a
busy machine disturbs little.

fastsurfer_vinn   79 classes, which become 95 ids, in three views of 256 slices
lod_brain         79 classes, by the fast engine
neuronet          the five protocols, by the fast engine, in windows
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))
WANTED_GIB = 6
NETWORKS = {
    "fastsurfer_vinn": (("fastsurfer79",), {}),
    "lod_brain": (("fastsurfer79",), {}),
    "neuronet": (("fsl_fast", "fsl_first", "spm_tissue", "malp_em", "malp_em_tissue"), {}),
}
OWN_LABELS = "the scan's own"
STAGES = {
    "load_image": "read", "prepare": "conform", "_asked": "network", "relateralise": "sides", "clean_labels": "clean", "labels_to_native": "way back",
    "judge": "judge", "volumes_ml": "volumes", "save_volume": "label map", "write_overlay": "overlay",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*NETWORKS, OWN_LABELS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=CHECKOUT / "../shared/data")
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.weights:
        return print(json.dumps(measure(args)))
    print(f"{'':17}{'peak GiB':>9}{'whole s':>9}" + "".join(f"{stage:>10}" for stage in STAGES.values()))
    most = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else [*NETWORKS, OWN_LABELS]:
            path = Path(folder, f"{name}.pt")
            write_weights(path, name if name in NETWORKS else "fastsurfer_vinn")
            command = [sys.executable, __file__, "--only", name, "--weights", str(path), "--threads", str(args.threads), "--data", str(args.data)]
            start = time.perf_counter()
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT).stdout.splitlines()[-1])
            whole, most = time.perf_counter() - start, max(most, found["gib"])
            stages = "".join(f"{found['seconds'].get(stage, 0):10.2f}" for stage in STAGES.values())
            print(f"{name:17}{found['gib']:9.2f}{whole:9.1f}{stages}", flush=True)
    if most > WANTED_GIB:
        sys.exit(f"{most:.2f} GiB; at most {WANTED_GIB} are wanted")


def write_weights(path: Path, name: str) -> None:
    """Random ones."""
    import torch

    from data_registry import protocol
    from lod_model import networks, weights

    protocols, smaller = NETWORKS[name]
    torch.manual_seed(0)
    network = networks.build(name, networks.config_for(name, list(map(protocol.load, protocols))) | smaller)
    weights.save(path, network, name=name, protocol=weights.joined(protocols), grid="1mm", provenance={})


def measure(args: argparse.Namespace) -> dict:
    """Seconds of each stage, and this process's peak in GiB."""
    from real_scan import first_t1w

    from lod_model.segment import segment

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, timed(seconds), own_labels(args.data / "bids/georgetown") if args.only == OWN_LABELS else timed({}):
        (outcome,) = segment([first_t1w(args.data / "bids/georgetown")], out=folder, weights=args.weights, threads=args.threads)
    assert outcome.dseg, outcome.reasons
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return {"gib": peak_kb / 2**20, "seconds": seconds}


@contextlib.contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up what each stage takes, wherever it is called from."""
    from lod_model import overlay, postprocess, predict, segment, segment_outputs

    modules = (segment, predict, postprocess, segment_outputs, overlay)
    kept = [(module, name, getattr(module, name)) for module in modules for name in STAGES if hasattr(module, name)]

    def wrapped(function, stage: str):
        def call(*given, **named):
            clock = time.perf_counter if stage == "network" else time.thread_time
            start = clock()
            try:
                return function(*given, **named)
            finally:
                seconds[stage] = seconds.get(stage, 0) + clock() - start

        return call

    for module, name, function in kept:
        setattr(module, name, wrapped(function, STAGES[name]))
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


@contextlib.contextmanager
def own_labels(database: Path) -> Iterator[None]:
    """In place of a network's labels those that the scan has, with their sides taken away and given back."""
    from real_scan import first_t1w

    from data_registry import conform, protocol
    from data_registry.label_sources import find_labels
    from data_registry.volume import load_labels
    from lod_model import predict, segment

    subject = first_t1w(database).relative_to(database).parts[0].removeprefix("sub-")
    (path,) = find_labels(database, subject, "").values()
    asked = segment._asked

    def known(weights, conformed, threads):
        ids = conform.labels_to_grid(load_labels(path), conformed.placement)
        classes = protocol.load("fastsurfer79").classes_of(ids)
        classes[classes == protocol.IGNORED] = 0
        return dict([predict.with_sides("fastsurfer79", classes)])

    segment._asked = known
    try:
        yield
    finally:
        segment._asked = asked


if __name__ == "__main__":
    main()
