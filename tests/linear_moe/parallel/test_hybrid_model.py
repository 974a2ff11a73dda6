"""Models whose layers a pattern names: beside GPT models of the same layers, with every symbol, and over ranks."""

import importlib.util

import pytest
import torch
import training

EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 32 --moe-router-topk 2 --moe-token-dispatcher-type alltoall".split()
GATED_DELTA_NET = (
    "--linear-key-head-dim 16 --linear-value-head-dim 16 --linear-num-key-heads 2 --linear-num-value-heads 2".split()
)
LATENT_ATTENTION = "--kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16".split()
EVERY_SECOND = ["--linear-attention-freq", 2]
SAME_LAYERS = {
    "one stored tensor for all layers, distributed optimizer": (["R-R-", *training.DISTRIBUTED_OPTIMIZER], []),
    "softmax attention and experts": (["R-*ER-*E", *EXPERTS], [*EVERY_SECOND, "--moe-layer-freq", "[0,1,0,1]"]),
    "multi-token prediction": (["R-R-/*-"], ["--mtp-num-layers", 1]),
    "multi-latent attention": (["R-+-", *LATENT_ATTENTION], [*EVERY_SECOND, "--multi-latent-attention"]),
}
"""Arguments of a hybrid model, the pattern first, and what a GPT model of the same layers has in place of the
pattern."""


def run(folder, ranks, *arguments, steps=4, save_at=(2,), load=None, **options):
    start = [] if load is None else ["--load", load]
    words = ["--mock-data", "--train-iters", steps, *arguments, *start]
    return training.launch(ranks, words, folder, save_at=save_at, **options)


def at_step(folder, step):
    """The folder, whose checkpoint that loads is the one after a step."""
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


@pytest.mark.parametrize("layers", SAME_LAYERS)
def test_both_model_classes_give_equal_losses_and_load_each_others_checkpoints(layers, tmp_path):
    (pattern, *shared), instead = SAME_LAYERS[layers]
    classes = {
        "hybrid": ["--hybrid-layer-pattern", pattern, *shared],
        "gpt": ["--token-mixer", "mom", "--num-layers", len(pattern.split("/")[0]) // 2, *shared, *instead],
    }
    losses = {name: run(tmp_path / name, 1, *arguments) for name, arguments in classes.items()}
    assert losses["hybrid"] == pytest.approx(losses["gpt"], rel=1e-6)
    assert losses["gpt"][4] < losses["gpt"][1] - 0.1
    for name, other in [("hybrid", "gpt"), ("gpt", "hybrid")]:
        resumed = run(tmp_path / f"{name} again", 1, *classes[name], save_at=(), load=at_step(tmp_path / other, 2))
        expected = {step: losses[other][step] for step in (3, 4)}
        assert resumed == pytest.approx(expected, rel=1e-6), (name, other)


def test_memories_gated_delta_net_softmax_and_experts_in_one_model(tmp_path):
    """Without a GPU Megatron's gated delta net needs no package; on a GPU the extra fla."""
    arguments = ["--hybrid-layer-pattern", "RE*EGE", *EXPERTS, *GATED_DELTA_NET]
    losses = run(tmp_path / "whole", 1, *arguments)
    assert losses[4] < losses[1] - 0.1
    log = (tmp_path / "whole" / "rank_0.txt").read_text()
    assert "(RE*EGE)" in log
    assert "patch cpu-gated-delta-net applied" in log or importlib.util.find_spec("fla")
    stored = training.parameters(tmp_path / "whole", 4)
    assert "decoder.layers.0.self_attention.memory_proj.key" in stored
    assert "decoder.layers.4.self_attention.conv1d.weight.query" in stored, sorted(stored)
    resumed = run(tmp_path / "again", 1, *arguments, save_at=(), load=at_step(tmp_path / "whole", 2))
    assert resumed == {step: losses[step] for step in (3, 4)}


UNTIED = ["--untie-embeddings-and-output-weights"]
LAYOUTS = {
    "pipeline stages": (2, "RE|*E", training.PP2),
    "virtual pipeline stages": (2, "R-|*-|-|RE", training.PP2),
    "pipeline stages and multi-token prediction": (2, "R-|*E/R-", training.PP2 + UNTIED),
    "virtual pipeline stages and multi-token prediction": (2, "R-|*-|-|RE/R-", training.PP2 + UNTIED),
    "tensor parallelism": (2, "RE*ERE", [*training.TP2, *training.SP]),
    "experts and memories over the same ranks": (2, "RE*ERE", training.EP2),
    "stages without borders in the pattern": (2, "R-RE", training.PP2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_losses_of_one_process(layout, tmp_path):
    ranks, pattern, split = LAYOUTS[layout]
    # Stages, and the ranks of experts, draw their weights from seeds of their own: both runs load the same weights.
    whole = ["--hybrid-layer-pattern", pattern.replace("|", ""), *EXPERTS, *(UNTIED if UNTIED[0] in split else [])]
    run(tmp_path / "start", 1, *whole, "--lr", 0, steps=1, save_at=(1,))
    start = ["--finetune", "--no-load-optim", "--no-load-rng"]
    one = run(tmp_path / "one", 1, *whole, *start, save_at=(), load=tmp_path / "start")
    words = ["--hybrid-layer-pattern", pattern, *EXPERTS, *split, *start]
    several = run(tmp_path / "several", ranks, *words, save_at=(2,), load=tmp_path / "start")
    assert several == pytest.approx(one, rel=1e-5)
    resumed = run(tmp_path / "resumed", 1, *whole, save_at=(), load=at_step(tmp_path / "several", 2))
    assert resumed == pytest.approx({step: one[step] for step in (3, 4)}, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
    ],
)
def test_a_norm_loads_under_the_name_that_the_checkpoint_has(name, stored):
    from megatron.core.dist_checkpointing import ShardedTensor

    from linear_moe.layer.checkpoint_names import use_stored_names

    for before, after in [("", ""), ("optimizer.state.exp_avg.", "optimizer.state.exp_avg.")]:
        keys = ["decoder.layers.1." + name, before + "decoder.layers.1." + name]
        state = {key: ShardedTensor.from_rank_offsets(key, torch.zeros(8)) for key in keys}
        shapes = {prefix + "decoder.layers.1." + stored: (8,) for prefix in ("", after)} | {
            "decoder.final_norm.x": (8,)
        }
        state["norm"] = ShardedTensor.from_rank_offsets("decoder.final_norm.x", torch.zeros(8))
        use_stored_names(state, shapes)
        assert {entry.key for entry in state.values()} == set(shapes)


def test_the_loss_scale_reaches_the_memory_routers_and_sparse_attention():
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from linear_moe.config import LOSS_SCALE_HOOK, MomMLATransformerConfig

    config = MomMLATransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=2, token_mixer="mom", mom_num_heads=2, mom_head_dim=16,
        is_hybrid_model=True, experimental_attention_variant="dsa", add_bias_linear=False,
    )  # fmt: skip
    before = MoEAuxLossAutoScaler.main_loss_backward_scale, DSAIndexerLossAutoScaler.main_loss_backward_scale
    try:
        getattr(config, LOSS_SCALE_HOOK)(torch.tensor(0.25))
        assert MoEAuxLossAutoScaler.main_loss_backward_scale == 0.25
        assert DSAIndexerLossAutoScaler.main_loss_backward_scale == 0.25
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale, DSAIndexerLossAutoScaler.main_loss_backward_scale = before
