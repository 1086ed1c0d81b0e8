"""Rounding to the grids in Triton, as `grid.quantize`, and codes back to values: shared by the kernels for CUDA. Imported only where
Triton is."""
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(8388608.0 * 1.5)
"""Added and taken away: rounds to an integer, ties to even."""


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def round_to_float(x, mantissa: tl.constexpr, least: tl.constexpr):
    """Value and code without its sign in a format with `mantissa` bits whose smallest normal number is 2^least; |x| within its range."""
    drop: tl.constexpr = 23 - mantissa
    bias: tl.constexpr = (126 + least) << mantissa
    one: tl.constexpr = (127 + least) << 23
    unit_bits: tl.constexpr = (127 + least - mantissa + 23) << 23
    unit: tl.constexpr = 2.0 ** (least - mantissa + 23)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + ((1 << (drop - 1)) - 1) + ((magnitude >> drop) & 1)) >> drop) << drop
    lifted = magnitude.to(tl.float32, bitcast=True) + unit  # its last bit is the subnormal step
    small = magnitude < one
    value = tl.where(small, (lifted - unit).to(tl.int32, bitcast=True), normal)
    code = tl.where(small, lifted.to(tl.int32, bitcast=True) - unit_bits, (normal >> drop) - bias)
    negative = (bits >> 31) & 1
    return (value | (negative << 31)).to(tl.float32, bitcast=True), code


@triton.jit
def round_to(x, floating: tl.constexpr, bits: tl.constexpr):
    """Value and code (int32; of FP8 and FP4 the E4M3 byte) of x, which is in units of the grid's step."""
    if floating:
        if bits == 8:
            value, code = round_to_float(clamp(x, -448.0, 448.0), 3, -6)
            negative = (x.to(tl.int32, bitcast=True) >> 31) & 1
        else:
            value, code = round_to_float(clamp(x, -6.0, 6.0), 1, 0)
            _, code = round_to_float(tl.abs(value), 3, -6)  # E4M3 holds every value of E2M1
            negative = (x < 0).to(tl.int32)  # -0 itself has no sign there
        code = code | (negative << 7)
    else:
        top: tl.constexpr = (1 << (bits - 1)) - 1
        value = (clamp(x, -top - 1.0, top * 1.0) + MAGIC) - MAGIC
        code = value.to(tl.int32)
    return value, code


@triton.jit
def nibble_of(code):
    """E2M1's four bits of the same value as an E4M3 byte (int32)."""
    magnitude = code & 0x7F  # 0.5 is 0x30; from 1 (0x38) on every fourth code is in E2M1, too
    some = tl.where(magnitude < 0x38, 1, (magnitude - 0x38) // 4 + 2)
    return tl.where(magnitude < 0x30, 0, some) | ((code >> 4) & 8)


@triton.jit
def value_of_byte(code):
    """fp32 of an E4M3 byte (int32), exactly; 0x7F and 0xFF are NaN."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)  # 2^-9
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return (value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def value_of_nibble(code):
    """fp32 of four bits of E2M1 (int32), exactly."""
    magnitude = code & 7
    normal = ((magnitude << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return (value.to(tl.int32, bitcast=True) | ((code & 8) << 28)).to(tl.float32, bitcast=True)
