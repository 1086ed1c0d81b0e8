"""What a job reads that trains: teacher, student, data. All that can be known of them before a weight is read; no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from kompressor_api.locations import Location
from kompressor_api.names import Reason, Role
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.architectures import refuse_unknown_forward, text_config
from kompressor_worker.assignment import Assignment
from kompressor_worker.calibration import check_dataset
from kompressor_worker.digests import digest
from kompressor_worker.distil.lesson import StoredModel
from kompressor_worker.errors import UserError
from kompressor_worker.gguf_result import prepared
from kompressor_worker.headers import load_json
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass, build_passes
from kompressor_worker.passes.distil import Distil, DistilParams, in_place_of_sizes
from kompressor_worker.reading import read_layout
from kompressor_worker.samples import FoundData
from kompressor_worker.storage import Output, Source
from kompressor_worker.storage.locations import open_data, open_output, open_source

__all__ = ["Distillation", "Models", "open_models", "training_data_of", "training_of"]

VOCABULARY = "tokenizer.json"
OTHERS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "tiktoken.model", "qwen.tiktoken")
"""What makes a tokenizer where there is no tokenizer.json; compared byte by byte."""
SCALING = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Of config.json: what becomes of logits."""


@dataclass(frozen=True)
class Distillation:
    """Opened and held against each other."""

    params: DistilParams
    source: StoredModel
    """The model of the job."""
    teacher: StoredModel
    student: StoredModel | None
    """A checkpoint that is trained in place of what the passes make."""
    logits: Callable[[str], Output] | None = None
    """Where recordings of the teacher's logits lie, by name (`teacher.offline.location`); None: below the job's output."""

    @classmethod
    def of(
        cls,
        passes: Sequence[Pass],
        source: Source,
        layout: ModelLayout,
        environ: Mapping[str, str],
        stop: threading.Event | None = None,
    ) -> Distillation | None:
        """None where no pass trains. `layout`: of the checkpoint at `source`. Raises UserError, CorruptSource, and what storage raises."""
        distil = training_of(passes)
        if distil is None:
            return None
        params, given = distil.params, StoredModel(source, layout)
        teacher, student = given, None
        if params.teacher.source is not None:
            teacher = StoredModel.read(open_source(params.teacher.source, environ, stop, Role.TEACHER))
            distil.refuse_layers("teacher", 1, teacher.layout.config)
            refuse_unlike("distil.teacher", teacher, given)
        if params.student.source is not None:
            place = open_source(params.student.source, environ, stop, Role.STUDENT)
            student = StoredModel(place, read_layout(place))  # plain: passes read it too
            distil.refuse_layers("student", 0, student.layout.config)
            refuse_unlike("distil.student", student, given)
        return cls(params, given, teacher, student, recordings(params, environ, stop))

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the result depends on beside the job's own source, passes and data."""
        found = {"teacher": self.teacher.layout.source_digest} if self.teacher is not self.source else {}
        if self.student is not None:
            found |= {"source": self.source.layout.source_digest, "student": self.student.layout.source_digest}
        return found


def recordings(params: DistilParams, environ: Mapping[str, str], stop: threading.Event | None) -> Callable[[str], Output] | None:
    """Raises UserError: nothing can be written there."""
    if params.teacher.offline is None or (location := params.teacher.offline.location) is None:
        return None

    def place(name: str) -> Output:
        below: Location = location.model_copy(update={"uri": f"{location.uri.rstrip('/')}/{name}"})
        return open_output(below, environ, stop, Role.LOGITS)

    place("recording")  # touches nothing
    return place


@dataclass(frozen=True)
class Models:
    """What a job starts from."""

    spec: CompressionJobSpec
    """The job's, with passes in place of the sizes that distil asks for."""
    source: Source
    """What the passes read: the job's own, or the checkpoint of a student."""
    layout: ModelLayout
    distillation: Distillation | None = None

    @property
    def original(self) -> StoredModel:
        """What the result is compared with: the job's own model."""
        return self.distillation.source if self.distillation is not None else StoredModel(self.source, self.layout)


def open_models(spec: CompressionJobSpec, environ: Mapping[str, str], stop: threading.Event | None = None) -> Models:
    """From headers alone. Raises UserError, CorruptSource, and what storage raises."""
    told = spec.model_copy(update={"passes": in_place_of_sizes(spec.passes)}) if spec.passes else spec
    passes = build_passes(told.passes)
    source = open_source(spec.model.source, environ, stop)
    layout = prepared(spec.output, source, read_layout(source))
    found = Distillation.of(passes, source, layout, environ, stop)
    if found is not None and found.student is not None:
        return Models(told, found.student.source, prepared(spec.output, found.student.source, found.student.layout), found)
    return Models(told, source, layout, found)


def training_of(passes: Sequence[Pass]) -> Distil | None:
    return next((p for p in passes if isinstance(p, Distil)), None)


def training_data_of(assigned: Assignment, environ: Mapping[str, str], stop: threading.Event | None = None) -> FoundData:
    """Raises UserError, and what storage raises."""
    distil = training_of(assigned.passes)
    assert distil is not None, "a job that trains"
    sample = distil.trained_on(assigned.spec.calibration)
    source = open_data(sample, environ, stop)
    return FoundData(sample, source, check_dataset(source, sample))


def refuse_unlike(who: str, model: StoredModel, other: StoredModel) -> None:
    """Raises UserError where the two do not speak of the same tokens, or `model` cannot be run."""
    refuse_unknown_forward(model.layout.family, model.layout.config)
    mine, theirs = vocabulary_of(model), vocabulary_of(other)
    if mine != theirs:
        raise UserError(
            f"{who} {model.source.uri} has a vocabulary of {mine} tokens, {other.source.uri} one of {theirs}: what both say next is "
            "compared token by token; choose a checkpoint with the same vocabulary",
            Reason.UNSUPPORTED_MODEL,
        )
    for key in SCALING:
        if (one := text_config(model.layout.config).get(key)) != (two := text_config(other.layout.config).get(key)):
            raise UserError(
                f"{who} {model.source.uri}: {key} is {one}, of {other.source.uri} {two}: their logits are not of one scale; choose a "
                "checkpoint of the same kind",
                Reason.UNSUPPORTED_MODEL,
            )
    if (difference := difference_of(model.source, other.source)) is not None:
        raise UserError(
            f"{who} {model.source.uri} has another tokenizer than {other.source.uri}: {difference}; choose a checkpoint with the same one",
            Reason.UNSUPPORTED_MODEL,
        )


def vocabulary_of(model: StoredModel) -> Any:
    return text_config(model.layout.config).get("vocab_size")


def difference_of(one: Source, other: Source) -> str | None:
    """In which way two tokenizers give a text other ids; None: in none that can be seen. Chat templates are not looked at."""
    mine, theirs = (frozenset(source.list()) for source in (one, other))
    if VOCABULARY in mine and VOCABULARY in theirs:
        return difference_of_parts(*(load_json(VOCABULARY, source.read(VOCABULARY), duplicates=True) for source in (one, other)))
    common = [name for name in OTHERS if name in mine and name in theirs]
    if common:
        unlike = next((name for name in common if one.read(name) != other.read(name)), None)
        return None if unlike is None else f"{unlike} is not the same"
    kinds = [sorted(names & {VOCABULARY, *OTHERS}) for names in (mine, theirs)]
    if not any(kinds):  # token ids alone
        return None
    said = [", ".join(names) or "none" for names in kinds]
    return f"{said[0]} there, {said[1]} here, which cannot be compared (save both as {VOCABULARY})"


def difference_of_parts(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Of two tokenizer.json: what turns a text into ids."""
    ids, others = dict(tokens_of(mine)), dict(tokens_of(theirs))
    if ids != others:
        token = min((name for name in ids.keys() | others.keys() if ids.get(name) != others.get(name)), key=lambda x: (len(x), x))
        return f"token {token!r} is {ids.get(token, 'absent')} there, {others.get(token, 'absent')} here"
    merges = ((mine.get("model") or {}).get("merges") or (), (theirs.get("model") or {}).get("merges") or ())
    for number, (a, b) in enumerate(zip_longest(*merges)):
        if as_pair(a) != as_pair(b):
            return f"merge {number} is {a!r} there, {b!r} here"
    return next(
        (f"{part} is not the same" for part in ("normalizer", "pre_tokenizer") if digest(mine.get(part)) != digest(theirs.get(part))), None
    )


def tokens_of(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, Mapping):
        yield from vocabulary.items()
    else:  # of a unigram model: [token, score] in the order of ids
        yield from ((str(entry[0]), number) for number, entry in enumerate(vocabulary))
    yield from ((str(added["content"]), int(added["id"])) for added in tokenizer.get("added_tokens") or ())


def as_pair(merge: Any) -> Any:
    """Older files write both halves in one string."""
    return merge.split(" ") if isinstance(merge, str) else merge
