"""Models of Hugging Face folders, loaded only when every tensor is there, in its shape, whole and finite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from linear_moe.conversion.config import OLDER_TYPE, layout_of, parse_config
from linear_moe.conversion.digests import listed
from linear_moe.conversion.files import ConversionError, read_json
from linear_moe.conversion.fla_types import FlaWeights, content_from_fla, is_fla_type
from linear_moe.conversion.names import Entry, Layout, entries
from linear_moe.conversion.weights import Weights, check_finite
from mom_layers.hf import MomForCausalLM
from mom_layers.hf.configuration_mom import MomConfig

EMBEDDING, TIED_WEIGHT = "model.embeddings.weight", "lm_head.weight"
MODEL_TYPES = ("mom", OLDER_TYPE)
UNUSED_WEIGHT = ".attn.D"
"""A parameter of OpenSparseLLMs' layers that computes nothing."""


def read_model(folder: Path) -> tuple[MomConfig, Weights, list[Entry]]:
    """A folder's configuration, its weights, and the table of the tensors that the configuration describes; all as of
    a "mom" model where the folder is of one of FLA's types.

    The sizes in the configuration are compared with the tensors' shapes here. No tensor is read, and none is made.

    Raises ConversionError for a folder that is not a MoM model's, or whose weights are not what config.json describes.
    """
    content = read_json(folder / "config.json")
    theirs = content.get("model_type")
    if is_fla_type(theirs):
        content = content_from_fla(content)
    elif theirs not in MODEL_TYPES:
        parse_config(content, set())
    weights = Weights(folder)
    if is_fla_type(theirs):
        weights = FlaWeights(weights, theirs, content["num_heads"])
    config = parse_config(content, weights.names())
    check_counts(_counts(config), weights)
    layout = layout_of(config)
    table = list(entries(layout))
    check_complete(weights, table, layout)
    return config, weights, table


def _counts(config: MomConfig) -> dict[str, int]:
    """How many parts of a kind, each with tensors of its own, a model has."""
    counts = {"num_hidden_layers": config.num_hidden_layers}
    if (moe := config.moe_spec()) is not None:
        counts["num_experts"] = moe.num_experts * len(moe.layers)
    if config.num_mom_layers and config.num_memories and not config.single_kv_proj:
        counts["num_memories"] = config.num_memories
    return counts


def check_counts(counts: dict[str, object], weights: Weights) -> None:
    """Raises ConversionError for more layers, memories or experts than there are tensors: the table of all names could
    fill the computer's memory."""
    held = len(weights.names())
    for key, count in counts.items():
        if isinstance(count, int) and count > held:
            raise ConversionError(f"config.json says {key} {count}, and the weights have only {held} tensors in all")


def check_complete(weights: Weights, table: Sequence[Entry], layout: Layout) -> None:
    """Raises ConversionError unless the weights are the table's, in their shapes."""
    expected = {name: shape for entry in table for name, shape in entry.hf}
    found = weights.names() - ({TIED_WEIGHT} if layout.tied else set())
    if missing := expected.keys() - found:
        raise ConversionError(f"the weights lack {listed(missing)}, which config.json describes")
    if unknown := {name for name in found - expected.keys() if not name.endswith(UNUSED_WEIGHT)}:
        raise ConversionError(f"the weights have {listed(unknown)}, which config.json does not describe")
    for name, shape in expected.items():
        actual = tuple(weights.describe(name).shape)
        if actual != shape:
            raise ConversionError(f"{name} is {list(actual)}, and config.json makes it {list(shape)}")
    if TIED_WEIGHT in weights.names() - found:
        tied, embedding = weights.read(TIED_WEIGHT), weights.read(EMBEDDING)
        if tied.dtype != embedding.dtype or not torch.equal(tied, embedding):
            raise ConversionError(
                f"{TIED_WEIGHT} differs from {EMBEDDING}, and config.json says tie_word_embeddings: true"
            )
    for entry in table:
        types = {weights.describe(name).dtype for name in entry.hf_names}
        if len(types) > 1:
            raise ConversionError(f"{', '.join(entry.hf_names)} must be of one type, not {', '.join(map(str, types))}")


def load_model(
    folder: Path, dtype: torch.dtype | None = None, loader: type = MomForCausalLM, **options
) -> PreTrainedModel:
    """A folder's model in evaluation mode, on the CPU.

    Args:
        folder: in the Hugging Face format. A model that is not a MoM model is loaded too, where ``loader`` can.
        dtype: to convert the weights to; the type in config.json when None.
        loader: the class whose ``from_pretrained`` loads the model.
        options: of ``from_pretrained``.

    Raises:
        ConversionError: tensors are missing, unexpected, of another shape, not finite, or not those in digests.json.
    """
    if loader is MomForCausalLM or read_json(folder / "config.json").get("model_type") in MODEL_TYPES:
        config, weights, _ = read_model(folder)
        if loader is not MomForCausalLM and read_json(folder / "config.json").get("model_type") == OLDER_TYPE:
            loader, options = MomForCausalLM, {}
        for name in weights.names():
            weights.read(name)  # compares the digest
        if not options.get("trust_remote_code"):
            options["config"] = config  # of an older file, completed from the tensors
    try:
        model, report = loader.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **options)
    except OSError:
        raise
    except Exception as error:  # any of transformers' own
        if "trust_remote_code" in str(error):
            raise
        raise ConversionError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    for kind, names in report.items():
        if names:  # missing_keys, unexpected_keys, mismatched_keys, error_msgs
            raise ConversionError(f"{folder} does not fit its config.json: {kind} {listed(map(str, names))}")
    for name, tensor in model.state_dict().items():
        check_finite(name, tensor, f"in {tensor.dtype}".replace("torch.", ""))
    return model.eval()
