"""What the passes that work on linears are asked for alike: targets and ignore, and where they quantise the group size."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from kompressor_api.fields import Count
from kompressor_api.v1alpha1 import Model
from kompressor_worker.errors import UserError
from kompressor_worker.formats.gguf_types import fitting, type_of
from kompressor_worker.layout import FileFormat
from kompressor_worker.schemes import SCHEMES, Scheme

GgufMix = Literal[
    "Q8_0", "Q6_K", "Q5_K", "Q5_K_M", "Q5_K_S", "Q4_K", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
]  # fmt: skip
"""Keys of `gguf_mixes.MIXES` whose types a pass can choose the codes of by itself."""
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class TargetParams(Model):
    """Base of the parameters of a pass that works on chosen linears."""

    targets: list[Pattern] = Field(
        default=["Linear"],
        min_length=1,
        max_length=256,
        description=(
            "Which linears: module names, re:<pattern> (from the start), or Linear for all of the decoder. Those that an "
            "earlier pass of the same kind has taken are left out."
        ),
    )
    ignore: list[Pattern] = Field(
        default_factory=list,
        max_length=1024,
        description="What to leave as it is, in the form of targets. Embeddings, the head (unless GGUF) and routers are left anyway.",
    )

    @field_validator("targets", "ignore")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


class LinearParams(TargetParams):
    """Base of the parameters of a pass that quantises linears."""

    group_size: Count | None = Field(
        default=None,
        ge=-1,
        le=65536,
        description=(
            "Columns that share a scale, -1 for a channel; packed integers only. Must divide the columns of every target. Default: 128 at "
            "2, 3 and 4 bits, -1 at 8."
        ),
    )

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("a group has at least one column; use -1 for one scale a channel")
        return value


def scheme_named(name: str, file_format: FileFormat) -> Scheme:
    """MXFP4 is stored in two ways under one name."""
    return SCHEMES[f"{name}_GGUF" if file_format == "gguf" and f"{name}_GGUF" in SCHEMES else name]


def fitted(scheme: Scheme, columns: int) -> Scheme:
    """The scheme, or what llama.cpp takes in its place where rows of so many columns are not made of whole blocks."""
    if scheme.format != "gguf":
        return scheme
    asked = type_of(scheme).name
    found = fitting(asked, columns)
    return scheme if found == asked else replace(scheme_named(found, "gguf"), instead_of=asked)


def scheme_in_groups(name: str, group_size: int | None, asked_by: str, file_format: FileFormat = "compressed-tensors") -> Scheme:
    """The scheme of this name, in groups of `group_size` if that is given. Raises UserError where its groups are fixed."""
    scheme = scheme_named(name, file_format)
    if group_size is None:
        return scheme
    if not scheme.choosable_groups:
        choosable = ", ".join(s.name for s in SCHEMES.values() if s.choosable_groups)
        raise UserError(
            f"{asked_by}: groupSize {group_size} with scheme {scheme.name}, whose groups are fixed; "
            f"leave groupSize out, or choose one of {choosable}"
        )
    return scheme.with_group_size(group_size)
