"""What the passes that quantise linears are asked for alike: group size, targets, ignore."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, StringConstraints, field_validator

from kompressor_api.v1alpha1 import Model
from kompressor_worker.errors import UserError
from kompressor_worker.schemes import SCHEMES, Scheme

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class LinearParams(Model):
    """Base of the parameters of a pass that quantises linears."""

    group_size: int | None = Field(
        default=None,
        ge=-1,
        le=65536,
        description=(
            "Columns that share a scale, -1 for one scale a channel; packed integer schemes only. Must divide the columns of every "
            "targeted weight. Default: the scheme's own, 128 at 3 and 4 bits, -1 at 8."
        ),
    )
    targets: list[Pattern] = Field(
        default=["Linear"],
        min_length=1,
        max_length=256,
        description=(
            "What to quantise: module names, regular expressions as re:<pattern> (matched from the start of the name), or Linear for every "
            "linear layer of the decoder. Layers that an earlier pass has quantised are left out."
        ),
    )
    ignore: list[Pattern] = Field(
        default_factory=list,
        max_length=1024,
        description="What to leave exact, in the same form as targets. Embeddings, the head and routers are exact without being listed.",
    )

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("a group has at least one column; use -1 for one scale a channel")
        return value

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


def scheme_in_groups(name: str, group_size: int | None, asked_by: str) -> Scheme:
    """The scheme of this name, in groups of `group_size` if that is given. Raises UserError where its groups are fixed."""
    scheme = SCHEMES[name]
    if group_size is None:
        return scheme
    if not scheme.choosable_groups:
        choosable = ", ".join(s.name for s in SCHEMES.values() if s.choosable_groups)
        raise UserError(
            f"{asked_by}: groupSize {group_size} with scheme {scheme.name}, whose groups are fixed; "
            f"leave groupSize out, or choose one of {choosable}"
        )
    return scheme.with_group_size(group_size)
