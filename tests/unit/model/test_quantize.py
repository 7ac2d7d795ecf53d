"""Tests that an int8 matrix has the least error possible, and that products use the matrix that it represents."""

from __future__ import annotations

import pytest
import torch

from overfill.model import quantize
from overfill.model.quantize import Int8Matrix, linear

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[1 << 19, 100], ids=["one-piece", "many-pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_CPU_PIECE", request.param)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_element_is_off_by_more_than_half_a_scale(dtype: torch.dtype, pieces: None) -> None:
    matrix = (torch.randn(37, 45) * torch.logspace(-4, 2, 37).unsqueeze(1)).to(dtype)
    quantised = Int8Matrix.of(matrix)

    assert (quantised.values.dtype, quantised.scales.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(quantised.scales, matrix.float().abs().amax(1) / 127)
    error = (quantised.dequantised() - matrix.float()).abs()
    assert (error <= quantised.scales.unsqueeze(1) * 0.5001).all()
    assert quantised.values.abs().amax(1).eq(127).all()  # every row uses the whole range
    assert quantised.nbytes == 37 * 45 + 37 * 4


def test_a_row_of_zeros_stays_zero() -> None:
    matrix = torch.randn(3, 8)
    matrix[1] = 0
    quantised = Int8Matrix.of(matrix)
    assert quantised.scales.gt(0).all()
    assert quantised.dequantised()[1].eq(0).all()
    assert linear(torch.randn(2, 8), quantised).isfinite().all()


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (67, 65), (1, 3)])
@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_product_equals_that_of_the_represented_matrix(
    dtype: torch.dtype, tokens: int, rows: int, columns: int, with_bias: bool, pieces: None
) -> None:
    quantised = Int8Matrix.of(torch.randn(rows, columns) * 0.1)
    x = torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    wide = quantised.dequantised().double()
    want = torch.nn.functional.linear(x.double(), wide, None if bias is None else bias.double())

    got = linear(x, quantised, bias)

    assert got.dtype == dtype
    # The result is rounded three times: the product, the scaled product, and the sum with the bias.
    size = (x.double().abs() @ wide.abs().T).max() + (0 if bias is None else bias.abs().max())
    assert (got.double() - want).abs().max() <= 3 * torch.finfo(dtype).eps * size


def test_a_float16_product_does_not_overflow_where_its_result_does_not() -> None:
    quantised = Int8Matrix.of(torch.full((2, 64), 0.01))
    x = torch.full((1, 64), 500.0, dtype=torch.float16)  # times 127, summed: far beyond float16
    torch.testing.assert_close(linear(x, quantised), torch.full((1, 2), 320.0, dtype=torch.float16))


def test_torchs_kernel_is_used_only_where_it_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = torch._weight_int8pack_mm

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(args[1].shape))
        return kernel(*args)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", counted)
    for dtype, tokens, columns in [
        (torch.bfloat16, 4, 64),
        (torch.bfloat16, 4, 65),  # rows of any other length make it crash
        (torch.bfloat16, 4, 48),
        (torch.bfloat16, 17, 64),
        (torch.float32, 4, 64),
    ]:
        linear(torch.randn(tokens, columns).to(dtype), Int8Matrix.of(torch.randn(9, columns)))
    assert calls == [(9, 64)]
