"""Weight-only int8 quantisation: matrices of one byte per element, and products with them.

Quantisation is symmetric, with one scale per row (output channel): row ``i`` of an ``Int8Matrix`` represents
``values[i] * scales[i]``. ``scales[i]`` is the row's largest magnitude divided by 127, so that the error is at most
half a scale. Activations keep their dtype. A product converts one piece of the matrix at a time to that dtype. The
piece stays in the processor's cache, which costs less than reading the whole matrix in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_CPU_PIECE = 1 << 19  # elements; a piece stays in the cache
_DEVICE_PIECE = 1 << 26  # elements; few launches, and bounded memory
_MAX_KERNEL_ROWS = 16  # with more rows, arithmetic is the bound, and torch's int8 kernel is not faster
_MIN_SCALE = torch.finfo(torch.float32).tiny  # the scale of rows of zeros


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """A quantised [out, in] matrix.

    Attributes:
        values: [out, in] int8, in -127..127.
        scales: [out] float32, positive.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> Int8Matrix:
        """Allocates a matrix, which the caller fills with ``copy_``."""
        return cls(
            torch.empty(rows, columns, dtype=torch.int8, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )

    @classmethod
    def of(cls, matrix: Tensor) -> Int8Matrix:
        """Quantises ``matrix``, [out, in] of any float type, on its device."""
        rows, columns = matrix.shape
        quantised = cls.empty(rows, columns, matrix.device)
        quantised.copy_(matrix)
        return quantised

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def copy_(self, matrix: Tensor) -> None:
        """Quantises ``matrix``, [out, in] of any float type, into this one, piece by piece to save memory."""
        count = _rows_at_once(self.values)
        for values, scales, rows in zip(
            self.values.split(count), self.scales.split(count), matrix.split(count), strict=True
        ):
            wide = rows.to(values.device).float()
            scales.copy_((wide.abs().amax(dim=1) / 127).clamp_min(_MIN_SCALE))
            values.copy_((wide / scales.unsqueeze(1)).round())

    def split(self, rows: list[int]) -> tuple[Int8Matrix, ...]:
        """Splits the matrix into views of ``rows[i]`` rows each."""
        parts = zip(torch.split(self.values, rows), torch.split(self.scales, rows), strict=True)
        return tuple(Int8Matrix(values, scales) for values, scales in parts)

    def dequantised(self) -> Tensor:
        """The matrix that this one represents. [out, in] float32."""
        return self.values * self.scales.unsqueeze(1)


Matrix = Tensor | Int8Matrix


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ weight.T + bias`` for both kinds of matrices.

    Args:
        x: [tokens, in].
        weight: [out, in], quantised or in ``x``'s dtype.
        bias: [out] in ``x``'s dtype.

    Returns:
        [tokens, out] in ``x``'s dtype.
    """
    if isinstance(weight, Tensor):
        return functional.linear(x, weight, bias)
    product = (_product(x, weight.values) * weight.scales).to(x.dtype)
    return product if bias is None else product + bias


def _product(x: Tensor, values: Tensor) -> Tensor:
    """Computes ``x @ values.T``, without scales, in ``x``'s dtype or a wider one. [tokens, out]"""
    if _torch_has_a_kernel(x, values):
        return torch._weight_int8pack_mm(x.contiguous(), values, x.new_ones(len(values)))
    if x.dtype == torch.float16:  # sums of integers up to 127 times activations would overflow it
        x = x.float()
    pieces = [functional.linear(x, piece.to(x.dtype)) for piece in values.split(_rows_at_once(values))]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _torch_has_a_kernel(x: Tensor, values: Tensor) -> bool:
    """True if torch's int8 kernel is correct and fast for these operands.

    It is for few bfloat16 rows on a CPU. The float32 and CUDA kernels are several times slower than converting pieces.
    The kernel reads whole vectors and crashes on rows whose length is not a multiple of 32.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return on_cpu and len(x) <= _MAX_KERNEL_ROWS and values.shape[1] % 32 == 0


def _rows_at_once(values: Tensor) -> int:
    piece = _CPU_PIECE if values.device.type == "cpu" else _DEVICE_PIECE
    return max(1, piece // values.shape[1])
