"""The files of a checkpoint: shards and their index, what is carried over, what the digest covers."""

from __future__ import annotations

import pytest
from breaks import INDEX, WEIGHTS, Break, config, edit_json, put, refused, without
from families import tiny_model
from sources import folder_source, safetensors_bytes

from kompressor_worker.errors import CorruptSource
from kompressor_worker.reading import read_layout

SHARDED: list[tuple[str, Break, str]] = [
    ("not json", put(INDEX, b"{"), f"{INDEX}: not JSON"),
    ("no map", put(INDEX, b"{}"), f"{INDEX}: weight_map must map tensor names to file names; upload the index again"),
    (
        "shard missing",
        without("model-00002-of-00005.safetensors"),
        "is in model-00002-of-00005.safetensors, which s3://bucket/model lacks; upload that file",
    ),
    (
        "tensor missing",
        lambda s: edit_json(s, INDEX, lambda i: i["weight_map"].update(novel="model-00001-of-00005.safetensors")),
        f"{INDEX}: 'novel' is not in model-00001-of-00005.safetensors; upload the index and the shards of one version",
    ),
    (
        "other shard",
        lambda s: edit_json(s, INDEX, lambda i: i["weight_map"].update({"model.norm.weight": "model-00001-of-00005.safetensors"})),
        f"{INDEX}: 'model.norm.weight' is in model-0000",
    ),
    (
        "twice",
        lambda s: s.files.update({"model-00002-of-00005.safetensors": s.files["model-00001-of-00005.safetensors"]}),
        "is both in model-00001-of-00005.safetensors and in model-00002-of-00005.safetensors; remove the stale file",
    ),
    (
        "both kinds",
        put(WEIGHTS, safetensors_bytes({})),
        f"{WEIGHTS} and {INDEX} are both there; loaders disagree on which counts: remove the stale one",
    ),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in SHARDED])
def test_broken_shards(change: Break, message: str) -> None:
    source = folder_source(tiny_model("llama", shard="200KB"))
    change(source)
    assert message in refused(source, CorruptSource)


def test_shards_without_an_index() -> None:
    source = folder_source(tiny_model("llama", shard="200KB"))
    del source.files[INDEX]
    assert read_layout(source).warnings == (f"{INDEX} is missing; all 5 shards are there and were used",)
    del source.files["model-00003-of-00005.safetensors"]
    assert "shard 3 of 5 is missing, and so is" in refused(source, CorruptSource)


def test_a_tensor_that_the_index_does_not_list_is_kept() -> None:
    source = folder_source(tiny_model("llama", shard="200KB"))
    edit_json(source, INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    layout = read_layout(source)
    assert layout.warnings == (f"{INDEX} does not list model.norm.weight; kept, as loaders do",)
    assert any(t.name == "model.norm.weight" for stage in layout.stages() for t in stage.tensors)


def test_what_is_carried_over() -> None:
    source = folder_source(tiny_model("llama"))
    carried = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "modeling_x.py", "tokenizer.json"]
    behind = [
        "consolidated.safetensors", "params.json", "original/params.json", "original/consolidated.00.pth",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "x-Q4.gguf", "onnx/model.onnx", "onnx/config.json",
    ]  # fmt: skip
    silent = [".gitattributes", ".git/HEAD", ".cache/huggingface/x", "kompressor.json", "report.html", ".kompressor/journal.json"]
    for name in (*carried, *behind, *silent):
        source.files[name] = b"x"
    layout = read_layout(source)
    assert list(layout.other_files) == carried
    assert layout.warnings == (
        "not carried over, being other copies of the weights: consolidated.safetensors, onnx/ (2 files), "
        "original/ (2 files), params.json, pytorch_model.bin, pytorch_model.bin.index.json, x-Q4.gguf",
    )


def test_digest_covers_what_is_read() -> None:
    def digest(*changes: Break) -> str:
        source = folder_source(tiny_model("llama"))
        for change in changes:
            change(source)
        return read_layout(source).source_digest

    base = digest()
    assert base == digest()
    assert base.startswith("sha256:") and len(base) == 71
    assert base == digest(put("pytorch_model.bin", b"x")), "not read"
    assert base != digest(config(rms_norm_eps=1e-3))
    assert base != digest(put("tokenizer.json", b"x"))
    flipped = digest(lambda s: s.files.update({WEIGHTS: s.files[WEIGHTS][:-1] + b"\xff"}))
    assert base != flipped, "another ETag"
