"""Combinations of arguments that would train another model than the one asked for."""

import argparse
import re

import pytest
from megatron.training.arguments import add_megatron_arguments

from linear_moe.entry.arguments import add_mom_arguments, check_context_parallel, check_model, fill_mom_arguments


def check(*arguments):
    parser = add_mom_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    args = parser.parse_args(["--token-mixer", "mom", *map(str, arguments)])
    fill_mom_arguments(args)
    check_model(args)
    check_context_parallel(args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "some.module", "some_spec"], "does not work with --spec some.module some_spec: leave it out"),
        (["--hybrid-layer-pattern", "M-*-"], "--hybrid-layer-pattern M-*-: write G where a MoM layer is to be"),
        (["--multi-latent-attention"], "does not work with --multi-latent-attention"),
        (["--context-parallel-size", 2, "--sft"], "does not work with --sft and --context-parallel-size 2"),
        (
            ["--context-parallel-size", 2, "--dataloader-inter-document-masking", "--linear-attention-freq", 2],
            "--context-parallel-size 2 and softmax attention layers: these want every document cut by itself",
        ),
        (
            ["--context-parallel-size", 2, "--dataloader-inter-document-masking", "--mtp-num-layers", 1],
            "make every layer MoM, without --mtp-num-layers",
        ),
        (["--use-megatron-fsdp"], "does not work with --use-megatron-fsdp: use --use-distributed-optimizer"),
        (["--use-torch-fsdp2"], "does not work with --use-torch-fsdp2: use --use-distributed-optimizer"),
        (["--cpu-offloading-num-layers", 1], "does not work with --cpu-offloading-num-layers: use --fine-grained"),
        (["--reset-position-ids"], "does not work with --reset-position-ids: memories know documents by"),
        (["--reset-attention-mask"], "does not work with --reset-attention-mask: memories know documents by"),
        (
            ["--dataloader-inter-document-masking", "--pipeline-model-parallel-size", 2, "--micro-batch-size", 2],
            "stages take packed rows one by one: --micro-batch-size 1",
        ),
        (
            ["--cuda-graph-impl", "local", "--dataloader-inter-document-masking"],
            "does not work with CUDA graphs of packed documents",
        ),
    ],
)
def test_refuses(arguments, message):
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
        ["--reset-position-ids", "--dataloader-inter-document-masking"],
        ["--dataloader-inter-document-masking", "--pipeline-model-parallel-size", 2, "--micro-batch-size", 1],
    ],
)
def test_takes(arguments):
    check(*arguments)
