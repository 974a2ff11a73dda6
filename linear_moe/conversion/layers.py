"""Which layers a model has: token mixer and MLP of each, from a checkpoint's tensors or a hybrid pattern, and back."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass

from linear_moe.conversion.files import ConversionError
from linear_moe.pattern import GATED_DELTA_NET, MEMORY, PREDICTION, STAGE
from mom_layers.hf.configuration_mom import MomConfig

MIXERS = {MEMORY: "mom", "*": "attention", "+": "latent"}
MLPS = {"-": "dense", "E": "moe"}
"""Symbols of a hybrid pattern, and what they stand for."""


@dataclass(frozen=True)
class LayerKinds:
    """The layers of a model, those of multi-token prediction last.

    Attributes:
        mixers: "mom", "attention" (softmax attention) or "latent" (multi-latent attention), for each layer.
        mlps: "dense" or "moe", for each layer.
        num_predictions: layers of multi-token prediction.
        hybrid: whether Megatron's model is a HybridModel.
    """

    mixers: tuple[str, ...]
    mlps: tuple[str, ...]
    num_predictions: int = 0
    hybrid: bool = False

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, a token mixer and an MLP each."""
        return len(self.mixers) - self.num_predictions

    def of(self, kind: str) -> list[int]:
        """Indices of the layers with a token mixer or an MLP of this kind."""
        return [i for i, kinds in enumerate(zip(self.mixers, self.mlps, strict=True)) if kind in kinds]

    @property
    def num_mom_layers(self) -> int:
        """Layers of the decoder whose token mixer is MoM."""
        return self.mixers[: self.num_layers].count("mom")

    def pattern(self) -> str:
        """The layers as a hybrid pattern. Megatron refuses a pipeline stage with softmax attention of both kinds: a new
        stage begins before the first layer of the other kind."""
        mixer, mlp = ({word: letter for letter, word in table.items()} for table in (MIXERS, MLPS))
        letters = [mixer[one] + mlp[two] for one, two in zip(self.mixers, self.mlps, strict=True)]
        main, softmax = "", None
        for pair, kind in zip(letters[: self.num_layers], self.mixers, strict=False):
            if kind != "mom" and softmax not in (None, kind):
                main += STAGE
            softmax = softmax if kind == "mom" else kind
            main += pair
        return PREDICTION.join([main, *letters[self.num_layers :]])

    def fits_gpt(self) -> bool:
        """Whether a GPT model of Megatron can have these layers: softmax layers of one kind, and predictions with
        softmax attention and the MLP of the last layer."""
        softmax, predicted = set(self.mixers) - {"mom"}, slice(self.num_layers, None)
        last = {(mixer, mlp) for mixer, mlp in zip(self.mixers[predicted], self.mlps[predicted], strict=True)}
        return len(softmax) < 2 and all(mixer != "mom" and mlp == self.mlps[self.num_layers - 1] for mixer, mlp in last)


def kinds_of_config(config: MomConfig, *, hybrid: bool = False) -> LayerKinds:
    """The layers of a Hugging Face model."""
    mixers = ["mom"] * config.num_all_layers
    for spec in config.attention_specs():
        for layer in spec.layers:
            mixers[layer] = "latent" if spec.latent else "attention"
    moe = config.moe_spec()
    mlps = ["moe" if moe and layer in moe.layers else "dense" for layer in range(config.num_all_layers)]
    kinds = LayerKinds(tuple(mixers), tuple(mlps), config.num_nextn_predict_layers)
    return LayerKinds(kinds.mixers, kinds.mlps, kinds.num_predictions, hybrid or not kinds.fits_gpt())


def kinds_of_pattern(pattern: str, prediction: str | None, args: Namespace) -> LayerKinds:
    """The layers of a HybridModel.

    Args:
        pattern: of --hybrid-layer-pattern.
        prediction: of the older --mtp-hybrid-override-pattern.
        args: of the checkpoint.

    Raises ConversionError for layers that are not pairs of a token mixer and an MLP of the Hugging Face format.
    """
    depths = getattr(args, "mtp_num_layers", None) or 0
    if prediction and PREDICTION not in pattern:
        pattern += (PREDICTION + prediction) * depths
    mixers = MIXERS if MEMORY in pattern else MIXERS | {GATED_DELTA_NET: "mom"}  # the earlier symbol of MoM layers
    kinds, main, found = [], True, 0
    for part in pattern.split(PREDICTION):
        letters = part.replace(STAGE, "")
        pairs = [letters[i : i + 2] for i in range(0, len(letters), 2)]
        bad = next((pair for pair in pairs if pair[:1] not in mixers or pair[1:] not in MLPS), None)
        if bad is not None or (not main and len(pairs) != 1):
            raise ConversionError(
                f"the Hugging Face format cannot hold --hybrid-layer-pattern {pattern}: its layers are pairs of a "
                f"token mixer, {' or '.join(mixers)}, and an MLP, {' or '.join(MLPS)}"
                + (f", and {bad} is none" if bad is not None else ", and multi-token prediction has one pair")
            )
        kinds += [(mixers[pair[0]], MLPS[pair[1]]) for pair in pairs]
        found += not main
        main = False
    return LayerKinds(tuple(k[0] for k in kinds), tuple(k[1] for k in kinds), found, hybrid=True)


def kinds_of_tensors(names: Iterable[str], num_layers: int) -> LayerKinds:
    """The layers of a GPT model of Megatron, from the names in its checkpoint."""
    names = set(names)
    predictions = {int(found[1]) for name in names if (found := re.match(r"mtp\.layers\.(\d+)\.", name))}
    mixers, mlps = [], []
    for layer in range(num_layers + len(predictions)):
        own = (
            f"decoder.layers.{layer}." if layer < num_layers else f"mtp.layers.{layer - num_layers}.transformer_layer."
        )
        prefixes = (own, "decoder.layers.") if layer < num_layers else (own,)

        def has(name: str, prefixes=prefixes) -> bool:
            return any(prefix + name in names for prefix in prefixes)

        softmax = "attention" if has("self_attention.linear_qkv.weight") else "mom"
        mixers.append("latent" if has("self_attention.linear_kv_down_proj.weight") else softmax)
        mlps.append("moe" if has("mlp.router.weight") else "dense")
    return LayerKinds(tuple(mixers), tuple(mlps), len(predictions))
