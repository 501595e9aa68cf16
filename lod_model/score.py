"""Score one weight file on labelled BIDS databases, scan by scan, as ``lodbrain segment`` would segment them.

    python -m lod_model.score --weights lod_brain.pt data/bids/*

Each T1w and its labels are brought to the 1 mm grid; what is scored there is the argmax of the class probabilities, interpolated from the
grid of the weights. For trainings of a whole project there is the stage *evaluate*.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_registry import protocol as protocols
from data_registry.conform import conform, labels_to_grid
from data_registry.errors import InputError, run_stage
from data_registry.files import replacing
from data_registry.label_sources import find_labels
from data_registry.tissue_maps import load_label_map
from data_registry.volume import Volume, load_image
from lod_model import metrics
from lod_model import postprocess as cleaning
from lod_model.predict import output_protocol, with_engine
from lod_model.segment import classes_of, find_scans, usable_weights
from lod_model.weights import Weights


def main() -> None:
    """Print, and with ``--out`` write, the Dice of each class for each labelled T1w of the databases."""
    parser = argparse.ArgumentParser(prog="python -m lod_model.score", description=main.__doc__)
    parser.add_argument("databases", nargs="+", type=Path, help="BIDS databases with FreeSurfer derivatives")
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--out", type=Path, help="a TSV file")
    parser.add_argument("--postprocess", choices=cleaning.METHODS, default="components", help="default: %(default)s, as in segment")
    arguments = parser.parse_args()
    weights = usable_weights(arguments.weights)
    weights = replace(weights, network=with_engine(weights.network, "fast")[0])
    columns = ["database", "scan", *protocols.load(output_protocol(weights.protocols[0])).foreground, "mean"]
    print("\t".join(columns))
    rows = []
    for database in arguments.databases:
        for scan, labels in labelled_scans(database, weights):
            dice = dice_at_1mm(scan, labels, weights, postprocess=arguments.postprocess)
            name = scan.name.removesuffix(".gz").removesuffix(".nii")
            rows.append([database.resolve().name, name, *(f"{value:.4f}" for value in [*dice, dice.mean()])])
            print("\t".join(rows[-1]), flush=True)
    if not rows:
        asked = ", ".join(map(str, arguments.databases))
        raise InputError(f"{asked}: no T1w with labels that {weights.protocol} speaks of; BIDS databases are wanted")
    if arguments.out:
        with replacing(arguments.out) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])


def labelled_scans(database: Path, weights: Weights) -> list[tuple[Path, Path]]:
    """(T1w, label map) of every scan of a BIDS database that has labels of the weights' protocol; what is left out is said on stderr."""
    scans, problems = find_scans([database])
    found = []
    for scan in scans:
        parts = dict(part.split("-", 1) for part in scan.name.split("_") if "-" in part)
        labels = find_labels(database, parts.get("sub", ""), parts.get("ses", ""), scan=scan.name.split(".")[0].removesuffix("_T1w"))
        source = next((source for source in protocols.load(weights.protocols[0]).sources if source in labels), None)
        if source:
            found.append((scan, labels[source]))
        else:
            problems[scan] = f"{scan}: no labels that {weights.protocol} speaks of; left out"
    for line in problems.values():
        print(line, file=sys.stderr)
    return found


def dice_at_1mm(scan: Path, labels: Path, weights: Weights, *, postprocess: str = "components") -> np.ndarray:
    """Dice of each foreground class, (classes − 1,)."""
    protocol, conformed = protocols.load(output_protocol(weights.protocols[0])), conform(load_image(scan), grid="1mm")
    truth = protocol.classes_of(labels_to_grid(load_label_map(labels), conformed.placement), where=str(labels))
    predicted, _, _ = classes_of(Volume(conformed.data, conformed.placement.affine, scan), weights=weights, postprocess=postprocess)
    return metrics.dice(truth, predicted, protocol.classes)


if __name__ == "__main__":
    run_stage(main)
