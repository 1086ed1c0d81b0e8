"""tokenizer.model: SentencePiece's own file, a protocol buffer, as far as a tokenizer of BPE is to be known from it.

Fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kompressor_worker.errors import CorruptSource

__all__ = ["Piece", "SentencePiece", "parse"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces; GGUF's types of tokens have the same numbers."""
BPE = 2
"""Of TrainerSpec.ModelType; 1 is a Unigram model."""


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePiece:
    pieces: tuple[Piece, ...]
    model_type: int
    dummy_prefix: bool
    """Whether a space comes before a text."""
    extra_whitespaces_removed: bool
    rules: bool
    """Whether characters are replaced before (`precompiled_charsmap`)."""


def parse(data: bytes) -> SentencePiece:
    """Raises CorruptSource."""
    pieces: list[Piece] = []
    model_type, dummy, removed, rules = 1, True, True, False
    try:
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", _bytes(piece[2]))[0] if 2 in piece else 0.0
                pieces.append(Piece(_bytes(piece.get(1, b"")).decode(), score, int(_number(piece.get(3, NORMAL)))))
            elif field == 2:
                model_type = _number(dict(_fields(_bytes(value))).get(3, 1))
            elif field == 3:
                spec = dict(_fields(_bytes(value)))
                rules = bool(spec.get(2, b""))
                dummy, removed = bool(_number(spec.get(3, 1))), bool(_number(spec.get(4, 1)))
    except (IndexError, ValueError, struct.error) as error:
        raise CorruptSource(f"tokenizer.model: not a SentencePiece model ({error}); upload the file again") from error
    if not pieces:
        raise CorruptSource("tokenizer.model: no pieces; upload the file again")
    return SentencePiece(tuple(pieces), model_type, dummy, removed, rules)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message: a number, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("it ends early")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text is expected")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number is expected")
    return value
