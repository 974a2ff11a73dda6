"""The check of what a layer of one memory launches beside its recurrence: convolutions over columns of one projection,
and norm and gate without a router's weights.

Shape legend: tokens N, heads H, key size K, value size V, columns of the raw gates P, filter width W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mom_layers.combine.operation import combine
from mom_layers.combine.reference import combine_reference
from mom_layers.convolve.columns import convolve_columns, split_columns
from mom_layers.convolve.reference import segment_convolution_reference
from mom_layers.route.sequences import plan_sequences
from mom_layers.selftest.cases import Case, Setting, Task
from mom_layers.selftest.operations import type_name, work_of

COLUMNS, EPS = 70, 1e-6  # of raw gates: more than a program copies


def one_memory(
    setting: Setting, lengths: Sequence[int], heads: int, k_dim: int, v_dim: int, width: int = 4, timed: int = 0
) -> Iterator[Task]:
    """Tokens sequence by sequence, and tokens that lie time first.

    Args:
        lengths: of the sequences that lie one after another.
        timed: tokens of the four sequences that are timed; 0 times nothing.
    """
    keys, values = heads * k_dim, heads * v_dim

    def case(lengths, time_major):
        borders, tokens = setting.borders(lengths), sum(lengths)
        plan = plan_sequences(borders, tokens, time_major=time_major, kernels="triton")
        convolutions = {"q_conv": keys, "k_conv": keys, "v_conv": values}
        leaves = {
            "projected": setting.draw(tokens, 2 * (keys + values) + COLUMNS, seed=1),
            **{name: setting.draw(c, width, seed=2 + i, scale=0.5) for i, (name, c) in enumerate(convolutions.items())},
            "norm_weight": 1.0 + setting.draw(v_dim, seed=5, scale=0.2),
        }

        def run(x):
            filters = (x[name] for name in convolutions)
            (q, k, v, raw), gate, _ = convolve_columns(
                x["projected"], *filters, plan, unit_length_heads=heads, kernels="triton"
            )
            o, gate = v.unflatten(1, (heads, -1)), gate.unflatten(1, (heads, -1))
            row_of_choice = None if plan.rows_are_tokens else plan.row_of_choice
            y = combine(o, None, row_of_choice, gate, x["norm_weight"], eps=EPS, kernels="triton")
            return {"q": q, "k": k, "raw": raw, "y": y}

        def reference(x):
            rows = plan.token_of_row.long()
            q, k, v, raw, gate = split_columns(x["projected"], keys, values)
            q, k, v = (
                segment_convolution_reference(part[rows], x[name], plan.cu_seqlens, unit)[0]
                for part, name, unit in ((q, "q_conv", heads), (k, "k_conv", heads), (v, "v_conv", None))
            )
            o, gate = v.unflatten(1, (heads, -1)), gate.unflatten(1, (heads, -1))
            weights = o.new_zeros(len(rows), 0)
            y = combine_reference(o, weights, plan.row_of_choice, gate, x["norm_weight"], EPS)
            return {"q": q, "k": k, "raw": raw[rows], "y": y}

        return Case(leaves, run, reference)

    longest = max(lengths)
    cases = (lambda: case(lengths, False), lambda: case([longest] * 3, True))
    yield Task(
        "one memory", f"{heads} heads, K {k_dim} V {v_dim}, W {width}, {type_name(setting.dtype)}", cases,
        setting.dtype, work=(lambda: work_of(case([timed] * 4, False))) if timed else None,
    )  # fmt: skip
