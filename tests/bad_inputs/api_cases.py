"""Bad values for every argument of the public calls of mom_layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from judge import Case, names

from mom_layers import MemoryState, MixtureOfMemories, get_rule
from mom_layers.combine.operation import combine
from mom_layers.convolve.operation import segment_convolution
from mom_layers.project.operation import grouped_projection
from mom_layers.recur.channel_decay import gated_linear_attention
from mom_layers.recur.scalar_delta import gated_delta_rule
from mom_layers.route.plan import build_routing_plan
from mom_layers.route.router import route

LAYER = {
    "hidden_size": 32, "num_heads": 2, "head_dim": 16, "expand_v": 1.0, "num_memories": 3, "topk": 2,
    "shared_memory": True, "conv_kernel": 4, "rule": "gated_deltanet", "single_kv_proj": False, "text_conv": 0,
    "norm_eps": 1e-6, "kernels": "torch",
}  # fmt: skip
TOKENS, MEMORIES, TOPK, HEADS, SIZE = 12, 3, 2, 2, 16
DROP = object()
"""Stands for an argument that is left out."""


def numbers(value: float) -> Iterator[tuple[str, object]]:
    yield "empty", ""
    yield "wrong type", "two"
    yield "wrong type: list", [value]
    yield "None", None
    yield "negative", -1
    yield "zero", 0
    yield "huge", 10**18
    yield "NaN", math.nan
    if isinstance(value, int) and not isinstance(value, bool):
        yield "fraction", value + 0.5


def truths() -> Iterator[tuple[str, object]]:
    yield "wrong type", "yes"
    yield "empty", ""
    yield "None", None
    yield "huge", 10**18


def words() -> Iterator[tuple[str, object]]:
    yield "empty", ""
    yield "wrong type", 3
    yield "wrong type: list", ["torch"]
    yield "None", None
    yield "unknown", "nowhere"


def tensors(value: torch.Tensor) -> Iterator[tuple[str, object]]:
    yield "None", None
    yield "wrong type", "tensor"
    yield "wrong type: list", value.tolist()
    yield "wrong type: number", 1.5
    yield "empty", value[:0]
    yield "wrong shape: one dimension more", value[None]
    yield "wrong shape: a row less", value[:-1]
    yield "wrong shape: a column more", torch.cat([value, value[..., :1]], -1)
    yield "wrong shape: a scalar", value.flatten()[0]
    yield "wrong device", value.to("meta")
    if value.is_floating_point():
        yield "wrong type: integers", value.to(torch.int64)
        yield "wrong type: complex", value.to(torch.complex64)
        yield "NaN", torch.full_like(value, math.nan)
    elif value.dtype != torch.bool:
        yield "wrong type: fractions", value.to(torch.float32)
        yield "negative", value - value.max() - 1
        yield "huge", torch.full_like(value, 2**31 - 1)
        yield "wrong type: truths", value > 0
    else:
        yield "wrong type: fractions", value.to(torch.float32)


def values(value: object) -> Iterator[tuple[str, object]]:
    """The bad values that replace a good one."""
    if isinstance(value, torch.Tensor):
        yield from tensors(value)
    elif isinstance(value, bool):
        yield from truths()
    elif isinstance(value, int | float):
        yield from numbers(value)
    elif isinstance(value, str):
        yield from words()
    else:
        yield from [("wrong type", "text"), ("wrong type: number", 3), ("empty", []), ("None", None)]


def finite(result: object) -> bool:
    if isinstance(result, torch.Tensor):
        return not result.is_floating_point() or result.is_meta or bool(torch.isfinite(result).all())
    return all(map(finite, result)) if isinstance(result, tuple | list) else True


def judge(call: Callable, good: dict, argument: str, kind: str, value: object, allowed: bool) -> str | None:
    """The fault of a call in which one argument has a bad value."""
    arguments = {name: entry for name, entry in good.items() if entry is not DROP} | {argument: value}
    try:
        result = call(**arguments)
    except (ValueError, TypeError) as error:
        shown = str(value) if isinstance(value, str | int | float) else ""
        # Where two shapes or devices do not fit each other, either argument may be the wrong one.
        others = good if "shape" in kind or "device" in kind or isinstance(good[argument], bool) else ()
        others = good if kind == "empty" and isinstance(value, torch.Tensor) else others
        return (
            None
            if names(str(error), argument, shown, *others) or repr(value) in str(error)
            else f"names neither argument nor value: {error}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not allowed:
        return "accepted"
    return None if finite(result) or kind == "NaN" else "accepted, and the result is not finite"


def examples() -> dict[str, tuple[Callable, dict, dict]]:
    """Of every call: the function, arguments that work, and what else of bad values works, by argument and kind."""
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(MEMORIES)[:TOPK] for _ in range(TOKENS)])
    borders = torch.tensor([0, 5, TOKENS], dtype=torch.int32)
    plan = build_routing_plan(ids, borders, num_memories=MEMORIES)
    rows = plan.num_rows
    layer = MixtureOfMemories(**LAYER)
    x = torch.randn(2, 6, 32)
    state = layer(x, output_state=True)[1]

    def forward(**arguments):
        return layer(arguments.pop("x"), **arguments)[0]

    def step(x, state):
        return layer.step(x, state.select(torch.arange(2)) if isinstance(state, MemoryState) else state)

    def build(**arguments):
        return MixtureOfMemories(**arguments)(torch.randn(1, 4, 32))[0]

    q, k, v = (torch.nn.functional.normalize(torch.randn(TOKENS, HEADS, SIZE), dim=-1) for _ in range(3))
    g, beta = -torch.rand(TOKENS, HEADS), torch.rand(TOKENS, HEADS)
    recur = {"initial_state": torch.randn(2, HEADS, SIZE, SIZE), "output_final_state": True, "scale": 0.25}
    nothing = {"NaN"}
    optional = {"None", "NaN"}
    truth = {"wrong type", "empty", "None", "huge"}  # as in a condition of Python
    return {
        "MixtureOfMemories": (build, LAYER, {
            "norm_eps": {"zero"}, "text_conv": {"zero"},
        }),
        "forward": (forward, {"x": x, "state": state, "output_state": True, "cu_seqlens": DROP, "token_mask":
            torch.ones(2, 6, dtype=torch.bool)},
            {"x": nothing, "state": {"None"}, "token_mask": {"None"}, "output_state": truth}),
        "forward, packed": (forward, {"x": x.reshape(1, 12, 32), "cu_seqlens": borders},
            {"x": nothing, "cu_seqlens": {"None"}}),
        "step": (step, {"x": x[:, 0], "state": state}, {"x": nothing}),
        "gated_delta_rule": (gated_delta_rule, {"q": q, "k": k, "v": v, "g": g, "beta": beta, "cu_seqlens": borders,
            **recur, "kernels": "torch"}, dict.fromkeys(("q", "k", "v", "g", "beta"), nothing)
            | {"initial_state": optional, "output_final_state": truth, "scale": {"None", "negative", "zero", "huge"}}),
        "gated_linear_attention": (gated_linear_attention, {"q": q, "k": k, "v": v, "g": -torch.rand(q.shape),
            "cu_seqlens": borders, **recur, "kernels": "torch"}, dict.fromkeys("qkvg", nothing)
            | {"initial_state": optional, "output_final_state": truth, "scale": {"None", "negative", "zero", "huge"}}),
        "route": (route, {"logits": torch.randn(TOKENS, MEMORIES), "topk": TOPK, "kernels": "torch"},
            {"logits": {"NaN", "empty", "wrong device", "wrong shape: a row less", "wrong shape: a column more"}}),
        "build_routing_plan": (build_routing_plan, {"memory_ids": ids, "token_cu_seqlens": borders,
            "num_memories": MEMORIES, "shared": True, "token_mask": torch.ones(TOKENS, dtype=torch.bool),
            "kernels": "torch"}, {"token_mask": {"None"}}),
        "combine": (combine, {"o": torch.randn(rows, HEADS, SIZE), "weights": torch.rand(TOKENS, TOPK),
            "row_of_choice": plan.row_of_choice, "output_gate": torch.randn(TOKENS, HEADS, SIZE),
            "norm_weight": torch.rand(SIZE), "eps": 1e-6, "kernels": "torch"},
            {"o": nothing, "weights": {"NaN", "wrong shape: a column more"}, "output_gate": nothing,
            "norm_weight": nothing, "eps": {"zero", "huge"}}),
        "grouped_projection": (grouped_projection, {"x": torch.randn(TOKENS, 32), "weight": torch.randn(4, 24, 32),
            "plan": plan, "kernels": "torch"}, {"x": nothing, "weight": nothing}),
        "segment_convolution": (segment_convolution, {"x": torch.randn(rows, 32), "weight": torch.randn(32, 4),
            "plan": plan, "gather": False, "unit_length_heads": 2, "initial_tail":
            torch.randn(plan.num_segments, 3, 32), "output_tail": True, "kernels": "torch"},
            {"x": nothing, "weight": nothing, "initial_tail": optional, "unit_length_heads": {"None"},
            "gather": {"empty", "None"}, "output_tail": truth}),
        "get_rule": (get_rule, {"name": "gla"}, {}),
    }  # fmt: skip


def api_cases(_: Path | None = None) -> list[Case]:
    cases = []
    for target, (call, good, allowed) in examples().items():
        for argument, value in good.items():
            if value is DROP:
                continue
            for kind, bad in values(value):

                def run(call=call, good=good, argument=argument, kind=kind, bad=bad, allowed=allowed):
                    return judge(call, good, argument, kind, bad, kind in allowed.get(argument, ()))

                cases.append(Case(target, argument, kind, run))
    return cases
