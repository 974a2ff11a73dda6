"""The checks of the memory update rules: recurrence and gates by every kernel set, and state passing.

Shape legend: rows R, segments S, slices P, heads H, key size K, value size V.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType

import torch

from mom_layers import recur
from mom_layers.common.chips import chip_of, forced
from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.common.reference import unit_length
from mom_layers.recur.rules import MemoryRule, RuleInputs, get_rule
from mom_layers.recur.state_passing import fold_gradients, fold_states
from mom_layers.selftest.cases import Case, Setting, Task, Work
from mom_layers.selftest.operations import forward_and_backward, type_name

# Rows of the segments of a case. RAGGED has empty segments, one row, a chunk of 64 rows with one row less and one row
# more, and more than the eight chunks of a span. MANY has so many segments that a chip takes its widest tiles.
RAGGED = (0, 1, 2, 63, 64, 65, 0, 517, 3)
MANY = (130, 0, 1, 64, *[5] * 40)
TIMED_ROWS, TIMED_SEGMENTS = 32768, 40


def kernel_families() -> list[ModuleType]:
    """The modules that list the kernel sets of a family."""
    names = [module.name for module in pkgutil.iter_modules(recur.__path__, f"{recur.__name__}.") if module.ispkg]
    found = []
    for name in names:
        package = importlib.import_module(name)
        if "kernel_sets" in {module.name for module in pkgutil.iter_modules(package.__path__)}:
            found.append(importlib.import_module(f"{name}.kernel_sets"))
    return found


def _parameters(rule: MemoryRule, setting: Setting, heads: int, k_dim: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: value.to(setting.device) for name, value in rule.init_parameters(heads, k_dim).items()}


def _leaves(
    rule: MemoryRule, setting: Setting, rows: int, heads: int, k_dim: int, v_dim: int, dtype, gate_scale: float = 1.0
):  # fmt: skip
    """q, k, v after the convolutions but before unit length, and raw gates, whose size is ``gate_scale``."""
    key_heads = rule.num_key_heads(heads)
    leaves = {
        "q": setting.draw(rows, key_heads, k_dim, seed=1, dtype=dtype),
        "k": setting.draw(rows, key_heads, k_dim, seed=2, dtype=dtype),
        "v": setting.draw(rows, heads, v_dim, seed=3, dtype=dtype),
    }
    for number, gate in enumerate(rule.raw_gates):
        leaves[gate.name] = setting.draw(
            rows, heads * gate.width(k_dim, v_dim), seed=4 + number, dtype=dtype, scale=gate_scale
        )
    return leaves


def _prepared(rule: MemoryRule, x: dict[str, torch.Tensor], parameters: Mapping, kernels: str) -> RuleInputs:
    q, k = x["q"], x["k"]
    if rule.unit_length_keys:
        q, k = (unit_length(rows.to(compute_dtype(rows.dtype))).to(rows.dtype) for rows in (q, k))
    raw = {gate.name: x[gate.name] for gate in rule.raw_gates}
    return rule.prepare(q, k, x["v"], raw, parameters, kernels)


def _loop(rule: MemoryRule, x: dict[str, torch.Tensor], parameters: Mapping, cu_seqlens, state):
    raw = {gate.name: x[gate.name] for gate in rule.raw_gates}
    return rule.reference(x["q"], x["k"], x["v"], raw, _double(parameters), cu_seqlens, state)


def _double(parameters: Mapping) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in parameters.items()}


def _raw_gates(rule: MemoryRule) -> tuple[str, ...]:
    return tuple(gate.name for gate in rule.raw_gates)


def gates_case(rule: MemoryRule, setting: Setting, rows: int, heads: int, k_dim: int, v_dim: int) -> Case:
    """What a rule computes before its recurrence: gates from raw gates and parameters. The parameters' gradients are
    compared here, where the terms of their sums do not nearly cancel."""
    leaves = _leaves(rule, setting, rows, heads, k_dim, v_dim, setting.dtype)
    parameters = _parameters(rule, setting, heads, k_dim)

    def run(x, kernels="triton"):
        inputs = _prepared(rule, x, {name: x[name] for name in parameters}, kernels)
        return {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.gates}

    return Case(leaves | parameters, run, lambda x: run(x, "torch"))


def gates(setting: Setting, name: str, rows: int, heads: int, k_dim: int, v_dim: int) -> Iterator[Task]:
    """A rule's gates."""
    yield Task(
        f"gates of {name}", f"{heads} heads, K {k_dim} V {v_dim}, {type_name(setting.dtype)}",
        (partial(gates_case, get_rule(name), setting, rows, heads, k_dim, v_dim),), setting.dtype,
    )  # fmt: skip


def recurrence_case(
    rule: MemoryRule, setting: Setting, lengths: Sequence[int], heads: int, k_dim: int, v_dim: int,
    dtype: torch.dtype, states: bool, gate_scale: float = 1.0,
) -> Case:  # fmt: skip
    """Gates and recurrence of a rule. ``states``: from an initial state, and with the final state as an output."""
    leaves = _leaves(rule, setting, sum(lengths), heads, k_dim, v_dim, dtype, gate_scale)
    parameters = _parameters(rule, setting, heads, k_dim)
    cu_seqlens = setting.borders(lengths)
    if states:
        one_row = {name: x[:1] for name, x in leaves.items()}
        keys = _prepared(rule, one_row, parameters, "torch").k.shape[2]
        leaves["state"] = setting.draw(
            len(lengths), heads, *rule.state_shape(keys, v_dim), seed=9, dtype=torch.float32, scale=0.3
        )

    def run(x):
        inputs = _prepared(rule, x, parameters, "triton")
        o, final = rule.recur(inputs, cu_seqlens, x.get("state"), states, "triton")
        return {"o": o, "final_state": final}

    def reference(x):
        o, final = _loop(rule, x, parameters, cu_seqlens, x.get("state"))
        return {"o": o, "final_state": final if states else None}

    return Case(leaves, run, reference, loose=_raw_gates(rule))


def _work(rule: MemoryRule, setting: Setting, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> Work:
    leaves = _leaves(rule, setting, TIMED_ROWS, heads, k_dim, v_dim, dtype)
    parameters = _parameters(rule, setting, heads, k_dim)
    borders = torch.linspace(0, TIMED_ROWS, TIMED_SEGMENTS + 1).int().to(setting.device)
    with torch.no_grad():
        inputs = _prepared(rule, leaves, parameters, "triton")
    names = tuple(inputs.gates)

    def run(x):
        prepared = RuleInputs(x["q"], x["k"], x["v"], {name: x[name] for name in names})
        return {"o": rule.recur(prepared, borders, None, False, "triton")[0]}

    step, moved = forward_and_backward(run, {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.gates})
    return Work(step, moved, 3.0 * rule.recurrence_flops(TIMED_ROWS, heads, k_dim, v_dim))


def recurrence(
    setting: Setting, name: str, heads: int, k_dim: int, v_dim: int, *, dtype: torch.dtype | None = None,
    cases: Sequence[tuple[Sequence[int], bool]] = ((RAGGED, True), (MANY, False)), timed: bool = False,
    every_set: bool = True, gate_scale: float = 1.0,
) -> Iterator[Task]:  # fmt: skip
    """A rule by the kernel set that the chip takes, then by every other set that takes the chip.

    Args:
        cases: lengths of segments, and whether with states.
        every_set: False for the chip's own set alone.
        gate_scale: of the raw gates.
    """
    rule, dtype = get_rule(name), dtype or setting.dtype
    if not rule.has_kernels(k_dim, v_dim):
        return
    families = kernel_families()
    for family in families:
        family.kernel_set.cache_clear()
    about = f"{heads} heads, K {k_dim} V {v_dim}, {type_name(dtype)}"
    built = tuple(partial(recurrence_case, rule, setting, lengths, heads, k_dim, v_dim, dtype, states, gate_scale)
                  for lengths, states in cases)  # fmt: skip
    work = partial(_work, rule, setting, heads, k_dim, v_dim, dtype) if timed else None
    yield Task(name, about, built, dtype, work)
    if not every_set:
        return
    # A family that the task ran has chosen a set.
    used = [family for family in families if family.kernel_set.cache_info().currsize]
    device = torch.zeros(0, device=setting.device).device
    for family in used:
        chosen = family.kernel_set(device, dtype, k_dim, v_dim)
        for kernels in family.KERNEL_SETS:
            problem = kernels.problem() if hasattr(kernels, "problem") else None
            if kernels is chosen or problem or not kernels.takes(chip_of(device), dtype, k_dim, v_dim):
                continue
            yield Task(
                name, f"{about}, {kernels.NAME} kernels", built, dtype, work, partial(forced, kernel_set=kernels.NAME)
            )  # fmt: skip


class _Slices(torch.autograd.Function):
    """A recurrence whose segments are cut into slices, as context-parallel ranks compute it, here one after another."""

    @staticmethod
    def forward(ctx, rule, rows_of_slice, borders, names, *tensors):
        """tensors: q, k, v and the gates by ``names``, of all rows; or a parameter, which all rows share."""
        parts = [[_part(x, rows, tensors[1]) for x in tensors] for rows in rows_of_slice]
        inputs = [_as_inputs(names, part) for part in parts]
        transitions = [rule.transition(x, b, "triton") for x, b in zip(inputs, borders, strict=True)]
        contributions = [rule.recur(x, b, None, True, "triton")[1] for x, b in zip(inputs, borders, strict=True)]
        states = fold_states(torch.stack(transitions), torch.stack(contributions))
        o = torch.empty_like(tensors[2])
        for rows, x, b, state in zip(rows_of_slice, inputs, borders, states[:-1], strict=True):
            o[rows] = rule.recur(x, b, state, False, "triton")[0]
        ctx.save_for_backward(*tensors)
        ctx.kept = rule, rows_of_slice, borders, names, transitions, states
        return o

    @staticmethod
    def backward(ctx, do):
        rule, rows_of_slice, borders, names, transitions, states = ctx.kept
        tensors = ctx.saved_tensors
        parts = [[_part(x, rows, tensors[1]) for x in tensors] for rows in rows_of_slice]
        own = []
        for rows, b, part, state in zip(rows_of_slice, borders, parts, states[:-1], strict=True):
            inputs = _as_inputs(names, part)
            if rule.linear_in_state:
                inputs, state = RuleInputs(inputs.q, inputs.k, None, inputs.gates), None
            own.append(rule.gradient_of_initial_state(inputs, do[rows], b, state, "triton"))
        wanted = fold_gradients(torch.stack(transitions), torch.stack(own))
        gradients = [torch.zeros_like(x) for x in tensors]
        for number, (rows, b, part) in enumerate(zip(rows_of_slice, borders, parts, strict=True)):
            leaves = [x.detach().requires_grad_() for x in part]
            with torch.enable_grad():
                o, final = rule.recur(_as_inputs(names, leaves), b, states[number], True, "triton")
            found = torch.autograd.grad([o, final], leaves, [do[rows], wanted[number + 1]], allow_unused=True)
            for whole, x in zip(gradients, found, strict=True):
                if x is None:
                    continue
                if whole.shape[0] == tensors[1].shape[0]:
                    whole[rows] = x
                else:
                    whole += x
        return None, None, None, None, *gradients


def _part(x: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The rows of a slice; a tensor that is not by row as a whole."""
    return x.detach()[rows] if x.shape[0] == keys.shape[0] else x.detach()


def _as_inputs(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> RuleInputs:
    q, k, v, *gates = tensors
    return RuleInputs(q, k, v, dict(zip(names, gates, strict=True)))


def state_passing(
    setting: Setting, name: str, heads: int, k_dim: int, v_dim: int, cuts: Sequence[Sequence[int]]
) -> Iterator[Task]:
    """Transitions, states and gradients that context-parallel ranks exchange, against one run over the whole.

    cuts: [P][S], rows that each slice holds of each segment.
    """
    rule = get_rule(name)
    if not rule.has_kernels(k_dim, v_dim):
        return

    def case():
        lengths = torch.tensor(cuts).sum(0).tolist()
        leaves = _leaves(rule, setting, sum(lengths), heads, k_dim, v_dim, setting.dtype)
        parameters = _parameters(rule, setting, heads, k_dim)
        held = torch.tensor(cuts)
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1] + held.cumsum(0) - held
        rows_of_slice = [
            torch.cat([torch.arange(a, a + n) for a, n in zip(*part, strict=True)]).to(setting.device)
            for part in zip(starts.tolist(), held.tolist(), strict=True)
        ]
        borders = [setting.borders(cut) for cut in cuts]

        def run(x):
            inputs = _prepared(rule, x, parameters, "triton")
            tensors = (inputs.q, inputs.k, inputs.v, *inputs.gates.values())
            return {"o": _Slices.apply(rule, rows_of_slice, borders, tuple(inputs.gates), *tensors)}

        def reference(x):
            return {"o": _loop(rule, x, parameters, setting.borders(lengths), None)[0]}

        return Case(leaves, run, reference, loose=_raw_gates(rule))

    yield Task(
        f"state passing of {name}", f"{len(cuts)} slices, {heads} heads, K {k_dim} V {v_dim}, "
        f"{type_name(setting.dtype)}", (case,), setting.dtype,
    )  # fmt: skip
