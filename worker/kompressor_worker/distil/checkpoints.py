"""Checkpoints of a training in object storage, by torch.distributed.checkpoint over our own working objects.

Each is a set of objects under a name that nothing else ever gets, and becomes one by a conditional write of the manifest that counts on it;
only then is the one before deleted. So the last good one is always whole, and of two leaders one is refused. What is where is JSON, not the
pickle that torch's own writers leave: a bucket is no place to run code from. Tensors are cut by torch's planner, so that another number of
processes reads what it needs.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from kompressor_api.names import Reason
from kompressor_worker.distil.lesson import TRAINING, History
from kompressor_worker.distil.together import Together
from kompressor_worker.errors import CorruptSource, KompressorError, UserError
from kompressor_worker.journal import remedy
from kompressor_worker.storage import Output

MANIFEST = f"{TRAINING}manifest.json"
VERSION = 1
OBJECT_BYTES = 64 << 20
"""Of an object of a checkpoint, about."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint, as the manifest counts on it."""

    step: int
    name: str
    objects: tuple[str, ...]
    """All of it; the first says what is in the others."""


@dataclass(frozen=True)
class Manifest:
    fingerprint: Mapping[str, Any]
    history: History = field(default_factory=History)
    """Up to `last`; nobody else's to change."""
    last: Saved | None = None
    best: Saved | None = None
    """The one of the best student; often the same."""
    writing: tuple[str, ...] = ()
    """Objects of one that was begun; deleted by whoever goes on."""

    def encode(self) -> bytes:
        return json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes, uri: str) -> Manifest:
        try:
            raw = json.loads(data)
            if raw.pop("version") != VERSION:
                raise ValueError("it is of another release")
            last, best = (None if (s := raw[k]) is None else Saved(s["step"], s["name"], tuple(s["objects"])) for k in ("last", "best"))
            return cls(raw["fingerprint"], History.of(raw["history"]), last, best, tuple(raw["writing"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{uri}: {MANIFEST} cannot be gone on from ({error}); {remedy(uri)}", Reason.JOURNAL_MISMATCH) from error


class Checkpoints:
    """Those of one training. Only the leader writes the manifest; all processes write and read their parts."""

    def __init__(self, output: Output, together: Together, fingerprint: Mapping[str, Any]) -> None:
        """Raises UserError: what is there is of another training."""
        self._output, self._together = output, together
        found = output.read(MANIFEST)
        self._etag = None if found is None else found[1]
        self.manifest = Manifest(fingerprint) if found is None else Manifest.decode(found[0], output.uri)
        for key, value in fingerprint.items():
            if (other := self.manifest.fingerprint.get(key)) != value:
                raise UserError(
                    f"{output.uri}: a training is here whose {key} was {other}, this one's is {value}; {remedy(output.uri)}",
                    Reason.JOURNAL_MISMATCH,
                )

    def save(self, state: Mapping[str, Tensor], history: History, best: bool) -> None:
        """Everything that is needed to go on behind `history`; its weights are the `best` so far, or those of an earlier one still are.
        Raises ClaimLost, and what storage raises."""
        made, before = self._write(state, history.steps), self.manifest
        self._commit(replace(before, history=deepcopy(history), last=made, best=made if best else before.best, writing=()))
        kept = {saved.name for saved in (self.manifest.last, self.manifest.best) if saved is not None}
        gone = {saved.name: saved for saved in (before.last, before.best) if saved is not None and saved.name not in kept}
        for saved in gone.values() if self._together.group.leads else ():
            self._output.delete(saved.objects)

    def load(self, state: Mapping[str, Tensor], saved: Saved) -> None:
        """Fills the tensors in place. Raises CorruptSource, and what storage raises."""
        with plainly():
            load(dict(state), storage_reader=Reader(self._output, saved), no_dist=self._together.mesh is None)

    def _write(self, state: Mapping[str, Tensor], step: int) -> Saved:
        name = self._together.told(f"{TRAINING}{step:08d}-{secrets.token_hex(4)}/")
        processes = self._together.group.size
        size = sum(x.numel() * x.element_size() for x in state.values())
        most = 2 + 2 * size // processes // OBJECT_BYTES  # of a process: parts are about alike
        begun = tuple(f"{name}{rank:05d}-{number:05d}" for rank in range(processes) for number in range(most))
        if self._together.group.leads:
            self._output.delete(self.manifest.writing)
        self._commit(replace(self.manifest, writing=(f"{name}index.json", *begun)))
        writer = Writer(self._output, name)
        with plainly():
            save(dict(state), storage_writer=writer, no_dist=self._together.mesh is None)
        objects = json.loads(self._together.told(json.dumps(writer.objects)))
        return Saved(step, name, tuple(objects))

    def _commit(self, manifest: Manifest) -> None:
        if self._together.group.leads:
            self._etag = self._output.replace(MANIFEST, manifest.encode(), self._etag)
        self.manifest = manifest


@contextmanager
def plainly() -> Iterator[None]:
    """What went wrong in one of the processes, as it was raised there; nothing is said of one that is alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:
        causes = [cause[0] for _, cause in sorted(error.failures.items())]
        raise next((cause for cause in causes if isinstance(cause, KompressorError)), causes[0]) from error


class Writer(StorageWriter):
    """The parts of one process, several tensors an object, raw; where each lies is kept by the index."""

    def __init__(self, output: Output, name: str) -> None:
        self._output, self._name = output, name
        self._rank = 0
        self.objects: list[str] = []
        """Once finished, in the coordinator."""

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs.get("rank", 0) or 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        rank = plan.storage_data or 0
        results: list[WriteResult] = []
        number, held, size = 0, list[memoryview](), 0

        def put() -> None:
            nonlocal number, held, size
            self._output.write(f"{self._name}{rank:05d}-{number:05d}", b"".join(held))
            number, held, size = number + 1, [], 0

        for item in plan.items:
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor), f"{item.index}: tensors alone are kept"
            data = memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            results.append(WriteResult(item.index, len(data), (f"{rank:05d}-{number:05d}", size, len(data))))
            held, size = [*held, data], size + len(data)
            if size >= OBJECT_BYTES:
                put()
        if held:
            put()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        found = [result for of_process in results for result in of_process]
        tensors = {
            name: {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "chunks": [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks],
            }
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        places = [[r.index.fqn, list(r.index.offset) if r.index.offset is not None else None, *r.storage_data] for r in found]
        index = f"{self._name}index.json"
        self._output.write(index, json.dumps({"tensors": tensors, "places": places}, separators=(",", ":")).encode())
        self.objects = [index, *sorted({f"{self._name}{result.storage_data[0]}" for result in found})]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    def __init__(self, output: Output, saved: Saved) -> None:
        self._output, self._saved = output, saved
        self._metadata = Metadata({})

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = json.loads(self._object(self._saved.objects[0]))
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(getattr(torch, entry["dtype"])),
                torch.Size(entry["shape"]),
                [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in entry["chunks"]],
            )
            for name, entry in index["tensors"].items()
        }
        places = {MetadataIndex(name, offset): (place, start, size) for name, offset, place, start, size in index["places"]}
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_object: dict[str, list[Any]] = {}
        for item in plan.items:
            by_object.setdefault(self._metadata.storage_data[item.storage_index][0], []).append(item)
        for name, items in sorted(by_object.items()):
            data = bytearray(self._object(f"{self._saved.name}{name}"))
            for item in items:
                _, start, size = self._metadata.storage_data[item.storage_index]
                entry = self._metadata.state_dict_metadata[item.storage_index.fqn]
                assert isinstance(entry, TensorStorageMetadata)
                offset = item.storage_index.offset or torch.Size([0] * len(entry.size))
                chunk = next(chunk for chunk in entry.chunks if chunk.offsets == offset)
                flat = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(0, dtype=torch.uint8)
                whole = flat.view(entry.properties.dtype).view(chunk.sizes)
                for dim, (first, count) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    whole = whole.narrow(dim, first, count)
                target = planner.resolve_tensor(item).detach()
                target.copy_(whole)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _object(self, name: str) -> bytes:
        found = self._output.read(name)
        if found is None:
            raise CorruptSource(f"{self._output.uri}: {name} of a training's checkpoint is missing; {remedy(self._output.uri)}")
        return found[0]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
