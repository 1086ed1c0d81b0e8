"""One of our results back into a plain checkpoint: every linear decoded to the model's dtype, no quantization_config.

It is a job without passes, whose source happens to be one of our results. So it streams stage by stage, goes on where it was cut off,
is published all at once, and lays its tensors out as any other job does: what a bitmask result expands to are the files, byte for byte,
that the same job with dense storage writes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import xxhash

from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
from kompressor_worker.checkpoint import Checkpoint, read_checkpoint
from kompressor_worker.errors import ClaimLost, CorruptSource, UserError
from kompressor_worker.formats import bitmask
from kompressor_worker.formats.stored import planned_tensors
from kompressor_worker.headers import load_json
from kompressor_worker.journal import RELEASE, open_journal
from kompressor_worker.layout import SourceTensor, StoredTensor
from kompressor_worker.pipeline import Limits, Load, Loaded
from kompressor_worker.progress import Progress
from kompressor_worker.publish import CONFIG, REPORT, already_published, build_report, publish, refuse_without_room
from kompressor_worker.reading import arranged
from kompressor_worker.shards import plan_output
from kompressor_worker.storage import JOURNAL, Source
from kompressor_worker.storage.locations import open_output, open_source
from kompressor_worker.verify import check_names, scheme_of

if TYPE_CHECKING:
    from kompressor_worker.journal import Journal
    from kompressor_worker.stream import DataFree, Step
    from kompressor_worker.writer import Carry, Writer

log = logging.getLogger(__name__)

KV_SCALES = (".self_attn.k_scale", ".self_attn.v_scale")
"""What the pass kvCache adds; a plain checkpoint has no place for them."""


@dataclass(frozen=True)
class Expanded:
    """What there is to say of it."""

    uri: str
    source_bytes: int
    output_bytes: int
    linears: int
    """That were stored otherwise than as they are."""
    seconds: float
    already: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "uri": self.uri,
            "sourceBytes": self.source_bytes,
            "outputBytes": self.output_bytes,
            "decodedLinears": self.linears,
            "seconds": round(self.seconds),
            "alreadyExpanded": self.already,
        }


def expand(
    location: SourceLocation,
    target: OutputSpec,
    environ: Mapping[str, str],
    progress: Progress,
    stop: threading.Event,
    limits: Limits | None = None,
) -> Expanded:
    """Raises UserError (not one of our results, or not finished), CorruptSource (not as it was written), and what storage raises; then
    nothing can be seen at the target."""
    began = time.monotonic()
    source, output = open_source(location, environ, stop), open_output(target, environ, stop)
    checkpoint, result = read_result(source)
    stored = source_tensors_of(checkpoint, result)
    layout = arranged(checkpoint, stored)
    plan = plan_output(layout, {})
    linears = sum(1 for tensor in stored.values() if tensor.encoding != "plain")
    expanded = {"uri": source.uri, "digest": result["result"]["digest"], "linears": linears}
    fingerprint = {"source": layout.source_digest, "expanded": str(expanded["digest"]), RELEASE: version("kompressor")}
    if already_published(output, fingerprint) is not None:
        if output.read(JOURNAL) is not None:  # who published it was cut off before all was cleared away
            output.cleanup()
        return Expanded(output.uri, layout.source_bytes, plan.tensor_bytes, linears, time.monotonic() - began, already=True)
    refuse_without_room(output, plan)
    output.probe()

    from kompressor_worker.stream import DataFree, Work, stream  # torch, only now that the request is known to make sense

    work = Work(layout, [], {}, plan, limits or Limits())
    journal = open_journal(output, fingerprint, f"expand of {source.uri}", lambda surveys: plan)
    progress.start(layout, journal.state.unit)
    name = result.get("job", {}).get("name") or "result"
    try:
        stream(work, Checked(DataFree(work), result["tensors"]), source, output, journal, progress.done, stop)
        progress.publishing()
        report = build_report(work, fingerprint, {"name": f"{name}, expanded"}, journal, source.uri, {"expanded": expanded})
        publish(work, source, output, journal, report)
    except ClaimLost:
        if output.read(JOURNAL) is None:  # the other one is done and gone: what we wrote since then is nobody's
            output.cleanup()
        raise
    return Expanded(output.uri, layout.source_bytes, plan.tensor_bytes, linears, time.monotonic() - began)


def read_result(source: Source) -> tuple[Checkpoint, dict[str, Any]]:
    """Its headers and its kompressor.json. Raises UserError, CorruptSource."""
    files = source.list()
    if CONFIG not in files:  # the last one that is written
        raise UserError(
            f"{source.uri}: no {CONFIG}, so this is no result, or its job has not finished; let it finish first",
            Reason.SOURCE_NOT_FOUND,
        )
    if REPORT not in files:
        raise UserError(
            f"{source.uri}: no {REPORT}, so this is no result of Kompressor; name the output.uri of a job that is Complete",
            Reason.UNSUPPORTED_MODEL,
        )
    result = load_json(REPORT, source.read(REPORT))
    if "gguf" in result:
        raise UserError(
            f"{source.uri}: a GGUF file, which llama.cpp reads as it is; for a plain checkpoint take the model that it was made from",
            Reason.UNSUPPORTED_MODEL,
        )
    checkpoint = read_checkpoint(source)
    try:
        check_names(checkpoint, result)
        if missing := sorted(set(result["files"]) - set(checkpoint.file_sizes)):
            raise CorruptSource(f"{source.uri}: {missing[0]} is missing; upload the result again")
        result["result"]["digest"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptSource(
            f"{source.uri}: {REPORT} lacks what Kompressor writes ({type(error).__name__}: {error}); upload the result again"
        ) from error
    return checkpoint, result


def source_tensors_of(checkpoint: Checkpoint, result: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """The tensors as the model sees them, by name, in stored order; those that say how inputs and a KV cache are rounded left out."""
    decoded: dict[str, SourceTensor] = {}
    taken: dict[str, str] = {}
    for name, linear in result["linears"].items():
        parts = [t.name for t in planned_tensors(name, tuple(linear["shape"]), linear["dtype"], scheme_of(linear))]
        stored = tuple(checkpoint.tensors[part] for part in parts if ".input_" not in part.removeprefix(name))
        weight = f"{name}.weight"
        decoded[weight] = SourceTensor(weight, linear["dtype"], tuple(linear["shape"]), stored, "quantized", scheme=scheme_of(linear))
        taken |= dict.fromkeys(parts, weight)
    for name, linear in result.get("pruned", {}).items():
        if how := linear.get("bitmask"):
            parts = [t.name for t in bitmask.planned_tensors(name, tuple(linear["shape"]), how["dtype"], how["values"])]
            weight, stored = f"{name}.weight", tuple(checkpoint.tensors[part] for part in parts)
            decoded[weight] = SourceTensor(weight, how["dtype"], tuple(linear["shape"]), stored, "bitmask")
            taken |= dict.fromkeys(parts, weight)
    scaled_cache = bool((checkpoint.config.get("quantization_config") or {}).get("kv_cache_scheme"))
    found: dict[str, SourceTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if (owner := taken.get(name)) is not None:
            found.setdefault(owner, decoded[owner])
        elif not (scaled_cache and name.endswith(KV_SCALES)):
            found[name] = SourceTensor(name, tensor.dtype, tensor.shape, (tensor,))
    return found


@dataclass
class Checked:
    """Units for `stream`, each tensor that is read held to the digest that was written with it."""

    units: DataFree
    digests: Mapping[str, str]
    """By stored tensor, as kompressor.json has them."""

    @property
    def left(self) -> Sequence[str]:
        return self.units.left

    def first(self, journal: Journal) -> int:
        return self.units.first(journal)

    def loads(self, unit: int) -> Iterator[Load]:
        return self.units.loads(unit)

    def replay(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        self.units.replay(unit, incoming, step)

    def run(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
        return self.units.run(unit, self._checked(incoming), writer, step)

    def _checked(self, incoming: Iterator[Loaded]) -> Iterator[Loaded]:
        """A tensor in slices is judged with its last one; by then the others are written, and seen by nobody."""
        hasher = xxhash.xxh3_128()
        for loaded in incoming:
            for tensor, start, stop in loaded.load.ranges:
                if start == 0:
                    hasher = xxhash.xxh3_128()
                hasher.update(loaded.views[tensor.name])
                if stop == tensor.nbytes:
                    self._judge(tensor, hasher.hexdigest())
            yield loaded

    def _judge(self, tensor: StoredTensor, digest: str) -> None:
        if (written := self.digests[tensor.name]) != f"xxh3-128:{digest}":
            raise CorruptSource(f"{tensor.name} in {tensor.file} is not what was written ({written}); upload the result again")
