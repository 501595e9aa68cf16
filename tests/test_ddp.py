"""Training on several processes is training on one: the same batches, gradients and figures; and it goes on on any number of them."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import several_processes
import torch
from several_processes import Full, Poison, Signals, on, told

from lod_model import checkpoints, networks, preempt, weights
from lod_model.data import EpochOrder
from lod_model.module import compile_passes
from lod_model.runs import fold_folder
from lod_model.shares import Shares, WholeBatches

FOLD = fold_folder("lod_brain-base-0", 0)


def seen(folder: Path, world: int) -> list[list]:
    """[epoch, step, samples] of each step, those of all processes and parts in the batch's order."""
    steps: dict[tuple, list] = {}
    for rank in range(world):
        for line in (folder / f"seen-{rank}").read_text().splitlines():
            epoch, step, start, samples = json.loads(line)
            steps.setdefault((epoch, step), []).append((start, samples))
    return [[*key, [sample for _, samples in sorted(parts) for sample in samples]] for key, parts in sorted(steps.items())]


def gradients(folder: Path) -> list[dict]:
    return [torch.load(folder / f"gradient-0-{step}") for step in range(len(list(folder.glob("gradient-0-*"))))]


def record(folder: Path, network: str = "lod_brain") -> dict:
    return json.loads((folder / fold_folder(f"{network}-base-0", 0) / "fold.json").read_text())


def digest(folder: Path) -> str:
    return weights.load(folder / FOLD / "weights.pt").hash


def order_of(scans: int, *, seed: int, at_least: int = 1) -> EpochOrder:
    return EpochOrder([SimpleNamespace(database="a", site=f"s{n % 3}") for n in range(scans)], seed=seed, at_least=at_least)


@pytest.mark.parametrize("case", range(50))
def test_no_sample_is_lost_or_doubled_by_a_kill(case):
    """Killed at random steps, each time gone on from the position alone by another number of processes, that takes its batches in as many parts."""
    draw = np.random.default_rng(case)
    scans, batch_size, parts, epochs = (int(n) for n in draw.integers(1, (40, 9, 4, 4), endpoint=True))
    at_least = int(draw.integers(1, 60))
    whole = order_of(scans, seed=case, at_least=at_least)
    wanted = []
    for epoch in range(epochs):
        whole.set_epoch(epoch)
        samples = list(whole)
        wanted += [(epoch, samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    found, position = [], (0, 0)
    while position[0] < epochs:
        world = int(draw.integers(1, 9))
        shares = [Shares(order_of(scans, seed=case, at_least=at_least), batch_size, parts=parts, rank=rank, world=world) for rank in range(world)]
        for share in shares:
            share.resume_at(*position)
        until, (epoch, consumed) = int(draw.integers(1, len(wanted) + 1)), position
        while epoch < epochs and until:
            for share in shares:
                share.sampler.set_epoch(epoch)
            first = len(shares[0]) - sum(1 for _ in shares[0])
            for index, given in enumerate(zip(*shares, strict=True), first):
                own = [keys[: share.part(index).own] for share, keys in zip(shares, given, strict=True)]
                assert all(given) and sum(map(len, own)) == shares[0].part(index).together
                if index % parts == 0:
                    found.append((epoch, []))
                found[-1][1].extend(sample for samples in own for sample in samples)
                if (reached := shares[0].consumed(index)) is not None:
                    consumed, until = reached, until - 1
                    if not until:
                        break
            epoch, consumed = (epoch + 1, 0) if consumed == len(whole) else (epoch, consumed)
        position = (epoch, consumed)
    assert found == wanted


def test_validation_is_dealt_out_whole():
    order = EpochOrder([SimpleNamespace()] * 7, seed=0, shuffle=False)
    shares = [WholeBatches(order, 2, rank=rank, world=3) for rank in range(3)]
    assert [[[i for _, i in batch] for batch in share] for share in shares] == [[[0, 1], [6]], [[2, 3], [6]], [[4, 5], [6]]]
    assert [[share.part(n).own for n in range(2)] for share in shares] == [[2, 1], [2, 0], [2, 0]]


STILL = {"fine": {"epochs": 1, "learning_rate": 1e-12}}  # the weights stay, so that rounding cannot grow


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("lod_brain", {"batch_size": 5}),
        pytest.param("lod_brain", {"batch_size": 5, "accumulate": 3}, marks=pytest.mark.full),
        pytest.param("neuronet", {"batch_size": 5, "protocol": ["lod7", "fsl_fast"]}, marks=pytest.mark.full),
        pytest.param("fastsurfer_cnn", {"batch_size": 10}, marks=pytest.mark.full),
    ],
    ids=["dice", "parts", "labels that some lack", "slices"],
)
def test_two_processes_have_the_gradients_of_one(tmp_path, network, settings):
    """And its figures: 7 scans in batches of 5 and 2, 3 to validate on. Dropout, which two processes draw otherwise, is off; batch norms rest."""
    small = several_processes.params().train.network
    settings = STILL | settings | {"network": small | {"lod_brain": small["lod_brain"] | {"dropout": 0.0}}}
    for world, more in ((1, {"accumulate": 1}), (2, {})):
        ends = on(world, tmp_path / str(world), told, settings | more, network=network, still_norms=True)
        assert {end.status for end in ends} == {0}, ends
    assert seen(tmp_path / "2", 2) == seen(tmp_path / "1", 1) and len(seen(tmp_path / "1", 1)) == 2
    for ours, theirs in zip(gradients(tmp_path / "2"), gradients(tmp_path / "1"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    ours, theirs = (record(tmp_path / str(world), network)["stages"]["fine"]["history"][0] for world in (2, 1))
    for name in ("val_loss", "val_dice") if network == "neuronet" else theirs:  # where some lack labels, that of a share counts as its size
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name


def test_it_goes_on_on_other_numbers_of_processes(tmp_path):
    """Two, of which one gets SIGTERM twice, then one, then two: the steps of a training that nobody disturbed, in one MLflow run."""
    settings = {"batch_size": 2, "fine": {"epochs": 2, "learning_rate": 0.01}}
    ends = on(2, tmp_path, told, settings, disturb=Signals(1, signal.SIGTERM, signal.SIGTERM, rank=1))
    assert [end.status for end in ends] == [preempt.STATUS] * 2 and "epoch 0, 4 of its 7 samples" in ends[0].said, ends
    (end,) = on(1, tmp_path, told, settings, disturb=Signals(5, signal.SIGUSR1))
    assert end.status == preempt.STATUS and "epoch 1, 4 of its 7 samples" in end.said, end.said
    ends = on(2, tmp_path, told, settings)
    assert [end.status for end in ends] == [0, 0] and not ends[1].said.count("INFO"), ends
    wanted = []
    for epoch, order in enumerate([order_of(7, seed=0)] * 2):
        order.set_epoch(epoch)
        samples = [list(sample) for sample in order]
        wanted += [[epoch, 4 * epoch + n, samples[2 * n : 2 * n + 2]] for n in range(4)]
    assert seen(tmp_path, 2) == wanted
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow/mlflow.db'}")
    runs = {run.info.run_name: run.info for run in client.search_runs([e.experiment_id for e in client.search_experiments()])}
    assert {name: run.status for name, run in runs.items()} == {"lod_brain-base-0": "FINISHED", "lod_brain-base-0-fold-0": "FINISHED"}
    history = client.get_metric_history(runs["lod_brain-base-0-fold-0"].run_id, "fine_val_loss")
    assert [metric.step for metric in history] == [0, 1]


def test_a_killed_process_ends_the_others_and_the_same_number_goes_on_bit_for_bit(tmp_path):
    """With dropout: from the last whole epoch, to the weights of a training that nobody disturbed."""
    settings = {"batch_size": 2, "fine": {"epochs": 2, "learning_rate": 0.01}}
    ends = on(2, tmp_path / "killed", told, settings, disturb=Signals(5, signal.SIGKILL, rank=1))
    assert [end.status for end in ends] == [2, -signal.SIGKILL], ends
    (line,) = [line for line in ends[0].said.splitlines() if "error" in line.lower()]
    assert line.startswith("error: process 0 of 2: another one has ended") and "Traceback" not in ends[0].said
    for name in ("killed", "whole"):
        ends = on(2, tmp_path / name, told, settings)
        assert [end.status for end in ends] == [0, 0], ends
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert not list(tmp_path.glob("**/.aside-*"))


def test_a_loss_that_is_no_number_ends_all_with_one_line(tmp_path):
    """It names the scan, of whichever process it is; the last epoch's checkpoint stands."""
    settings = {"batch_size": 7, "fine": {"epochs": 3, "learning_rate": 0.01}}
    ends = on(2, tmp_path, told, settings, disturb=Poison("sub-03", epoch=1))
    assert [end.status for end in ends] == [2, 2], ends
    assert "Traceback" not in ends[0].said + ends[1].said and "error" not in ends[1].said
    (line,) = [line for line in ends[0].said.splitlines() if line.startswith("error: ")]
    assert "lod_brain-base-0 fold-0, fine, epoch 1: the gradient is not finite at " in line and "sub-03" in line and line.count("sub-") < 5
    state = torch.load(tmp_path / FOLD / "fine/last.ckpt", weights_only=True)
    assert state["epoch"] == 0 and all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_a_full_disk_ends_in_one_line_and_what_stood_stands(tmp_path):
    """No file may grow beyond 64 kB: the first checkpoint fits, its successor, with more in it, does not."""
    path = tmp_path / "last.ckpt"
    checkpoints.save({"weights": torch.zeros(1000)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            checkpoints.save({"weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)  # of which run_stage makes its line
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.full
def test_a_training_on_a_full_disk_goes_on_when_there_is_room(tmp_path):
    """Two processes, of which the first cannot write: one line, no traceback, and then the rest."""
    settings = {"batch_size": 2, "fine": {"epochs": 2, "learning_rate": 0.01}}
    ends = on(2, tmp_path, told, settings, disturb=Full(5, 20_000))
    assert [end.status for end in ends] == [2, 2] and "Traceback" not in ends[0].said + ends[1].said, ends
    (line,) = [line for line in ends[0].said.splitlines() if line.startswith("error: ")]
    assert "/fine/" in line and "File too large; a place that can be read and written is wanted" in line
    assert on(1, tmp_path, told, settings)[0].status == 0
    assert [row["epoch"] for row in record(tmp_path)["stages"]["fine"]["history"]] == [0, 1] and not list(tmp_path.glob("**/.aside-*"))


@pytest.mark.full
def test_more_processes_than_a_batch_has_samples_take_larger_batches(tmp_path):
    """Two with the recipe's batch of one: twice the batch, as many steps an epoch as with the recipe's, a larger learning rate that warms up;
    and the batch stays as it is when one process goes on."""
    settings = {"fine": {"epochs": 2, "learning_rate": 0.01}, "large_batch": {"warm_up": 0.25}}
    ends = on(2, tmp_path, told, settings, disturb=Signals(8, signal.SIGTERM))
    assert [end.status for end in ends] == [preempt.STATUS] * 2, ends
    assert on(1, tmp_path, told, settings)[0].status == 0
    steps = seen(tmp_path, 2)
    assert [len(samples) for _, _, samples in steps] == [2] * 14 and len({tuple(sample) for _, _, samples in steps for sample in samples}) == 28
    assert record(tmp_path)["batch_factor"] == 2 and record(tmp_path)["stages"]["fine"]["steps"] == 14
    rates = [float(line) for line in (tmp_path / "rates-0").read_text().split()]
    warming = [1 + (2**0.5 - 1) * min(1, (step + 1) / 3.5) for step in range(14)]
    assert rates == pytest.approx([0.01 * part for part in warming])


@pytest.mark.full
def test_a_stop_waits_for_the_end_of_a_batch_in_parts(tmp_path):
    settings = {"batch_size": 4, "accumulate": 2, "fine": {"epochs": 1, "learning_rate": 0.01}}
    (end,) = on(1, tmp_path, told, settings, disturb=Signals(0, signal.SIGTERM))
    assert end.status == preempt.STATUS and "epoch 0, 4 of its 7 samples" in end.said, end.said
    assert on(1, tmp_path, told, settings)[0].status == 0
    assert [len(samples) for _, _, samples in seen(tmp_path, 1)] == [4, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_norms": "all"}, "train.batch_norms is all: between processes without GPUs there is no such norm; own, or one process, is wanted"),
        ({"compile": "network", "fine_patch": 8}, "train.compile is network: windows of train.fine_patch begin elsewhere in each step; none"),
    ],
)
def test_what_does_not_fit_is_said_once(tmp_path, settings, words):
    ends = on(2, tmp_path, told, settings)
    assert [end.status for end in ends] == [2, 2]
    assert f"error: {words}" in ends[0].said and "error" not in ends[1].said


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler, which torch.compile wants")
def test_a_compiled_network_is_the_network():
    """The same logits and gradients; its weights have the same names."""
    network, image = networks.build("unet", {"widths": [2, 4], "dropout": 0.0}), torch.randn(1, 1, 8, 8, 8)
    network(image).square().mean().backward()
    wanted, names = {name: p.grad.clone() for name, p in network.named_parameters()}, list(network.state_dict())
    network.zero_grad()
    compile_passes(network)
    network(image).square().mean().backward()
    assert list(network.state_dict()) == names
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)
