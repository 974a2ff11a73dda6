"""Converts a Megatron checkpoint of a Mixture-of-Memories model to the Hugging Face format.

    python tools/convert_to_hf.py --load runs/demo/checkpoints --save runs/demo/hf
    python tools/convert_to_hf.py --load CKPT --save DIR --iteration 1000 --dtype bfloat16 --verify

Reads torch_dist checkpoints of any parallel layout, in one process and without a GPU; the model's arguments come from
the checkpoint. Writes safetensors, digests.json, config.json, generation_config.json, the tokenizer, a model card, and
the code that `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` runs. DIR appears only when it is
complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import DTYPES, not_negative, path, size, text, whole


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--load", type=path, required=True, help="folder that Megatron saved to, or one checkpoint in it"
    )
    parser.add_argument("--save", type=path, required=True, help="new folder")
    parser.add_argument("--iteration", type=whole(0), help="checkpoint to convert [the latest]")
    parser.add_argument("--tokenizer", type=path, help="folder of the tokenizer [the tokenizer of the training]")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights [as stored]; A_log and dt_bias stay float32"
    )
    parser.add_argument(
        "--model-type", type=text, default="mom",
        help="model_type of config.json: mom, or a type of flash-linear-attention for a model of one memory: "
        "gated_deltanet, gla, delta_net [mom]",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", type=size, default="5GB", help="largest size of a file of weights [5GB]")
    parser.add_argument("--overwrite", action="store_true", help="replace --save if it is an earlier export")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="run whatever code the checkpoint's files name, as PyTorch does"
    )
    card = parser.add_argument_group("model card")
    card.add_argument("--name", type=text, metavar="OWNER/MODEL", help="name of the model on the Hugging Face hub")
    card.add_argument("--license", type=text, metavar="ID", help="license of the weights, such as apache-2.0")
    card.add_argument(
        "--language", type=text, nargs="+", default=[], metavar="CODE", help="languages of the data, such as en"
    )
    card.add_argument("--datasets", type=text, nargs="+", default=[], metavar="NAME", help="data sets on the hub")
    verify = parser.add_argument_group("check")
    verify.add_argument(
        "--verify", action="store_true", help="run one batch through both models in float32 and compare"
    )
    verify.add_argument(
        "--verify-bound", type=not_negative, default=1e-4, help="largest difference relative to the logits [1e-4]"
    )
    verify.add_argument("--verify-tokens", type=whole(1), default=128, help="length of the batch's sequences [128]")
    parsed = parser.parse_args(argv)
    if parsed.verify and parsed.model_type != "mom":
        parser.error(
            f"--verify needs --model-type mom: flash-linear-attention runs a model of type {parsed.model_type}"
        )
    return parsed
