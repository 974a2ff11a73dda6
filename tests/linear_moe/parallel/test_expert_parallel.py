"""Memories over ranks: the exchange of rows, alone and beside a mixture of experts; layouts that are refused."""

import os
import traceback

import pytest
import torch
import warm_python
from split_layer import Layer
from training import EP2, launch

from linear_moe.config import MomTransformerConfig
from linear_moe.parallel.all_to_all import plan_arrivals

WORLDS = (2, 3, 4)
CASES = {
    "ragged documents": {},
    "ragged documents, routed memories only": {"shared": False},
    "two memories take all tokens": {"kind": "crowded"},
    "one memory takes all tokens": {"kind": "one", "shared": False},
    "sequences of one length, stored time first": {"kind": "regular"},
    "one projection for all memories": {"single": True},
}
"""What the ranks hold, by the name of the case."""
UNEVEN = {"sequences of another number and length on every rank": {"kind": "uneven"}}


def cases_of(exchange):
    return CASES | (UNEVEN if exchange == "all-to-all" else {})


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


def on_ranks(rank, place, sender, exchange, cases):
    from megatron_patches import cpu

    cpu.apply()
    from linear_moe.parallel.expert import mix_memories_over_ranks

    torch.set_num_threads(1)
    os.environ |= place
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    try:
        for case in cases.values():
            layer = Layer(group.size(), exchange, **case)
            data = layer.inputs(rank)
            y = mix_memories_over_ranks(
                data.x, data.q, data.gate, data.mix, layer.choices(data, group), layer.routed(rank),
                layer.shared_parameters(), exchange=exchange,
            )  # fmt: skip
            result = layer.gradients(y, data)
            for total in result[layer.OWN :]:
                torch.distributed.all_reduce(total)
            sender.send([tensor.numpy() for tensor in result])
        sender.send(agreed(rank, group))
    except BaseException:
        sender.send(traceback.format_exc())
        raise


def agreed(rank, group):
    """What a rank says of the same batch on every rank, and of a larger one on every later rank."""
    from linear_moe.parallel import sequence_counts

    said, device = [], torch.device("cpu")
    for tokens in (12, 12, 20 + rank):
        try:
            sequence_counts.compare_once("all-gather", 3, tokens, group, device)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    batch = torch.tensor([0, 5])
    counts = sequence_counts.counts_of_batch(batch, 1 + rank, 5, group)
    assert sequence_counts.counts_of_batch(batch, 100 + rank, 5, group) is counts  # the same batch, without a word
    return *said, counts.sequences, counts.tokens, counts.fewest_tokens


def exchanged(ranks, exchange):
    """Outputs and gradients: {case: [of every rank]}; then what the ranks have agreed on."""
    cases = cases_of(exchange)
    return warm_python.answers_of_ranks(on_ranks, ranks, (exchange, cases), (*cases, "agreed"), 60)


@pytest.mark.parametrize("exchange", ["all-to-all", "all-gather"])
@pytest.mark.parametrize("ranks", WORLDS)
def test_ranks_compute_what_one_computes(ranks, exchange):
    found = exchanged(ranks, exchange)
    for same, again, larger, *counts in found.pop("agreed"):
        assert not same and not again and counts == [ranks, 5, 5]
        assert f"a rank has 20 tokens where another has {19 + ranks}" in larger
    for name, results in found.items():
        layer = Layer(ranks, exchange, **cases_of(exchange)[name])
        layer.compare([[torch.from_numpy(tensor) for tensor in result] for result in results], name)


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
