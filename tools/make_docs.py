"""Writes the tables of docs/ and of tools/measured that follow from the code and from the measured figures.

    python tools/make_docs.py            writes the tables
    python tools/make_docs.py --check    writes nothing; the exit status is 1 where a page is not current

A page has a table between two lines, `<!-- table: NAME ... -->` and `<!-- end of table -->`; the rest of the page is
written by hand. tests/test_docs.py makes the same check.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import compatibility
import torch
from measured_rows import MEASURED, Row, read_rows, rows_of_last_commit, source

from linear_moe import plugin, recipes
from linear_moe.entry.arguments import DEFAULTS, FIELDS, OLD_NAMES, OURS, add_mom_arguments, is_switch, option
from linear_moe.recipes.size import memory_a_gpu, size_of
from linear_moe.trials.runs import MOM, RESUMED
from linear_moe.trials.table import Rows, exceptions, groups, markdown
from linear_moe.trials.verdict import TRAINS
from mom_layers import MemoryRule, get_rule, rule_names

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (*sorted(DOCS.glob("*.md")), MEASURED / "megatron_commands.md")
TABLE = re.compile(r"(<!-- table: ([a-z-]+)\b.*?-->\n)(.*?)(<!-- end of table -->\n)", re.DOTALL)
KINDS = {int: "a whole number", float: "a number", str: "a text"}
LAYERS = {
    "mom": "this layer",
    "softmax": "softmax attention",
    "fla-mom": "FLA's MoM",
    "fla-gdn": "FLA's GatedDeltaNet, one memory",
}


def cell(text: object) -> str:
    """A text that cannot end the cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A table of Markdown with its last line break."""
    lines = [head := list(head), ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def code(words: Iterable[object]) -> str:
    """Words as code, separated by commas."""
    return ", ".join(f"`{word}`" for word in words)


def arguments() -> str:
    """The arguments of this project, from the parser's group and the configuration's fields."""
    actions = {action.dest: action for action in add_mom_arguments(argparse.ArgumentParser(add_help=False))._actions}
    before = {now: option(old) for old, now in OLD_NAMES.items()}
    rows = []
    for name in OURS:
        action, default, about = actions[name], DEFAULTS[name], FIELDS[name].metadata
        if is_switch(name):
            spelled, values, shown = [option(name), option(f"no_{name}")], "", "on" if default else "off"
        else:
            spelled, values = [option(name)], code(action.choices) if action.choices else KINDS[action.type]
            shown = "none" if default is None else f"`{default}`"
        note = f" Earlier name: `{before[name]}`." if name in before else ""
        rows.append((code(spelled), values, shown, "yes" if about["fixed"] else "", about["help"] + note))
    for name, action in actions.items():  # arguments of a run, which no configuration stores
        if name not in OURS:
            rows.append((code(action.option_strings), "", "", "", action.help))
    return table(("argument", "values", "default", "fixed", "meaning"), rows)


def head_sizes() -> str:
    """Head sizes of every rule's Triton kernels."""
    rows = (
        (f"`{name}`", *(", ".join(map(str, get_rule(name).kernel_sizes(of_keys=keys))) for keys in (True, False)))
        for name in rule_names()
    )
    return table(("rule", "key sizes of the Triton kernels", "value sizes"), rows)


def patches(cpu: bool) -> str:
    """The patches of every run, or of a machine without a GPU."""
    chosen = [patch for patch in plugin.patches() if patch.name.startswith("cpu-") == cpu]
    head = ("patch", "why Megatron has to be changed", "what would make the patch unnecessary")
    return table(head, ((f"`{patch.name}`", patch.reason, patch.removed_when) for patch in chosen))


def patch_targets() -> str:
    """What every patch replaces."""
    rows = (
        (f"`{patch.name}`", code(f"{target.module}.{target.attribute}" for target in patch.targets))
        for patch in plugin.patches()
    )
    return table(("patch", "replaced"), rows)


def layer_times(kinds: tuple[str, ...]) -> str:
    """Milliseconds and memory of a training step of one layer, for some kinds of layers, from one commit."""
    rows = [row for row in rows_of_last_commit("h200_layers.csv", "layer", set(kinds)) if row["layer"] in kinds]
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["batch"], row["tokens"], row["hidden"]), {})[row["layer"]] = row
    lines = []
    for (batch, tokens, hidden), found in cases.items():
        values = [time_and_memory(found[kind]) if kind in found else "not measured" for kind in kinds]
        lines.append((f"{batch} x {tokens}, {hidden}", *values))
    return table(("sequences x tokens, hidden size", *(LAYERS[kind] for kind in kinds)), lines) + caption(rows)


def one_memory() -> str:
    """This layer beside FLA's layer with one memory, as CUDA graphs, from one commit."""
    rows = rows_of_last_commit("h200_layers.csv", "layer", {"mom", "fla-gdn"})
    found = {(row["batch"], row["tokens"], row["hidden"], row["layer"]): row for row in rows}
    lines = []
    for (*case, layer), row in found.items():
        ours = found.get((*case, "mom"))
        if layer != "fla-gdn" or ours is None:
            continue
        times, sizes = ([float(each[key]) for each in (ours, row)] for key in ("both_graph_ms", "peak_gib"))
        ratios = f"{times[0] / times[1]:.1f} times the time, {sizes[0] / sizes[1]:.1f} times the memory"
        lines.append((f"{case[0]} x {case[1]}, {case[2]}", *(f"{time:.1f} ms" for time in times), ratios))
    head = ("sequences x tokens, hidden size", "top-2 of 4 and a shared memory", LAYERS["fla-gdn"], "ratio")
    return table(head, lines) + caption(rows)


def time_and_memory(row: Row) -> str:
    """A cell of `layer_times`. A CUDA graph's time leaves out the host, which issues kernels one by one otherwise."""
    graph = "" if row["both_graph_ms"] in ("", "nan") else f" ({float(row['both_graph_ms']):.1f})"
    return f"{float(row['both_ms']):.1f}{graph} ms, {float(row['peak_gib']):.2f} GiB"


def lengths() -> str:
    """Time and memory of one layer over the length of one sequence."""
    rows = rows_of_last_commit("h200_lengths.csv", "layer", {"mom", "softmax"})
    found = {(row["layer"], int(row["tokens"])): row for row in rows}
    lines = []
    for tokens in sorted({tokens for _, tokens in found}):
        values = [
            f"{float(row['both_ms']):.1f} ms, {float(row['peak_gib']):.1f} GiB" if row else "not measured"
            for row in (found.get((kind, tokens)) for kind in ("mom", "softmax"))
        ]
        lines.append((f"{tokens // 1024}k", *values))
    return table(("tokens of one sequence", LAYERS["mom"], LAYERS["softmax"]), lines) + caption(rows)


def decoding() -> str:
    """Time of one token and bytes kept, over the context, for whole models."""
    rows = [row for row in read_rows("h200_decode.csv") if row["what"].endswith("-model") and row["batch"] == "1"]
    found = {(row["what"], int(row["context"])): row for row in rows}
    lines = []
    for context in sorted({context for _, context in found}):
        values = [
            f"{float(row['ms_per_token']):.2f} ms, {float(row['state_bytes_per_sequence']) / 1e9:.2f} GB"
            for row in (found[kind, context] for kind in ("mom-model", "softmax-model"))
        ]
        lines.append((f"{context // 1024}k", *values))
    return table(("tokens of context", "24 MoM layers", "24 softmax layers"), lines) + caption(rows)


def layouts() -> str:
    """Speed and memory of the 380M recipe on one GPU and in the layouts of two."""
    rows = read_rows("h200x2_layouts.csv")
    lines = [
        (
            row["layout"], f"{row['global_batch']} x {int(row['sequence']):,}", f"{int(row['tokens_per_second']):,}",
            row["of_one"], f"{float(row['peak_gib']):.0f} GiB", row["commit"],
        )
        for row in rows
    ]  # fmt: skip
    head = ("layout", "sequences a step x tokens", "tokens/s", "times one GPU", "memory of a GPU", "commit")
    return table(head, lines)


def exchange_times() -> str:
    """Times of one layer with the memories over two ranks, for every exchange, beside a rank that has all memories."""
    rows = read_rows("h200x2_exchange_times.csv")
    lines = []
    for row in rows:
        graph = "no graph" if row["both_graph_ms"] == "nan" else f"{float(row['both_graph_ms']):.1f} ms"
        name = "all memories on the rank" if row["exchange"] == "one" else f"`{row['exchange']}`"
        issued, memory = f"{float(row['both_ms']):.1f} ms", f"{float(row['peak_gib']):.1f} GiB"
        lines.append((name, issued, graph, row["waits"], memory))
    head = ("exchange", "as the host issues the layer", "as a CUDA graph", "waits for the GPU", "memory")
    return table(head, lines) + caption(rows)


def two_gpu_cases() -> str:
    """Runs on two GPUs beside the same run on one, as `tests/linear_moe/parallel/two_gpus.py` compares them."""
    rows = read_rows("h200x2_cases.csv")
    head = ("run on two GPUs", "losses of six steps differ by", "first gradient norm differs by", "resumed losses by")
    keys = ("case", "loss_difference", "norm_difference", "resume_difference")
    return table(head, ([row[key] for key in keys] for row in rows)) + caption(rows)


def converted() -> str:
    """Last validation losses of a softmax model, and of models with memories that were made of that model."""
    rows = read_rows("converted_tiny.csv")
    last = {row["title"]: row for row in rows}
    softmax = float(next(iter(last.values()))["validation_loss"])
    lines = (
        (title, f"{int(row['tokens']):,}", row["validation_loss"], f"{float(row['validation_loss']) / softmax - 1:.1%}")
        for title, row in last.items()
    )
    return table(("model", "tokens", "validation loss", "above softmax attention"), lines) + caption(rows)


def recipe_sizes() -> str:
    """Every recipe of examples/recipes: its model's size, its layout, and its speed where that was measured."""
    measured = {row["recipe"]: row for row in read_rows("recipes.csv")}  # the newest row of a recipe comes last
    lines = []
    for name in recipes.names():
        recipe = recipes.read(name)
        size, row = size_of(recipe), measured.get(name)
        layout = ", ".join(f"{axis} {value}" for axis, value in recipe.layout.items() if axis != "GPUS" and value > 1)
        speed = "not measured"
        if row is not None:
            where = f"{row['gpus']} x {row['device']}, {row['layout']} ({row['commit']})"
            speed = f"{int(row['tokens_per_second']):,} on {where}"
        lines.append((
            f"`{name}`", f"{size.all / 1e9:.2f}B", f"{size.at_work / 1e9:.2f}B",
            f"{recipe.layout['GPUS']} GPUs" + (f": {layout}" if layout else ""), f"{memory_a_gpu(recipe):.0f} GiB",
            speed,
        ))  # fmt: skip
    head = ("recipe", "parameters", "at work for a token", "layout", "memory of a GPU, computed", "tokens/s")
    return table(head, lines)


def megatron_commands() -> str:
    """What became of the commands of Megatron-LM's users: a summary, and what does not train or resume exactly."""
    rows, names = command_rows()
    left = sum(rows.result(name, MOM) is None for name in names)
    state = f"{left} of {len(names)} sets are not run yet" if left else f"All {len(names)} sets were run"
    waiting = sum(rows.result(name, MOM) == TRAINS and rows.result(name, RESUMED) is None for name in names)
    if waiting:
        state += f", and {waiting} that train are not resumed yet"
    return (
        f"{groups(rows, names)}\n{state}. What does not train, or does not resume exactly:\n\n{exceptions(rows, names)}"
    )


def all_megatron_commands() -> str:
    """A line for every command that was run, and the names of the others."""
    rows, names = command_rows()
    left = [f"- {name}\n" for name in names if rows.result(name, MOM) is None]
    return markdown(rows, names) + (f"\nNot run yet:\n\n{''.join(left)}" if left else "")


def command_rows() -> tuple[Rows, list[str]]:
    """The rows of tools/try_megatron_commands.py, and the names of all sets that the tool finds."""
    names = (MEASURED / "megatron_commands_names.txt").read_text().split()
    return Rows(MEASURED / "megatron_commands.csv"), names


def rules() -> str:
    """Operations and state of one token and head, for every rule."""
    rows = []
    for name in rule_names():
        rule = get_rule(name)
        k_dim = v_dim = 128 if rule.has_kernels(128, 128) else max(rule.kernel_sizes(of_keys=True))
        state = rule.state_shape(_key_size(rule, k_dim, v_dim), v_dim)
        kind = "a number for each channel" if rule.diagonal_transition else "a matrix"
        size = "" if k_dim == 128 else f" (K = V = {k_dim})"
        flops = rule.recurrence_flops(1000, 1, k_dim, v_dim) / 1e6
        rows.append((f"`{name}`", f"{flops:.0f} thousand{size}", " x ".join(map(str, state)), kind))
    return table(("rule", "operations, forward", "numbers of a state", "what a token multiplies the state by"), rows)


def _key_size(rule: MemoryRule, k_dim: int, v_dim: int) -> int:
    """Numbers of a key as the recurrence reads it, which a feature map may have made longer."""
    heads = 4
    keys = torch.zeros(1, rule.num_key_heads(heads), k_dim)
    raw = {gate.name: torch.zeros(1, heads * gate.width(k_dim, v_dim)) for gate in rule.raw_gates}
    parameters = rule.init_parameters(heads, k_dim)
    return rule.prepare(keys, keys, torch.zeros(1, heads, v_dim), raw, parameters, "torch").k.shape[2]


def recurrences(file: str = "h200_recurrences.csv") -> str:
    """Milliseconds of every rule's recurrence as a CUDA graph, beside FLA's operation of the same rule."""
    rows = read_rows(file)
    lines = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        for shape in dict.fromkeys(_shape(row) for row in rows if row["rule"] == rule):
            found = {row["kernel"]: row for row in rows if row["rule"] == rule and _shape(row) == shape}
            if rule not in found:
                continue
            times = [f"{float(found[rule][name]):.2f}" for name in ("forward_graph_ms", "both_graph_ms")]
            peers = [name for name in found if name != rule]
            if peers:
                times = [
                    f"{mine} ({float(found[peers[0]][name]):.2f})"
                    for mine, name in zip(times, ("forward_graph_ms", "both_graph_ms"), strict=True)
                ]
            lines.append((f"`{rule}`", shape, *times, peers[0] if peers else ""))
    return table(("rule", "shape", "forward", "forward+backward", "in parentheses"), lines) + caption(rows)


def _shape(row: dict[str, str]) -> str:
    return f"{row['segments']} x {row['tokens']} rows, {row['heads']} heads of {row['head_dim']}"


def rule_times() -> str:
    """Milliseconds of every rule's layer, from the newest commit, beside FLA's GatedDeltaNet."""
    if not (MEASURED / "h200_rules.csv").exists():
        return "These layers were not timed yet.\n"
    rows = rows_of_last_commit("h200_rules.csv", "layer", {"gated_deltanet"})
    cases = list(dict.fromkeys((row["batch"], row["tokens"], row["hidden"]) for row in rows))
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        found = {(row["batch"], row["tokens"], row["hidden"]): row for row in rows if row["layer"] == layer}
        cells = (
            f"{float(found[case]['both_ms']):.1f} ({float(found[case]['both_graph_ms']):.1f})" if case in found else ""
            for case in cases
        )
        lines.append((LAYERS.get(layer, f"`{layer}`"), *cells))
    head = ("layer", *(f"{batch} x {tokens}, {hidden}" for batch, tokens, hidden in cases))
    return table(head, lines) + caption(rows)


def rule_training() -> str:
    """First and last losses of every rule's hundred steps."""
    name = "rule_training.csv"
    rows = read_rows(name) if (MEASURED / name).exists() else []
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        found.setdefault(row["rule"], {}).setdefault(row["layers"], {})[int(row["step"])] = float(row["loss"])
    lines = []
    for rule in sorted(found):
        cells = (
            f"{losses[min(losses)]:.2f} to {losses[max(losses)]:.2f}"
            for losses in (found[rule].get(how, {}) for how in ("memories", "alone"))
            if losses
        )
        lines.append((f"`{rule}`", *cells))
    return table(("rule", "as memories", "alone"), lines) if lines else "Not trained yet.\n"


def caption(rows: list[Row]) -> str:
    """Where the figures of a table come from."""
    return f"\n{source(rows)}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "arguments": arguments,
    "head-sizes": head_sizes,
    "patches": lambda: patches(cpu=False),
    "cpu-patches": lambda: patches(cpu=True),
    "patch-targets": patch_targets,
    "rules": rules,
    "recurrences": recurrences,
    "recurrences-after": partial(recurrences, "h100_recurrences.csv"),
    "rule-times": rule_times,
    "rule-training": rule_training,
    "layer-times": lambda: layer_times(("mom", "softmax")),
    "peer-times": lambda: layer_times(("mom", "fla-mom", "fla-gdn")),
    "one-memory": one_memory,
    "lengths": lengths,
    "decoding": decoding,
    "layouts": layouts,
    "exchange-times": exchange_times,
    "two-gpu-cases": two_gpu_cases,
    "recipes": recipe_sizes,
    "converted": converted,
    "megatron-commands": megatron_commands,
    "all-megatron-commands": all_megatron_commands,
    "chips": lambda: table(("architecture", "devices", "Triton", "what was tried"), compatibility.chips()),
    "spills": lambda: table(
        ("architecture", "most shared memory of a kernel, bytes", "most local memory of a thread, bytes"),
        compatibility.spills(),
    ),
}


def filled(page: str) -> str:
    """A page with every table written anew."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[4]}", page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, and write nothing")
    args = parser.parse_args(argv)
    status = 0
    for path in PAGES:
        text = path.read_text()
        if (new := filled(text)) == text:
            continue
        if args.check:
            print(f"{path.parent.name}/{path.name} is not current: run python tools/make_docs.py", file=sys.stderr)
            status = 1
        else:
            path.write_text(new)
            print(f"wrote the tables of {path.parent.name}/{path.name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
