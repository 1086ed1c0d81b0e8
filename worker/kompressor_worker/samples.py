"""The data that a job asks for: found and fingerprinted from listings, then read into rows of token ids."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kompressor_api.datasets import Sample
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.calibration import Rows, check_dataset, read_rows
from kompressor_worker.digests import digest
from kompressor_worker.errors import UserError
from kompressor_worker.passes import Pass
from kompressor_worker.records import DatasetFiles
from kompressor_worker.storage import Source
from kompressor_worker.storage.locations import open_data
from kompressor_worker.tokenizer import ModelTokenizer

WHERE = ("uri", "endpoint", "region", "path_style", "ca_bundle", "credentials_secret")
"""How the data is reached says nothing about what it is."""


@dataclass(frozen=True)
class FoundData:
    """A dataset that is there."""

    sample: Sample
    source: Source
    files: DatasetFiles

    @property
    def fingerprint(self) -> str:
        """Of the files by size and ETag, and of what is drawn from them."""
        asked = self.sample.model_dump(
            by_alias=True, exclude_none=True, exclude={"dataset": set(WHERE), "gates": True, "runtime": True, "threshold": True}
        )
        return digest([asked, [[info.name, info.size, info.etag] for info in self.files.files]])

    def read(self, tokenizer: ModelTokenizer, stop: threading.Event) -> Rows:
        return read_rows(self.source, self.sample, tokenizer, stop)


def flows(spec: CompressionJobSpec, passes: Sequence[Pass]) -> bool:
    """Whether activations flow through the model, or whole blocks are changed: else each tensor is compressed by itself."""
    return spec.evaluation is not None or any(p.measures or p.transforms for p in passes)


def wanted_samples(spec: CompressionJobSpec, passes: Sequence[Pass]) -> list[Sample]:
    """Raises UserError where a pass measures activations and there is nothing to measure them on."""
    names = [next(iter(entry)) for entry in spec.passes]
    hungry = [(i, name) for i, (name, p) in enumerate(zip(names, passes, strict=True)) if p.measures]
    if hungry and spec.calibration is None:
        i, name = hungry[0]
        raise UserError(
            f"passes[{i}].{name}: measures activations, and spec.calibration is missing; add spec.calibration.dataset, or "
            + without_data(passes[i])
        )
    samples: list[Sample] = []
    if spec.calibration is not None and hungry:
        samples.append(spec.calibration)
        if spec.drift is not None:
            samples.append(spec.drift)
    if spec.evaluation is not None:
        samples.append(spec.evaluation)
    return [*samples, *(wanted for p in passes if (wanted := p.trained_on(spec.calibration)) is not None)]


def refuse_short_rows(spec: CompressionJobSpec, passes: Sequence[Pass]) -> None:
    """Raises UserError where no calibration row can have as many tokens as a pass needs to see something."""
    for i, (entry, p) in enumerate(zip(spec.passes, passes, strict=True)):
        if spec.calibration is not None and spec.calibration.sequence_length < p.shortest_row:
            raise UserError(
                f"passes[{i}].{next(iter(entry))}: calibration.sequenceLength {spec.calibration.sequence_length} shows nothing of it; set "
                f"{p.shortest_row} or more, better {2 * p.shortest_row}"
            )


def without_data(hungry: Pass) -> str:
    """What can be done in place of a pass where there is no data."""
    if hungry.prunes:
        return "prune by magnitude, which works without data"
    if hungry.kv or hungry.reduces or hungry.surveys or hungry.recovers:
        return "leave it out"
    return "use a pass and scheme that work without data, such as rtn with W4A16"


def unused_samples(spec: CompressionJobSpec, passes: Sequence[Pass]) -> tuple[str, ...]:
    """Warnings."""
    if spec.calibration is not None and not any(p.measures or p.reads_calibration for p in passes):
        return ("spec.calibration is given, but no pass measures activations: it is not read",)
    return ()


def find_samples(
    samples: Sequence[Sample], tokenizer: ModelTokenizer, environ: Mapping[str, str], stop: threading.Event
) -> dict[str, FoundData]:
    """By section of the spec: calibration, drift, evaluation. No torch. Raises UserError, and what storage raises."""
    found: dict[str, FoundData] = {}
    for sample in samples:
        source = open_data(sample, environ, stop)
        found[sample.SECTION] = FoundData(sample, source, check_dataset(source, sample))
        if sample.dataset.kind != "tokens":
            tokenizer.check(chat=sample.dataset.kind == "messages")
    return found


def facts(rows: Mapping[str, Rows], found: Mapping[str, FoundData]) -> dict[str, Any]:
    """What the report says of the data."""
    return {
        section: {
            "uri": found[section].sample.dataset.uri,
            "samples": len(data.tokens),
            "tokens": sum(len(row) for row in data.tokens),
            "sequenceLength": found[section].sample.sequence_length,
            "packing": found[section].sample.packing,
            "seed": found[section].sample.seed,
            "documents": data.documents,
            "skipped": data.skipped,
            "bos": data.bos,
            "digest": data.digest,
        }
        for section, data in rows.items()
    }
