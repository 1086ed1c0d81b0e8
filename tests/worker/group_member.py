"""A training process for tests of groups: sums, and says so, until it has done as many steps as it is asked for."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from kompressor_worker.distil.launching import Member
from kompressor_worker.distil.lesson import TrainingStep
from kompressor_worker.errors import KompressorError, LossNotFinite, Terminated

steps, fails = int(sys.argv[1]), int(sys.argv[2])
"""`fails`: the rank that ends with an error of its own at step 3; -1: none."""
try:
    with Member() as member, member.joined() as group:
        for step in range(1, steps + 1):
            held = torch.tensor([float(group.rank), float(member.stop.is_set())])
            dist.all_reduce(held)
            if step == 3 and group.rank == fails:
                raise LossNotFinite("nonsense at step 3")
            if held[1]:
                raise Terminated("told to stop")
            if group.leads:
                member.tell(TrainingStep(step, steps, float(held[0]), 0, 0, 0, 0, 0, os.getpid(), 0))
            time.sleep(0.02)
except KompressorError as error:
    sys.exit(int(error.exit_code))
