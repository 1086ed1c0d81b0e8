"""A training process of a job: one of those that train together, started by its pod's first process, which goes on when they are done.

Each finds by itself what it needs, as the leader has left it at the output: what surveys have found, and the student.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kompressor_worker.distil.lesson import TrainingStep, finished
from kompressor_worker.distillation import open_models, training_data_of
from kompressor_worker.job import Job
from kompressor_worker.pipeline import Limits
from kompressor_worker.storage.locations import open_output
from kompressor_worker.target.ladder import Ladder

if TYPE_CHECKING:
    import threading

    from kompressor_worker.distil.group import Gathering, GroupSettings
    from kompressor_worker.distil.launching import Member

__all__ = ["Together", "command", "follow", "group_of", "train_in_group"]


def command(manifest: Path, in_cluster: bool) -> list[str]:
    return [sys.executable, "-m", "kompressor_worker", "train", str(manifest), *(["--in-cluster"] if in_cluster else [])]


def group_of(job: Job, environ: Mapping[str, str]) -> GroupSettings:
    """As the operator tells it; outside of a cluster this is the only pod, and the spec says how many processes it has."""
    from kompressor_worker.distil.group import GroupSettings

    settings, asked = GroupSettings.of(environ), job.spec.worker.processes_per_pod
    return replace(settings, processes=asked) if settings == GroupSettings() and asked is not None else settings


@dataclass(frozen=True)
class Together:
    """How the leader trains where there is more than one process."""

    gathering: Gathering
    command: Sequence[str]

    def train(self, tell: Callable[[TrainingStep], None], stop: threading.Event) -> None:
        """Raises what the processes do, GroupIncomplete, PeerLost, Terminated."""
        self.gathering.train(self.command, tell, stop)


def follow(settings: GroupSettings, run: Sequence[str], job: Job, environ: Mapping[str, str], stop: threading.Event) -> None:
    """What the first process of every pod but the leader's does. Raises what `Together.train` does."""
    from kompressor_worker.distil.group import follow as wait_and_train
    from kompressor_worker.publish import CONFIG

    def over() -> bool:
        output = open_output(job.spec.output, environ, stop)
        return CONFIG in output.existing() or finished(output) is not None

    wait_and_train(settings, run, stop, over)


def train_in_group(job: Job, environ: Mapping[str, str], member: Member, limits: Limits) -> None:
    """Raises what `train` does, PeerLost."""
    from kompressor_worker import survey
    from kompressor_worker.distil.train import train
    from kompressor_worker.distilling import lesson_of, read_training

    models = open_models(job.spec, environ, member.stop)
    assert models.distillation is not None, "only a job that trains has such processes"
    output = open_output(job.spec.output, environ, member.stop)
    if member.group.leads:
        output.probe()
    (rung,) = Ladder.of(models.spec, models.layout).rungs
    assigned = survey.recalled(output, survey.rounds(rung.assigned.passes), rung.assigned)
    rows = read_training(training_data_of(assigned, environ, member.stop), models.distillation, member.stop)
    with member.joined() as group:
        train(lesson_of(models.distillation, assigned, output, rows, limits, group, member.stop, member.tell))
