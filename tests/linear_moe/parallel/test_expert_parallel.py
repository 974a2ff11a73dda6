"""Memories over ranks: the exchange of rows, alone and beside a mixture of experts; layouts that are refused."""

import os
import traceback
from types import SimpleNamespace

import pytest
import torch
import warm_python
from training import EP2, launch

from linear_moe.config import MomTransformerConfig
from linear_moe.parallel.expert import plan_arrivals
from mom_layers.mixing import MemoryParameters, mix_memories
from mom_layers.recur.rules import get_rule
from mom_layers.route.plan import build_routing_plan
from mom_layers.settings import MixerSettings

MEMORIES, HEADS, K, V, HIDDEN = 4, 2, 16, 8, 32
WEIGHTS = ("projection", "q_conv", "k_conv", "v_conv", "norm_weight")


def test_arriving_rows_are_sorted_by_memory_source_sequence_and_time():
    counts = torch.tensor([[[3, 0], [1, 2]], [[0, 0], [4, 1]]], dtype=torch.int32)  # [source, memory, sequence]
    arrived = [
        (memory, source, sequence, time)
        for source in range(2)
        for memory in range(2)
        for sequence in range(2)
        for time in range(counts[source, memory, sequence])
    ]
    plan = plan_arrivals(counts, len(arrived))
    assert [arrived[i] for i in plan.token_of_row] == sorted(arrived)
    assert plan.row_of_choice[plan.token_of_row.long(), 0].tolist() == list(range(len(arrived)))
    assert plan.cu_seqlens.tolist() == [0, 3, 3, 3, 3, 4, 6, 10, 11] and plan.memory_offsets.tolist() == [3, 11]
    assert [sorted(arrived)[i][3] for i in range(len(arrived))] == plan.position_of_row.tolist()


def weights(shared):
    rule, random = get_rule("gated_deltanet"), torch.Generator().manual_seed(0)

    def draw(*shape):
        return (0.3 * torch.randn(*shape, generator=random)).requires_grad_()

    parameters = MemoryParameters(
        settings=MixerSettings(HEADS, K, V / K),
        projection=draw(MEMORIES + shared, sum(rule.projection_sizes(HEADS, K, V)), HIDDEN),
        q_conv=draw(HEADS * K, 4),
        k_conv=draw(HEADS * K, 4),
        v_conv=draw(HEADS * V, 4),
        rule_parameters={name: draw(HEADS) for name in rule.parameter_names},
        norm_weight=draw(V),
    )
    return parameters


def inputs(rank, crowded):
    """Ragged sequences, of another number on every rank. crowded: every token chooses memories 0 and 1."""
    random = torch.Generator().manual_seed(1 + rank)
    borders = torch.tensor([[0, 5, 5, 12], [0, 7, 8, 8, 10, 17]][rank] if not crowded else [0, 6, 9], dtype=torch.int32)
    tokens = int(borders[-1])
    x, q, gate = (torch.randn(tokens, width, generator=random) for width in (HIDDEN, HEADS * K, HEADS * V))
    ids = torch.rand(tokens, 2 if crowded else MEMORIES, generator=random).argsort(1)[:, :2]
    mix = torch.rand(tokens, 2, generator=random).softmax(1)
    return SimpleNamespace(x=x.requires_grad_(), q=q.requires_grad_(), gate=gate, mix=mix, ids=ids, borders=borders)


def gradients(y, data, parameters):
    tensors = [data.x, data.q, *(getattr(parameters, name) for name in WEIGHTS), *parameters.rule_parameters.values()]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), tensors)]


def on_one_rank(data, shared):
    parameters = weights(shared)
    plan = build_routing_plan(data.ids, data.borders, num_memories=MEMORIES, shared=shared)
    return gradients(mix_memories(data.x, data.q, data.gate, data.mix, plan, parameters)[0], data, parameters)


def on_two_ranks(rank, place, cases, sender):
    from megatron_patches import cpu

    cpu.apply()
    from linear_moe.parallel.expert import mix_memories_over_ranks

    torch.set_num_threads(1)
    os.environ |= place
    torch.distributed.init_process_group("gloo")
    try:
        for shared, crowded in cases:
            parameters, data = weights(shared), inputs(rank, crowded)
            here = slice(2 * rank, 2 * rank + 2)
            routed = MemoryParameters(**{**vars(parameters), "projection": parameters.projection[here]})
            all_tokens = MemoryParameters(**{**vars(parameters), "projection": parameters.projection[-1:]})
            y = mix_memories_over_ranks(
                data.x, data.q, data.gate, data.mix, data.ids, data.borders, routed, all_tokens if shared else None,
                num_memories=MEMORIES, group=torch.distributed.group.WORLD, ragged=not crowded,
            )  # fmt: skip
            result = gradients(y, data, parameters)
            for total in result[3:]:
                torch.distributed.all_reduce(total)
            sender.send([tensor.numpy() for tensor in result])
    except BaseException:
        sender.send(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def exchanged():
    """Output and gradients of two ranks: {(shared, crowded): [rank 0's, rank 1's]}."""
    cases = [(shared, crowded) for shared in (True, False) for crowded in (False, True)]
    store, places = warm_python.meeting_place(2)
    context = warm_python.server()
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        context.Process(target=on_two_ranks, args=(rank, places[rank], cases, pipes[rank][1])) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    results = {}
    try:
        for case in cases:
            assert all(receiver.poll(60) for receiver, _ in pipes), f"no result for {case}"
            results[case] = [receiver.recv() for receiver, _ in pipes]
            assert not any(isinstance(result, str) for result in results[case]), results[case]
    finally:
        for rank in ranks:
            rank.kill()
        del store
    return results


@pytest.mark.parametrize("crowded", [False, True], ids=["ragged", "a rank receives no row"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "routed only"])
def test_two_ranks_compute_what_one_computes(exchanged, shared, crowded):
    expected = [on_one_rank(inputs(rank, crowded), shared) for rank in range(2)]
    for rank, got in enumerate(exchanged[shared, crowded]):
        for i, tensor in enumerate(got):
            whole = expected[rank][i] if i < 3 else expected[0][i] + expected[1][i]
            torch.testing.assert_close(torch.from_numpy(tensor), whole, rtol=1e-4, atol=1e-5)


def test_a_moe_mlp_shares_the_expert_parallel_group(documents, tmp_path):
    experts = "--num-experts 4 --moe-ffn-hidden-size 32 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
    model = [*experts.split(), "--mom-single-kv-proj", "--data-path", documents]
    launch(1, [*model, "--train-iters", 1, "--lr", 0], tmp_path / "initial", save_at=(1,))
    model += ["--train-iters", 4, "--load", tmp_path / "initial", "--finetune", "--no-load-optim", "--no-load-rng"]
    assert launch(2, [*model, *EP2], tmp_path / "two") == pytest.approx(launch(1, model, tmp_path / "one"), rel=1e-5)


def test_memories_that_do_not_divide_stay_whole_beside_experts(documents, tmp_path):
    experts = "--num-experts 4 --moe-ffn-hidden-size 32 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
    model = [*experts.split(), "--mom-num-memories", 3, "--data-path", documents, "--train-iters", 2]
    assert len(launch(2, [*model, *EP2], tmp_path)) == 2
    assert (
        "memories: all 3 on each of 2 expert-parallel ranks, because --mom-num-memories 3 does not divide over "
        "--expert-model-parallel-size 2\n"
    ) in (tmp_path / "rank_0.txt").read_text()


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"mom_num_memories": 3}, "--mom-num-memories 3 does not divide over --expert-model-parallel-size 2"),
        (
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            "--tensor-model-parallel-size 2 splits each memory by head, and --expert-tensor-parallel-size 1 is another",
        ),
        ({"token_mixer": "attention"}, "num_moe_experts must be non None"),
    ],
)
def test_layouts_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MomTransformerConfig(
            **(
                {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "token_mixer": "mom"}
                | {"expert_model_parallel_size": 2, "mom_expert_parallel": "on"}
                | settings
            )
        )


def test_memories_may_be_the_only_experts():
    config = MomTransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, token_mixer="mom", expert_model_parallel_size=2
    )
    assert config.expert_model_parallel_size == 2 and config.num_moe_experts is None
