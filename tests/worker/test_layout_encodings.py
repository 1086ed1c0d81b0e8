"""Checkpoints that are FP8 or MXFP4 by name, and not by what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from breaks import Q, edit_header, edit_json, refused
from families import fp8_block_model, mxfp4_model, tiny_model
from sources import folder_source

from kompressor_worker.errors import CorruptSource, KompressorError, UserError

FP8: list[tuple[str, Callable[[dict[str, Any]], Any], type[KompressorError], str]] = [
    ("scale missing", lambda e: e.pop(f"{Q}_scale_inv"), CorruptSource, "leave a gap"),
    (
        "scale renamed",
        lambda e: e.update({"lonely": e.pop(f"{Q}_scale_inv")}),
        CorruptSource,
        f"{Q}: F8_E4M3 without {Q}_scale_inv; upload the checkpoint again",
    ),
    (
        "weight renamed",
        lambda e: e.update({"lonely": {**e.pop(Q), "dtype": "I8"}}),
        CorruptSource,
        f"{Q}_scale_inv: a scale without its weight; upload the checkpoint again",
    ),
    (
        "scale's shape",
        lambda e: e[f"{Q}_scale_inv"].update(shape=[1, 2]),
        CorruptSource,
        f"{Q}_scale_inv: shape [1, 2], but [256, 128] in blocks of [128, 128] needs [2, 1]; correct weight_block_size",
    ),
    ("type", lambda e: e[Q].update(dtype="I8"), UserError, f"{Q}: I8 [256, 128] with scales in F32 is not FP8 in blocks"),
    (
        "static",
        lambda e: e.update({"a.input_scale": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        UserError,
        "a.input_scale: static activation scales cannot be decoded away; start from the unquantised checkpoint",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), [pytest.param(c, k, m, id=i) for i, c, k, m in FP8])
def test_broken_fp8(change: Callable[[dict[str, Any]], Any], kind: type[KompressorError], message: str) -> None:
    source = folder_source(fp8_block_model(tiny_model("qwen3")))
    edit_header(source, change)
    assert message in refused(source, kind)


def test_broken_fp8_config() -> None:
    source = folder_source(fp8_block_model(tiny_model("qwen3")))
    edit_json(source, "config.json", lambda c: c["quantization_config"].update(weight_block_size=[128]))
    assert "config.json: weight_block_size [128] is not [rows, columns]" in refused(source, CorruptSource)


BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
SCALES = "model.layers.0.mlp.experts.down_proj_scales"
MXFP4: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("no scales", lambda e: e.update({"x": e.pop(SCALES)}), f"{BLOCKS}: blocks without"),
    ("no blocks", lambda e: e.update({"x": e.pop(BLOCKS)}), f"{SCALES}: scales without their blocks"),
    (
        "shape",
        lambda e: e[BLOCKS].update(shape=[4, 128, 4, 32]),
        f"{BLOCKS}: U8 [4, 128, 4, 32] and scales U8 [4, 128, 8] are no MXFP4 ([E, rows, groups, 16] and",
    ),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in MXFP4])
def test_broken_mxfp4(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    source = folder_source(mxfp4_model())
    edit_header(source, change)
    assert message in refused(source, CorruptSource)
