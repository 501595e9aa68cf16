"""A training that is asked to stop (SLURM's USR1 or TERM) writes where it stands and ends, and later goes on exactly from there.

The handler sets a flag, nothing else: a second signal changes nothing. At the end of a batch all processes agree on the flag, the
checkpoint is written aside and renamed, and the process exits with :data:`STATUS`, upon which ``infra/slurm/job.sbatch`` requeues its job.
Lightning's own ways are left out: its requeueing saves, and its TERM handler broadcasts, within the handler, where several processes hang.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lod_model import processes
from lod_model.shares import Shares

log = logging.getLogger("lodbrain.train")
STATUS = 75
"""Exit status of a training that has stopped and wants to go on: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_asked: list[int] = []


class Preempted(SystemExit):
    """Stopped when asked to; what was reached is on disk."""

    def __init__(self) -> None:
        super().__init__(STATUS)


@contextmanager
def listening() -> Iterator[None]:
    """Within the block, signals ask to stop; an error that comes after one, e.g. of a helper that the same signal ended, is a stop too."""
    _asked.clear()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _install()
    try:
        yield
    except Exception as error:
        if _asked and not processes.is_loss(error):  # srun and torchrun signal the others when a process fails: no reason to begin again
            raise Preempted from error
        raise
    finally:
        for number, handler in before.items():
            _handle(number, handler)


def deaf(_worker: int) -> None:
    """For a loader's workers, who get the signals of the whole job: the process that they read for ends them, nobody else."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def Stopping(shares: Shares, path: Path):
    """A Lightning callback that stops when asked to, its state in ``path``, the checkpoint that a training goes on from.

    ``shares`` are those of the training samples. The state is the epoch and how many of its samples, of all processes together, have been
    consumed, at the end of a batch. What Lightning does not restore is done here: the place within the epoch, and the step of a
    schedule that follows validation, which Lightning takes after it has saved an epoch.
    """
    from pytorch_lightning import Callback

    class Stopping(Callback):
        def __init__(self) -> None:
            self.epoch, self.consumed, self.figures = 0, 0, {}
            self.resumed = False

        def state_dict(self) -> dict:
            return {"epoch": self.epoch, "consumed": self.consumed, "figures": self.figures}

        def load_state_dict(self, state: dict) -> None:
            self.epoch, self.consumed, self.figures = state["epoch"], state["consumed"], state["figures"]
            self.resumed = True
            shares.resume_at(self.epoch, self.consumed)

        def on_train_start(self, trainer, _module) -> None:
            _install()  # Lightning has put its own in place
            if self.resumed and not self.consumed:  # between epochs
                for config in trainer.lr_scheduler_configs:
                    if config.reduce_on_plateau and config.monitor in self.figures:
                        config.scheduler.step(self.figures[config.monitor])

        def on_train_batch_end(self, trainer, _module, _output, _batch, index) -> None:
            consumed = shares.consumed(index)
            if consumed is None:  # of a batch in parts, not the last
                return
            self.consumed = consumed
            if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # then validation, or the end of the epoch, comes next
                self._stop_if_asked(trainer)

        def on_validation_start(self, trainer, _module) -> None:
            trainer.fit_loop.restarting = False  # else the schedule leaves out an epoch that was resumed

        def on_validation_batch_end(self, trainer, *_) -> None:
            if not trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch:
                self._stop_if_asked(trainer)

        def on_train_epoch_end(self, trainer, _module) -> None:
            self.epoch, self.consumed = self.epoch + 1, 0
            self.figures = {name: float(value) for name, value in trainer.callback_metrics.items()}

        def on_save_checkpoint(self, trainer, _module, checkpoint: dict) -> None:
            if trainer.validating:  # as Lightning marks a validation that is to be done again from its start
                progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
                for part in ("total", "current"):
                    progress[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

        def _stop_if_asked(self, trainer) -> None:
            if processes.any_of(bool(_asked)):
                trainer.save_checkpoint(path)
                log.info("asked to stop: epoch %d, %d of its %d samples, is in %s", self.epoch, self.consumed, len(shares.sampler), path)
                processes.await_first()
                raise Preempted

    return Stopping()


def _install() -> None:
    for number in SIGNALS:
        _handle(number, lambda number, _frame: _asked.append(number))


def _handle(number: int, handler) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
