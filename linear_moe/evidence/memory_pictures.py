"""Pictures and a table of what memories hold, from files of memories.py and the rows of training. Needs matplotlib."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from linear_moe.evidence.classes import Rows, is_of, title
from linear_moe.watching.headless_matplotlib import plt, save

NAMES = ("memory_load.png", "memory_layers.png", "memory_answers.png", "memory_text.png")
LISTED = 8  # tokens of a memory in the table


def read_holdings(folder: Path, models: Rows) -> dict[str, dict]:
    """{key of a model: its file of memories.py} of the models that have one."""
    paths = {row["key"]: folder / f"memories_{row['key']}.json" for row in models}
    return {key: json.loads(path.read_text()) for key, path in paths.items() if path.is_file()}


def first_of(models: Rows, holdings: dict[str, dict]):
    """The model whose memories are drawn: MoM as the comparison has it, or else the first that has a file."""
    chosen = [row for row in models if row["key"] in holdings]
    return next((row for row in chosen if row["model"] == "mom"), chosen[0])


def draw_all(folder: Path, models: Rows, history: Rows, output: Path, prefix: str = "") -> list[Path]:
    """Draws the pictures of the models that have files of memories.py. Returns the paths; none without such a model."""
    holdings = read_holdings(folder, models)
    if not holdings:
        return []
    chosen, first = [row for row in models if row["key"] in holdings], first_of(models, holdings)
    paths = [output / f"{prefix}{name}" for name in NAMES]
    draw_load(paths[0], chosen, models, history)
    unbalanced = [row for row in chosen if row["model"] == "mom-balancing-0"][:1]
    draw_layers(paths[1], [first, *unbalanced], models, history)
    draw_answers(paths[2], holdings[first["key"]], title(first, models))
    draw_text(paths[3], holdings[first["key"]], title(first, models))
    return paths


def load_of(row) -> np.ndarray:
    """[layers, memories] shares of a row of training.csv."""
    return np.array([[float(share) for share in layer.split(":")[1].split("/")] for layer in row["load"].split()])


def draw_load(path: Path, chosen: Rows, models: Rows, history: Rows) -> None:
    """Of every model: shares of the most and the least used memory along training, and the routing entropy."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for index, model in enumerate(chosen):
        rows = {int(row["step"]): row for row in history if is_of(row, model) and row["load"]}
        if not rows:
            continue
        tokens = [int(rows[step]["tokens"]) / 1e6 for step in sorted(rows)]
        loads = [load_of(rows[step]) for step in sorted(rows)]
        for extreme, style in ((np.max, "-"), (np.min, ":")):
            values = [extreme(load, 1).mean() for load in loads]
            label = title(model, models) if style == "-" else None
            left.plot(tokens, values, style, color=f"C{index}", label=label)
        layers = [rows[step]["entropy"].split() for step in sorted(rows)]
        entropy = [np.mean([float(layer.split(":")[1]) for layer in found]) for found in layers]
        right.plot(tokens, entropy, color=f"C{index}")
    left.set(xlabel="training tokens (millions)", ylabel="share of a layer's choices, mean over layers",
             title="Most (lines) and least (dots) used memory")  # fmt: skip
    right.set(xlabel="training tokens (millions)", ylabel="nats a token, mean over layers", title="Routing entropy")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(figure, path)


def draw_layers(path: Path, chosen: Rows, models: Rows, history: Rows) -> None:
    """Shares of every memory along training: a row of panels a model, a panel a layer, a line a memory."""
    courses = []
    for model in chosen:
        rows = {int(row["step"]): row for row in history if is_of(row, model) and row["load"]}
        tokens = [int(rows[step]["tokens"]) / 1e6 for step in sorted(rows)]
        names = [layer.split(":")[0] for layer in rows[max(rows)]["load"].split()]
        courses.append((model, names, tokens, np.array([load_of(rows[step]) for step in sorted(rows)])))
    columns = max(len(names) for _, names, _, _ in courses)
    size = (1.2 + 2 * columns, 0.8 + 2 * len(courses))
    figure, panels = plt.subplots(len(courses), columns, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for row_of_panels, (model, names, tokens, loads) in zip(panels, courses, strict=True):
        for index, axes in enumerate(row_of_panels):
            if index >= len(names):
                axes.axis("off")
                continue
            for memory in range(loads.shape[2]):
                axes.plot(tokens, loads[:, index, memory], linewidth=1, label=f"memory {memory}")
            axes.set_title(f"layer {names[index]}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        row_of_panels[0].set_ylabel(title(model, models), fontsize=7)
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].legend(fontsize=6)
    figure.supxlabel("training tokens (millions)", fontsize=8)
    figure.suptitle("Share of a layer's choices that every memory takes")
    save(figure, path)


def draw_answers(path: Path, holding: dict, name: str) -> None:
    """Change of answers without the tokens of other memories, and the loss without a memory, by layer."""
    layers = list(holding["layers"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.35 * len(layers) + 3.5), layout="constrained")
    places = np.arange(len(layers))
    kinds = ((-0.2, "own", "a routed memory"), (0.2, "shared", "the shared memory, at the same tokens"))
    for shift, kind, label in kinds:
        values = [100 * np.mean(holding["layers"][layer]["isolation"][kind] or [np.nan]) for layer in layers]
        left.barh(places + shift, values, 0.4, label=label)
    left.set_yticks(places, layers)
    left.invert_yaxis()
    left.set(xlabel="change of the answers, % of their size", ylabel="layer",
             title="Answers when only one memory's tokens are left")  # fmt: skip
    left.legend(fontsize=8)
    memories = list(holding["layers"][layers[0]]["without"])
    if memories:
        base = holding["losses"]["loss"]
        rise = np.array([[holding["layers"][layer]["without"][m]["loss"] - base for m in memories] for layer in layers])
        picture = right.imshow(rise, cmap="Reds", aspect="auto", vmin=0)
        for (row, column), value in np.ndenumerate(rise):
            color = "white" if value > 0.6 * rise.max() else "black"
            right.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=8, color=color)
        right.set_xticks(range(len(memories)), memories)
        right.set_yticks(range(len(layers)), layers)
        right.set(xlabel="memory", ylabel="layer", title="Rise of the loss when a memory holds nothing")
        figure.colorbar(picture, ax=right, label="nats a token")
    figure.suptitle(name)
    save(figure, path)


def draw_text(path: Path, holding: dict, name: str) -> None:
    """A piece of held-out text in the first, the middle and the last MoM layer; a token's colour is its memories'."""
    layers = list(holding["layers"])
    chosen = list(dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]))
    figure, panels = plt.subplots(len(chosen), 1, figsize=(13, 3.6 * len(chosen)), layout="constrained", squeeze=False)
    for axes, layer in zip(panels[:, 0], chosen, strict=True):
        pieces = holding["layers"][layer]["example"]
        pairs = sorted({tuple(memories) for _, memories in pieces})
        colors = {pair: plt.get_cmap("tab10")(index % 10) for index, pair in enumerate(pairs)}
        column, line, width = 0, 0, 120
        for text, memories in pieces:
            shown = text.replace("\t", "    ")
            for number, part in enumerate(shown.split("\n")):
                if number or column + len(part) > width:
                    column, line = 0, line + 1
                box = {"facecolor": colors[tuple(memories)], "alpha": 0.35, "edgecolor": "none", "pad": 0.8}
                if part:
                    axes.text(column, line, part.replace("$", r"\$"), family="monospace", fontsize=7.5, bbox=box)
                column += len(part)
        axes.set(xlim=(0, width), ylim=(line + 1, -1), title=f"layer {layer}")
        axes.axis("off")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colors[pair], alpha=0.35) for pair in pairs]
        axes.legend(handles, [" and ".join(map(str, pair)) for pair in pairs], title="memories", fontsize=7,
                    loc="center left", bbox_to_anchor=(1, 0.5))  # fmt: skip
    figure.suptitle(f"{name}: where tokens of held-out text go")
    save(figure, path)


def layers_table(holding: dict) -> str:
    """A layer a line: shares of its memories, routing entropy, changes of answers, the loss without each memory."""
    head = ["layer", "shares, %", "routing entropy", "change of a routed memory's answers", "of the shared memory's",
            "rise of the loss without a routed memory", "without the shared memory"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    base = holding["losses"]["loss"]
    for number, layer in holding["layers"].items():
        rises = {memory: losses["loss"] - base for memory, losses in layer["without"].items()}
        shared, routed = rises.pop("shared", None), list(rises.values())
        changes = [layer["isolation"][kind] for kind in ("own", "shared")]
        cells = [number, " ".join(f"{100 * share:.0f}" for share in layer["load"]), f"{layer['entropy']:.3f}"]
        cells += [f"{np.mean(change):.1e}" if change else "" for change in changes]
        cells += [
            f"{min(routed):.3f} to {max(routed):.3f}" if routed else "",
            "" if shared is None else f"{shared:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tokens_table(holding: dict) -> str:
    """Of the middle layer's memories: share of the choices, and the tokens that a memory takes most often."""
    layers = list(holding["layers"])
    layer = holding["layers"][layers[len(layers) // 2]]
    lines = ["| memory | share of the choices | tokens, and how many of their occurrences go there |"]
    lines.append("| --- | --- | --- |")
    for memory, (share, tokens) in enumerate(zip(layer["load"], layer["tokens"], strict=True)):
        shown = ", ".join(f"`{json.dumps(text, ensure_ascii=False)[1:-1].replace('`', chr(39)).replace('|', '¦')}` "
                          f"{100 * part:.0f} %" for text, part, _ in tokens[:LISTED])  # fmt: skip
        lines.append(f"| {memory} | {100 * share:.0f} % | {shown} |")
    return f"Layer {layers[len(layers) // 2]}:\n\n" + "\n".join(lines)
