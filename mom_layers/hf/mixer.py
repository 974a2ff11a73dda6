"""Layers under the parameter names of the Hugging Face format, one matrix a memory and piece of the projection: MoM's,
and a layer of one memory, whose names are those of FLA's GatedDeltaNet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from mom_layers.hf.attention_and_mlp import HeadNorm
from mom_layers.hf.cache import MemoryLayer
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.projections import (
    MemoryLinear,
    MemoryProjections,
    NoConvolution,
    OneMatrix,
    ShortConvolution,
    is_plain,
)
from mom_layers.hf.sequence import TokenSequence
from mom_layers.mixing import MemoryParameters, TokenMaps, has_step, mix_tokens, step_tokens
from mom_layers.one_memory import mix_alone, step_alone
from mom_layers.recur.rules import kept_exact, warn_without_kernels


class RecurrentAttention(nn.Module):
    """What both layers have: convolutions, the rule's parameters, norm, output gate and output projection.

    A layer adds its projections, ``projection``, ``_mix`` and ``_step``.
    """

    def __init__(self, config: MomConfig, layer_idx: int = 0):
        super().__init__()
        self.settings = replace(config.mixer_settings(), layer=layer_idx, num_layers=config.num_all_layers)
        self.rule = self.settings.update_rule
        warn_without_kernels(self.rule)
        self.hidden_size = config.hidden_size
        # The format's letter of each piece of a projection: "k" is projected by k_proj.M and shared_k, or by k_proj.
        self.letters = ["k", "v", *(gate.hf for gate in self.rule.raw_gates)]
        self.kernels = "auto" if self.settings.has_kernels() else "torch"
        self._one_matrix = OneMatrix()

    def _make_shared_modules(self) -> None:
        hidden, keys, values = self.hidden_size, self.settings.key_width, self.settings.value_width
        for name, channels in (("q", keys), ("k", keys), ("v", values)):
            if self.settings.conv_kernel > 1:
                setattr(self, f"{name}_conv1d", ShortConvolution(channels, self.settings.conv_kernel))
            else:  # no convolution: one fixed tap
                setattr(self, f"{name}_conv1d", NoConvolution(channels))
        for name, value in self.settings.initial_parameters().items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=name not in self.rule.fixed_parameters))
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.o_norm = HeadNorm(self.settings.value_dim, self.settings.norm_eps)
        self.o_proj = nn.Linear(values, hidden, bias=False)

    def projection(self, dtype: torch.dtype) -> torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None:
        """What the kernels take as ``MemoryParameters.projection``."""
        raise NotImplementedError

    def forward(
        self, x: torch.Tensor, sequence: TokenSequence, past: MemoryLayer | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] follows the tokens that ``past`` has seen. Afterwards ``past`` holds the state after x.

        Returns out [B, T, D] and the router's logits [B * T, M], None without a router. Padding reaches no memory, and
        its outputs are zero.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        kernels = "torch" if x.dtype == torch.float64 else self.kernels
        parameters = self.memory_parameters(x.dtype)
        if self._decodes(x, sequence, past, parameters, kernels):
            out, router_logits = self._step(x[:, 0], parameters, past.state)
            past.advance(past.state, 1)
            return out[:, None], router_logits
        options = {
            "token_mask": sequence.token_mask, "state": None if past is None else past.state,
            "output_state": past is not None, "kernels": kernels,
        }  # fmt: skip
        out, state, router_logits = self._mix(x, parameters, sequence.cu_seqlens, options)
        if past is not None:
            past.advance(state, sequence.length)
        return out, router_logits

    def _decodes(self, x, sequence: TokenSequence, past: MemoryLayer | None, parameters, kernels: str) -> bool:
        """Whether the new tokens, one of every sequence, can go through the kernels that change the state in place."""
        one_new_token = (
            sequence.length == 1 and sequence.token_mask is None and past is not None and past.state is not None
        )
        if not one_new_token or torch.is_grad_enabled() or parameters.q_conv.dtype != x.dtype:
            return False
        return not callable(parameters.projection) and has_step(self.rule, kernels, x)

    def memory_parameters(self, dtype: torch.dtype) -> MemoryParameters:
        """The weights that act on rows; the memories' projections in ``dtype``.

        Raises:
            ValueError: an adapter on a convolution or on the output norm, whose weights the kernels read.
        """
        for name, kind in (("q_conv1d", CONVOLUTIONS), ("k_conv1d", CONVOLUTIONS), ("v_conv1d", CONVOLUTIONS),
                           ("text_conv1d", CONVOLUTIONS), ("o_norm", HeadNorm)):  # fmt: skip
            if hasattr(self, name) and not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name} is a {type(getattr(self, name)).__name__}: the layer's kernels read the weights of its "
                    "convolutions and of its output norm, so that no adapter can act on them. Leave q_conv1d, "
                    "k_conv1d, v_conv1d, text_conv1d and o_norm out of the adapter's target modules"
                )
        norm_weight = self.o_norm()
        return MemoryParameters(
            settings=self.settings,
            projection=self.projection(dtype),
            q_conv=self.q_conv1d(norm_weight),
            k_conv=self.k_conv1d(norm_weight),
            v_conv=self.v_conv1d(norm_weight),
            rule_parameters={name: getattr(self, name) for name in self.rule.parameter_names},
            norm_weight=norm_weight,
        )

    @torch.no_grad()
    def reset_rule_parameters(self) -> None:
        """Draws the rule's parameters (A_log, dt_bias, ...) anew, except parameters that were loaded."""
        for name, value in self.settings.initial_parameters().items():
            parameter = getattr(self, name)
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(value)

    def _apply(self, fn, recurse=True):
        with kept_exact(getattr(self, name) for name in self.rule.parameter_names):
            return super()._apply(fn, recurse)


class MomAttention(RecurrentAttention):
    """Mixture of Memories with `q_proj`, `gate` (the router), `k_proj.M`, `shared_k`, `q_conv1d`, `A_log`, ...

    The kernels take the matrices of keys, values and raw gates as one matrix [A, O, D]. Where an adapter, a hook or
    offloading acts on a module, the modules are called instead; see :meth:`projection`.
    """

    def __init__(self, config: MomConfig, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.settings.key_width, bias=False)
        self.gate = nn.Linear(hidden, config.num_memories, bias=False)
        for letter, size in zip(self.letters, self.settings.projection_sizes, strict=True):
            if not config.single_kv_proj:
                setattr(self, f"{letter}_proj", MemoryProjections(hidden, size, config.num_memories))
            if config.single_kv_proj or config.shared_mem:
                setattr(self, f"shared_{letter}", nn.Linear(hidden, size, bias=False))
        if config.text_conv_size:
            self.text_conv1d = ShortConvolution(hidden, config.text_conv_size)
        self._make_shared_modules()

    def _maps(self) -> TokenMaps:
        filters = self.text_conv1d() if self.settings.text_conv else None
        return TokenMaps(query=self.q_proj, output_gate=self.g_proj, out=self.o_proj, text_conv=filters)

    def _mix(self, x, parameters, cu_seqlens, options):
        return mix_tokens(x, self.gate, self._maps(), parameters, cu_seqlens, **options)

    def _step(self, x, parameters, state):
        return step_tokens(x, self.gate, self._maps(), parameters, state)

    def projection(self, dtype: torch.dtype) -> torch.Tensor | Callable[[torch.Tensor], torch.Tensor]:
        """The projection of keys, values and raw gates: of memory 0, of memory 1, ..., of the shared memory.

        Returns:
            the weights [A, O, D] where every module is as the layer made it. Otherwise a function from tokens [N, D] to
            the projections of all tokens by all memories, [A, N, O], which takes more products than the kernels need.
        """
        routed = [getattr(self, f"{letter}_proj") for letter in self.letters] if hasattr(self, "k_proj") else []
        shared = [getattr(self, f"shared_{letter}") for letter in self.letters] if hasattr(self, "shared_k") else []
        linears = [
            linear for projections in routed if is_plain(projections, MemoryProjections) for linear in projections
        ]
        plain = len(linears) == len(routed) * self.settings.num_memories
        plain = plain and all(is_plain(linear, MemoryLinear) for linear in linears)
        if plain and all(is_plain(linear, nn.Linear) for linear in shared):
            weights = [projections[m].weight for m in range(self.settings.num_memories) for projections in routed]
            weights += [linear.weight for linear in shared]
            if all(weight.is_floating_point() for weight in weights):
                memories = self.settings.num_memories * bool(routed) + bool(shared)
                return self._one_matrix.read(weights).unflatten(0, (memories, -1)).to(dtype)
        return self._called(routed, shared)

    def _called(self, routed: list[nn.Module], shared: list[nn.Module]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function [N, D] -> [A, N, O] that calls the modules."""

        def project(x: torch.Tensor) -> torch.Tensor:
            memories = []
            if routed:  # each module projects for all routed memories
                projected = [module(x).unflatten(1, (self.settings.num_memories, -1)) for module in routed]
                memories += torch.cat(projected, dim=-1).unbind(1)
            if shared:
                memories.append(torch.cat([module(x) for module in shared], dim=-1))
            return torch.stack(memories)

        return project


class OneMemoryAttention(RecurrentAttention):
    """One memory alone, with `q_proj`, `k_proj`, `v_proj`, `b_proj`, ..., `g_proj`, `q_conv1d`, `A_log`, ...

    One product projects all pieces. Where an adapter, a hook or offloading acts on a module, the modules are called.
    """

    def __init__(self, config: MomConfig, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        sizes = self.settings.fused_sizes[:-1]
        for letter, size in zip(["q", *self.letters], sizes, strict=True):
            setattr(self, f"{letter}_proj", nn.Linear(config.hidden_size, size, bias=False))
        self._make_shared_modules()

    def projection(self, dtype: torch.dtype) -> None:
        """The layer projects the tokens itself."""

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        linears = [getattr(self, f"{letter}_proj") for letter in ["q", *self.letters, "g"]]
        weights = [linear.weight for linear in linears]
        if all(is_plain(linear, nn.Linear) and linear.bias is None for linear in linears) and all(
            weight.is_floating_point() for weight in weights
        ):
            return F.linear(x, self._one_matrix.read(weights).to(x.dtype))
        return torch.cat([linear(x) for linear in linears], dim=-1)

    def _mix(self, x, parameters, cu_seqlens, options):
        return *mix_alone(x, self._project, self.o_proj, parameters, cu_seqlens, **options), None

    def _step(self, x, parameters, state):
        return step_alone(x, self._project, self.o_proj, parameters, state), None


CONVOLUTIONS = (ShortConvolution, NoConvolution)


def token_mixer(config: MomConfig, layer_idx: int) -> RecurrentAttention:
    """The layer of that index that a configuration describes."""
    kind = OneMemoryAttention if config.mixer_settings().alone else MomAttention
    return kind(config, layer_idx)
