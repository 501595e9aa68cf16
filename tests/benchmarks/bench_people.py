"""How sure likeness is, and what 27,000 people cost.

    python tests/benchmarks/bench_people.py rates    # same head saved, shaded, turned, cut … and different heads; minutes
    python tests/benchmarks/bench_people.py scale    # all pairs of 27,000 random descriptors, beside one plain matrix product

``rates`` takes the real scans of the test data and two renderings of each label map. Thresholds are chosen on the people of one half and tried
on the other. Bounds are Clopper–Pearson's at 95 %; pairs share people, so they are not independent and the bounds are a little too good.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage, stats

from data_registry import protocol
from data_registry.conform import conform, labels_to_grid
from data_registry.likeness import NUMBERS, describe, likeness, pairs_above, sure_above
from data_registry.volume import load_image, load_labels
from lod_model.corrupt import along, bias_field, reproducible, resampling
from lod_model.render import Rendering, load_anatomy, render
from pipelines.people import REVIEW, SAME

DATA = Path(__file__).parents[2] / "../shared/data"
VOXEL_MM = 2.0
ONE_PERSON = {"prisma_flash2d_4.8mm_slices": "brainchop_conformed_1mm"}
"""Two files of one head: found by likeness, and their folds and ventricles agree side by side."""
CUT_ALREADY = ("malc", "voxelmorph", "brainload")
RENDERING = Rendering(rotation_degrees=8, scale=0, axis_scale=0, translation_mm=8, warps=(), arbitrary_contrast=0, inverted=0, stripped=0, cut=0,
                      strength=0.5)  # fmt: skip


def heads(data: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(person, what was done, (128, 128, 128) uint8), LIA, 2 mm."""
    scans = sorted(data.glob("bids/*/sub-*/anat/*T1w.nii.gz")) + sorted(data.glob("t1w/*.nii.gz"))
    for number, path in enumerate(scans):
        database = path.parts[-4]
        name = path.name.removesuffix(".nii.gz") if path.parent.name == "t1w" else f"{database} {path.parts[-3]}"
        conformed = conform(load_image(path), grid=f"{VOXEL_MM:g}mm")
        person = ONE_PERSON.get(name, name)
        if person != name:
            yield person, "another scanner", conformed.data
            continue
        yield person, "first", conformed.data
        for what, changed in variants(conformed.data.astype(np.float32), np.random.default_rng(number), whole=database not in CUT_ALREADY):
            yield person, what, saved(changed)
        labels = sorted((path.parents[2] / "derivatives/freesurfer" / path.parts[-3]).glob("mri/*.mgz"))
        if labels and database not in CUT_ALREADY:
            yield person, "skull off", saved(conformed.data * (labels_to_grid(load_labels(labels[0]), conformed.placement) > 0))
    table = protocol.load("lod7")
    for path in sorted(data.glob("anatomies/*.nii.gz")):
        anatomy = load_anatomy(path)
        for what, seed in (("first", int(anatomy.name[-2:])), ("rendered anew", 1000 + int(anatomy.name[-2:]))):
            yield anatomy.name, what, saved(render(anatomy, protocol=table, seed=seed, voxel_mm=2, how=RENDERING).image * 255)


def variants(head: np.ndarray, rng: np.random.Generator, *, whole: bool) -> Iterator[tuple[str, np.ndarray]]:
    """What may become of one scan, and a mock of another session: turned, moved, of another size by 2 %, shaded, noisy."""
    yield "intensities scaled", 255 * (head / 255) ** rng.choice([0.7, 1.4])
    yield "bias field", shaded(head, rng)
    yield "noise", noisy(head, rng, 0.06)
    yield "shifted 20 mm", moved(head, rng, degrees=0, mm=20)
    yield "turned 5°", moved(head, rng, degrees=5, mm=0)
    yield "turned 10°", moved(head, rng, degrees=10, mm=8)
    yield "slices of 5 mm", thick(head, rng, 5.0)
    yield "neck cut off", neckless(head)
    session = noisy(shaded(255 * (moved(head, rng, degrees=10, mm=12, scale=0.02) / 255) ** rng.uniform(0.75, 1.35), rng), rng, 0.04)
    yield "mock session", session
    if whole:
        yield "defaced", defaced(head)
        yield "mock session, defaced, 3.5 mm", thick(defaced(session), rng, 3.5)


def moved(head: np.ndarray, rng: np.random.Generator, *, degrees: float, mm: float, scale: float = 0.0) -> np.ndarray:
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-degrees, degrees, 3))):
        one = np.eye(3)
        i, j = (k for k in range(3) if k != axis)
        one[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = turn @ one * np.cbrt(1 + rng.uniform(-scale, scale))
    centre = (np.array(head.shape) - 1) / 2
    return ndimage.affine_transform(head, turn, offset=centre - turn @ centre + rng.uniform(-mm, mm, 3) / VOXEL_MM, order=1)


def shaded(head: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    with reproducible(int(rng.integers(2**31))):
        return head * bias_field(head.shape, limit=0.35).numpy()


def noisy(head: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Rician noise, of a share of bright tissue."""
    deviation = share * np.quantile(head[head > 20], 0.9)
    return np.hypot(head + rng.normal(0, deviation, head.shape), rng.normal(0, deviation, head.shape))


def thick(head: np.ndarray, rng: np.random.Generator, mm: float) -> np.ndarray:
    axis = int(rng.integers(3))
    matrix = resampling(head.shape[axis], slice_mm=mm, width_mm=0, voxel_mm=VOXEL_MM)
    return along(torch.from_numpy(np.ascontiguousarray(head, np.float32)), matrix, axis).numpy()


def defaced(head: np.ndarray) -> np.ndarray:
    """Nothing in front of and below a plane from the forehead to the neck."""
    low, high = np.quantile(np.argwhere(ndimage.gaussian_filter(head, 1) > 0.1 * head.max()), [0.002, 0.998], axis=0)
    _, down, forward = np.indices(head.shape, sparse=True)
    face = (down - low[1] + forward - high[2]) * VOXEL_MM > 100
    return np.where(np.broadcast_to(face, head.shape), 0, head)


def neckless(head: np.ndarray) -> np.ndarray:
    cut = head.copy()
    cut[:, np.argwhere((head > 0.15 * head.max()).any((0, 2)))[0, 0] + int(160 / VOXEL_MM) :] = 0
    return cut


def saved(head: np.ndarray) -> np.ndarray:
    low, high = np.quantile(head[::3, ::3, ::3], [0.001, 0.999])
    return np.clip((head - low) * 255 / (high - low), 0, 255).astype(np.uint8)


def upper_bound(hits: int, number: int) -> float:
    """Clopper–Pearson's, 95 %, one side."""
    return float(stats.beta.ppf(0.95, hits + 1, number - hits)) if number > hits else 1.0


def rates() -> None:
    torch.set_num_threads(1)
    described: dict[tuple[str, str], np.ndarray | None] = {}
    seconds = 0.0
    for person, what, head in heads(DATA.resolve()):
        start = time.process_time()
        described[person, what] = describe(head, VOXEL_MM)
        seconds += time.process_time() - start
    print(f"{len(described)} pictures of {len({person for person, _ in described})} people; {seconds / len(described):.2f} s of processor each")
    lost = sorted(f"{person} ({what})" for (person, what), numbers in described.items() if numbers is None)
    print(f"no brain found in {len(lost)}: {', '.join(lost)}")
    people = sorted({person for person, _ in described})
    halves = people[::2], people[1::2]
    chosen = sure_above(100, _strangers(described, halves[0])[:2])
    thresholds = (chosen, REVIEW, SAME, sure_above(27_000 * 26_999 // 2))
    for name, half in (("chosen on", halves[0]), ("tried on", halves[1]), ("all", people)):
        mean, deviation, values, of_all = _strangers(described, half)
        print(f"{name}: {len(half)} people, {len(values)} pairs of strangers: mean {mean:.3f}, deviation {deviation:.3f}, top {values.max():.2f}, "
              f"skewness {stats.skew(values):.2f}, excess kurtosis {stats.kurtosis(values):.2f}")  # fmt: skip
        for least in thresholds:
            false, wide, tail = int((values >= least).sum()), int((of_all >= least).sum()), stats.norm.sf(least, mean, deviation)
            print(f"  at {least:.2f}: {false} of {len(values)} pairs, at most {upper_bound(false, len(values)):.2%}; {wide} of {len(of_all)} of all "
                  f"pictures; were they normal {tail:.1e}, or {tail * 27_000**2 / 2:,.1f} of the pairs of 27,000 people")  # fmt: skip
        found = defaultdict(list)
        for (person, what), numbers in described.items():
            first = described[person, "first"]
            if person in half and what != "first" and first is not None:
                found[what].append(-1.0 if numbers is None else likeness(first, numbers))
        for what, hits in found.items():
            share = ", ".join(f"{np.mean(np.array(hits) >= least):.2f}" for least in thresholds)
            print(f"    {what:30s} n {len(hits):2d}  median {np.median(hits):.2f}  lowest {min(hits):5.2f}  found at these {share}")


def _strangers(described: dict, people: list[str]) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Mean and deviation over different people's first pictures; their likenesses; those of all their pictures."""
    own = [(key, numbers) for key, numbers in described.items() if key[0] in people and numbers is not None]
    values, of_all = [], []
    for i, ((person, what), one) in enumerate(own):
        for (other, its), two in own[i + 1 :]:
            if person != other:
                of_all.append(likeness(one, two))
                if what == its == "first":
                    values.append(of_all[-1])
    return float(np.mean(values)), float(np.std(values)), np.array(values), np.array(of_all)


def scale(number: int = 27_000) -> None:
    descriptors = np.clip(np.random.default_rng(0).normal(0, 32, (number, NUMBERS)), -127, 127).astype(np.int8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    start = time.perf_counter()
    found, (mean, deviation) = pairs_above(descriptors, REVIEW)
    took = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 - before
    unit = descriptors[:1024].astype(np.float32)
    rest = descriptors.astype(np.float32)
    start = time.perf_counter()
    unit @ rest.T
    plain = (time.perf_counter() - start) * number / 1024 / 2
    print(f"{number} descriptors, {number * (number - 1) // 2} pairs: {took:.1f} s, {memory:.2f} GB more; the products alone {plain:.1f} s; "
          f"{len(found)} pairs above {REVIEW}, deviation {deviation:.3f} about {mean:.3f}; in a table {descriptors.nbytes / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    {"rates": rates, "scale": scale}[sys.argv[1] if len(sys.argv) > 1 else "scale"]()
