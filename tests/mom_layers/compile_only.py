"""Compiles Triton kernels for a GPU that is not there, by running the code that launches the kernels on CPU tensors."""

import re
from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from mom_layers.recur import kernel_sets

# Bytes that one program may use, by compute capability: A100, H100.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


def compile_only(capability: int) -> list:
    """From now on every launch in this process compiles and does not run, and kernel sets are chosen for that chip.

    Returns the list that receives (kernel name, compiled kernel). Kernels must have been defined without
    TRITON_INTERPRET, and none may have been launched.
    """
    compiled = []
    run = jit.JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    jit.JITFunction.run = compile_instead
    kernel_sets.INTERPRETER = kernel_sets.Chip(f"sm_{capability}", divmod(capability, 10), SHARED_MEMORY[capability])
    return compiled


def left_operands_in_registers(kernel) -> int:
    """Hopper's asynchronous products (wgmma) whose left operand is a list of registers and not a descriptor."""
    return len(re.findall(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{", kernel.asm["ptx"]))
