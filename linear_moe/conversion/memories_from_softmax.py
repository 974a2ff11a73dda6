"""MoM layers that start from a Transformer's softmax layers.

What a layer has of the Transformer: queries from its queries, the keys and values of every memory from its keys and
values (those of a group repeated for each query head), the output projection as it is. What is new starts gently:
convolutions pass the last token, the state decays slowly, beta is 1/2, the router has small weights, and the output
gate is closed: SiLU(0) = 0, so that the new layer adds nothing to the hidden state. The slope of SiLU at 0 is 1/2: the
gate opens from the first step of training on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from linear_moe.conversion.config import layout_of
from linear_moe.conversion.files import ConversionError
from linear_moe.conversion.names import entries
from linear_moe.conversion.transformer_folders import Tensors
from mom_layers.hf.attention_config import AttentionSpec
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.settings import MixerSettings

ROUTER_STD = 1e-3
LINEAR_PART = 0.25
"""Size of a convolution's output for a usual token: SiLU is close to linear there, so that keys keep their signs."""
FASTEST, SLOWEST = 1e-2, 1e-3
"""Log decays with which the heads of gated_deltanet start: memories of about a hundred and a thousand tokens."""


@dataclass(frozen=True)
class Memories:
    """Choices for the new layers: fields of `MixerSettings` that no Transformer fixes."""

    num_memories: int = 4
    topk: int = 2
    shared_memory: bool = True
    conv_kernel: int = 4
    rule: str = "gated_deltanet"


def chosen_layers(softmax: str | None, memories: str | None, num_layers: int) -> list[int]:
    """Indices of the layers that stay softmax attention.

    Args:
        softmax: of --softmax-layers: all, none, every-N, or indices with commas.
        memories: of --mom-layers: the layers that do not stay.

    Raises ConversionError for a word that is none of these, and for a layer that does not exist.
    """
    option, given = ("--softmax-layers", softmax) if memories is None else ("--mom-layers", memories)
    given = "every-4" if given is None else given
    every = given.removeprefix("every-")
    if given in ("all", "none"):
        found = list(range(num_layers)) if given == "all" else []
    elif given.startswith("every-") and every.isdecimal() and int(every) > 0:
        found = [layer for layer in range(num_layers) if (layer + 1) % int(every) == 0]
    elif all(word.strip().isdecimal() for word in given.split(",")):
        found = sorted({int(word) for word in given.split(",")})
        if found[-1] >= num_layers:
            raise ConversionError(f"{option} {given}: the model has the layers 0 to {num_layers - 1}")
    else:
        raise ConversionError(f"{option} {given}: expected all, none, every-N, or numbers of layers such as 3,7,11")
    return found if memories is None else [layer for layer in range(num_layers) if layer not in found]


def with_memories(
    config: MomConfig, tensors: Tensors, softmax_layers: Sequence[int], memories: Memories, seed: int = 0
) -> tuple[MomConfig, Tensors]:
    """A model whose layers are softmax attention, with MoM layers in the place of all but some of them.

    Args:
        config, tensors: of the model. The tensors of the result are computed when they are read.
        softmax_layers: indices of the layers that stay.
        memories: choices for the new layers.
        seed: of the router's weights.

    Raises ConversionError for a model that has memories, or whose softmax layers no MoM layer can start from.
    """
    if config.num_mom_layers:
        raise ConversionError("the model has MoM layers already: leave out --softmax-layers and --mom-layers")
    new = [layer for layer in range(config.num_hidden_layers) if layer not in softmax_layers]
    if not new:
        return config, tensors
    specs = config.attention_specs()
    found = {replace(spec, layers=()) for spec in specs if set(spec.layers) & set(new)}
    if len(found) > 1 or (spec := found.pop()).latent:
        raise ConversionError(
            "MoM layers start from softmax layers of one kind, and not from multi-latent attention: name the layers "
            "that stay softmax with --softmax-layers"
        )
    settings = _settings(spec, memories, config)
    content = config.to_dict() | {
        "num_heads": settings.num_heads,
        "head_dim": settings.head_dim,
        "expand_v": 1.0,
        "num_memories": settings.num_memories,
        "topk": settings.topk,
        "shared_mem": settings.shared_memory,
        "conv_size": settings.conv_kernel,
        "mom_backend": settings.rule,
        "attn": _remaining(config.attn, set(new)),
    }
    changed = MomConfig(**content)
    return changed, _StartedTensors(changed, tensors, set(new), spec, settings, seed)


def _remaining(attn: dict | list, new: set[int]) -> dict | list | None:
    """The `attn` entry without some layers."""
    every = [attn] if isinstance(attn, dict) else attn
    entries = [entry | {"layers": [layer for layer in entry["layers"] if layer not in new]} for entry in every]
    entries = [entry for entry in entries if entry["layers"]]
    return entries if len(entries) > 1 else next(iter(entries), None)


def _settings(spec: AttentionSpec, memories: Memories, config: MomConfig) -> MixerSettings:
    try:
        settings = MixerSettings(
            num_heads=spec.num_heads, head_dim=spec.head_dim, norm_eps=config.norm_eps, **vars(memories)
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(str(error)) from error
    rule = settings.update_rule
    if not settings.has_kernels():
        raise ConversionError(
            f"the Transformer's heads have size {spec.head_dim}, and the kernels of --mom-rule {memories.rule} take "
            f"{', '.join(map(str, rule.kernel_sizes(True)))}: --softmax-layers all keeps every layer as it is"
        )
    if rule.key_heads is not None:
        raise ConversionError(
            f"--mom-rule {memories.rule} has {rule.key_heads} key for all heads, and the Transformer a key for each: "
            "choose a rule with a key for each head, such as gated_deltanet"
        )
    return settings


class _StartedTensors:
    """The tensors of a model with new MoM layers: the Transformer's, and what :class:`_Starts` computes from them."""

    def __init__(
        self, config, tensors: Tensors, new: set[int], spec: AttentionSpec, settings: MixerSettings, seed: int
    ):
        self._source = tensors
        self._starts: dict[str, tuple[_Starts, str, tuple[int, ...], bool]] = {}
        self._names: set[str] = set()
        count = config.num_hidden_layers
        layers = {layer: _Starts(tensors, layer, count, spec, settings, seed + layer) for layer in new}
        for entry in entries(layout_of(config)):
            for name, shape in entry.hf:
                self._names.add(name)
                own = f"model.layers.{entry.layer}.attn."
                if entry.layer in new and name.startswith(own):
                    self._starts[name] = layers[entry.layer], name.removeprefix(own), shape, entry.row.exact

    def names(self) -> set[str]:
        return self._names

    def describe(self, name: str) -> torch.Tensor:
        if name not in self._starts:
            return self._source.describe(name)
        start, _, shape, exact = self._starts[name]
        return torch.empty(shape, dtype=torch.float32 if exact else start.dtype, device="meta")

    def read(self, name: str) -> torch.Tensor:
        if name not in self._starts:
            return self._source.read(name)
        start, own, shape, exact = self._starts[name]
        tensor = start.tensor(own, shape).to(torch.float32 if exact else start.dtype)
        assert tensor.shape == shape, (name, tensor.shape, shape)
        return tensor.contiguous()


class _Starts:
    """The tensors with which one MoM layer starts, from a softmax layer.

    Args:
        tensors: of the Transformer.
        layer, num_layers: number of the layer, from 0, and of the model's layers.
        spec: of the softmax layer.
        settings: of the MoM layer.
        seed: of the tensors that are drawn.
    """

    def __init__(
        self, tensors: Tensors, layer: int, num_layers: int, spec: AttentionSpec, settings: MixerSettings, seed: int
    ):
        prefix = f"model.layers.{layer}."
        self._tensors, self._prefix, self._place = tensors, prefix, (layer, num_layers)
        self._spec, self._settings, self._seed = spec, settings, seed
        self._rule = settings.update_rule
        self._letters = {gate.hf: gate for gate in self._rule.raw_gates}
        self.dtype = tensors.describe(f"{prefix}attn.q_proj.weight").dtype
        self._parameters: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor that the layer calls ``name``."""
        kind = name.partition(".")[0].removesuffix("_proj").removeprefix("shared_")
        if name in self._rule.parameter_names:
            return self._rule_parameter(name)
        if kind in ("q", "k", "v"):
            return self._heads(kind)
        if kind.endswith("_conv1d"):
            return self._convolution(kind.removesuffix("_conv1d"), shape)
        if name == "o_proj.weight":
            return self._read("attn.o_proj.weight")
        if name == "o_norm.weight":
            return torch.ones(shape)
        if name == "g_proj.weight" or kind in self._letters and self._rule.name in STARTS:
            return torch.zeros(shape)
        return self._drawn(name, shape, ROUTER_STD if name == "gate.weight" else 0.02)

    def _read(self, name: str) -> torch.Tensor:
        return self._tensors.read(self._prefix + name)

    def _heads(self, letter: str) -> torch.Tensor:
        """The projection of queries, keys or values [H K, D], a key and value for every query head. A norm over heads
        before the dot product is part of the projection: its length goes away, its weight stays."""
        weight = self._read(f"attn.{letter}_proj.weight")
        size, count = self._spec.head_dim, self._spec.num_heads
        heads = weight.unflatten(0, (-1, size))
        if self._spec.qk_norm and letter != "v":
            norm = self._read(f"attn.{letter}_norm.weight").float()
            heads = (heads.float() * norm[:, None]).to(weight.dtype)
        return heads.repeat_interleave(count // heads.shape[0], dim=0).flatten(0, 1)

    def _convolution(self, letter: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The last tap alone, [H K, 1, W]: one size for each head, with which SiLU sees numbers around LINEAR_PART.
        Queries and keys lose their length afterwards, and the values' is that of a normed output."""
        projection = self._heads(letter).float() * self._read("attn_norm.weight").float()
        usual = projection.unflatten(0, (self._spec.num_heads, -1)).square().sum(-1).mean(1).sqrt()  # [H]
        taps = torch.zeros(shape)
        sizes = (LINEAR_PART / usual.clamp(min=1e-6)).clamp(max=1.0)
        taps[:, 0, -1] = sizes.repeat_interleave(self._spec.head_dim)
        return taps

    def _rule_parameter(self, name: str) -> torch.Tensor:
        if not self._parameters:
            heads, size = self._settings.num_heads, self._settings.head_dim
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                self._parameters = self._rule.parameters_of_layer(heads, size, *self._place)
            self._parameters |= STARTS.get(self._rule.name, _no_parameters)(heads, size)
        return self._parameters[name]

    def _drawn(self, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1000 + sum(name.encode()))
        return torch.randn(shape, generator=generator) * std


def _no_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    return {}


def _slow_decay(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """Log decays -softplus(dt_bias) from FASTEST to SLOWEST over the heads."""
    return {"A_log": torch.zeros(num_heads), "dt_bias": _steps(num_heads)}


def _slow_key_channels(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """The same over the key channels of every head."""
    return {"A_log": torch.zeros(num_heads), "dt_bias": _steps(head_dim).expand(num_heads, -1).clone()}


def _steps(count: int) -> torch.Tensor:
    step = torch.exp(torch.linspace(math.log(FASTEST), math.log(SLOWEST), count))
    return torch.log(torch.expm1(step))


def _slow_channels(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """Log decays logsigmoid(bias) / 16 from about -0.02 to -0.0004 over the channels of a head."""
    return {"decay_bias": torch.linspace(1.0, 5.0, head_dim).expand(num_heads, -1).clone()}


STARTS: dict[str, Callable[[int, int], dict[str, torch.Tensor]]] = {
    "gated_deltanet": _slow_decay,
    "kda": _slow_key_channels,
    "gated_deltanet2": _slow_key_channels,
    "gla": _slow_channels,
    "deltanet": _no_parameters,
}
"""Rules whose raw gates start at zero (beta at 1/2, the decay as the rule's parameters say), and the parameters with
which the state decays slowly. The gates and parameters of other rules start as those of a new layer."""
