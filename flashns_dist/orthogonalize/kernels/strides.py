"""Memory layouts that bulk copies (TMA) can express."""

from __future__ import annotations

from torch import Tensor


def described(t: Tensor) -> bool | None:
    """Whether a descriptor can express ``(batch, rows, cols)``: as it is, transposed, or not.

    Returns:
        False if the last dimension is the contiguous one, True if the one before it is, None if
        neither is, or an address or a stride is not a multiple of 16 bytes.
    """
    size = t.element_size()
    batch_stride, row, col = t.stride()
    if t.data_ptr() % 16 or (t.shape[0] > 1 and (batch_stride * size % 16 or batch_stride == 0)):
        return None
    if col == 1 and row * size % 16 == 0 and row >= t.shape[2]:
        return False
    if row == 1 and col * size % 16 == 0 and col >= t.shape[1]:
        return True
    return None
