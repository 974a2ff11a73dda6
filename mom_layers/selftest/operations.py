"""The checks of routing, plan, gathers, projection, convolutions and mixing.

Shape legend: tokens N, rows R, segments S, routed memories M, all memories A, heads H, key size K, value size V,
hidden size D, filter width W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mom_layers.combine.operation import combine
from mom_layers.combine.reference import combine_reference
from mom_layers.convolve.operation import segment_convolution
from mom_layers.convolve.qkv import convolve_qkv
from mom_layers.convolve.reference import segment_convolution_reference
from mom_layers.project.operation import grouped_projection
from mom_layers.route.plan import RoutingPlan, build_routing_plan
from mom_layers.route.plan_part import plan_of_memories
from mom_layers.route.router import route
from mom_layers.route.rows import gather_rows
from mom_layers.route.spare_rows import zero_spare_gradients, zero_spare_rows_
from mom_layers.selftest.cases import Case, Setting, Task, Work

WIDTH = 4


@dataclass(frozen=True)
class Tokens:
    """Sequences of tokens and the memories that they go to.

    Attributes:
        lengths: of the sequences.
        memories: M; no token goes to memory 0, which stays empty, where M > k.
        topk: k.
        shared: whether there is a shared memory.
        masked: whether some tokens are padding.
    """

    lengths: Sequence[int]
    memories: int = 4
    topk: int = 2
    shared: bool = True
    masked: bool = False

    def ids(self, setting: Setting) -> torch.Tensor:
        """[N, k], different memories for each token."""
        empty = int(self.memories > self.topk)
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(sum(self.lengths), self.memories - empty, generator=generator).argsort(1)
        return (order[:, : self.topk] + empty).to(setting.device)

    def mask(self, setting: Setting) -> torch.Tensor | None:
        """[N] bool, or None."""
        if not self.masked:
            return None
        return (torch.rand(sum(self.lengths), generator=torch.Generator().manual_seed(5)) < 0.7).to(setting.device)

    def plan(self, setting: Setting, kernels: str = "torch") -> RoutingPlan:
        return build_routing_plan(
            self.ids(setting), setting.borders(self.lengths), num_memories=self.memories, shared=self.shared,
            token_mask=self.mask(setting), kernels=kernels,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"top-{self.topk} of {self.memories}{' and shared' if self.shared else ''}"


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward_and_backward(run, leaves: dict[str, torch.Tensor]):
    """A call that computes the outputs and the gradients of all leaves, and the bytes that both must move."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    outputs = [x for x in run(leaves).values() if x is not None and x.requires_grad]
    given = [torch.randn_like(x) for x in outputs]
    moved = 2.0 * sum(x.nbytes for x in (*outputs, *leaves.values()))

    def step():
        outputs = [x for x in run(leaves).values() if x is not None and x.requires_grad]
        torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)

    return step, moved


def work_of(case: Case, flops: float = 0.0) -> Work:
    """The forward and backward pass of a case, for the clock."""
    step, moved = forward_and_backward(case.run, case.leaves)
    return Work(step, moved, flops)


def routing(setting: Setting, tokens: int, memories: int, topk: int, timed: int = 0) -> Iterator[Task]:
    """Router logits to weights and memories."""

    def case(tokens, dtype):
        # Distinct logits that every type holds exactly, so that all types choose the same memories.
        order = torch.rand(tokens, memories, generator=torch.Generator().manual_seed(1)).argsort(1)
        logits = (order * (4.0 / memories) - 2.0).to(setting.device, dtype)

        def reference(leaves):
            kept, ids = torch.softmax(leaves["logits"], dim=-1).topk(topk, dim=-1)
            return {"weights": kept / kept.sum(-1, keepdim=True), "ids": ids}

        def run(leaves):
            weights, ids = route(leaves["logits"], topk, kernels="triton")
            return {"weights": weights, "ids": ids}

        return Case({"logits": logits}, run, reference, loose=("logits",))

    for dtype in dict.fromkeys((torch.float32, setting.dtype)):
        yield Task(
            "route", f"top-{topk} of {memories}, {type_name(dtype)}", (lambda dtype=dtype: case(tokens, dtype),), dtype,
            work=(lambda dtype=dtype: work_of(case(timed, dtype))) if timed else None,
        )  # fmt: skip


def plan_reference(tokens: Tokens, setting: Setting) -> dict[str, torch.Tensor]:
    """The routing plan as lists, in the order of its definition."""
    ids, mask = tokens.ids(setting).tolist(), tokens.mask(setting)
    kept = [True] * len(ids) if mask is None else mask.tolist()
    borders = setting.borders(tokens.lengths).tolist()
    choices = [[*chosen, tokens.memories] if tokens.shared else chosen for chosen in ids]
    all_memories = tokens.memories + int(tokens.shared)
    rows, cu_seqlens, offsets = [], [0], []
    for memory in range(all_memories):
        for first, last in zip(borders[:-1], borders[1:], strict=True):
            rows += [(t, choices[t].index(memory)) for t in range(first, last) if kept[t] and memory in choices[t]]
            cu_seqlens.append(len(rows))
        offsets.append(len(rows))
    if mask is not None:
        rows += [(t, choice) for t in range(len(ids)) if not kept[t] for choice in range(len(choices[t]))]
        cu_seqlens.append(len(rows))
        offsets[-1] = len(rows)
    row_of_choice = torch.zeros(len(ids), tokens.topk + int(tokens.shared), dtype=torch.int32)
    for row, (token, choice) in enumerate(rows):
        row_of_choice[token, choice] = row
    segments = [s for s, (a, b) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)) for _ in range(a, b)]
    return {
        "token_of_row": torch.tensor([token for token, _ in rows]),
        "row_of_choice": row_of_choice,
        "segment_of_row": torch.tensor(segments),
        "position_of_row": torch.tensor([row - cu_seqlens[s] for row, s in enumerate(segments)]),
        "cu_seqlens": torch.tensor(cu_seqlens),
        "memory_offsets": torch.tensor(offsets),
    }


def planning(setting: Setting, tokens: Sequence[Tokens], timed: Tokens | None = None) -> Iterator[Task]:
    """Choices of memories to rows."""

    def case(tokens):
        def run(leaves):
            plan = tokens.plan(setting, "triton")
            return {name: getattr(plan, name) for name in plan_reference_names}

        return Case({}, run, lambda leaves: plan_reference(tokens, setting), gradients=False)

    def work():
        ids, borders = timed.ids(setting), setting.borders(timed.lengths)

        def step():
            return build_routing_plan(
                ids, borders, num_memories=timed.memories, shared=timed.shared, kernels="triton"
            )  # fmt: skip

        plan = step()
        written = sum(getattr(plan, name).nbytes for name in plan_reference_names)
        return Work(step, float(written + ids.nbytes))

    plan_reference_names = (
        "token_of_row", "row_of_choice", "segment_of_row", "position_of_row", "cu_seqlens", "memory_offsets",
    )  # fmt: skip
    yield Task(
        "routing plan", ", ".join(dict.fromkeys(map(str, tokens))), tuple(lambda t=t: case(t) for t in tokens),
        torch.float32, work=work if timed else None,
    )  # fmt: skip


def gathering(setting: Setting, tokens: Tokens, channels: int, timed: Tokens | None = None) -> Iterator[Task]:
    """Tokens to rows, and the sum over a token's rows as the gradient."""

    def case(tokens):
        plan = tokens.plan(setting)
        token_of_row = plan.token_of_row.long()
        return Case(
            {"x": setting.draw(sum(tokens.lengths), channels, seed=1)},
            lambda leaves: {"rows": gather_rows(leaves["x"], plan, kernels="triton")},
            lambda leaves: {"rows": leaves["x"][token_of_row]},
        )

    yield Task(
        "gather rows", f"{tokens}, {channels} channels, {type_name(setting.dtype)}", (lambda: case(tokens),),
        setting.dtype, work=(lambda: work_of(case(timed))) if timed else None,
    )  # fmt: skip


def spare(setting: Setting, tokens: Tokens, channels: int) -> Iterator[Task]:
    """Zeros in the spare rows of two memories' part of a plan, and in these rows' gradients."""

    def case():
        part, row_here = plan_of_memories(tokens.plan(setting), 0, 2)
        used = (row_here >= 0)[:, None]

        def run(leaves):
            (rows,) = zero_spare_gradients((leaves["rows"],), part, kernels="triton")
            return {"rows": rows, "zeroed": zero_spare_rows_(rows.detach().clone(), part, kernels="triton")}

        def reference(leaves):
            rows = leaves["rows"]
            kept = torch.where(used, rows, rows.detach())  # spare rows receive no gradient
            return {"rows": kept, "zeroed": torch.where(used, rows.detach(), 0)}

        return Case({"rows": setting.draw(part.num_rows, channels, seed=1)}, run, reference)

    yield Task(
        "spare rows", f"{tokens}, {channels} channels, {type_name(setting.dtype)}", (case,), setting.dtype
    )  # fmt: skip


def projection(
    setting: Setting, tokens: Tokens, inputs: int, outputs: int, dtypes: Sequence[torch.dtype],
    timed: Tokens | None = None,
) -> Iterator[Task]:  # fmt: skip
    """Every row by its memory's matrix. Hopper and newer have PyTorch's product for bfloat16, other types Triton's."""

    def case(tokens, dtype):
        plan = tokens.plan(setting)
        ends, token_of_row = plan.memory_offsets.tolist(), plan.token_of_row.long()
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

        def run(leaves):
            rows = grouped_projection(leaves["x"], leaves["weight"], plan, kernels="triton")
            return {"rows": rows[:, :outputs]}

        def reference(leaves):
            parts = leaves["x"][token_of_row].split(sizes)
            return {"rows": torch.cat([x @ w.t() for x, w in zip(parts, leaves["weight"], strict=True)])}

        x = setting.draw(sum(tokens.lengths), inputs, seed=1, dtype=dtype)
        weight = setting.draw(plan.num_all_memories, outputs, inputs, seed=2, dtype=dtype, scale=inputs**-0.5)
        return Case({"x": x, "weight": weight}, run, reference)

    for dtype in dtypes:

        def work(dtype=dtype):
            built = case(timed, dtype)
            rows = sum(timed.lengths) * (timed.topk + int(timed.shared))
            return work_of(built, 6.0 * rows * inputs * outputs)

        yield Task(
            "grouped projection", f"{tokens}, {inputs} to {outputs}, {type_name(dtype)}",
            (lambda dtype=dtype: case(tokens, dtype),), dtype, work=work if timed else None,
        )  # fmt: skip


def _tails(setting: Setting, plan: RoutingPlan, widths: dict[str, int]) -> dict[str, torch.Tensor]:
    return {
        f"{name}_tail": setting.draw(plan.num_segments, WIDTH - 1, channels, seed=20 + number)
        for number, (name, channels) in enumerate(widths.items())
    }


def convolutions(
    setting: Setting, tokens: Tokens, heads: int, k_dim: int, v_dim: int, timed: Tokens | None = None,
    tails: bool = True,
) -> Iterator[Task]:  # fmt: skip
    """The three convolutions of a layer in one launch; and one convolution that reads tokens."""
    keys, values = heads * k_dim, heads * v_dim
    widths = {"q": keys, "k": keys, "v": values}

    def three(tokens, with_tails, unit=True):
        plan = tokens.plan(setting)
        unit_heads = heads if unit else None
        leaves = {
            "q": setting.draw(sum(tokens.lengths), keys, seed=1),
            "projected": setting.draw(plan.num_rows, keys + values + 2 * heads, seed=2),
            **{f"{n}_conv": setting.draw(c, WIDTH, seed=10 + i, scale=0.5) for i, (n, c) in enumerate(widths.items())},
        }
        if with_tails:
            leaves |= _tails(setting, plan, widths)

        def named(q, k, v, raw, tails):
            found = {"q": q, "k": k, "v": v, "raw": raw}
            return found | (dict(zip(("q_tail", "k_tail", "v_tail"), tails, strict=True)) if with_tails else {})

        def run(x):
            given = tuple(x.get(f"{name}_tail") for name in widths)
            convs = (x[f"{name}_conv"] for name in widths)
            return named(*convolve_qkv(
                x["q"], x["projected"], *convs, plan, unit_length_heads=unit_heads, tails=given,
                output_tail=with_tails, kernels="triton",
            ))  # fmt: skip

        def reference(x):
            rows = x["q"][plan.token_of_row.long()]
            k, v, raw = x["projected"].split((keys, values, 2 * heads), dim=1)
            done = [
                segment_convolution_reference(
                    part, x[f"{name}_conv"], plan.cu_seqlens, unit_heads if name != "v" else None, x.get(f"{name}_tail")
                )
                for name, part in (("q", rows), ("k", k), ("v", v))
            ]
            return named(*(y for y, _ in done), raw, [tail for _, tail in done])

        return Case(leaves, run, reference)

    def tokens_convolved(tokens, linear=False):
        plan = tokens.plan(setting)
        unit_heads = None if linear else heads

        def run(x):
            y, tail = segment_convolution(
                x["x"], x["conv"], plan, gather=True, unit_length_heads=unit_heads, silu=not linear, output_tail=True,
                kernels="triton",
            )  # fmt: skip
            return {"y": y, "tail": tail}

        def reference(x):
            rows = x["x"][plan.token_of_row.long()]
            y, tail = segment_convolution_reference(rows, x["conv"], plan.cu_seqlens, unit_heads, silu=not linear)
            return {"y": y, "tail": tail}

        leaves = {
            "x": setting.draw(sum(tokens.lengths), keys, seed=1),
            "conv": setting.draw(keys, WIDTH, seed=2, scale=0.5),
        }
        return Case(leaves, run, reference)

    cases = [lambda: three(tokens, False)]
    if tails:
        cases += [lambda: three(tokens, True), lambda: three(tokens, False, unit=False)]
    yield Task(
        "convolutions of q, k, v", f"{heads} heads, K {k_dim} V {v_dim}, {type_name(setting.dtype)}", tuple(cases),
        setting.dtype, work=(lambda: work_of(three(timed, False))) if timed else None,
    )  # fmt: skip
    if tails:
        yield Task(
            "convolution of tokens", f"{heads} heads of {k_dim}, {type_name(setting.dtype)}",
            (lambda: tokens_convolved(tokens), lambda: tokens_convolved(tokens, linear=True)), setting.dtype,
            work=(lambda: work_of(tokens_convolved(timed))) if timed else None,
        )  # fmt: skip


def combining(
    setting: Setting, tokens: Sequence[Tokens], heads: int, v_dim: int, timed: Tokens | None = None
) -> Iterator[Task]:
    """Rows to tokens, with norm and output gate."""

    def case(tokens):
        plan, eps = tokens.plan(setting), 1e-6
        count = sum(tokens.lengths)
        weights = torch.softmax(setting.draw(count, tokens.topk, seed=2, dtype=torch.float32), dim=-1)
        leaves = {
            "o": setting.draw(plan.num_rows, heads, v_dim, seed=1),
            "weights": weights,
            "output_gate": setting.draw(count, heads, v_dim, seed=3),
            "norm_weight": 1.0 + setting.draw(v_dim, seed=4, scale=0.2),
        }
        if tokens.topk + int(tokens.shared) == 1:
            # The norm divides by a single row's weight: its gradient is zero but for eps.
            del leaves["weights"]

        def run(x):
            return {"y": combine(x["o"], x.get("weights", weights), plan.row_of_choice, x["output_gate"],
                                 x["norm_weight"], eps=eps, kernels="triton")}  # fmt: skip

        def reference(x):
            return {"y": combine_reference(x["o"], x.get("weights", weights.double()), plan.row_of_choice,
                                           x["output_gate"], x["norm_weight"], eps)}  # fmt: skip

        return Case(leaves, run, reference)

    yield Task(
        "combine", f"{heads} heads of {v_dim}, {type_name(setting.dtype)}", tuple(lambda t=t: case(t) for t in tokens),
        setting.dtype, work=(lambda: work_of(case(timed))) if timed else None,
    )  # fmt: skip
