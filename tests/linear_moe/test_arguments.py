"""Combinations of arguments that are refused, and earlier names of arguments."""

import argparse
import logging
import re

import pytest
from megatron.training.arguments import add_megatron_arguments

from linear_moe.entry.arguments import (
    add_mom_arguments,
    check_context_parallel,
    check_model,
    compare_with_checkpoint,
    fill_mom_arguments,
    restore_from_checkpoint,
    send_shapes,
)
from linear_moe.entry.attention_options import drop_unused_attention
from linear_moe.entry.cpu_options import use_counterparts
from linear_moe.entry.hybrid_pattern import choose_token_mixer, use_memory_symbol, use_present_name
from linear_moe.pattern import asks_for_memories


def check(*arguments):
    parser = add_mom_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    args = parser.parse_args(["--token-mixer", "mom", *map(str, arguments)])
    choose_token_mixer(args)
    fill_mom_arguments(args)
    use_present_name(args)
    use_memory_symbol(args)
    check_model(args)
    check_context_parallel(args)
    return args


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "some.module", "some_spec"], "does not work with --spec some.module some_spec: leave --spec out"),
        (
            ["--hybrid-layer-pattern", "M-*-"],
            "--hybrid-layer-pattern M-*- has no layer with memories: write R for each layer that is to have memories, "
            "for example --hybrid-layer-pattern 'R-*-'",
        ),
        (["--hybrid-override-pattern", "*-*-"], "for example --hybrid-layer-pattern 'R-*-', or leave out"),
        (["--hybrid-override-pattern", "*-", "--hybrid-layer-pattern", "G-"], "are two names of one argument"),
        (
            ["--hybrid-layer-pattern", "*-", "--mtp-hybrid-override-pattern", "G-", "--mtp-num-layers", 1],
            "--hybrid-layer-pattern *-/R- has no layer with memories: write R for each layer that is to have memories, "
            "for example --hybrid-layer-pattern 'R-/R-'",
        ),
        (
            ["--hybrid-layer-pattern", "RD-", "--transformer-impl", "local"],
            "the symbol D in --hybrid-layer-pattern RD- and --transformer-impl local: Megatron's sparse attention",
        ),
        (
            ["--hybrid-layer-pattern", "GM-", "--transformer-impl", "local"],
            "the symbol M in --hybrid-layer-pattern RM- and --transformer-impl local: Megatron's Mamba layers need",
        ),
        (
            ["--hybrid-layer-pattern", "RX-"],
            "--hybrid-layer-pattern RX-: 'X' is not the symbol of a layer: use R (memories), G (Megatron's gated delta "
            "net), M (Mamba), * (softmax attention), + (multi-latent attention), D (sparse attention), - (MLP), E "
            "(experts), | between pipeline stages, / before multi-token prediction",
        ),
        (["--hybrid-layer-pattern", "R-*-", "--linear-attention-freq", 2], "leave out --linear-attention-freq"),
        (
            ["--token-mixer", "attention", "--hybrid-layer-pattern", "R-"],
            "--token-mixer attention and the symbol R in --hybrid-layer-pattern R-: leave out --token-mixer, or",
        ),
        (
            ["--hybrid-layer-pattern", "R-|*-/R-", "--pipeline-model-parallel-size", 2],
            "--pipeline-model-parallel-size 2 and tied embeddings: Megatron's HybridModel cannot save them",
        ),
        (
            ["--hybrid-layer-pattern", "G*-", "--transformer-impl", "local", "--context-parallel-size", 2],
            "softmax attention layers, --transformer-impl local and --context-parallel-size 2: local attention cannot",
        ),
        (
            ["--hybrid-layer-pattern", "G*", "--multi-latent-attention"],
            "--multi-latent-attention and the symbol * in --hybrid-layer-pattern R*: * is plain softmax attention",
        ),
        (
            ["--experimental-attention-variant", "dsa", "--linear-attention-freq", 2],
            "does not work with --experimental-attention-variant dsa and softmax attention layers: a GPT model has",
        ),
        (["--heterogeneous-layers-config-path", "x.json"], "leave the option out, and use --linear-attention-freq"),
        (
            ["--context-parallel-size", 2, "--dataloader-inter-document-masking", "--linear-attention-freq", 2],
            "--context-parallel-size 2 and softmax attention layers: softmax attention cuts every document into equal",
        ),
        (
            ["--context-parallel-size", 2, "--dataloader-inter-document-masking", "--mtp-num-layers", 1],
            "make every layer MoM, without --mtp-num-layers",
        ),
        (["--reset-position-ids"], "does not work with --reset-position-ids: use --dataloader-inter-document-masking"),
        (
            ["--reset-attention-mask"],
            "does not work with --reset-attention-mask: use --dataloader-inter-document",
        ),
        (
            ["--cuda-graph-impl", "local", "--dataloader-inter-document-masking"],
            "does not work with CUDA graphs of packed documents",
        ),
    ],
)
def test_refused_combinations(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--context-parallel-size", 2, "--dataloader-inter-document-masking"],
        ["--context-parallel-size", 2, "--linear-attention-freq", 2],
        ["--cuda-graph-impl", "full_iteration"],
        ["--hybrid-layer-pattern", "G-*-"],
        ["--hybrid-override-pattern", "G-*-"],
        ["--multi-latent-attention", "--transformer-impl", "local"],
        ["--multi-latent-attention", "--linear-attention-freq", 2],
        ["--multi-latent-attention", "--linear-attention-freq", 2, "--transformer-impl", "local"],
        ["--multi-latent-attention", "--mtp-num-layers", 1, "--transformer-impl", "local"],
        ["--hybrid-layer-pattern", "G+"],
        ["--hybrid-layer-pattern", "R+", "--transformer-impl", "local"],
        ["--hybrid-layer-pattern", "RGM*E-|R-/R-"],
        ["--hybrid-layer-pattern", "RD-"],
        ["--hybrid-layer-pattern", "G-*-", "--context-parallel-size", 2],
        ["--hybrid-layer-pattern", "GM-"],
        ["--reset-position-ids", "--dataloader-inter-document-masking"],
        ["--dataloader-inter-document-masking", "--pipeline-model-parallel-size", 2, "--micro-batch-size", 2],
        ["--context-parallel-size", 2, "--sft"],
        ["--context-parallel-size", 2, "--sft", "--linear-attention-freq", 2],
    ],
)
def test_accepted_combinations(arguments):
    check(*arguments)


@pytest.mark.parametrize(
    ("given", "built"), [("G-*-", "R-*-"), ("RG-", "RG-"), ("R-*-/G-", "R-*-/G-"), ("G-*-/G*-", "R-*-/R*-")]
)
def test_g_stands_for_memories_in_a_pattern_without_r_alone(given, built, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("linear_moe"), "propagate", True)
    with caplog.at_level("INFO", logger="linear_moe"):
        assert check("--hybrid-layer-pattern", given).hybrid_layer_pattern == built
    assert (f"--hybrid-layer-pattern {given} has no R" in caplog.text) == (given != built)
    assert given == built or f"as --hybrid-layer-pattern {built} does" in caplog.text


def test_a_pattern_with_r_needs_no_token_mixer():
    parser = add_mom_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    for name in ("--hybrid-layer-pattern", "--hybrid-override-pattern"):
        for words, mixer in ([name, "R-"], "mom"), ([name, "G-"], None), ([f"{name}=R-*-"], "mom"):
            args = parser.parse_args(words)
            use_present_name(args)
            choose_token_mixer(args)
            assert args.token_mixer == mixer
            assert asks_for_memories(words) == (mixer == "mom")


@pytest.mark.parametrize("packed", ["--sft", "--dataloader-inter-document-masking"])
def test_micro_batches_of_packed_rows_over_stages_send_their_shapes(packed):
    several = [packed, "--pipeline-model-parallel-size", 2, "--micro-batch-size", 2]
    args = check(*several)
    send_shapes(args)
    assert args.variable_seq_lengths and args.moe_token_dispatcher_type == "alltoall"
    one = check(packed, "--pipeline-model-parallel-size", 2, "--micro-batch-size", 1)
    send_shapes(one)
    assert not getattr(one, "variable_seq_lengths", False) and one.moe_token_dispatcher_type == "allgather"
    with pytest.raises(ValueError, match="transformer_config.py:2644.*use --moe-token-dispatcher-type alltoall"):
        send_shapes(check(*several, "--num-experts", 4))


@pytest.mark.parametrize("name", ["--mom-kernels", "--mom-backend"])
def test_the_kernels_have_two_names_on_the_command_line(name):
    parser = add_mom_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    assert parser.parse_args([name, "torch"]).mom_kernels == "torch"
    assert not hasattr(parser.parse_args([name, "torch"]), "mom_backend")


@pytest.mark.parametrize("name", ["mom_kernels", "mom_backend"])
@pytest.mark.parametrize(("given", "restored"), [([], "torch"), (["--mom-kernels", "triton"], "triton")])
def test_the_kernels_come_back_from_checkpoints_old_and_new(name, given, restored):
    args = add_mom_arguments(argparse.ArgumentParser()).parse_args(given)
    saved = argparse.Namespace(token_mixer="mom", mom_topk=3, layernorm_epsilon=1e-6, **{name: "torch"})
    restore_from_checkpoint(args, saved)
    assert args.mom_kernels == restored
    assert (args.token_mixer, args.mom_topk, args.layernorm_epsilon) == ("mom", 3, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "left", "lines"),
    [
        (
            ["--multi-latent-attention", "--rope-type", "yarn", "--mla-down-proj-fusion"],
            (False, None, False, None),
            ["--multi-latent-attention and its options have nothing to do: every layer is MoM"],
        ),
        (
            ["--multi-latent-attention", "--rope-type", "yarn", "--linear-attention-freq", 2],
            (True, None, False, "yarn"),
            [],
        ),
        (["--multi-latent-attention", "--mtp-num-layers", 1], (True, None, False, None), []),
        (
            ["--multi-latent-attention", "--experimental-attention-variant", "dsa"],
            (False, None, False, None),
            [
                "--experimental-attention-variant dsa has nothing to do: every layer is MoM",
                "--multi-latent-attention and its options have nothing to do: every layer is MoM",
            ],
        ),
        (
            ["--experimental-attention-variant", "gated_delta_net", "--linear-attention-freq", 4],
            (False, None, False, None),
            ["--experimental-attention-variant gated_delta_net has nothing to do: MoM layers take the place of the "
             "gated delta net"],
        ),
    ],
)  # fmt: skip
def test_attention_options_that_have_nothing_to_do_are_named(arguments, left, lines, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("linear_moe"), "propagate", True)
    args = check(*arguments)
    with caplog.at_level("INFO", logger="linear_moe"):
        drop_unused_attention(args)
    assert caplog.messages == lines
    names = ("multi_latent_attention", "experimental_attention_variant", "mla_down_proj_fusion", "rope_type")
    assert tuple(getattr(args, name) for name in names) == left


def test_a_rule_alone_fills_what_a_router_would_need():
    args = check("--token-mixer", "gla")
    assert (args.mom_rule, args.mom_num_memories, args.mom_topk, args.mom_shared_memory) == ("gla", 0, 0, True)
    fill_mom_arguments(args)  # a second time changes nothing
    with pytest.raises(ValueError, match="--mom-topk 2: --token-mixer gla is one memory of that rule alone: leave"):
        check("--token-mixer", "gla", "--mom-topk", 2)
    with pytest.raises(ValueError, match="--token-mixer gla does not work with --spec some.module some_spec"):
        check("--token-mixer", "gla", "--spec", "some.module", "some_spec")


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (["--token-mixer", "gla"], ["--token-mixer", "gated_deltanet"], "written with --token-mixer gated_deltanet"),
        (["--token-mixer", "gla"], [], "written with --token-mixer mom, the command line says gla"),
        (["--mom-rule", "gla"], [], "written with --mom-rule gated_deltanet, the command line says gla"),
    ],
)
def test_a_checkpoint_of_another_rule_is_refused(mine, theirs, message):
    with pytest.raises(ValueError, match=message):
        compare_with_checkpoint(check(*mine), check(*theirs))


def test_a_checkpoint_of_a_rule_alone_says_the_rule():
    args = argparse.Namespace(token_mixer=None, layernorm_epsilon=1e-5)
    saved = check("--token-mixer", "gla")
    saved.layernorm_epsilon = 1e-6
    restore_from_checkpoint(args, saved)
    fill_mom_arguments(args)
    assert (args.token_mixer, args.mom_rule, args.mom_num_memories) == ("gla", "gla", 0)
    assert args.layernorm_epsilon == 1e-6


def test_megatron_fsdps_checkpoints_load_at_their_tensor_parallel_size():
    args, saved = check("--use-megatron-fsdp", "--tensor-model-parallel-size", 2), check("--use-megatron-fsdp")
    compare_with_checkpoint(args, args)
    with pytest.raises(
        ValueError, match="--tensor-model-parallel-size 2: the checkpoint was written with 1, and Megat"
    ):
        compare_with_checkpoint(args, saved)


def test_fsdp_and_offloading_are_left_out_on_a_machine_without_a_gpu(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("linear_moe"), "propagate", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fsdp = ["--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor", "--cpu-offloading-num-layers", 2]
    args = check(*fsdp, "--transformer-impl", "local", "--distributed-backend", "gloo")
    with caplog.at_level("INFO", logger="linear_moe"):
        use_counterparts(args)
    assert (args.use_megatron_fsdp, args.ckpt_format, args.cpu_offloading_num_layers) == (False, "torch_dist", 0)
    assert caplog.messages == [
        "no GPU: --ckpt-format fsdp_dtensor becomes torch_dist",
        "no GPU: --cpu-offloading-num-layers 2 is left out",
        "no GPU: --use-megatron-fsdp is left out",
    ]


FOR_GPUS = [
    *"--transformer-impl transformer_engine --distributed-backend nccl --fp8-format hybrid --moe-grouped-gemm".split(),
    *"--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec --cuda-graph-impl local".split(),
]


@pytest.mark.parametrize(("gpu", "mixer"), [(False, "mom"), (False, "attention"), (True, "mom")])
def test_a_command_for_gpus_gets_its_counterparts_on_a_machine_without(gpu, mixer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("linear_moe"), "propagate", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    parser = add_mom_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    args = parser.parse_args([*FOR_GPUS, "--token-mixer", mixer])
    before = dict(vars(args))
    with caplog.at_level("INFO", logger="linear_moe"):
        use_counterparts(args)
    if gpu:
        assert vars(args) == before and not caplog.messages
        return
    values = (args.transformer_impl, args.distributed_backend, args.fp8, args.moe_grouped_gemm, args.cuda_graph_impl)
    assert values == ("local", "gloo", None, False, "none")
    assert caplog.messages[:5] == [
        "no GPU: --distributed-backend nccl becomes gloo",
        "no GPU: --transformer-impl transformer_engine becomes local",
        "no GPU: --cuda-graph-impl local becomes none",
        "no GPU: --fp8-format hybrid is left out",
        "no GPU: --moe-grouped-gemm is left out",
    ]
    assert (args.spec is None) == (len(caplog.messages) == 6) == (mixer == "mom")


def test_what_needs_an_option_that_is_left_out_is_left_out_too(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    parser = add_mom_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    words = "--moe-grouped-gemm --recompute-modules moe_act mlp --use-megatron-fsdp --fsdp-manual-registration"
    args = parser.parse_args([*words.split(), "--token-mixer", "mom"])
    use_counterparts(args)
    assert args.recompute_modules == ["mlp"] and not args.fsdp_manual_registration
