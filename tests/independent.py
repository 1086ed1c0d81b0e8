"""What the compressed-tensors library makes of a weight, with none of our code: the reference for published files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def decompressed(folder: Path) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Module name, its weight by the library's decompressor, and its scheme, for every quantised linear of a published result."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    stored = tensors_of(folder)
    for name in sorted({n.rpartition(".")[0] for n in stored if n.endswith("weight_scale")}):
        groups = list(config.config_groups.values())
        scheme = next((g for g in groups if any(match_name(name, t) for t in g.targets)), groups[0])
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        state = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == name}
        yield name, compressor.decompress(state, scheme)["weight"], scheme


def rounded(weight: torch.Tensor, args: Any, global_scale: torch.Tensor | None) -> torch.Tensor:
    """The weight [out, in] rounded to nearest by the library's own observers' maths: range, scale in fp32 rounded to the stored dtype,
    quantise, dequantise."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, columns = weight.shape
    match str(getattr(args.strategy, "value", args.strategy)):
        case "channel":
            tiles = weight.reshape(rows, 1, columns)
        case "group" | "tensor_group":
            tiles = weight.reshape(rows, columns // args.group_size, args.group_size)
        case "block":
            height, width = args.block_structure
            tiles = weight.reshape(rows // height, height, columns // width, width).transpose(1, 2).flatten(2)
    low, high = tiles.amin(-1).float(), tiles.amax(-1).float()
    scale, zero_point = calculate_qparams(low, high, args, global_scale=global_scale)
    if not args.scale_dtype:
        scale = scale.to(weight.dtype)
    return fake_quantize(weight.float(), scale.float(), zero_point, args, global_scale=global_scale).to(weight.dtype)


def global_scale(weights: list[torch.Tensor]) -> torch.Tensor:
    """NVFP4's, of all weights that share it."""
    from compressed_tensors.quantization.utils import generate_gparam

    low, high = min(w.min() for w in weights).float(), max(w.max() for w in weights).float()
    return generate_gparam(low.reshape(1), high.reshape(1))


def expand(folder: Path, out: Path) -> Path:
    """A plain checkpoint of a published result, for models that no loader here reads in compressed form."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*", "kompressor.json"))
    weights = {f"{name}.weight": weight for name, weight, _ in decompressed(folder)}
    quantised = {name.rpartition(".")[0] for name in weights}
    plain = {n: t for n, t in tensors_of(folder).items() if n.rpartition(".")[0] not in quantised}
    save_file({n: t.to(torch.bfloat16).contiguous() for n, t in (plain | weights).items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out
