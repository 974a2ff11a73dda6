"""Writes the pages of docs/ that follow from the code: arguments.md and patches.md.

    python tools/make_docs.py            writes the pages
    python tools/make_docs.py --check    writes nothing; the exit status is 1 where a page is not current

tests/test_docs.py makes the same check.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from linear_moe import plugin
from linear_moe.entry.arguments import DEFAULTS, FIELDS, OLD_NAMES, OURS, add_mom_arguments, is_switch, option

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by tools/make_docs.py. Change the code, then run that tool. -->\n"

ARGUMENTS = """# Arguments

{note}
These arguments are added to Megatron's. `--token-mixer mom` switches the memories on; every other argument has a default.
Where the same setting can be given in several ways, the first of this list wins:

1. the argument on the command line, `--mom-num-memories 8`;
2. with `--use-checkpoint-args`, the value stored in the checkpoint;
3. with `--spec linear_moe.layer_specs mom_layer_spec` and no launcher, the environment variable `MOM_NUM_MEMORIES=8`, then
   the line `mom_num_memories: 8` of the YAML file that the environment variable `MOM_CONFIG` names;
4. the default.

[What each argument does to the model](concepts.md) is explained with a picture; this page is the reference.

## Table of arguments

A *fixed* argument gives the weights their meaning. A checkpoint stores the value, and a run that loads the checkpoint with
another value stops with a message.

| argument | values | default | fixed | meaning |
|---|---|---|---|---|
{rows}

Earlier names still work: {old}.

## Megatron's arguments with a meaning for memories

| argument | meaning with `--token-mixer mom` |
|---|---|
| `--linear-attention-freq 8` | Every eighth layer is softmax attention; all other layers are MoM. |
| `--linear-attention-freq "([1]*7+[0])*3"` | A list says every layer's mixer: 1 is MoM, 0 is softmax attention. Without the argument every layer is MoM. |
| `--hybrid-layer-pattern` | In `pretrain_hybrid.py` and `pretrain_mamba.py`, every letter `G` is a MoM layer. |
| `--expert-model-parallel-size` | Splits the memories over GPUs too, as `--mom-expert-parallel` says. Experts are not required. |
| `--num-attention-heads` | Heads of softmax layers. A MoM layer has `--mom-num-heads`. |
| `--norm-epsilon` | Also of the norm inside a MoM layer. |

## Environment variables

| variable | meaning |
|---|---|
| `MOM_CONFIG` | YAML file with settings, for runs without our arguments on the command line. |
| `MOM_TRUST_CHECKPOINT=1` | Allows a checkpoint to run the code that its files name. [Checkpoints](checkpoints.md#checkpoints-from-other-people) says when to do so. |
| `MOM_TRACEBACK=1` | `linear_moe.pretrain` prints an error's traceback instead of its message alone. |
| `MOM_CHECK=1` | On a GPU, checks the values of index tensors such as `cu_seqlens`. The check waits for the GPU and makes training slower. |
| `MOM_PYTHON` | The interpreter that the scripts in `examples` use as it is, without installing anything. |
"""

PATCHES = """# What is changed in Megatron

{note}
Megatron has no hook for some things that memories need. Each such change is a *patch*: it has a name and a reason, it can
be undone, and it stops the run with a clear message where the installed Megatron has no such place. Nothing on disk is
changed; a patch lives in the process that applied it.

- The patches in effect, in Python: `megatron_patches.patch.applied()`.
- Every patch that a run can have, in Python: `linear_moe.plugin.patches()`. This page is written from that list.
- `linear_moe.plugin.uninstall()` undoes them all.

## Patches of every run

| patch | why Megatron has to be changed | what change in Megatron would make the patch unnecessary |
|---|---|---|
{rows}

`training-log` belongs to runs of Megatron-LM's own scripts, and adds a line about the memories. `console` belongs to
`python -m linear_moe.pretrain`, and prints one line in place of Megatron's.

## Patches on a machine without a GPU

Megatron is written for GPUs. These patches let the same command run on a CPU, over gloo. On a machine with a GPU none of
them is applied.

| patch | why Megatron has to be changed | what change in Megatron would make the patch unnecessary |
|---|---|---|
{cpu_rows}

## Where each patch acts

| patch | replaced |
|---|---|
{targets}

[How to write a patch](architecture.md#a-patch) has the rules that a new one follows. Differences between releases of
Megatron are in `megatron_patches/releases`.
"""


def cell(text: object) -> str:
    """A text that cannot end the cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(rows) -> str:
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def arguments_page() -> str:
    """docs/arguments.md, from the parser's group and the configuration's fields."""
    parser = add_mom_arguments(argparse.ArgumentParser())
    actions = {action.dest: action for action in parser._actions}
    rows = []
    for name in OURS:
        action, default = actions[name], DEFAULTS[name]
        if is_switch(name):
            spelled, values = f"`{option(name)}`, `{option('no_' + name)}`", ""
            shown = "on" if default else "off"
        else:
            spelled = f"`{option(name)}`"
            kind = {int: "a whole number", float: "a number", str: "a text"}
            values = ", ".join(f"`{choice}`" for choice in action.choices) if action.choices else kind[action.type]
            shown = "none" if default is None else f"`{default}`"
        about = FIELDS[name].metadata
        rows.append((spelled, values, shown, "yes" if about["fixed"] else "", about["help"]))
    old = ", ".join(f"`{option(before)}` for `{option(now)}`" for before, now in OLD_NAMES.items())
    return ARGUMENTS.format(note=NOTE, rows=table(rows), old=old)


def patches_page() -> str:
    """docs/patches.md, from `linear_moe.plugin.patches`."""
    patches = plugin.patches()
    every = [patch for patch in patches if not patch.name.startswith("cpu-")]
    cpu = [patch for patch in patches if patch.name.startswith("cpu-")]

    def reasons(some):
        return table((f"`{patch.name}`", patch.reason, patch.removed_when) for patch in some)

    targets = table(
        (f"`{patch.name}`", ", ".join(f"`{target.module}.{target.attribute}`" for target in patch.targets))
        for patch in [*every, *cpu]
    )
    return PATCHES.format(note=NOTE, rows=reasons(every), cpu_rows=reasons(cpu), targets=targets)


PAGES = {"arguments.md": arguments_page, "patches.md": patches_page}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, and write nothing")
    args = parser.parse_args(argv)
    status = 0
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.exists() and path.read_text() == text:
            continue
        if args.check:
            print(f"docs/{name} is not current: run python tools/make_docs.py", file=sys.stderr)
            status = 1
        else:
            path.write_text(text)
            print(f"wrote docs/{name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
