"""The checks of the decode step.

Shape legend: sequences B, all memories A, heads H, key size K, value size V, hidden size D, filter width W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mom_layers.combine.reference import combine_reference
from mom_layers.convolve.operation import UNIT_LENGTH_EPS
from mom_layers.convolve.reference import segment_convolution_reference
from mom_layers.mixing import MemoryParameters
from mom_layers.recur.rules import get_rule
from mom_layers.selftest.cases import Case, Setting, Task, Work
from mom_layers.selftest.operations import Tokens, type_name
from mom_layers.settings import MixerSettings
from mom_layers.state import MemoryState


def _decoding_case(setting: Setting, settings: MixerSettings, batch: int, hidden: int) -> tuple[Case, MemoryState]:
    rule, heads = settings.update_rule, settings.num_heads
    keys, values, all_memories = settings.key_width, settings.value_width, settings.num_all_memories
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = {name: x.to(setting.device) for name, x in rule.init_parameters(heads, settings.head_dim).items()}
    tail = (batch, all_memories, settings.conv_kernel - 1)
    leaves = {
        "x": setting.draw(batch, hidden, seed=1),
        "q": setting.draw(batch, keys, seed=2),
        "output_gate": setting.draw(batch, values, seed=3),
        "projection": setting.draw(all_memories, sum(settings.projection_sizes), hidden, seed=4, scale=hidden**-0.5),
        "q_conv": setting.draw(keys, settings.conv_kernel, seed=5, scale=0.5),
        "k_conv": setting.draw(keys, settings.conv_kernel, seed=6, scale=0.5),
        "v_conv": setting.draw(values, settings.conv_kernel, seed=7, scale=0.5),
        "norm_weight": 1.0 + setting.draw(settings.value_dim, seed=8, scale=0.2),
        "recurrent": setting.draw(
            batch, all_memories, heads, *rule.state_shape(settings.head_dim, settings.value_dim), seed=9,
            dtype=torch.float32, scale=0.3,
        ),
        "q_tail": setting.draw(*tail, keys, seed=10),
        "k_tail": setting.draw(*tail, keys, seed=11),
        "v_tail": setting.draw(*tail, values, seed=12),
        **parameters,
    }  # fmt: skip
    ids = Tokens([batch], settings.num_memories, settings.topk).ids(setting)
    logits = setting.draw(batch, settings.num_memories, seed=13, dtype=torch.float32, scale=0.1)
    logits = logits.scatter_add(1, ids, torch.arange(2.0, 2.0 + settings.topk).expand(batch, -1).to(logits))
    state_names = ("recurrent", "q_tail", "k_tail", "v_tail")

    def step(x, state):
        memory_parameters = MemoryParameters(
            settings, x["projection"], x["q_conv"], x["k_conv"], x["v_conv"], {n: x[n] for n in parameters},
            x["norm_weight"],
        )  # fmt: skip
        return rule.decode_step(
            x["x"], x["q"], x["output_gate"], logits.to(x["x"].dtype), memory_parameters, state, settings.topk,
            settings.shared_memory, UNIT_LENGTH_EPS,
        )  # fmt: skip

    def run(x):
        state = MemoryState(*(x[name].clone() for name in state_names))
        return {"y": step(x, state), **{name: getattr(state, name) for name in state_names}}

    def reference(x):
        return _decode_reference(x, logits.to(setting.dtype).double(), settings, tuple(parameters))

    return Case(leaves, run, reference, gradients=False), step


def _decode_reference(x, logits, settings: MixerSettings, parameter_names) -> dict[str, torch.Tensor]:
    """One token of every sequence by the plain loops of convolution, rule and mixing."""
    rule, heads = settings.update_rule, settings.num_heads
    key_heads = rule.num_key_heads(heads)
    state = {name: x[name].clone() for name in ("recurrent", "q_tail", "k_tail", "v_tail")}
    kept, ids = logits.topk(settings.topk, dim=-1)
    weights, ends = torch.softmax(kept, dim=-1), torch.tensor([0, 1])
    outputs = []
    for sequence in range(x["x"].shape[0]):
        chosen = ids[sequence].tolist() + ([settings.num_memories] if settings.shared_memory else [])
        for memory in chosen:
            here = (slice(sequence, sequence + 1), memory)
            k, v, *raw = (x["projection"][memory] @ x["x"][sequence])[None].split(settings.projection_sizes, dim=1)
            rows = {}
            for name, row, n in (
                ("q", x["q"][sequence : sequence + 1], key_heads),
                ("k", k, key_heads),
                ("v", v, heads),
            ):
                y, tail = segment_convolution_reference(row, x[f"{name}_conv"], ends, None, state[f"{name}_tail"][here])
                rows[name] = y.view(1, n, -1)
                state[f"{name}_tail"][here] = tail
            raw = dict(zip(rule.gate_widths, raw, strict=True))
            parameters = {name: x[name] for name in parameter_names}
            o, after = rule.reference(*rows.values(), raw, parameters, ends, state["recurrent"][here])
            state["recurrent"][here] = after
            outputs.append(o)
    choices = len(outputs) // x["x"].shape[0]
    row_of_choice = torch.arange(len(outputs)).view(-1, choices)
    gate = x["output_gate"].unflatten(1, (heads, -1))
    y = combine_reference(torch.cat(outputs), weights, row_of_choice, gate, x["norm_weight"], settings.norm_eps)
    return {"y": y.flatten(1), **state}


def decoding(
    setting: Setting, rule: str, heads: int, k_dim: int, v_dim: int, hidden: int, batches: Sequence[int],
    timed: int = 0,
) -> Iterator[Task]:  # fmt: skip
    """One token of every sequence, for rules with a fused step. A small batch and a large batch project differently."""
    if get_rule(rule).decode_step is None:
        return
    settings = MixerSettings(num_heads=heads, head_dim=k_dim, expand_v=v_dim / k_dim, rule=rule)

    def work():
        case, step = _decoding_case(setting, settings, timed, hidden)
        names = ("recurrent", "q_tail", "k_tail", "v_tail")
        state = MemoryState(*(case.leaves[name].clone() for name in names))
        read = settings.topk + int(settings.shared_memory)
        states = 2.0 * state.nbytes * read / settings.num_all_memories
        return Work(lambda: step(case.leaves, state), states + case.leaves["projection"].nbytes)

    yield Task(
        f"decode step of {rule}", f"{heads} heads, K {k_dim} V {v_dim}, {type_name(setting.dtype)}",
        tuple(lambda b=b: _decoding_case(setting, settings, b, hidden)[0] for b in batches), setting.dtype,
        work=work if timed else None,
    )  # fmt: skip
