"""Split rules: who is trained on, who is held out. Pure functions; the stage ``pipelines.split`` freezes their result.

A fold has four roles: ``external_test`` (held-out groups, e.g. places), ``internal_test`` (unseen people of training groups), ``val``
(people of training groups, for early stopping and the choice of a checkpoint) and ``train``. A scan outside all four is ``excluded``,
with the reason. With k folds a person is ``internal_test`` in at most one fold and ``external_test`` in exactly one, so that internal and
external scores compare the same scans.

Guards keep what must not stand on both sides apart: person, family, content (the same bytes) and suspected (heads alike, see
:mod:`pipelines.people`) tie people together, also through others, and a tied person never stands on both sides; scanner keeps a held-out
group's machines out of training.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_registry.errors import InputError
from data_registry.params import Split, fingerprint
from data_registry.schema import read_table, table_metadata

ROLES = ("train", "val", "internal_test", "external_test", "excluded")
_PEOPLE_GUARDS = {"person": "person", "family": "family", "content": "t1w_sha256", "suspected": "suspected"}
FEW_PEOPLE = 2


def compile_split(scans: list[dict], settings: Split) -> tuple[list[dict], list[list[str]]]:
    """Rows of the split table for usable ``scans`` (rows of the scans table), and for each fold what a reader should know.

    Raises :class:`InputError` for a scan without the key, fewer than two groups, a hold-out name that is no group, or a fold with
    nobody, or fewer than ``train_people``, to train on.
    """
    group_of = {scan["scan_id"]: _group(scan, settings.key) for scan in scans}
    unit_of = _tied_people(scans, settings)
    home = {}  # a tied person who stands in several groups takes their role from the first by name
    for scan in scans:
        unit = unit_of[scan["scan_id"]]
        home[unit] = min(home.get(unit, group_of[scan["scan_id"]]), group_of[scan["scan_id"]])
    fold_of, folds = _folds(home, sorted(set(group_of.values())), settings)
    members = defaultdict(list)
    for unit in sorted(home, key=lambda unit: _draw(settings.seed, unit)):
        members[home[unit]].append(unit)
    rows, notes = [], []
    for fold in range(folds):
        roles, reasons = _fold_roles(fold, folds, scans, group_of, unit_of, members, fold_of, settings)
        if settings.train_people is not None:
            reasons |= _fewer(fold, roles, scans, unit_of, settings)
        rows += [
            {
                "fold": fold,
                "scan_id": scan["scan_id"],
                "role": roles[scan["scan_id"]],
                "group": group_of[scan["scan_id"]],
                "person": scan["person"],
                "reason": reasons.get(scan["scan_id"]),
            }
            for scan in scans
        ]
        if "train" not in roles.values():
            held = ", ".join(sorted(group for group, own in fold_of.items() if own == fold))
            raise InputError(f"fold {fold} (held out: {held}): nobody is left to train on; fewer guards, shares or folds are wanted")
        notes.append(_notes(roles, unit_of))
    return rows, notes


def _group(scan: dict, key: str) -> str:
    if not scan[key]:
        raise InputError(f"{scan['scan_id']}: {key} is empty; the split holds out by {key}, so every scan needs one")
    return scan[key]


def _tied_people(scans: list[dict], settings: Split) -> dict[str, str]:
    """scan_id → unit: scans that share a person, a family, bytes or a suspicion, directly or through others, are one unit."""
    parent = {scan["scan_id"]: scan["scan_id"] for scan in scans}

    def root(item: str) -> str:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    first: dict[tuple[str, str], str] = {}
    for scan in scans:
        for guard, column in _PEOPLE_GUARDS.items():
            if guard in settings.guards and scan.get(column):
                a, b = root(first.setdefault((guard, scan[column]), scan["scan_id"])), root(scan["scan_id"])
                parent[max(a, b)] = min(a, b)
    return {scan_id: root(scan_id) for scan_id in parent}


def _folds(home: dict[str, str], groups: list[str], settings: Split) -> tuple[dict[str, int], int]:
    """The fold that holds each group out (−1: none), and how many folds there are: largest group first, into the emptiest fold."""
    if settings.holdout:
        for name in settings.holdout:
            if name not in groups:
                raise InputError(f"split.holdout: {name!r} is no {settings.key} of the data; one of {', '.join(groups)} is wanted")
        fold_of = {group: 0 if group in settings.holdout else -1 for group in groups}
        if -1 not in fold_of.values():
            raise InputError(f"split.holdout names every {settings.key}; at least one must be left to train on")
        return fold_of, 1
    if settings.folds == 1:
        if not settings.internal_share:
            raise InputError("split.folds is 1 and split.internal_share 0, which leaves nobody to test on; more of either is wanted")
        return dict.fromkeys(groups, -1), 1
    if len(groups) < 2:
        only = f"the data has one {settings.key} only ({', '.join(groups)})"
        raise InputError(f"{only}; at least two are wanted to hold one out, or split.folds 1, which tests on unseen people alone")
    folds = min(settings.folds, len(groups))
    people = defaultdict(int)
    for group in home.values():
        people[group] += 1
    load, fold_of = [0] * folds, {}
    for group in sorted(groups, key=lambda group: (-people[group], _draw(settings.seed, group))):
        fold_of[group] = min(range(folds), key=lambda fold: (load[fold], fold))
        load[fold_of[group]] += max(1, people[group])
    return fold_of, folds


def _fold_roles(fold, folds, scans, group_of, unit_of, members, fold_of, settings) -> tuple[dict[str, str], dict[str, str]]:
    """Role of every scan in one fold, and why the excluded ones are."""
    held = {scan["scan_id"] for scan in scans if fold_of[group_of[scan["scan_id"]]] == fold}
    held_units = {unit_of[scan_id] for scan_id in held}
    held_scanners = {scan["scanner"] for scan in scans if scan["scan_id"] in held} - {None} if "scanner" in settings.guards else set()
    roles, reasons, free = {}, {}, defaultdict(list)
    for scan in scans:
        scan_id, unit = scan["scan_id"], unit_of[scan["scan_id"]]
        if scan_id in held:
            roles[scan_id] = "external_test"
        elif unit in held_units:
            roles[scan_id], reasons[scan_id] = "excluded", f"tied to a person of a held-out {settings.key}"
        elif scan["scanner"] in held_scanners:
            roles[scan_id], reasons[scan_id] = "excluded", f"made on a scanner of a held-out {settings.key} ({scan['scanner']})"
        else:
            free[unit].append(scan_id)
    internal = set()
    bins = max(folds - 1, round(1 / settings.internal_share)) if settings.internal_share else 0
    for group, units in members.items():
        turn = (fold - fold_of[group] - 1) % folds
        asked = {unit for place, unit in enumerate(units) if bins and place % bins == turn} & free.keys()
        if asked < free.keys() & units:  # unseen people of a place that others are trained on
            internal |= asked
    val = _validation_units(members, fold, free.keys() - internal, settings)
    for unit, scan_ids in free.items():
        roles |= dict.fromkeys(scan_ids, "internal_test" if unit in internal else "val" if unit in val else "train")
    return roles, reasons


def _validation_units(members, fold: int, free: set[str], settings: Split) -> set[str]:
    """Of ``free`` people those for validation: one from each group in turn, from groups that keep somebody to train on first."""
    own = {group: [u for u in units if u in free] for group, units in members.items()}
    number = len(free)
    wanted = min(max(1, round(settings.val_share * number)), number - 1) if settings.val_share and number else 0
    queue = [
        (len(units) < 2, place, _draw(settings.seed, f"{fold}/{unit}"), unit)
        for units in own.values()
        for place, unit in enumerate(sorted(units, key=lambda unit: _draw(settings.seed, f"{fold}/{unit}")))
    ]
    return {unit for *_, unit in sorted(queue)[:wanted]}


def _fewer(fold: int, roles: dict[str, str], scans: list[dict], unit_of: dict[str, str], settings: Split) -> dict[str, str]:
    """Take all but ``train_people`` out of training, in ``roles``, and say why: one person from each site in turn stays, in a fixed order."""
    site_of: dict[str, tuple[str, str]] = {}
    for scan in scans:
        if roles[scan["scan_id"]] == "train":
            site, unit = (scan["database"], scan["site"]), unit_of[scan["scan_id"]]
            site_of[unit] = min(site_of.get(unit, site), site)
    if len(site_of) < settings.train_people:
        wanted = f"fold {fold} has {len(site_of)} people to train on; so many, or fewer, are wanted"
        raise InputError(f"split.train_people is {settings.train_people}: {wanted}")
    turns, queue = defaultdict(int), []
    for unit in sorted(site_of, key=lambda unit: _draw(settings.seed, f"people/{unit}")):
        site = site_of[unit]
        queue.append((turns[site], _draw(settings.seed, f"site/{'/'.join(site)}"), unit))
        turns[site] += 1
    kept = {unit for *_, unit in sorted(queue)[: settings.train_people]}
    reasons = {}
    for scan_id, role in roles.items():
        if role == "train" and unit_of[scan_id] not in kept:
            roles[scan_id], reasons[scan_id] = "excluded", f"not among the {settings.train_people} people that are trained on"
    return reasons


def _notes(roles: dict[str, str], unit_of: dict[str, str]) -> list[str]:
    notes = []
    for role in ("train", "val", "internal_test"):
        people = len({unit_of[scan_id] for scan_id, r in roles.items() if r == role})
        if people < FEW_PEOPLE:
            notes.append(f"{role} has one person: too few for a figure to mean much" if people else f"no people for {role}")
    return notes


def prove(rows: list[dict], scans: list[dict], settings: Split) -> list[dict]:
    """The leakage proof, from the frozen table alone: for each fold and guard, the keys that stand on both sides (wanted: 0).

    person, family, content, suspected: what training or validation saw against both tests, and training against validation. scanner and the
    split's key: everything else against ``external_test``.
    """
    by_id = {scan["scan_id"]: scan for scan in scans}
    proof = []
    for fold in sorted({row["fold"] for row in rows}):
        role = {row["scan_id"]: row["role"] for row in rows if row["fold"] == fold}

        def keys(column: str, *roles: str, role: dict = role) -> set:
            return {by_id[scan_id].get(column) for scan_id, r in role.items() if r in roles} - {None, ""}

        for guard, column in _PEOPLE_GUARDS.items():
            if guard in settings.guards:
                tests = keys(column, "internal_test", "external_test")
                seen = keys(column, "train", "val")
                overlaps = len(seen & tests) + len(keys(column, "train") & keys(column, "val"))
                overlaps += len(keys(column, "internal_test") & keys(column, "external_test"))
                proof.append({"fold": fold, "guard": guard, "overlaps": overlaps, "checked": len(seen | tests)})
        for guard in ({"scanner"} & set(settings.guards)) | {settings.key}:
            inside, outside = keys(guard, "train", "val", "internal_test"), keys(guard, "external_test")
            proof.append({"fold": fold, "guard": guard, "overlaps": len(inside & outside), "checked": len(inside | outside)})
    return proof


def resolution(native_affine: Sequence[float]) -> str:
    """A scan's voxel size by the rule of the grid ``min``, the smallest edge, in mm to one decimal; of a samples row's affine.

    >>> resolution([0, 0, -0.75, 70, 0.7, 0, 0, -80, 0, 0.7, 0, -90, 0, 0, 0, 1])
    '0.7'
    """
    edges = np.linalg.norm(np.reshape(native_affine, (4, 4))[:3, :3], axis=0)
    return f"{edges.min():.1f}"


def split_hash(rows: list[dict]) -> str:
    """Hash of who has which role in which fold."""
    return fingerprint(sorted([row["fold"], row["scan_id"], row["role"]] for row in rows))


def data_hash(tables: Path) -> str:
    """Hash of all that training and evaluation read in the shards: of scans that the frozen split names, whatever else the samples table holds."""
    named = set(read_table(tables / "split.parquet", "split")["scan_id"].to_pylist())
    samples = read_table(tables / "samples.parquet", "samples").select(["scan_id", "shard_sha256", "row_group"]).to_pylist()
    rows = sorted([row["scan_id"], row["shard_sha256"], row["row_group"]] for row in samples if row["scan_id"] in named)
    return fingerprint(rows, table_metadata(tables / "samples.parquet").get("preparation"))


def _draw(seed: int, name: str) -> str:
    """A fixed pseudo-random order: no history, no generator state."""
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
