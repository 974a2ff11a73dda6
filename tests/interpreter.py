"""Repairs the interpreter of Triton 3.5 to 3.9, which runs kernels where there is no GPU, spares it idle work, and
checks the addresses that kernels read and write."""

from functools import cache, wraps

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


class _Places:
    """The memory of the tensors that the running kernel was given.

    Attributes:
        kernel: its name.
        names, starts, ends: of every storage, in the order of addresses.
        from_integers: whether the kernel made a pointer of an integer that it loaded.
    """

    def __init__(self, kernel: str, arguments: dict[str, object]):
        self.kernel, self.from_integers = kernel, False
        storages = {}
        for name, value in arguments.items():
            for tensor in value if isinstance(value, tuple) else (getattr(value, "base", value),):
                if isinstance(tensor := getattr(tensor, "base", tensor), torch.Tensor):
                    storage = tensor.untyped_storage()
                    start = storage.data_ptr()
                    storages[start] = (start + storage.nbytes(), name)
        self.starts = np.array(sorted(storages), np.uint64)
        self.ends = np.array([storages[start][0] for start in sorted(storages)], np.uint64)
        self.names = [storages[start][1] for start in sorted(storages)]

    def check(self, what: str, addresses: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        active = addresses if mask is None or mask.all() else addresses[np.broadcast_to(mask, addresses.shape)]
        if active.size == 0:
            return
        first, last = active.min(), active.max()
        place = int(np.searchsorted(self.starts, first, side="right")) - 1
        if place >= 0 and int(last) + size <= int(self.ends[place]):
            return
        places = np.searchsorted(self.starts, active, side="right").astype(np.int64) - 1
        ends = self.ends[places] if len(self.ends) else np.zeros_like(active)
        outside = (places < 0) | (active + np.uint64(size) > ends)
        if not outside.any():
            return
        wrong = int(active[outside].min())
        below = [(wrong - int(end), f"past the end of {name}") for end, name in zip(self.ends, self.names, strict=True)]
        above = [(int(start) - wrong, f"before {name}") for start, name in zip(self.starts, self.names, strict=True)]
        distance, side = min(((by, side) for by, side in below + above if by > -size), default=(0, "of no tensor"))
        raise IndexError(
            f"{self.kernel} {what} {int(outside.sum())} of {active.size} elements outside of its tensors, "
            f"the lowest {distance} bytes {side}"
        )


class _CheckedMemory:
    """Triton's functions that read and write memory, after a check of every address that is not masked."""

    def __init__(self, memory):
        self.memory, self.places = memory, None

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def load(self, pointers, mask, other, dtype):
        # The tensor behind a pointer that was an integer is no argument.
        if self.places and not self.places.from_integers:
            self.places.check("reads", pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        if self.places:
            self.places.check("writes", pointers, mask, value.itemsize)
        return self.memory.store(pointers, value, mask)

    def atomic_cas(self, pointers, expected, value, *rest):
        if self.places:
            self.places.check("writes", pointers, None, value.itemsize)
        return self.memory.atomic_cas(pointers, expected, value, *rest)

    def atomic_rmw(self, operation, pointers, value, mask, *rest):
        if self.places:
            self.places.check("writes", pointers, mask, value.itemsize)
        return self.memory.atomic_rmw(operation, pointers, value, mask, *rest)


def check_addresses() -> None:
    """A kernel that reads or writes outside of the tensors that it was given raises InterpreterError.

    On a GPU such a kernel reads other tensors, changes them, or ends the process. Here nothing would tell: memory next
    to a tensor mostly belongs to the process. An address inside the storage of any argument passes.
    """
    memory = interpreter._interpreter = _CheckedMemory(interpreter._interpreter)
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    to_host, call, to_pointer = executor._init_args_hst, executor.__call__, builder.create_int_to_ptr

    @wraps(to_host)
    def to_host_and_remember(self, args, kwargs):
        on_host = to_host(self, args, kwargs)
        memory.places = _Places(self.fn.__name__, dict(zip(self.arg_names, on_host[0], strict=False)) | on_host[1])
        return on_host

    @wraps(call)
    def call_and_forget(self, *args, **kwargs):
        try:
            return call(self, *args, **kwargs)
        finally:
            memory.places = None

    @wraps(to_pointer)
    def to_pointer_and_note(self, source, dtype):
        memory.places.from_integers = True
        return to_pointer(self, source, dtype)

    executor._init_args_hst, executor.__call__ = to_host_and_remember, call_and_forget
    builder.create_int_to_ptr = to_pointer_and_note
