"""Predicted memory of an orthogonalization: what was measured, and what must follow."""

from __future__ import annotations

import pytest
import torch

from flashns_dist.orthogonalize import KELLER_JORDAN, METHODS, workspace_bytes

# Peaks beyond the input on an H200: batch, rows, columns, dtype, bytes. Some lines of
# docs/benchmarks/memory-h200.jsonl.
MEASURED = [
    (1, 4096, 14336, torch.bfloat16, 268436480),
    (1, 14336, 4096, torch.float32, 385876992),
    (4, 4096, 4096, torch.bfloat16, 671089664),
    (4, 1024, 4096, torch.float32, 109052928),
    (4, 8192, 2048, torch.bfloat16, 301990912),
    (1, 7168, 18432, torch.bfloat16, 675284480),
    (1, 7168, 2048, torch.float32, 96470016),
    (64, 768, 2048, torch.bfloat16, 503318016),
    (16, 512, 2048, torch.bfloat16, 109052416),
    (16, 512, 512, torch.float32, 41943552),
    (300, 128, 512, torch.bfloat16, 128845312),
]


@pytest.mark.parametrize(("batch", "rows", "cols", "dtype", "measured"), MEASURED)
def test_the_prediction_is_what_was_measured(
    batch: int, rows: int, cols: int, dtype: torch.dtype, measured: int
) -> None:
    predicted = batch * workspace_bytes("auto", rows, cols, input_dtype=dtype)
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (2048, 1024)])
def test_there_is_room_for_the_iterate_and_the_result(method: str, shape: tuple[int, int]) -> None:
    n, m = shape
    found = workspace_bytes(method, n, m)
    assert found >= 4 * n * m
    assert found == workspace_bytes(method, m, n)
    assert workspace_bytes(method, n, m, dtype=torch.float32) > found
    assert workspace_bytes(method, n, m, input_dtype=torch.float32) >= found


def test_coefficients_are_those_that_run() -> None:
    given = workspace_bytes("auto", 1024, 1024, KELLER_JORDAN)
    assert given == workspace_bytes("standard", 1024, 1024, KELLER_JORDAN)
    assert given != workspace_bytes("auto", 1024, 1024)
    with pytest.raises(ValueError, match="normalization"):
        workspace_bytes("fast", 64, 64, KELLER_JORDAN)
