"""Triton's interpreter (``TRITON_INTERPRET=1``), repaired where that of 3.4 to 3.6 is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, as decided when they were defined."""
    return bool(triton.knobs.runtime.interpret)


def repair() -> None:
    """Mends three things that the interpreter gets wrong; calling it again does nothing.

    A loop bound that is a kernel argument fails with NumPy 2.4 and later (``int`` of a one-element
    array); a product of bfloat16 blocks multiplies their bit patterns; and fp32 is truncated to
    bfloat16 instead of rounded.
    """
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    patch_tensor, dot, cast = (
        interpreter._patch_lang_tensor,
        builder.create_dot,
        builder.cast_impl,
    )

    def patch(tensor: Any, *scope: Any) -> None:  # Triton 3.4 has no scope
        patch_tensor(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *options)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_rounded(source.data), tl.bfloat16)
        return cast(self, source, target)

    interpreter._patch_lang_tensor = patch
    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    builder.repaired = True


def _widened(handle: Any) -> Any:
    """A bfloat16 block, which the interpreter keeps as 16-bit patterns, as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _rounded(data: Any) -> Any:
    """fp32 to the bit patterns of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), nearest)
