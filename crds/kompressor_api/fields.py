"""The base of every model in the API, and the kinds of field that they are made of, each with its maximum."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, StringConstraints

__all__ = ["UNSTORED", "Count", "Flag", "Message", "Model", "Name", "Number", "Short", "Text", "Time", "Uri", "Warnings"]

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Uri = Annotated[str, StringConstraints(pattern=r"^((s3|hf|pvc)://[^/\s]\S*|file:///\S*)$", max_length=1024)]
Short = Annotated[str, StringConstraints(max_length=253)]
Flag = Annotated[bool, Strict()]
"""A YAML boolean; the API server does not take "true" for true either."""
Count = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
"""A YAML number; the API server does not take "0.1" or true for one either."""


UNSTORED = "x-unstored"
"""In a field's `json_schema_extra`: its default is the models' alone, not the CRD's, which would write it into every object. For fields
that are younger than a release: during an upgrade that release's operator would meet a name that nobody wrote and it does not know."""


def _clip(limit: int) -> BeforeValidator:
    """A status that the API server refuses for its length helps nobody: what is too long ends in an ellipsis."""
    return BeforeValidator(lambda v: f"{v[: limit - 1]}…" if isinstance(v, str) and len(v) > limit else v)


Text = Annotated[str, StringConstraints(max_length=1024), _clip(1024)]
Message = Annotated[str, StringConstraints(max_length=32768), _clip(32768)]
Time = Annotated[str, StringConstraints(max_length=64), Field(json_schema_extra={"format": "date-time"})]
MAX_WARNINGS = 64


def _clip_list(values: Any) -> Any:
    if isinstance(values, list) and len(values) > MAX_WARNINGS:
        return [
            *values[: MAX_WARNINGS - 1],
            f"and {len(values) - MAX_WARNINGS + 1} more: see kompressor.json beside the result",
        ]
    return values


Warnings = Annotated[list[Text], Field(max_length=MAX_WARNINGS), BeforeValidator(_clip_list)]


class Model(BaseModel):
    """camelCase on the wire, snake_case in Python; unknown names are an error."""

    model_config = ConfigDict(
        extra="forbid",
        populate_by_name=True,
        alias_generator=lambda name: "".join(w if i == 0 else w.capitalize() for i, w in enumerate(name.split("_"))),
    )

    @classmethod
    def model_validate(cls, obj: Any, *, by_name: bool | None = False, **options: Any) -> Self:
        """As pydantic's, but as the API server reads: `path_style` is unknown, only camelCase names are known; 4.0 is an integer."""
        return super().model_validate(_whole(obj), by_name=by_name, **options)


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_whole(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
