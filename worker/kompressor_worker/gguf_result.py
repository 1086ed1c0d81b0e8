"""A job whose result is a GGUF file: what is read for it beforehand, what cannot be asked of it, its plan, and its name. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from kompressor_api.v1alpha1 import CompressionJobSpec, OutputSpec
from kompressor_worker.architectures import text_config
from kompressor_worker.errors import UserError
from kompressor_worker.formats.gguf_architectures import CANDIDATES, INSIDE, decoder_of
from kompressor_worker.formats.gguf_tokenizer import FILES, tokenizer_metadata
from kompressor_worker.formats.gguf_types import type_of
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass
from kompressor_worker.report_sections import size
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import OutputPlan
from kompressor_worker.storage import Source

__all__ = ["decoder_alone", "file_name", "gguf_plan", "gguf_warnings", "prepared", "quantises", "refuse_impossible"]


def prepared(output: OutputSpec, source: Source, layout: ModelLayout) -> ModelLayout:
    """The layout of the checkpoint at `source` for this output: a GGUF file has the tokenizer in it, so that is read now. Raises UserError
    for one that cannot be carried over exactly, and what storage raises."""
    if output.format != "gguf":
        return layout
    layout = decoder_alone(layout)
    files = {name: source.read(name) for name in FILES if name in layout.file_sizes}
    rows = next((linear.shape[0] for linear in layout.linears() if linear.kind == "embedding"), 0)
    tokenizer = tokenizer_metadata(files, rows, text_config(layout.config))
    return replace(layout, file_format="gguf", tokenizer=tokenizer, warnings=(*layout.warnings, *tokenizer.warnings))


OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
"""Of config.json, what may stand outside of text_config."""


def decoder_alone(layout: ModelLayout) -> ModelLayout:
    """A model that also sees or hears without what it does that with, of which nothing is read then; a warning says so."""
    text = text_config(layout.config)
    if text is layout.config or layout.family not in CANDIDATES:
        return layout
    left = [unit for unit in layout.units if unit.name != "head" and not any(stage.linears for stage in unit.stages)]
    left = [unit for unit in left if not any(INSIDE.match(t.name) for stage in unit.stages for t in stage.tensors)]
    names = (t.name for unit in left for stage in unit.stages for t in stage.tensors)
    parts = ", ".join(sorted({name.removeprefix("model.").partition(".")[0] for name in names}))
    warning = (
        f"left out: {parts}, {size(sum(unit.source_bytes for unit in left))}: a GGUF file holds the decoder alone; llama.cpp sees and "
        "hears through a second file, which its convert_hf_to_gguf.py makes of the source (--mmproj)"
    )
    config = {**{key: layout.config[key] for key in OUTER if key in layout.config}, **text}
    units = tuple(unit for unit in layout.units if unit not in left)
    return replace(layout, units=units, config=config, source_config=config, warnings=(*layout.warnings, *([warning] if left else [])))


def refuse_impossible(spec: CompressionJobSpec, passes: Sequence[Pass], layout: ModelLayout) -> None:
    """Raises UserError for what a GGUF file has no place for, and for a decoder that llama.cpp does not compute."""
    decoder_of(layout)
    names = [next(iter(entry)) for entry in spec.passes]
    if layout.kv_cache is not None:
        where = next((i for i, p in enumerate(passes) if p.kv), 0)
        raise UserError(
            f"passes[{where}].{names[where]}: a GGUF file holds no scales of a cache; leave it out, llama.cpp takes the type of its cache "
            "when it starts (--cache-type-k q8_0)"
        )
    trained = next((i for i, p in enumerate(passes) if p.trains), None)
    rounded = False
    for i, name in enumerate(names if trained is not None else ()):
        rounded = rounded or quantises(spec.passes[i])
        if passes[i].recovers and rounded:
            raise UserError(
                f"passes[{i}].{name}: passes[{trained}].{names[trained or 0]} rounds weights anew, so what is tuned of their rounding is "
                "lost; put it before the pass that quantises, behind one that prunes, or leave it out"
            )
        if name != "rtn" and quantises(spec.passes[i]):
            raise UserError(
                f"passes[{i}].{name}: passes[{trained}].{names[trained or 0]} chooses the codes of a GGUF file by itself, on the scales of "
                "rounding to nearest; put rtn with this scheme in its place"
            )


def gguf_plan(spec: CompressionJobSpec, layout: ModelLayout, schemes: Mapping[str, Scheme]) -> OutputPlan:
    from kompressor_worker.formats.gguf_file import MAX_SPLIT_BYTES, plan_gguf
    from kompressor_worker.formats.gguf_metadata import metadata_of

    name = file_name(spec, layout)
    assert layout.tokenizer is not None, "read before the passes prepare"
    metadata = metadata_of(layout, layout.tokenizer, PurePosixPath(name).stem)
    return plan_gguf(layout, schemes, metadata, name, spec.output.max_file_bytes or MAX_SPLIT_BYTES)


def file_name(spec: CompressionJobSpec, layout: ModelLayout) -> str:
    """As asked for, or after what the passes that quantise are asked for."""
    if spec.output.name is not None:
        return spec.output.name
    asked = list(dict.fromkeys(_schemes_asked(spec.passes)))
    return f"model-{asked[0] if len(asked) == 1 else 'mixed' if asked else layout.dtype}.gguf"


def quantises(entry: Mapping[str, Any]) -> bool:
    """Whether a pass of the spec gives linears another type."""
    return any(_schemes_asked([entry]))


def _schemes_asked(entries: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for entry in entries:
        for params in entry.values():
            if isinstance(params, Mapping):
                yield from [str(params["scheme"])] if "scheme" in params else params.get("candidates", ())


def gguf_warnings(layout: ModelLayout, schemes: Mapping[str, Scheme]) -> list[str]:
    """What llama.cpp makes of the decoder, and which linears are in another type than asked for, because their rows are not whole blocks of
    that one."""
    columns = {linear.name: linear.shape[1] for linear in layout.linears()}
    found: dict[tuple[str, str, int], list[str]] = {}
    for name, scheme in schemes.items():
        if scheme.instead_of:
            found.setdefault((scheme.instead_of, type_of(scheme).name, columns[name]), []).append(name)
    lines = list(decoder_of(layout).warnings)
    for (asked, kind, width), names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {width} columns are no whole blocks of {asked}, so they are in {kind}, as llama.cpp does it")
    return lines
