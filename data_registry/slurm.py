"""The one door to SLURM: tasks are submitted as an array, and waited for.

Below the current folder, which all nodes share, ``logs/slurm`` holds for each array ``<job>.json``, what it was submitted for, and for each
of its tasks ``<job>_<index>.log`` and, in the end, ``.status``. So a task's end is known when SLURM has forgotten it, and who starts
again finds what is at work already.
"""

import json
import logging
import math
import os
import shlex
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data_registry.errors import InputError
from data_registry.files import replacing
from data_registry.jobs import Job, Slurm

log = logging.getLogger("lodbrain.slurm")
LOGS = Path("logs/slurm")
SCRIPTS = Path(__file__).resolve().parents[1] / "infra/slurm"
ENDS = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
FORGOTTEN = "FORGOTTEN"
GRACE_S = 60.0  # in which what one node has written reaches another
POLL_S = 15.0


@dataclass(frozen=True)
class Task:
    """Its name, a line of shell with its own srun, and a fingerprint of what it makes."""

    name: str
    command: str
    identity: str = ""


@dataclass(frozen=True)
class Place:
    """Where a task is: a job and an index of its array."""

    job: str
    index: int

    def __str__(self) -> str:
        return f"{self.job}_{self.index}"

    @property
    def log(self) -> Path:
        return LOGS / f"{self}.log"

    @property
    def status(self) -> int | None:
        """Exit status of its command; None while there is none."""
        path = LOGS / f"{self}.status"
        return int(path.read_text() or 1) if path.is_file() else None


def submit(name: str, tasks: list[Task], job: Job, settings: Slurm) -> dict[Place, str]:
    """One array of the tasks; their names by place. InputError with what sbatch says, if it refuses."""
    if not tasks:
        return {}
    LOGS.mkdir(parents=True, exist_ok=True)
    commands = [" && ".join([*settings.setup, task.command]) for task in tasks]
    done = _ask("sbatch", *options(name, len(tasks), job, settings), str(SCRIPTS / "job.sbatch"), *commands)
    if done.returncode:
        raise InputError(f"sbatch: {_last(done.stderr)}; resources.slurm of params.yaml, for {name}")
    number = done.stdout.strip().split(";")[0]
    with replacing(LOGS / f"{number}.json") as aside:
        aside.write_text(json.dumps({"name": name, "tasks": [[task.name, task.identity] for task in tasks]}) + "\n", encoding="utf-8")
    log.info("%s: job %s, an array of %d", name, number, len(tasks))
    return {Place(number, index): task.name for index, task in enumerate(tasks)}


def options(name: str, tasks: int, job: Job, settings: Slurm) -> list[str]:
    """What sbatch is told.

    >>> options("x", 3, Job(hours=0.5, gres="gpu:1"), Slurm(at_once=2, options=["--qos=long"]))[2:7]
    ['--job-name=x', '--array=0-2%2', '--output=logs/slurm/%A_%a.log', '--open-mode=append', '--signal=USR1@120']
    >>> options("x", 3, Job(hours=0.5, gres="gpu:1"), Slurm(at_once=2, options=["--qos=long"]))[7:]
    ['--time=30', '--nodes=1', '--ntasks-per-node=1', '--cpus-per-task=1', '--gres=gpu:1', '--qos=long']
    """
    chosen = {
        "job-name": name, "array": f"0-{tasks - 1}%{settings.at_once}", "output": f"{LOGS}/%A_%a.log", "open-mode": "append",
        "signal": f"USR1@{settings.warning_s}", "time": math.ceil(60 * job.hours), "nodes": job.nodes, "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": job.cpus, "mem": f"{job.mem_gb}G" if job.mem_gb else None, "gres": job.gres,
        "partition": job.partition or settings.partition, "account": settings.account,
    }  # fmt: skip
    return ["--parsable", "--requeue", *(f"--{key}={value}" for key, value in chosen.items() if value is not None), *settings.options]


def step(command: list[str], job: Job) -> str:
    """A line of shell that runs a command as all of a job's tasks; if one fails, so do the others."""
    return f"srun --kill-on-bad-exit=1 --cpus-per-task={job.cpus} {shlex.join(command)}"


def wait_for(places: dict[Place, str], *, cancel: set[str]) -> dict[str, str]:
    """Until all have ended: why those failed that did, by name. Ctrl-C cancels the jobs of ``cancel``."""
    failed, waiting, ended, shown = {}, dict(places), {}, None
    begin = time.monotonic()
    try:
        while True:
            states = _states({place.job for place in waiting})
            for place, name in list(waiting.items()) if states is not None else ():
                state = states.get(place, _Seen(FORGOTTEN)).state
                if state not in ENDS | {FORGOTTEN}:
                    ended.pop(place, None)
                elif _is_over(place, state, time.monotonic() - ended.setdefault(place, time.monotonic())):
                    del waiting[place]
                    if state != "COMPLETED" and (state != FORGOTTEN or place.status != 0):
                        failed[name] = _reason(place, state)
                        log.warning("%s failed: %s", name, failed[name])
            if states is not None and (told := _summary(states, waiting, len(places), len(failed))) != shown:
                shown = told
                log.info("%s", shown)
            if not waiting:
                return failed
            time.sleep(min(POLL_S, 1 + (time.monotonic() - begin) / 20))
    except KeyboardInterrupt:
        if cancel:
            _ask("scancel", *sorted(cancel))
            log.warning("cancelled job %s", ", ".join(sorted(cancel)))
        raise


def at_work() -> dict[str, tuple[Place, str]]:
    """Tasks of this folder that SLURM has not seen the end of: their places and identities by name."""
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in LOGS.glob("*.json")}
    if not records:
        return {}
    found = {}
    while (states := _states(set(records))) is None:
        time.sleep(POLL_S)
    for number, record in records.items():
        seen = {place.index: (place, one) for place, one in states.items() if place.job == number}
        active = {index: place for index, (place, one) in seen.items() if one.state not in ENDS and one.is_ours(record["name"])}
        found |= {name: (active[index], identity) for index, (name, identity) in enumerate(record["tasks"]) if index in active}
        if not active:
            (LOGS / f"{number}.json").unlink(missing_ok=True)
    return found


@dataclass(frozen=True)
class _Seen:
    """What squeue tells of a task."""

    state: str
    name: str = ""
    folder: str = ""
    reason: str = ""

    def is_ours(self, name: str) -> bool:
        """SLURM may count its jobs anew, and give the number to somebody else."""
        return (self.name, os.path.realpath(self.folder)) == (name, os.path.realpath("."))


def _states(jobs: set[str]) -> dict[Place, _Seen] | None:
    """Of all their tasks that SLURM knows; None while it does not answer."""
    if not jobs:
        return {}
    done = _ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(sorted(jobs))}", "--format=%F|%K|%T|%j|%Z|%r")
    if done.returncode and "Invalid job id" not in done.stderr:
        log.warning("squeue: %s; asking again", _last(done.stderr))
        return None
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {Place(job, int(index)): _Seen(*rest) for job, index, *rest in rows}


def _is_over(place: Place, state: str, since_s: float) -> bool:
    """Whether a task's end is one: a pre-empted one, or one whose node has died, goes back into the queue."""
    if state in ("COMPLETED", "FAILED") or place.status is not None:
        return True
    return since_s > (GRACE_S if state == FORGOTTEN else 4)


def _reason(place: Place, state: str) -> str:
    """The last line of a task's log that is not srun's, and where it stands."""
    lines = place.log.read_text(encoding="utf-8", errors="replace").splitlines() if place.log.is_file() else []
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("srun: ")]
    return f"{'' if state == 'FAILED' else state + ', '}{lines[-1] if lines else 'no log'} ({place.log})"


def _summary(states: dict[Place, _Seen], waiting: dict[Place, str], tasks: int, failed: int) -> str:
    seen = [states[place] for place in waiting if place in states]
    counts = Counter(f"{one.state.lower()}{f' ({one.reason})' if one.state == 'PENDING' else ''}" for one in seen)
    ended = {"done": tasks - len(waiting) - failed, "failed": failed}
    return ", ".join(f"{number} {what}" for what, number in [*sorted(counts.items()), *ended.items()] if number)


def _ask(*command: str) -> subprocess.CompletedProcess:
    """Run a command of SLURM. Of a job that this may run in, its environment keeps nothing: the new one has settings of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: no such command; a machine that submits to SLURM, or resources.launcher: local, is wanted") from None


def _last(text: str) -> str:
    """The last line, without the command's name before it."""
    return (text.strip().splitlines() or ["no answer"])[-1].rpartition("error: ")[2]
