"""A layer whose memories are split over ranks, with inputs of every kind, and the same layer on one rank."""

from types import SimpleNamespace

import torch

from linear_moe.parallel.choices import Choices
from mom_layers.mixing import MemoryParameters, mix_memories
from mom_layers.recur.rules import get_rule
from mom_layers.route.plan import build_routing_plan
from mom_layers.settings import MixerSettings

MEMORIES, HEADS, K, V, HIDDEN, TOPK = 12, 2, 16, 16, 32, 2
WEIGHTS = ("projection", "q_conv", "k_conv", "v_conv", "norm_weight")
BORDERS = ([0, 5, 5, 17], [0, 7, 8, 8, 10, 17], [0, 17], [0, 1, 2, 3, 17])
"""Of the packed documents on every rank; all ranks have 17 tokens."""


class Layer:
    """Weights and inputs in float32, the same wherever they are drawn.

    Args:
        ranks: E.
        exchange: its name; an all-to-all takes another number of tokens on every rank.
        kind: "ragged" documents; "crowded", where every token chooses memories 0 and 1; "one", where every token
            chooses memory 0 alone; "regular", two sequences of one length, stored time first; "uneven",
            sequences of one length, but of another number and length on every rank, as in evaluation.
        shared: whether there is a shared memory.
        single: whether all memories share one projection.
    """

    OWN = 4
    """Results that are a rank's own; the others are sums over ranks."""

    def __init__(self, ranks, exchange, kind="ragged", shared=True, single=False):
        self.ranks, self.exchange, self.kind, self.shared, self.single = ranks, exchange, kind, shared, single
        rule, random = get_rule("gated_deltanet"), torch.Generator().manual_seed(0)

        def draw(*shape):
            return (0.3 * torch.randn(*shape, generator=random)).requires_grad_()

        self.parameters = MemoryParameters(
            settings=MixerSettings(HEADS, K, V / K),
            projection=draw(1 if single else MEMORIES + shared, sum(rule.projection_sizes(HEADS, K, V)), HIDDEN),
            q_conv=draw(HEADS * K, 4),
            k_conv=draw(HEADS * K, 4),
            v_conv=draw(HEADS * V, 4),
            rule_parameters={name: draw(HEADS) for name in rule.parameter_names},
            norm_weight=draw(V),
        )

    def _with(self, projection):
        return MemoryParameters(**{**vars(self.parameters), "projection": projection})

    def routed(self, rank):
        """Parameters of the memories of a rank."""
        if self.single:
            return self.parameters
        here = MEMORIES // self.ranks
        return self._with(self.parameters.projection[rank * here : (rank + 1) * here])

    def shared_parameters(self):
        return self._with(self.parameters.projection[-1:]) if self.shared else None

    def inputs(self, rank):
        random = torch.Generator().manual_seed(1 + rank)
        borders = {
            "regular": [0, 9, 18],
            "uneven": list(range(0, (1 + rank) * (9 - rank) + 1, 9 - rank)),
        }.get(self.kind, BORDERS[rank])
        if self.exchange == "all-to-all" and self.kind == "ragged":
            borders = [min(border, 17 - 2 * rank) for border in borders]
        tokens = borders[-1]
        x, q, gate = (torch.randn(tokens, width, generator=random) for width in (HIDDEN, HEADS * K, HEADS * V))
        choices = {"crowded": 2, "one": 1}.get(self.kind, MEMORIES)
        ids = torch.rand(tokens, choices, generator=random).argsort(1)[:, :TOPK]
        return SimpleNamespace(
            x=x.requires_grad_(),
            q=q.requires_grad_(),
            gate=gate,
            mix=torch.rand(ids.shape, generator=random).softmax(1).requires_grad_(),
            ids=ids,
            borders=torch.tensor(borders, dtype=torch.int32),
        )

    def choices(self, data, group):
        most = {"regular": 2, "uneven": self.ranks}.get(self.kind)
        most = most or max(len(borders) for borders in BORDERS[: self.ranks]) - 1
        return Choices(
            data.ids, data.borders, num_memories=MEMORIES, group=group, most_sequences=most,
            ragged=not self.is_time_major, time_major=self.is_time_major,
        )  # fmt: skip

    @property
    def is_time_major(self):
        return self.kind in ("regular", "uneven")

    def gradients(self, y, data):
        """y and the gradients of x, q and the router's weights; then those of all parameters."""
        mine = self.parameters
        tensors = [data.x, data.q, data.mix, *(getattr(mine, name) for name in WEIGHTS), *mine.rule_parameters.values()]
        gradients = torch.autograd.grad(y.square().sum(), tensors, allow_unused=True)
        zeros = (torch.zeros_like(tensor) for tensor in tensors)
        return [y.detach(), *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]

    def on_one_rank(self, rank):
        """What a rank computes that has all memories."""
        data = self.inputs(rank)
        plan = build_routing_plan(data.ids, data.borders, num_memories=MEMORIES, shared=self.shared)
        plan = plan.time_major() if self.is_time_major else plan
        return self.gradients(mix_memories(data.x, data.q, data.gate, data.mix, plan, self.parameters)[0], data)

    def compare(self, results, name):
        """Asserts that the results of all ranks, with sums over ranks, are those of one rank with all memories."""
        expected = [self.on_one_rank(rank) for rank in range(self.ranks)]
        for rank, got in enumerate(results):
            for i, tensor in enumerate(got):
                whole = expected[rank][i] if i < self.OWN else sum(result[i] for result in expected)
                error, size = (tensor - whole).norm(), whole.norm()
                assert error <= 1e-5 * size, f"{name}, rank {rank}, tensor {i}: {error} of {size}"
