"""Mixtures whose files hold the experts of a layer stacked, as transformers writes them on request: read by expert, to the same result."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors.torch import save_file
from sources import folder_source

import jobs
from independent import tensors_of
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import CorruptSource, UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.reading import read_layout

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"]


def as_in_memory(source: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, save_original_format=False)
    return folder


def layout_of(folder: Path) -> ModelLayout:
    return read_layout(folder_source(folder))


def published(source: Path, folder: Path, passes: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    job = jobs.write(folder.with_suffix(".json"), jobs.manifest(source.as_uri(), folder.as_uri(), passes))
    assert run_cli(["run", str(job)]) == 0
    return tensors_of(folder), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_or_by_expert_it_is_the_same_model(family: str, tmp_path: Path) -> None:
    source = tiny_model(family)
    stacked = as_in_memory(source, tmp_path / "stacked")
    held = {name: tuple(tensor.shape) for name, tensor in tensors_of(stacked).items()}
    assert sum(len(shape) == 3 for shape in held.values()) >= 2 and not any(".experts.0." in name for name in held)
    one, other = layout_of(source), layout_of(stacked)
    assert [unit.name for unit in one.units] == [unit.name for unit in other.units]
    assert list(one.linears()) == list(other.linears())
    assert other.warnings == ()
    experts = [stage for stage in other.stages() if ".experts." in stage.name]
    assert {stage.source_bytes for stage in experts} == {sum(x.shape[0] * x.shape[1] * 2 for x in experts[0].linears)}, "its bytes alone"
    ranges = sorted((t.start, t.stop) for stage in experts for tensor in stage.tensors for t in tensor.stored)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges)), "of no other expert"
    for passes in ([{"rtn": {"scheme": "W4A16", "groupSize": 32}}], [{"magnitude": {"sparsity": 0.5}}]):
        name = next(iter(passes[0]))
        (tensors, config), (others, same) = (published(s, tmp_path / f"{name}-{s.name}", passes) for s in (source, stacked))
        assert tensors.keys() == others.keys() and all(torch.equal(tensors[each], others[each]) for each in tensors)
        assert config.get("quantization_config") == same.get("quantization_config")


def changed(source: Path, folder: Path, change: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({**tensors_of(source), **change}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    source = as_in_memory(tiny_model("qwen3_moe", moe_intermediate_size=96), tmp_path / "stacked")
    name = "model.layers.1.mlp.experts.down_proj"
    stack = tensors_of(source)[name]
    turned = {name: stack.transpose(1, 2).contiguous()}
    with pytest.raises(UserError, match=r"down_proj: \[4, 96, 128\], the last axes the other way .* \[4, 128, 96\].*save_pre"):
        layout_of(changed(source, tmp_path / "turned", turned))
    with pytest.raises(CorruptSource, match=r"down_proj: shape \[3, 128, 96\], but config.json says \[4, 128, 96\]"):
        layout_of(changed(source, tmp_path / "fewer", {name: stack[:3].contiguous()}))
    twice = {"model.layers.1.mlp.experts.2.down_proj.weight": stack[2].contiguous()}
    with pytest.raises(CorruptSource, match=r"experts.2.down_proj.weight is there beside it"):
        layout_of(changed(source, tmp_path / "twice", twice))
