"""Launching the Triton kernels that are not tiled products."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch
import triton
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Scalar, is_number
from flashns_dist.orthogonalize.kernels.strides import described
from flashns_dist.orthogonalize.kernels.triton_launch import TL_DTYPES, descriptor, precision
from flashns_dist.orthogonalize.kernels.triton_normalize import (
    inverse_norms_kernel,
    normalize_once_kernel,
    partial_norms_kernel,
    scale_kernel,
    scale_transpose_kernel,
)
from flashns_dist.orthogonalize.kernels.triton_prepared import (
    Launch,
    LaunchTable,
    argument,
    key_and_values,
)
from flashns_dist.orthogonalize.kernels.triton_product import (
    combine_kernel,
    mirror_kernel,
    scale_columns_kernel,
)
from flashns_dist.orthogonalize.kernels.triton_sketch import scale_sketch_kernel, sketch_kernel
from flashns_dist.orthogonalize.kernels.triton_small import gram_space_kernel

# A matrix of at most this many (padded) entries is normalized by one program in one pass.
ONE_PASS_ENTRIES = 32768
SKETCH_ROWS = 64
# Columns that a program sketches, and rows that it loads at a time: of eight tiles on an H200 the
# fastest or within 16 % of it, at eight shapes.
SKETCH_BLOCK = (128, 64)

_LAUNCHES = LaunchTable()


@cache
def device_facts(index: int) -> tuple[str, int, int]:
    """Name, compute capability's major number, and number of SMs of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.major, properties.multi_processor_count


def has_tensor_cores(t: Tensor) -> bool:
    """Whether the device of ``t`` multiplies matrices in hardware as these kernels need it."""
    return t.device.type == "cuda" and device_facts(t.get_device())[1] >= 8


def run(
    launch: Callable[[], Launch],
    tensors: Sequence[Tensor],
    scalars: Sequence[float | Tensor],
    *key: Hashable,
) -> None:
    """Launches; the key, with what the tensors and scalars say, determines everything but these."""
    facts, values = key_and_values(tensors, scalars)
    device = tensors[0].get_device()
    _LAUNCHES.launch((*key, facts, device), device, values, launch)


def launch_normalize(x: Tensor, scale: Scalar, transpose: bool, out: Tensor, norms: Tensor) -> None:
    """Writes ``x * scale / norm`` to ``out``, and the norms; ``x`` has contiguous rows."""
    batch, rows, cols = x.shape
    each = not is_number(scale)
    factor = argument(scale)
    padded_rows, padded_cols = triton.next_power_of_2(rows), triton.next_power_of_2(cols)
    if padded_rows * padded_cols <= ONE_PASS_ENTRIES:

        def once() -> Launch:
            return Launch(
                normalize_once_kernel, (batch,), (x, out, norms, factor), (rows, cols, x.stride(0)),
                {"SCALE_EACH": each, "TRANSPOSE": transpose, "ROWS": padded_rows,
                 "COLS": padded_cols},
                {"num_warps": 4 if padded_rows * padded_cols <= 8192 else 16},
            )  # fmt: skip

        run(once, (x, out, norms), (factor,), "normalize once", x.shape, transpose)
        return
    size = rows * cols
    block, steps, sums, levels = _partial_norms(x)
    chunks = sums.shape[1]

    def scaling() -> Launch:
        padded_chunks = triton.next_power_of_2(chunks)
        changing = (x, sums, levels, out, norms, factor)
        constants = {"SCALE_EACH": each, "CHUNKS": padded_chunks}
        if not transpose:
            return Launch(
                scale_kernel, (chunks, batch), changing, (size, chunks, batch, x.stride(0)),
                constants | {"BLOCK": block, "STEPS": steps}, {"num_warps": 8},
            )  # fmt: skip
        tile, tile_steps = 64, 4
        return Launch(
            scale_transpose_kernel,
            (-(-cols // tile), -(-rows // (tile * tile_steps)), batch),
            changing,
            (rows, cols, chunks, batch, x.stride(0)),
            constants | {"BLOCK": tile, "STEPS": tile_steps},
            {"num_warps": 4},
        )

    run(scaling, (x, sums, levels, out, norms), (factor,), "scale", x.shape, transpose)


def _partial_norms(x: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """Partial sums of squares of matrices with contiguous entries, and how they are cut.

    Returns:
        Entries per block, blocks per chunk, and for each matrix and chunk the sum and its level.
    """
    batch, size = x.shape[0], x.shape[1] * x.shape[2]
    # Chunks depend on the matrix alone, so that its norm does not depend on the batch.
    block, steps = 4096, 4 if size <= 1 << 22 else 16
    while -(-size // (block * steps)) > 1024:
        steps *= 2
    chunks = -(-size // (block * steps))
    sums = torch.empty((batch, chunks), dtype=torch.float32, device=x.device)
    levels = torch.empty((batch, chunks), dtype=torch.int32, device=x.device)

    def launch() -> Launch:
        return Launch(
            partial_norms_kernel, (chunks, batch), (x, sums, levels), (size, x.stride(0)),
            {"BLOCK": block, "STEPS": steps}, {"num_warps": 8},
        )  # fmt: skip

    run(launch, (x, sums, levels), (), "norms", x.shape)
    return block, steps, sums, levels


def launch_inverse_norms(x: Tensor, scale: float, out: Tensor) -> None:
    """Writes ``scale / norm`` of each matrix, whose entries are contiguous in any order."""
    _, _, sums, levels = _partial_norms(x)
    batch, chunks = sums.shape

    def launch() -> Launch:
        return Launch(
            inverse_norms_kernel, (batch,), (sums, levels, out, scale), (chunks,),
            {"CHUNKS": triton.next_power_of_2(chunks)}, {"num_warps": 4},
        )  # fmt: skip

    run(launch, (sums, levels, out), (scale,), "inverse norms", sums.shape)


def launch_sketch(
    signs: Tensor, x: Tensor, scale: float, tma: bool, out: Tensor, inverse: Tensor
) -> None:
    """Writes ``scale / norm`` of each matrix to ``inverse``, and ``signs x`` times that to ``out``.

    Args:
        signs: ``(1, SKETCH_ROWS, n)``, contiguous, in the dtype of ``x``.
        x: ``(batch, n, m)``.
        scale: A number.
        tma: Whether to read both by descriptors.
        out: ``(batch, SKETCH_ROWS, m)``, contiguous.
        inverse: ``(batch,)`` fp32.
    """
    batch, n, m = x.shape
    rows, (block, depth) = SKETCH_ROWS, SKETCH_BLOCK
    chunks = -(-m // block)  # so that a norm does not depend on the batch
    sums = torch.empty((batch, chunks), dtype=torch.float32, device=x.device)
    levels = torch.empty((batch, chunks), dtype=torch.int32, device=x.device)
    # A sketch of huge entries is beyond float16, and rounding one to bfloat16 twice does no harm.
    raw_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    raw = torch.empty(out.shape, dtype=raw_dtype, device=x.device)
    swapped = tma and bool(described(x))

    def sketching() -> Launch:
        sources: tuple[object, ...] = (signs, x)
        if tma:
            sources = descriptor(signs, False, rows, depth), descriptor(x, swapped, depth, block)
        constants = {
            "X_SWAPPED": swapped,
            "ROWS": rows,
            "BLOCK": block,
            "BLOCK_K": depth,
            "TMA": tma,
        }
        return Launch(
            sketch_kernel, (chunks, batch), (*sources, raw, sums, levels),
            (n, m, *((0, 0, 0) if tma else x.stride())), constants,
            {"num_warps": 4, "num_stages": 4 if tma else 3},
        )  # fmt: skip

    def scaling() -> Launch:
        size, entries = rows * m, 4096
        return Launch(
            scale_sketch_kernel, (-(-size // entries), batch),
            (raw, sums, levels, out, inverse, scale), (size, chunks),
            {"BLOCK": entries, "CHUNKS": triton.next_power_of_2(chunks)}, {"num_warps": 4},
        )  # fmt: skip

    run(sketching, (signs, x, raw, sums, levels), (), "sketch", x.shape, tma)
    run(scaling, (raw, sums, levels, out, inverse), (scale,), "scale sketch", out.shape)


def launch_gram_space(
    x: Tensor, steps: tuple[tuple[float, ...], ...], alpha: Scalar, scale: Scalar, out: Tensor
) -> None:
    """Writes to ``out`` the factor of these steps; see ``gram_space_kernel``."""
    batch, n, m = x.shape
    block = max(16, triton.next_power_of_2(n))
    scalars = (argument(alpha), argument(scale))

    def launch() -> Launch:
        constants = {
            "ROWS": steps,
            "ALPHA_EACH": not is_number(alpha),
            "SCALE_EACH": not is_number(scale),
            "BLOCK": block,
            "BLOCK_M": 32 if x.dtype == torch.float32 else 64,
            "DTYPE": TL_DTYPES[x.dtype],
            "PRECISION": precision(x.dtype, has_tensor_cores(x)),
        }
        options = {"num_warps": 8 if block == 128 else 4, "num_stages": 3}
        return Launch(
            gram_space_kernel, (batch,), (x, out, *scalars), (n, m, *x.stride()), constants, options
        )

    run(launch, (x, out), scalars, "gram_space", x.shape, steps)


def scale_columns(a: Tensor, scale: Tensor) -> Tensor:
    """``a diag(scale)`` in the dtype of ``a``."""
    batch, n, _ = a.shape
    out = torch.empty((batch, n, n), dtype=a.dtype, device=a.device)
    factors = scale.float().contiguous()

    def launch() -> Launch:
        return Launch(
            scale_columns_kernel, (-(-n // 128), -(-n // 32), batch), (a, factors, out),
            (n, *a.stride()), {"BLOCK_N": 32, "BLOCK_M": 128}, {"num_warps": 4},
        )  # fmt: skip

    run(launch, (a, factors, out), (), "scale_columns", a.shape)
    return out


def launch_combine(a: Tensor, b: Tensor, scalars: tuple[float | Tensor, ...], out: Tensor) -> None:
    """Writes ``alpha * a + beta * b + gamma * I`` to ``out``; all three are contiguous.

    Args:
        a, b: ``(batch, n, n)``, symmetric.
        scalars: ``triton_prepared.arguments`` of the three.
        out: ``(batch, n, n)``.
    """
    batch, n, _ = a.shape

    def launch() -> Launch:
        each = [isinstance(scalar, Tensor) for scalar in scalars]
        blocks = -(-n // 64)
        return Launch(
            combine_kernel, (blocks * (blocks + 1) // 2, batch), (a, b, out, *scalars), (n,),
            {"ALPHA_EACH": each[0], "BETA_EACH": each[1], "GAMMA_EACH": each[2], "BLOCK": 64},
            {"num_warps": 4},
        )  # fmt: skip

    run(launch, (a, b, out), scalars, "combine", a.shape)


def launch_mirror(matrix: Tensor, square: int) -> None:
    """Writes the lower triangle of each square on the diagonal over its upper one, in place.

    Args:
        matrix: ``(batch, n, n)``, symmetric outside the squares.
        square: Their size, a power of two and at least 64; the last one may be smaller.
    """
    batch, n, _ = matrix.shape
    blocks = square // 64

    def launch() -> Launch:
        return Launch(
            mirror_kernel, (-(-n // square) * (blocks * (blocks + 1) // 2), batch), (matrix,),
            (n, *matrix.stride()), {"SQUARE": square, "BLOCK": 64}, {"num_warps": 4},
        )  # fmt: skip

    run(launch, (matrix,), (), "mirror", matrix.shape, square)
