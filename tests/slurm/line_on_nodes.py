"""A line learned by all tasks of a job together, slowly, each writing which samples it was given: ``line_on_nodes.py FOLDER``."""

import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from lod_model import preempt
from lod_model.data import EpochOrder

EPOCHS, SAMPLES = 3, 24
RANK, WORLD = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))


class Points(Dataset):
    def __getitem__(self, key):
        return torch.tensor(key)


class Share(EpochOrder):
    """Every WORLD-th sample of what is left of an epoch."""

    def __len__(self) -> int:
        return super().__len__() // WORLD

    def __iter__(self):
        return iter(list(super().__iter__())[RANK::WORLD])


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, keys, _index):
        with open(Path(sys.argv[1], f"seen-{RANK}"), "a") as file:
            file.write(f"{self.trainer.global_step} {self.current_epoch} {keys[0, 0]} {keys[0, 1]}\n")
        time.sleep(0.2)
        return (self.weight * keys[0, 1] - 2 * keys[0, 1]) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def order(kind=EpochOrder) -> EpochOrder:
    return kind([SimpleNamespace(database="a", site="b")] * SAMPLES, seed=3)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    path, share = Path(sys.argv[1], "last.ckpt"), order(Share)

    class Whole:  # the position counts the samples of all tasks
        resume_at = share.resume_at

        def __len__(self) -> int:
            return SAMPLES

    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", strategy="ddp", devices=1, num_nodes=int(os.environ["SLURM_NNODES"]), plugins=preempt.plugins(),
        callbacks=[preempt.Stopping(Whole(), path)], use_distributed_sampler=False, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.argv[1],
    )  # fmt: skip
    module = Line()
    with preempt.listening():
        trainer.fit(module, DataLoader(Points(), sampler=share), ckpt_path=path if path.is_file() else None, weights_only=True)
    Path(sys.argv[1], f"weight-{RANK}").write_text(f"{trainer.global_step} {module.weight.item()!r}")
