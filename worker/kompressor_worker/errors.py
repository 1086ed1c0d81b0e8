"""What can go wrong in a worker, as one tree.

KompressorError
├── UserError           64  the job cannot work as written
│   ├── AccessDenied        credentials refused
│   ├── NotFound            no such bucket, prefix, repository or claim
│   ├── EngineMissing       no inference engine to measure with
│   ├── EngineFailed        it did not measure what a gate judges
│   └── OutputOccupied      the output holds something else, or another job's work
├── CorruptSource       65  the checkpoint is broken
├── BadNumerics         66  NaN or Inf where numbers belong
│   └── LossNotFinite       training has diverged; its last good checkpoint is kept
├── GateFailed          67  the result is not good enough
├── OutOfMemory         71  an allocation failed
├── StorageError        74  storage did not answer; worth another try
│   ├── GroupIncomplete     the other pods of the group did not come
│   ├── NoSpaceLeft         no room for the output
│   └── UploadLost          the store has thrown an unfinished upload away
├── Terminated          75  told to stop; the journal is committed
│   └── ClaimLost           another worker owns the output now
└── PeerLost            76  another pod of the group went away; all go on from the last checkpoint

Every message names the object, the value and the remedy. `exit_code` and `reason` go to the pod's termination message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kompressor_api.names import ExitCode, Reason

__all__ = [
    "AccessDenied",
    "BadNumerics",
    "ClaimLost",
    "CorruptSource",
    "EngineFailed",
    "EngineMissing",
    "GateFailed",
    "GroupIncomplete",
    "KompressorError",
    "LossNotFinite",
    "NoSpaceLeft",
    "NotFound",
    "OutOfMemory",
    "OutputOccupied",
    "PeerLost",
    "StorageError",
    "Terminated",
    "UploadLost",
    "UserError",
]


class KompressorError(Exception):
    exit_code = ExitCode.USER_ERROR
    reason = Reason.INVALID_SPEC


class UserError(KompressorError):
    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class AccessDenied(UserError):
    reason = Reason.ACCESS_DENIED


class NotFound(UserError):
    reason = Reason.SOURCE_NOT_FOUND


class EngineMissing(UserError):
    reason = Reason.ENGINE_MISSING


class EngineFailed(UserError):
    reason = Reason.ENGINE_FAILED


class OutputOccupied(UserError):
    reason = Reason.OUTPUT_OCCUPIED


class CorruptSource(KompressorError):
    exit_code = ExitCode.CORRUPT_SOURCE
    reason = Reason.CORRUPT_SOURCE


class BadNumerics(KompressorError):
    exit_code = ExitCode.BAD_NUMERICS
    reason = Reason.BAD_NUMERICS


class LossNotFinite(BadNumerics):
    reason = Reason.LOSS_NOT_FINITE


class GateFailed(KompressorError):
    exit_code = ExitCode.GATE_FAILED
    reason = Reason.GATE_FAILED

    def __init__(self, message: str, result: Mapping[str, Any] | None = None) -> None:
        """`result`: what was measured, as `status.result` has it."""
        super().__init__(message)
        self.result = dict(result or {})


class OutOfMemory(KompressorError):
    exit_code = ExitCode.OUT_OF_MEMORY
    reason = Reason.OUT_OF_MEMORY


class StorageError(KompressorError):
    exit_code = ExitCode.STORAGE
    reason = Reason.STORAGE_FAILED


class GroupIncomplete(StorageError):
    reason = Reason.GROUP_INCOMPLETE


class NoSpaceLeft(StorageError):
    reason = Reason.NO_SPACE_LEFT


class UploadLost(StorageError):
    pass


class Terminated(KompressorError):
    exit_code = ExitCode.TERMINATED
    reason = Reason.TERMINATED


class ClaimLost(Terminated):
    reason = Reason.CLAIM_LOST


class PeerLost(KompressorError):
    exit_code = ExitCode.PEER_LOST
    reason = Reason.PEER_LOST
