"""Repairs Triton 3.6's interpreter, which runs the kernels where there is no GPU."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Three faults, none of them the compiler's: loops up to a loaded number fail with NumPy 2.4 or newer, bfloat16 is
    multiplied as the integers that hold it, and rounded towards zero."""
    builder = interpreter.InterpreterBuilder
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def cast_impl(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, dtype)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = cast(self, a, tl.float32), cast(self, b, tl.float32)
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = lambda self, source, dtype, rounding_mode: cast_impl(self, source, dtype)
    builder.create_dot = create_dot
