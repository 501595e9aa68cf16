"""A training that is signalled stops at the next batch and goes on as if nothing had been: the same samples, steps, rates and weights."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lod_model import checkpoints, preempt, processes
from lod_model.data import EpochOrder
from lod_model.shares import Shares

EPOCHS, BATCHES, VAL_BATCHES = 3, 4, 3


class Line(LightningModule):
    """y = 2x by steps that are too long, so that validation has the rate cut; signals itself before its step number ``at``."""

    def __init__(self, at: int | None = None, signals=(signal.SIGUSR1,)) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.at, self.signals, self.passed = at, signals, 0
        self.seen, self.rates, self.validated = [], [], 0

    def _tick(self) -> None:
        if self.passed == self.at:
            for number in self.signals:
                os.kill(os.getpid(), number)
        self.passed += 1

    def training_step(self, batch, _index):
        self._tick()
        self.seen += [tuple(key) for key in batch["key"].tolist()]
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return ((self.weight * batch["x"] - 2 * batch["x"]) ** 2).mean()

    def validation_step(self, batch, _index):
        self._tick()
        self.validated += len(batch["x"])
        self.log("val_loss", (self.weight - 2) ** 2, batch_size=len(batch["x"]))

    def configure_optimizers(self):
        optimiser = torch.optim.SGD(self.parameters(), lr=1.2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=0, factor=0.5)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Points(torch.utils.data.Dataset):
    def __getitem__(self, key):
        number, index = key
        return {"key": torch.tensor(key), "x": torch.tensor(1.0 + 0.1 * index + 0.01 * number)}


def fit(folder, module, *, workers=0) -> Line:
    order = EpochOrder([SimpleNamespace(database="a", site="b")] * 7, seed=1)
    shares = Shares(order, 2)
    training = DataLoader(Points(), batch_sampler=shares, num_workers=workers, worker_init_fn=preempt.deaf)
    validation = DataLoader(Points(), batch_size=3, sampler=EpochOrder(order.scans, seed=1, shuffle=False))
    path = folder / "last.ckpt"
    last = ModelCheckpoint(folder, "last", monitor=None, save_top_k=1, every_n_epochs=1, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=EPOCHS, callbacks=[preempt.Stopping(shares, path), last], plugins=[processes.environment(), checkpoints.plugin()],
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, accelerator="cpu",
        devices=1,
    )  # fmt: skip
    with preempt.listening():
        trainer.fit(module, training, validation, ckpt_path=path if path.is_file() else None, weights_only=True)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Line:
    """A training that nobody disturbs."""
    module = fit(tmp_path_factory.mktemp("whole"), Line())
    assert len(set(module.rates)) > 1 and module.validated == EPOCHS * 7
    return module


@pytest.mark.parametrize("at", range(EPOCHS * (BATCHES + VAL_BATCHES)))
def test_it_goes_on_where_it_stopped(tmp_path, whole, at):
    """Stopped in any batch of training or validation, the last of an epoch among them."""
    first, second = Line(at), Line()
    epoch, step = divmod(at, BATCHES + VAL_BATCHES)
    ends = at >= EPOCHS * (BATCHES + VAL_BATCHES) - 1  # nothing was left to do but the last epoch's end
    with contextlib.nullcontext() if ends else pytest.raises(preempt.Preempted) as stopped:
        fit(tmp_path, first)
    if not ends:
        assert stopped.value.code == preempt.STATUS
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)
        (place,) = [state for name, state in state["callbacks"].items() if "Stopping" in name]
        if step < BATCHES - 1:
            assert (place["epoch"], place["consumed"]) == (epoch, 2 * (step + 1))
        fit(tmp_path, second)
    assert first.seen + second.seen == whole.seen
    assert first.rates + second.rates == whole.rates
    assert torch.equal((first if ends else second).weight, whole.weight)
    assert not list(tmp_path.glob(".aside-*"))


def test_an_epochs_end_is_gone_on_from_in_the_same_order(tmp_path, whole):
    """After a kill: the checkpoint of the last whole epoch, and readers beside the process."""

    class Killed(Exception):
        pass

    class Dies(Line):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                raise Killed

    first, second = Dies(), Line()
    with pytest.raises(Killed):
        fit(tmp_path, first)
    fit(tmp_path, second, workers=1)
    assert first.seen + second.seen == whole.seen and first.rates + second.rates == whole.rates
    assert torch.equal(second.weight, whole.weight)


def test_a_second_signal_while_it_is_written_changes_nothing(tmp_path, whole, monkeypatch):
    """TERM after USR1, in the middle of the writing of the checkpoint."""
    written = torch.save

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        written(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    first, second = Line(5), Line()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", signalled)
        with pytest.raises(preempt.Preempted):
            fit(tmp_path, first)
    fit(tmp_path, second)
    assert first.seen + second.seen == whole.seen and torch.equal(second.weight, whole.weight)


def test_a_checkpoint_stands_until_the_next_is_whole(tmp_path, whole, monkeypatch):
    """Killed half-way through the writing: what stood before is gone on from."""
    first, second, third = Line(1), Line(1), Line()
    with pytest.raises(preempt.Preempted):
        fit(tmp_path, first)
    before = (tmp_path / "last.ckpt").read_bytes()

    def half(path, _content):
        path.open("wb").write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit(tmp_path, second)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    fit(tmp_path, third)
    assert first.seen + third.seen == whole.seen and torch.equal(third.weight, whole.weight)


def test_readers_do_not_hear(tmp_path):
    """SLURM signals every process of a job; those that read end with the one they read for."""

    class Signals(Line):
        def _tick(self):
            if self.passed == 1:
                children = [str(child.pid) for child in torch.multiprocessing.active_children()]
                subprocess.run(["kill", "-USR1", *children], check=True)
                subprocess.run(["kill", "-TERM", *children], check=True)
            self.passed += 1

    class Fails(Line):
        def training_step(self, batch, index):
            readers.extend(torch.multiprocessing.active_children())
            raise ArithmeticError

    readers = []
    with pytest.raises(ArithmeticError):
        fit(tmp_path, Fails(), workers=1)
    for reader in readers:
        reader.terminate()  # as Python does when it ends
        reader.join(60)
    assert readers and not any(reader.is_alive() for reader in readers)
    assert fit(tmp_path, Signals(), workers=1).passed == EPOCHS * (BATCHES + VAL_BATCHES)


def test_an_error_after_a_signal_is_a_stop():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(preempt.Preempted), preempt.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a helper was ended by the same signal")
    with pytest.raises(RuntimeError), preempt.listening():
        raise RuntimeError("an error")
    assert signal.getsignal(signal.SIGTERM) == before
