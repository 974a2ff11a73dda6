"""Repairs the interpreter of Triton 3.5 to 3.9, which runs kernels where there is no GPU, and spares it idle work."""

from functools import cache

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


class _Lasting:
    set_attr = staticmethod(setattr)


def repair() -> None:
    """Four faults, none of them the compiler's: loops up to a loaded number fail with NumPy 2.4 or newer, bfloat16 is
    multiplied as the integers that hold it, and rounded towards zero, and a comparison of two numbers becomes a block
    of integers, which Triton 3.9 takes for no mask."""
    builder = interpreter.InterpreterBuilder
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot
    splat = builder.create_splat

    def patch_lang_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        patches = scope[0] if scope else _Lasting  # Triton 3.5 undoes nothing after a call
        patches.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def cast_impl(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, dtype)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = cast(self, a, tl.float32), cast(self, b, tl.float32)
        return dot(self, a, b, *rest)

    def create_splat(self, kind, value):
        block = splat(self, kind, value)
        if kind.scalar == tl.int1:
            block = interpreter.TensorHandle(block.data.astype(bool), tl.int1)
        return block

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.create_splat = create_splat
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = lambda self, source, dtype, rounding_mode: cast_impl(self, source, dtype)
    builder.create_dot = create_dot


def hasten() -> None:
    """Leaves out two thirds of its time, and nothing that a kernel or a test could see."""
    # The language's functions are exchanged for the interpreter's again at every call of one kernel from another.
    patch_lang, scope = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", lambda: None)

    def patch_lang_once(fn):
        languages = [module for module in (tl, tl.core) if any(module is value for value in fn.__globals__.values())]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return scope()
        return patch_lang(fn)

    interpreter._patch_lang = patch_lang_once
    # Integers are added a second time in 64 bits and compared, for an assertion that exists only in debug mode.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    assert not options.debug
    interpreter.interpreter_builder.options = options
    # A tensor's shape and its NumPy type are worked out anew for every result, and shapes compared that are the same.
    numpy_type, broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    numpy_types = {}

    def numpy_type_once(dtype):
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = numpy_type(dtype)
        return numpy_types[dtype.name]

    @cache
    def shape_of(*sizes):
        return tl.core.tuple([tl.constexpr(size) for size in sizes])

    def init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape = shape_of(*type.shape.values) if type.is_block() else shape_of()
        self.numel = tl.constexpr(type.numel if type.is_block() else 1)

    def broadcast_unless_same(self, left, right):
        return (left, right) if left.shape is right.shape else broadcast(self, left, right)

    interpreter._get_np_dtype = numpy_type_once
    tl.core.tensor.__init__ = init
    TritonSemantic.broadcast_impl_value = broadcast_unless_same
