"""A line learned by all tasks of a job together, slowly, each writing which samples it was given: ``line_on_nodes.py FOLDER``."""

import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from lod_model import checkpoints, preempt, processes
from lod_model.data import EpochOrder
from lod_model.shares import Shares

EPOCHS, SAMPLES = 3, 24


class Points(Dataset):
    def __getitem__(self, key):
        return torch.tensor(key)


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, keys, _index):
        with open(Path(sys.argv[1], f"seen-{self.global_rank}"), "a") as file:
            file.write(f"{self.trainer.global_step} {self.current_epoch} {keys[0, 0]} {keys[0, 1]}\n")
        time.sleep(0.2)
        return (self.weight * keys[0, 1] - 2 * keys[0, 1]) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def order() -> EpochOrder:
    return EpochOrder([SimpleNamespace(database="a", site="b")] * SAMPLES, seed=3)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    path = Path(sys.argv[1], "last.ckpt")
    with processes.together() as group, preempt.listening():
        shares = Shares(order(), group.world, rank=group.rank, world=group.world)
        trainer = Trainer(
            max_epochs=EPOCHS, callbacks=[preempt.Stopping(shares, path)], plugins=[processes.environment(), checkpoints.plugin()], logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.argv[1],
            **processes.trainer_options(synchronised=False),
        )  # fmt: skip
        module, there = Line(), processes.from_first(path.is_file)
        trainer.fit(module, DataLoader(Points(), batch_sampler=shares), ckpt_path=path if there else None, weights_only=True)
        Path(sys.argv[1], f"weight-{group.rank}").write_text(f"{trainer.global_step} {module.weight.item()!r}")
