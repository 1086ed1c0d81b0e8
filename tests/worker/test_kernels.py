"""The compiled kernels against their eager references, and how they come to be compiled."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rtn import ALL, DTYPES, same_bytes, shared_scale, weights

import image_check
from kompressor_worker import kernels, processor
from kompressor_worker.kernels import build, compiled, eager, prebuilt
from kompressor_worker.schemes import SCHEMES, Scheme

quick = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++", "zig"))), reason="no C++ compiler on this machine")


def equal(ours: kernels.Quantized, reference: kernels.Quantized) -> None:
    assert same_bytes(ours.codes, reference.codes)
    assert same_bytes(ours.scale, reference.scale)
    assert (ours.zero_point is None) == (reference.zero_point is None)
    if ours.zero_point is not None and reference.zero_point is not None:
        assert same_bytes(ours.zero_point, reference.zero_point)
    assert ours.squared_error == pytest.approx(reference.squared_error, rel=1e-9)
    assert ours.squared_norm == pytest.approx(reference.squared_norm, rel=1e-9)
    assert ours.nonfinite == reference.nonfinite == 0


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: f"{s.name}-{s.group_size}")
@quick
@given(weight=weights())
def test_quantize_equals_eager(lib: CDLL, scheme: Scheme, weight: torch.Tensor) -> None:
    shared = shared_scale(weight, scheme)
    equal(compiled.quantize(lib, weight, scheme, shared), eager.quantize(weight, scheme, shared))


ODD = [s for s in ALL if s.type == "int" or s.bits == 8] + [SCHEMES[n].with_group_size(g) for n in ("W3A16", "W4A16") for g in (3, 24, 40)]


@pytest.mark.parametrize("scheme", ODD, ids=lambda s: f"{s.name}-{s.group_size}")
@quick
@given(weight=weights(columns=(1, 5, 17, 30, 90, 130)))
def test_odd_columns_equal_eager(lib: CDLL, scheme: Scheme, weight: torch.Tensor) -> None:
    shared = shared_scale(weight, scheme)
    equal(compiled.quantize(lib, weight, scheme, shared), eager.quantize(weight, scheme, shared))


@pytest.mark.parametrize("scheme", [SCHEMES["MXFP4"], SCHEMES["NVFP4A16"]], ids=lambda s: s.name)
@quick
@given(weight=weights(columns=(2, 18, 70, 1000)))
def test_partial_fp4_groups_equal_eager(lib: CDLL, scheme: Scheme, weight: torch.Tensor) -> None:
    shared = torch.tensor([123.4])
    equal(compiled.quantize(lib, weight, scheme, shared), eager.quantize(weight, scheme, shared))


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: f"{s.name}-{s.group_size}")
def test_threads_change_nothing(lib: CDLL, threads: None, scheme: Scheme) -> None:
    weight = torch.randn(400, 1024).bfloat16()
    assert weight.numel() > compiled.SERIAL
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(compiled.quantize(lib, weight, scheme, torch.tensor([100.0])))
    for other in results[1:]:
        equal(other, results[0])
        assert (other.squared_error, other.squared_norm) == (results[0].squared_error, results[0].squared_norm)


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: f"{s.name}-{s.group_size}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_what_is_not_finite(lib: CDLL, scheme: Scheme, dtype: torch.dtype) -> None:
    weight = torch.randn(130, 384).to(dtype)
    weight[0, 0] = weight[129, 383] = torch.nan
    weight[7, 200], weight[7, 201] = torch.inf, -torch.inf
    shared = torch.tensor([100.0])
    assert compiled.quantize(lib, weight, scheme, shared).nonfinite == eager.quantize(weight, scheme, shared).nonfinite == 4


@quick
@given(
    weight=weights(columns=(1, 33, 700)), bad=st.lists(st.tuples(st.integers(0, 8), st.sampled_from([torch.nan, torch.inf, -torch.inf])))
)
def test_amax_equals_eager(lib: CDLL, weight: torch.Tensor, bad: list[tuple[int, float]]) -> None:
    for row, value in bad:
        weight[row, 0] = value
    assert compiled.amax(lib, weight) == eager.amax(weight)


def test_nonfinite_of_any_tensor() -> None:
    for dtype in (*DTYPES, torch.float64, torch.float8_e4m3fn):
        tensor = torch.zeros(1_200_000).to(dtype)
        assert kernels.nonfinite(tensor) == 0
        tensor[[0, 70_000, 1_199_999]] = torch.tensor(torch.nan, dtype=dtype)
        assert kernels.nonfinite(tensor) == 3
    assert kernels.nonfinite(torch.ones(3, dtype=torch.int64)) == 0
    assert kernels.nonfinite(torch.empty(0)) == 0
    assert kernels.nonfinite(torch.tensor([[1.0, torch.inf], [2.0, 3.0]]).t()) == 1


def same_values(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    """Bit for bit, but for the payload of a NaN."""
    nan = reference.isnan()
    return torch.equal(ours.isnan(), nan) and same_bytes(ours.masked_fill(nan, 0), reference.masked_fill(nan, 0))


@quick
@given(
    st.integers(0, 2**32),
    st.integers(1, 200),
    st.integers(1, 300),
    st.sampled_from([(128, 128), (32, 16), (1, 64)]),
    st.sampled_from(DTYPES),
)
def test_fp8_blocks_equal_eager(lib: CDLL, seed: int, rows: int, columns: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.randn(-(-rows // block[0]), -(-columns // block[1]), generator=generator).exp()
    assert same_values(compiled.decode_fp8_block(lib, codes, scale, block, dtype), eager.decode_fp8_block(codes, scale, block, dtype))


@quick
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.sampled_from(DTYPES))
def test_mxfp4_experts_equal_eager_and_transformers(lib: CDLL, seed: int, experts: int, rows: int, groups: int, dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(0, 255, (experts, rows, groups), generator=generator).to(torch.uint8)
    decoded = compiled.decode_mxfp4(lib, blocks, scales, dtype)
    assert same_values(decoded, eager.decode_mxfp4(blocks, scales, dtype))
    assert same_values(decoded, convert_moe_packed_tensors(blocks, scales, dtype=dtype))


def test_an_exponent_of_nan_is_seen(lib: CDLL) -> None:
    blocks, scales = torch.full((1, 4, 1, 16), 0x21, dtype=torch.uint8), torch.full((1, 4, 1), 255, dtype=torch.uint8)
    assert kernels.nonfinite(kernels.decode_mxfp4(blocks, scales, torch.bfloat16)) == 128


def test_eager_can_be_forced() -> None:
    code = (
        "import torch; from kompressor_worker import kernels, processor; from kompressor_worker.kernels import build;"
        "from kompressor_worker.schemes import SCHEMES;"
        "assert build.library() is None; assert kernels.quantize(torch.ones(8, 128), SCHEMES['W4A16']).nonfinite == 0;"
        "assert kernels.decode_mxfp4(torch.ones(1, 2, 1, 16).byte(), torch.ones(1, 2, 1).byte(), torch.bfloat16).shape == (1, 32, 2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"KOMPRESSOR_KERNELS": "eager"})


def test_operations_are_torchs_too() -> None:
    weight = torch.randn(16, 128).bfloat16()
    codes, scale, _, stats = torch.ops.kompressor.quantize(weight, "W4A16", 64, None)
    assert (codes.shape, scale.shape, stats.shape) == ((16, 16), (16, 2), (3,))
    meta = eager.quantize(weight, SCHEMES["W4A16"].with_group_size(64))
    assert same_bytes(codes, meta.codes)


def test_warns_once_where_nothing_can_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("KOMPRESSOR_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    monkeypatch.delenv("KOMPRESSOR_KERNELS", raising=False)
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
    (record,) = caplog.records
    assert "false: exit code 1" in record.message
    assert "Install g++ or clang++, or set CXX" in record.message
    assert not list((tmp_path / "kernels").glob("*")), "a failed build leaves nothing behind"


@needs_compiler
def test_is_compiled_once_and_whole(lib: CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KOMPRESSOR_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", [flag for flag in build.FLAGS if flag != "-O3"])
    monkeypatch.setattr(build, "NATIVE", ())
    first = build.build()
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [first.name]
    stamp = first.stat().st_mtime_ns
    assert build.build() == first
    assert first.stat().st_mtime_ns == stamp
    # a CPU without AVX gives the same bytes and the same sums
    weight = torch.randn(40, 256).bfloat16()
    plain = CDLL(str(first))
    for scheme in ALL:
        one, other = (compiled.quantize(x, weight, scheme, torch.tensor([100.0])) for x in (plain, lib))
        equal(one, other)
        assert one.squared_error == other.squared_error


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small one in place of the kernels' own, an empty cache, and an image's folder to build into."""
    path = tmp_path / "kernels.cpp"
    path.write_text('extern "C" int answer() { return 1; }')
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "SOURCES", (path.name,))
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "image")
    monkeypatch.setenv("KOMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KOMPRESSOR_KERNELS", raising=False)
    return path


def answer(library: CDLL | None) -> int | None:
    return None if library is None else library.answer()


@needs_compiler
@pytest.mark.skipif(not processor.features() >= prebuilt.V3, reason="not a CPU that an image's libraries are for")
def test_an_image_brings_the_library_along(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(build.build_ahead()) == 3
    exec(image_check.KERNELS, {})  # what an image is asked for holds
    with monkeypatch.context() as without_compiler:
        without_compiler.setenv("CXX", "false")
        assert answer(build.library()) == 1
        source.write_text('extern "C" int answer() { return 2; }')
        assert build.library() is None, "what the image brought along is of another source"
        source.write_text('extern "C" int answer() { return 1; }')
        without_compiler.setattr(build, "FLAGS", [*build.FLAGS, "-DOTHER"])
        assert build.library() is None, "and of other flags"
    source.write_text('extern "C" int answer() { return 2; }')
    assert answer(build.library()) == 2


@needs_compiler
def test_what_root_builds_others_can_read(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also by a linker that writes into the file that is there, and leaves its mode as it was."""
    compiler = tmp_path / "keeping"
    version = '[ "$1" = --version ] && exec g++ --version'
    keeping = 'cp -p "$out" "$out.was"; g++ "$@" && cat "$out" > "$out.was" && mv "$out.was" "$out"'
    compiler.write_text(f"#!/bin/sh\n{version}\nfor out; do :; done\n{keeping}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build.build().stat().st_mode & 0o777 == 0o755


@needs_compiler
@pytest.mark.skipif(not prebuilt.paths(""), reason="an image's libraries are for x86-64")
def test_a_cpu_gets_the_best_library_that_it_can_run(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.build_ahead()
    for features, expected in (
        (prebuilt.V4 | {"avx512_bf16", "amx_tile"}, "v4-bf16"),
        (prebuilt.V4, "v4"),
        (prebuilt.V4 - {"avx512dq"}, "v3"),
        (prebuilt.V3 - {"fma"}, None),
        (frozenset(), None),
    ):
        monkeypatch.setattr(processor, "features", lambda features=features: features)
        found = prebuilt.find(build._digest())
        assert (found and found.name.rpartition("-")[0]) == expected


@needs_compiler
@pytest.mark.skipif(not processor.features() >= prebuilt.V3, reason="not a CPU that an image's libraries are for")
def test_levels_give_the_bits_of_a_library_for_this_cpu(lib: CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Vectors half as wide, same bits: a job may go on where its image's library is another one."""
    monkeypatch.setenv("KOMPRESSOR_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", [flag for flag in build.FLAGS if flag != "-O3"])
    monkeypatch.setattr(build, "NATIVE", prebuilt.LEVELS[-1].flags)
    other = CDLL(str(build.build()))
    weight, x = torch.randn(70, 200) * 0.02, torch.randn(100, 200)
    factor = torch.eye(200) + torch.randn(200, 200).triu(1) * 0.1
    for symmetric in (True, False):
        grouped = weight, factor, 40, 4, symmetric, torch.bfloat16
        ours, theirs = compiled.gptq_groups(lib, *grouped), compiled.gptq_groups(other, *grouped)
        assert all(map(torch.equal, ours[:3], theirs[:3]))  # the loss is a sum over panels of rows
    sums = [torch.zeros(200, 200), torch.zeros(200, 200)]
    compiled.add_gram(lib, sums[0], x)
    compiled.add_gram(other, sums[1], x)
    assert torch.equal(*sums)
    assert torch.equal(compiled.hadamard(lib, x[:, :128].contiguous(), None), compiled.hadamard(other, x[:, :128].contiguous(), None))
