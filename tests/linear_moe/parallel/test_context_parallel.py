"""Sequences over ranks: a layer's slices equal the whole, in float64; the order of Megatron's batches; the volume."""

import os
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import toy_rule
import warm_python
from rules_to_test import composed
from torch.utils.checkpoint import checkpoint

from linear_moe.parallel.sequence_order import contiguous_layout, plan_exchange, zigzag_layout
from mom_layers.mixing import MemoryParameters, mix_memories
from mom_layers.recur.rules import MemoryRule, RuleInputs, get_rule
from mom_layers.route.plan import build_routing_plan
from mom_layers.settings import MixerSettings

RANKS, TOKENS, MEMORIES, HEADS, K, V, HIDDEN, WIDTH = 3, 36, 4, 2, 16, 8, 24, 4
WEIGHTS = ("projection", "q_conv", "k_conv", "v_conv", "norm_weight")
DOCUMENTS = {
    "two sequences": None,
    "a document over all ranks, empty ones": [0, 5, 5, 31, 31, 34, 36, 36],
    "borders between ranks": [0, 12, 24, 36],
    "one document": [0, 36],
    "documents over single edges": [0, 1, 11, 14, 23, 35, 36],
}
# Outputs that are not linear in the state: the backward pass needs the values and the state that came from other ranks.
NORMALISED = replace(toy_rule.RULE, name="normalised", key_heads=None)
RULES = {name: get_rule(name) for name in composed()} | {NORMALISED.name: NORMALISED}
CASES = [(documents, rule, "own projections") for documents in DOCUMENTS for rule in RULES]
CASES += [(documents, "gated_deltanet", kind) for documents in DOCUMENTS for kind in ("one projection", "recomputed")]
CASES += [(documents, "gated_deltanet", "two memories take all tokens") for documents in DOCUMENTS]
CASES += [("two sequences", rule, "in three parts") for rule in RULES]
CASES += [("two sequences", rule, "in three parts, states kept") for rule in ("gated_deltanet", "gla", NORMALISED.name)]
CASES += [(documents, rule, "states kept") for documents in DOCUMENTS for rule in ("gated_deltanet", NORMALISED.name)]

# Of two ranks and of four.
FEW_CASES = [
    (documents, rule, kind)
    for documents in ("two sequences", "a document over all ranks, empty ones", "documents over single edges")
    for rule in ("gated_deltanet", "gla", "kda", "mamba2", NORMALISED.name)
    for kind in ("own projections", "states kept", "two memories take all tokens", "in three parts")
    if rule == "gated_deltanet" or kind == "own projections"
    if documents == "two sequences" or "parts" not in kind
]


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class SettingsOfRule(MixerSettings):
    """Settings with a rule that no registry has."""

    given: MemoryRule | None = None

    @property
    def update_rule(self):
        return self.given


def parameters_of(rule, kind):
    rule = RULES[rule]
    groups = 1 if kind == "one projection" else MEMORIES + 1
    return MemoryParameters(
        settings=SettingsOfRule(HEADS, K, V / K, given=rule),
        projection=0.4 * random(groups, sum(rule.projection_sizes(HEADS, K, V)), HIDDEN, seed=10),
        q_conv=random(HEADS * K, WIDTH, seed=11),
        k_conv=random(HEADS * K, WIDTH, seed=12),
        v_conv=random(HEADS * V, WIDTH, seed=13),
        rule_parameters={
            name: 0.2 + 0.3 * random(HEADS, *shape, seed=14) for name, shape in rule.parameter_shapes(K).items()
        },
        norm_weight=random(V, seed=15),
    )


def whole_inputs(batch, length=TOKENS, kind=""):
    """Tokens [B, T, *], their memories, and the outputs' gradient. Few tokens choose the third memory, so that its
    segments are short; no token chooses the last memory."""
    x, q, gate, dy = (
        random(batch, length, width, seed=seed) for seed, width in enumerate((HIDDEN, HEADS * K, HEADS * V, HEADS * V))
    )
    likely = [100.0, 100.0, 0.0, 0.0] if kind == "two memories take all tokens" else [1.0, 1.0, 0.0, -100.0]
    logits = random(batch, length, MEMORIES, seed=5) + torch.tensor(likely)
    return x, q, gate, random(batch, length, 2, seed=6).softmax(-1), logits.topk(2).indices, dy


def outputs_and_gradients(inputs, borders, parameters, sequence_slice=None, kind=""):
    """y [B, T, H V]; gradients of x, q, gate and the mixing weights [B, T, *], then of the parameters."""
    from megatron.core.tensor_parallel import checkpoint as megatrons_checkpoint

    *tokens, ids, dy = inputs
    x, q, gate, mix = (x.flatten(0, 1).detach().requires_grad_() for x in tokens)
    fields = {name: getattr(parameters, name).clone().requires_grad_() for name in WEIGHTS}
    rule_parameters = {name: x.clone().requires_grad_() for name, x in parameters.rule_parameters.items()}
    parameters = replace(parameters, **fields, rule_parameters=rule_parameters)
    plan = build_routing_plan(ids.flatten(0, 1), borders, num_memories=MEMORIES, shared=True)

    def layer(x, q, gate, mix):
        return mix_memories(x, q, gate, mix, plan, parameters, sequence_slice=sequence_slice)[0]

    if kind == "recomputed":
        y = checkpoint(layer, x, q, gate, mix, use_reentrant=False)
    elif "states kept" in kind:
        y = megatrons_checkpoint(layer, False, x, q, gate, mix)
    else:
        y = layer(x, q, gate, mix)
    y.backward(dy.flatten(0, 1))
    gradients = [leaf.grad for leaf in (x, q, gate, mix, *fields.values(), *rule_parameters.values())]
    return [x.detach().unflatten(0, ids.shape[:2]) for x in (y, *gradients[:4])], list(gradients[4:])


def borders_of(documents, batch, length):
    return torch.arange(0, batch * length + 1, length).int() if documents is None else torch.tensor(documents).int()


def work(rank, documents, rule, kind):
    """One rank's outputs and gradients; the gradients of parameters are summed over the ranks."""
    from linear_moe.parallel.context import ContextSlice

    batch = 2 if DOCUMENTS[documents] is None else 1
    length = TOKENS // torch.distributed.get_world_size()
    inputs = [x[:, rank * length : (rank + 1) * length] for x in whole_inputs(batch, kind=kind)]
    borders = borders_of(DOCUMENTS[documents], batch, length)
    here = ContextSlice(torch.distributed.group.WORLD, length, None if DOCUMENTS[documents] is None else borders)
    if DOCUMENTS[documents] is not None:
        borders = here.local_documents()
    here._is_small = lambda *about: "states kept" in kind  # these slices are shorter than a state
    if "in three parts" in kind:
        here._num_parts = lambda *about: 3
    by_token, gradients = outputs_and_gradients(inputs, borders, parameters_of(rule, kind), here, kind)
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    return [x.numpy() for x in (*by_token, *gradients)]


def reorder(rank):
    """A batch in Megatron's order, the batch in the order of time, and the gradient that comes back."""
    from linear_moe.parallel.sequence_order import SequenceOrder

    order = SequenceOrder(torch.distributed.group.WORLD, RANKS)
    chunks = torch.arange(2 * RANKS * 4.0).view(2 * RANKS, 4, 1)
    x = torch.cat([chunks[rank], chunks[2 * RANKS - 1 - rank]]).requires_grad_()
    y = order.to_contiguous(x)
    back = order.to_zigzag(y)
    (gradient,) = torch.autograd.grad(back, x, x.detach())
    return [t.detach().numpy() for t in (x, y, back, gradient)]


@contextmanager
def counted():
    """Counts the numbers that this rank gives to collectives inside: a list of one number."""
    sent, kept = [0], {}

    def counting(collective, source):
        def call(*arguments, **keywords):
            sent[0] += arguments[source].numel()
            return collective(*arguments, **keywords)

        return call

    for name, source in (("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1)):
        kept[name] = getattr(torch.distributed, name)
        setattr(torch.distributed, name, counting(kept[name], source))
    try:
        yield sent
    finally:
        for name, collective in kept.items():
            setattr(torch.distributed, name, collective)


def volume(rank, kind="", small=False):
    """Numbers that a rank sends for a layer, forward and backward, by the length of its slice."""
    from linear_moe.parallel.context import ContextSlice

    found = []
    for length in (TOKENS // RANKS, 8 * TOKENS // RANKS):
        inputs = [x[:, rank * length : (rank + 1) * length] for x in whole_inputs(2, RANKS * length)]
        here = ContextSlice(torch.distributed.group.WORLD, length)
        here._is_small = lambda *about: small
        with counted() as sent:
            outputs_and_gradients(inputs, borders_of(None, 2, length), parameters_of("gated_deltanet", ""), here, kind)
        found += sent
    return found


def others(rank):
    """What a rank found beside the cases."""
    recomputed = {small: volume(rank, "states kept", small) for small in (False, True)}
    return {"order": reorder(rank), "volume": volume(rank), "recomputed volume": recomputed}


def run_rank(rank, place, sender, cases, also):
    from linear_moe.parallel import context
    from megatron_patches import cpu, recomputed_regions

    context.CHUNK = 2  # parts are cut between chunks, and these slices are shorter than one
    cpu.apply()
    recomputed_regions.PATCH.apply()
    torch.set_num_threads(1)
    os.environ |= place
    torch.distributed.init_process_group("gloo")
    try:
        sender.send({case: work(rank, *case) for case in cases} | (others(rank) if also else {}))
    except BaseException:
        sender.send(traceback.format_exc())
        raise


def answers(size, cases, also=False):
    """What every rank of ``size`` found: {case: its tensors}."""
    return warm_python.answers_of_ranks(run_rank, size, (cases, also), ("all cases",), 120)["all cases"]


@pytest.fixture(scope="module")
def ranks():
    return answers(RANKS, CASES, also=True)


def compare(ranks, documents, rule, kind):
    batch = 2 if DOCUMENTS[documents] is None else 1
    borders = borders_of(DOCUMENTS[documents], batch, TOKENS)
    by_token, gradients = outputs_and_gradients(whole_inputs(batch, kind=kind), borders, parameters_of(rule, kind))
    for rank, result in enumerate(ranks):
        got = [torch.from_numpy(x) for x in result[documents, rule, kind]]
        length = TOKENS // len(ranks)
        here = slice(rank * length, (rank + 1) * length)
        names = [*("y", "x", "q", "gate", "mix"), *WEIGHTS, *RULES[rule].parameter_names]
        for name, mine, expected in zip(names, got, [x[:, here] for x in by_token] + gradients, strict=True):
            # hgrn2 makes its keys from the forget gate, and reads no projected key.
            assert (expected.norm() > 0) != (rule == "hgrn2" and name == "k_conv")
            assert (mine - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.parametrize("documents,rule,kind", CASES)
def test_slices_of_sequences_equal_whole_sequences(ranks, documents, rule, kind):
    compare(ranks, documents, rule, kind)


@pytest.mark.parametrize("size", [2, 4])
def test_slices_of_two_and_of_four_ranks(size):
    results = answers(size, FEW_CASES)
    for case in FEW_CASES:
        compare(results, *case)


def test_reordering_to_the_order_of_time_and_back(ranks):
    for rank, result in enumerate(ranks):
        x, y, back, gradient = (torch.from_numpy(t) for t in result["order"])
        assert y.flatten().tolist() == list(range(8 * rank, 8 * rank + 8))
        assert torch.equal(back, x) and torch.equal(gradient, x)


@pytest.mark.parametrize("context_size,tensor_size", [(2, 1), (4, 1), (2, 2), (3, 2), (2, 3), (4, 4), (3, 5)])
def test_blocks_are_exchanged_in_every_layout(context_size, tensor_size):
    zigzag, contiguous = zigzag_layout(context_size, tensor_size), contiguous_layout(context_size, tensor_size)
    for before, after in [(zigzag, contiguous), (contiguous, zigzag)]:
        plans = [plan_exchange(before, after, rank) for rank in range(context_size * tensor_size)]
        arrived = [[] for _ in plans]
        for plan, blocks in zip(plans, before, strict=True):
            sent = iter([blocks[i] for i in plan.send_order])
            for to, count in enumerate(plan.sends):
                arrived[to].append([next(sent) for _ in range(count)])
        for plan, pieces, blocks in zip(plans, arrived, after, strict=True):
            assert [len(piece) for piece in pieces] == plan.receives
            arrival = [block for piece in pieces for block in piece]
            assert [arrival[i] for i in plan.place] == blocks


def test_volume_does_not_depend_on_the_sequence_length(ranks):
    segments = 2 * (MEMORIES + 1)
    # States and transitions, then gradients and transitions, and the tails of queries, keys, values and gates.
    maps = 2 * segments * HEADS * K * (K + V)
    for result in ranks:
        short, long = result["volume"]
        assert short == long
        assert maps < short < 2 * maps


def test_a_recomputed_region_passes_states_once(ranks):
    states = 2 * (MEMORIES + 1) * HEADS * K * (K + V)  # with their transitions
    for result in ranks:
        volume = result["recomputed volume"]
        assert [twice - once for twice, once in zip(volume[False], volume[True], strict=True)] == [states, states]


@pytest.mark.parametrize("documents,segments,parts", [(None, 10, 1), ("given", 5, 1), (None, 10, 4)])
@pytest.mark.parametrize("rule,columns", [("gated_deltanet", V + K), ("gla", V + 1), ("normalised", V + 2)])
def test_states_are_kept_that_take_no_more_memory_than_the_values(rule, columns, documents, segments, parts):
    from linear_moe.parallel.context import ContextSlice

    here = object.__new__(ContextSlice)
    here.documents = documents
    plan = SimpleNamespace(num_segments=10, num_all_memories=5)
    transition = columns - V - (rule == "normalised")
    rows = segments * K * (parts * columns + (transition if parts > 1 else 0)) // V
    for number, small in ((rows, True), (rows - 1, False)):
        inputs = RuleInputs(*(torch.empty(number, HEADS, n, dtype=torch.float64) for n in (K, K, V)), {})
        assert here._is_small(plan, RULES[rule], inputs, parts) == small


@pytest.mark.parametrize(
    "segments,rows,rule,documents,parts",
    [
        (5, 98304, "gated_deltanet", None, 4),
        (5, 98304, "gla", None, 4),
        (5, 98304, "mamba2", None, 1),  # whose kernels cut segments themselves
        (5, 98304, "gated_deltanet", "given", 1),
        (5, 4 * 5 * 1024 - 1, "gated_deltanet", None, 2),
        (40, 98304, "gated_deltanet", None, 1),
    ],
)
def test_long_slices_of_few_segments_are_computed_in_parts(segments, rows, rule, documents, parts):
    from linear_moe.parallel.context import ContextSlice

    here = object.__new__(ContextSlice)
    here.documents = documents
    plan = SimpleNamespace(num_segments=segments, num_rows=rows)
    inputs = RuleInputs(None, None, torch.empty(rows, 4, 0), {})
    assert here._num_parts(plan, RULES[rule], inputs) == parts


def test_parts_are_whole_chunks():
    from linear_moe.parallel.context import _in_parts

    borders = torch.tensor([0, 1000, 1000, 1064, 1066], dtype=torch.int32)
    expected = [0, 256, 512, 768, 1000, 1000, 1000, 1000, 1000, 1064, 1064, 1064, 1064, 1066, 1066, 1066, 1066]
    assert _in_parts(borders, 4).tolist() == expected and _in_parts(borders, 4).dtype == torch.int32
