"""The kernels in Triton: in its interpreter, through its compiler, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_inputs import constants, inputs, layer, of_range

from kompressor_worker import kernels
from kompressor_worker.grid import Grid
from kompressor_worker.kernels import activations
from kompressor_worker.schemes import COMPRESSED_TENSORS, SCHEMES


@pytest.mark.parametrize("module", ["triton_interpreted.py", "triton_compiled.py"])
def test_triton(module: str) -> None:
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if "interpreted" in module else {})
    done = subprocess.run([sys.executable, str(Path(__file__).with_name(module))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; Triton's interpreter and its compiler ran")
def test_cuda_equals_eager() -> None:
    weight, factor, _ = layer(300, 384, 9)
    for scheme in (SCHEMES["W4A16"], SCHEMES["W4A16_ASYM"], SCHEMES["FP8_DYNAMIC"], SCHEMES["NVFP4A16"]):
        found = of_range(weight, scheme)
        moved = Grid(*(None if g is None else g.cuda() for g in (found.scale, found.zero_point, found.global_scale)))  # type: ignore[arg-type]
        codes, _ = kernels.gptq(weight.cuda(), factor.cuda(), moved, scheme)
        expected, _ = kernels.gptq(weight, factor, found, scheme)
        assert (codes.cpu().float() != expected.float()).float().mean() < 1e-2
    for kind in activations.KINDS:
        x = inputs(1, (70, 300)).bfloat16()
        moved_ones = {name: value.cuda() for name, value in constants(kind, x.float()).items()}
        ours = kernels.fake_quantize_input(x.cuda(), kind, **moved_ones)  # type: ignore[arg-type]
        assert torch.equal(ours.cpu(), kernels.fake_quantize_input(x, kind, **constants(kind, x.float())))  # type: ignore[arg-type]
    for name in COMPRESSED_TENSORS:
        shared = torch.tensor([300.0])
        half = weight.bfloat16()
        ours, theirs = kernels.quantize(half.cuda(), SCHEMES[name], shared), kernels.quantize(half, SCHEMES[name], shared)
        assert torch.equal(ours.codes.cpu().view(torch.uint8), theirs.codes.view(torch.uint8))
        assert torch.equal(ours.scale.cpu().view(torch.uint8), theirs.scale.view(torch.uint8))
        assert ours.squared_error == pytest.approx(theirs.squared_error, rel=1e-9)
    for dtype in (torch.bfloat16, torch.float32):
        x, sums = torch.randn(1000, 300).to(dtype), torch.zeros(300, 300)
        moved_sums = sums.cuda()
        kernels.add_gram(moved_sums, x.cuda())
        kernels.add_gram(sums, x)
        assert torch.allclose(moved_sums.cpu(), sums, atol=1e-3)
        assert torch.equal(moved_sums, moved_sums.T)
    x = torch.randn(10, 12 * 512, dtype=torch.float64)
    base = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    assert torch.allclose(kernels.hadamard(x.cuda(), base).cpu(), kernels.hadamard(x, base), atol=1e-13)
