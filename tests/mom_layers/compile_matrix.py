"""Compiles every kernel of a layer for chips, types and head sizes, and writes what the compiler reports of each.

    PYTHONPATH=[folder of another Triton:]. python tests/mom_layers/compile_matrix.py --output matrix.csv

A row of the CSV is one kernel as it was compiled for one head size. Needs no GPU.
"""

import argparse
import csv
import itertools
import os
import re
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import triton  # noqa: E402
from compile_only import (  # noqa: E402
    compiling,
    left_operands_in_registers,
    registers_and_local_memory,
    tensor_core_products,
)
from undefined_registers import undefined_registers  # noqa: E402

from mom_layers.common import checks  # noqa: E402
from mom_layers.common.chips import CHIPS  # noqa: E402
from mom_layers.layer import LinearAttentionLayer, MixtureOfMemories  # noqa: E402
from mom_layers.one_memory import mix_projected  # noqa: E402
from mom_layers.recur.rules import get_rule  # noqa: E402
from mom_layers.route import plan  # noqa: E402
from mom_layers.route.rows_triton import zero_spare_rows_triton  # noqa: E402
from mom_layers.route.sequences import plan_sequences  # noqa: E402
from mom_layers.state import MemoryState  # noqa: E402

COLUMNS = (
    "triton", "chip", "dtype", "key_size", "value_size", "rule", "kernel", "result",
    "shared_bytes", "registers", "local_bytes", "warps", "tensor_cores",
)  # fmt: skip
RULES = ("gated_deltanet", "gla", "hgrn2", "kda", "gated_deltanet2", "mamba2", "retention")
SIZES = (256, 128, 64, 32, 16)
HEADS, TOKENS, LONG, WIDTH = 4, 128, 4096, 4


def compile_layer(rule: str, dtype: torch.dtype, key_size: int, value_size: int, training_alone: bool) -> None:
    """Launches every kernel of a layer: training, with states before and after, with padding, decoding, and what
    context parallelism computes; or the kernels of a training step alone."""
    layer = MixtureOfMemories(
        128, num_heads=HEADS, head_dim=key_size, expand_v=value_size / key_size, rule=rule, kernels="triton"
    ).to(dtype)
    x = torch.zeros(1, TOKENS, 128, dtype=dtype, requires_grad=True)
    layer(x)[0].sum().backward()
    if training_alone:
        return
    keys, values, memories = HEADS * key_size, HEADS * value_size, layer.settings.num_all_memories
    state = MemoryState(
        torch.zeros(1, memories, HEADS, *layer.rule.state_shape(key_size, value_size), requires_grad=True),
        *(torch.zeros(1, memories, WIDTH - 1, n, dtype=dtype, requires_grad=True) for n in (keys, keys, values)),
    )
    out, after = layer(x, state=state, output_state=True)
    (out.sum() + sum(part.sum() for _, part in after.named_tensors())).backward()
    with torch.no_grad():
        layer(x, output_state=True, token_mask=torch.ones(1, TOKENS, dtype=torch.bool))
        for batch in (1, 16):  # few tokens read their memories' weights, many read all weights
            layer.step(
                x[0, :batch],
                MemoryState(*(part.expand(batch, *part.shape[1:]).contiguous() for _, part in state.named_tensors())),
            )
    shared = MixtureOfMemories(
        128, num_heads=HEADS, head_dim=key_size, expand_v=value_size / key_size, rule=rule, kernels="triton",
        single_kv_proj=True, text_conv=WIDTH,
    ).to(dtype)  # fmt: skip
    shared(x)[0].sum().backward()
    zero_spare_rows_triton(x.detach()[0].contiguous(), torch.zeros(1, dtype=torch.int32))
    compile_alone(rule, dtype, key_size, value_size)
    # Context parallelism: transitions, and the gradient of a slice's initial state.
    rule = get_rule(rule)
    q, k, v = (torch.zeros(TOKENS, HEADS, n, dtype=dtype) for n in (key_size, key_size, value_size))
    borders = torch.tensor([0, TOKENS], dtype=torch.int32)
    raw = {
        gate.name: torch.zeros(TOKENS, HEADS * gate.width(key_size, value_size), dtype=dtype) for gate in rule.raw_gates
    }
    inputs = rule.prepare(q, k, v, raw, rule.init_parameters(HEADS, key_size), "triton")
    state = torch.zeros(1, HEADS, *rule.state_shape(inputs.k.shape[2], value_size))
    rule.transition(inputs, borders, "triton")
    rule.gradient_of_initial_state(inputs, v, borders, state, "triton")


def compile_alone(rule: str, dtype: torch.dtype, key_size: int, value_size: int) -> None:
    """Launches the kernels of a layer of one memory as that layer launches them: without a plan's choices, without a
    convolution, for tokens that lie time first, and decoding."""
    x = torch.zeros(1, TOKENS, 128, dtype=dtype, requires_grad=True)
    for width in (WIDTH, 1):
        layer = LinearAttentionLayer(
            128, rule, num_heads=HEADS, head_dim=key_size, expand_v=value_size / key_size, conv_kernel=width,
            kernels="triton",
        ).to(dtype)  # fmt: skip
        out, state = layer(x, output_state=True)
        out.sum().backward()
        layer.step(x[0, :1].detach(), MemoryState(*(part.detach().contiguous() for _, part in state.named_tensors())))
    # So few and long sequences are cut into parts.
    borders = torch.tensor([0, LONG // 2, LONG], dtype=torch.int32)
    projected = torch.zeros(LONG, layer.in_proj.out_features, dtype=dtype, requires_grad=True)
    y, _ = mix_projected(projected, plan_sequences(borders, LONG, time_major=True), layer.memory_parameters(),
                         kernels="triton")  # fmt: skip
    y.sum().backward()


def reason(error: Exception) -> str:
    """A failure in one line: the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:160]


def rows_of(architecture, dtype, key_size, value_size, rule, kernel_set=None, keep=None, training_alone=False):
    """What the compiler reports of every kernel, a dictionary each."""
    with compiling(architecture, kernel_set=kernel_set, go_on=True) as compiled:
        compile_layer(rule, dtype, key_size, value_size, training_alone)
    seen = {}
    for name, kernel in compiled:
        row = dict(
            triton=triton.__version__, chip=architecture, dtype=str(dtype).removeprefix("torch."),
            key_size=key_size, value_size=value_size, rule=rule, kernel=name,
        )  # fmt: skip
        if isinstance(kernel, Exception):
            row |= dict(result=reason(kernel))
        else:
            registers, local = registers_and_local_memory(kernel)
            shared = kernel.metadata.shared
            result = "compiled" if shared <= CHIPS[architecture].shared_memory else "too much shared memory"
            if architecture == "sm_90" and left_operands_in_registers(kernel):
                result = "left operands in registers"
            elif architecture == "sm_90" and undefined_registers(kernel):
                result = "undefined registers"
            row |= dict(result=result, shared_bytes=shared, registers=registers, local_bytes=local,
                        warps=kernel.metadata.num_warps, tensor_cores=tensor_core_products(kernel))  # fmt: skip
        seen[tuple(row.values())] = row
        if keep and not isinstance(kernel, Exception):
            keep_text(keep, len(seen), row, kernel)
    return list(seen.values())


def keep_text(folder: Path, number: int, row: dict, kernel) -> None:
    """Writes the compiler's text without the lines that say where the source stands, for comparisons."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "ptx" if "ptx" in kernel.asm else "amdgcn"
    lines = [line for line in kernel.asm[kind].splitlines() if not re.match(r"\s*(\.loc|\.file|//)", line)]
    text = "\n".join(lines).split(".section\t.debug")[0]
    name = "-".join(str(row[key]) for key in ("chip", "dtype", "key_size", "value_size", "rule"))
    (folder / f"{name}-{number:03}-{row['kernel']}.{kind}").write_text(text)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(c for c in CHIPS if c.startswith("sm_")))
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--sizes", help="such as 256x256,64x128; every pair of sizes without")
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--kernel-set", help="the NAME of a kernel set, for families that have the set")
    parser.add_argument("--training-alone", action="store_true", help="no states, no decoding, no context parallelism")
    parser.add_argument("--output", help="a CSV file that the rows are added to; standard output without")
    parser.add_argument("--keep", type=Path, help="a folder for the compiler's texts")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    # Nothing runs, so that no tensor holds a plan: values are not checked, and PyTorch reads row 0 where a plan says.
    checks.checks_values = plan.checks_values = lambda tensor: False
    torch.empty = torch.zeros
    torch.set_num_threads(1)
    pairs = itertools.product(SIZES, SIZES)
    if arguments.sizes:
        pairs = [tuple(map(int, pair.split("x"))) for pair in arguments.sizes.split(",")]
    dtypes = [getattr(torch, name) for name in arguments.dtypes.split(",")]
    cases = itertools.product(arguments.chips.split(","), dtypes, pairs, arguments.rules.split(","))
    new = not (arguments.output and Path(arguments.output).exists())
    failures = 0
    with open(arguments.output, "a", newline="") if arguments.output else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for chip, dtype, (key_size, value_size), rule in cases:
            rows = rows_of(
                chip, dtype, key_size, value_size, rule, arguments.kernel_set, arguments.keep, arguments.training_alone
            )
            failures += sum(row["result"] != "compiled" for row in rows)
            writer.writerows(rows)
            file.flush()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
