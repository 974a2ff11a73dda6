"""A MoM layer under the parameter names of the Hugging Face format: one matrix a memory and purpose."""

from __future__ import annotations

import torch
import torch.nn as nn

from mom_layers.hf.cache import MemoryLayer
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.layers import RMSNorm
from mom_layers.hf.sequence import TokenSequence
from mom_layers.mixing import MemoryParameters, TokenMaps, has_step, mix_tokens, step_tokens
from mom_layers.recur.rules import kept_exact


class MomAttention(nn.Module):
    """Mixture of Memories with `q_proj`, `gate` (the router), `k_proj.M`, `shared_k`, `q_conv1d`, `A_log`, ...

    The separate matrices of keys, values and gates are read as the one matrix [G, O, D] that the kernels take; see
    :meth:`memory_projection`.
    """

    def __init__(self, config: MomConfig):
        super().__init__()
        self.settings = config.mixer_settings()
        self.rule = self.settings.rule
        hidden, keys, values = config.hidden_size, self.settings.key_width, self.settings.value_width

        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.gate = nn.Linear(hidden, config.num_memories, bias=False)
        # The format's letter of each piece of a projection: "k" is projected by k_proj.M and shared_k.
        self.letters = ["k", "v", *(gate.hf for gate in self.rule.raw_gates)]
        sizes = self.settings.projection_sizes
        for letter, size in zip(self.letters, sizes, strict=True):
            if not config.single_kv_proj:
                linears = [nn.Linear(hidden, size, bias=False) for _ in range(config.num_memories)]
                setattr(self, f"{letter}_proj", nn.ModuleList(linears))
            if config.single_kv_proj or config.shared_mem:
                setattr(self, f"shared_{letter}", nn.Linear(hidden, size, bias=False))
        for name, channels in (("q", keys), ("k", keys), ("v", values)):
            conv = nn.Conv1d(channels, channels, config.conv_size, groups=channels, bias=False)
            setattr(self, f"{name}_conv1d", conv)
        for name, value in self.rule.init_parameters(config.num_heads, config.head_dim).items():
            self.register_parameter(name, nn.Parameter(value))
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.o_norm = RMSNorm(self.settings.value_dim, config.norm_eps)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.kernels = "auto" if self.settings.has_kernels() else "torch"

    def forward(
        self, x: torch.Tensor, sequence: TokenSequence, past: MemoryLayer | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, T, D] after the tokens that ``past`` has seen, which gets the state after these ones.

        Returns out [B, T, D], zero at padding, which reaches no memory, and the router's logits [B * T, M].
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        kernels = "torch" if x.dtype == torch.float64 else self.kernels
        maps = TokenMaps(query=self.q_proj, output_gate=self.g_proj, out=self.o_proj)
        parameters = self.memory_parameters(x.dtype)
        if self._decodes(x, sequence, past, kernels):
            out, router_logits = step_tokens(x[:, 0], self.gate, maps, parameters, self.settings, past.state)
            past.advance(past.state, 1)
            return out[:, None], router_logits
        out, state, router_logits = mix_tokens(
            x, self.gate, maps, parameters, self.settings, sequence.cu_seqlens,
            token_mask=sequence.token_mask, state=None if past is None else past.state,
            output_state=past is not None, kernels=kernels,
        )  # fmt: skip
        if past is not None:
            past.advance(state, sequence.length)
        return out, router_logits

    def _decodes(self, x, sequence: TokenSequence, past: MemoryLayer | None, kernels: str) -> bool:
        """Whether the new tokens, one of every sequence, can go through the kernels that change the state in place."""
        one_each = sequence.length == 1 and sequence.token_mask is None and past is not None and past.state is not None
        if not one_each or torch.is_grad_enabled() or self.q_conv1d.weight.dtype != x.dtype:
            return False
        return has_step(self.rule, kernels, x)

    def memory_parameters(self, dtype: torch.dtype) -> MemoryParameters:
        return MemoryParameters(
            rule=self.rule,
            projection=self.memory_projection().to(dtype),
            q_conv=self.q_conv1d.weight.squeeze(1),
            k_conv=self.k_conv1d.weight.squeeze(1),
            v_conv=self.v_conv1d.weight.squeeze(1),
            rule_parameters={name: getattr(self, name) for name in self.rule.parameter_names},
            norm_weight=self.o_norm.weight,
            num_heads=self.settings.num_heads,
            norm_eps=self.settings.norm_eps,
        )

    def memory_projection(self) -> torch.Tensor:
        """[G, O, D]: keys, values and gates of memory 0, of memory 1, ..., of the shared memory.

        Where gradients are wanted this is a copy that leads back to the named parameters. Elsewhere it is a view: the
        first call moves the parameters' values so that they lie one after another, and later calls copy nothing.

        Raises:
            ValueError: a projection that is not a plain linear map with a floating-point weight (an adapter, say).
        """
        groups = self._projections()
        for linear in (linear for group in groups for linear in group):
            if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
                raise ValueError(
                    f"the memories' projections must be plain linear layers, got {type(linear).__name__} with a "
                    f"{linear.weight.dtype} weight: leave {', '.join(f'{x}_proj, shared_{x}' for x in self.letters)} "
                    "out of adapters and quantisation"
                )
        weights = [linear.weight for group in groups for linear in group]
        shape = (len(groups), -1, weights[0].shape[1])
        wants_gradient = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if not wants_gradient and _lie_in_a_row(weights):
            rows = sum(weight.shape[0] for weight in weights)
            first = weights[0].detach()
            return first.as_strided((rows, shape[2]), (shape[2], 1)).view(shape)
        if wants_gradient or torch.compiler.is_compiling() or _owned_by_others(weights):
            return torch.cat(weights).view(shape)
        # What is laid out must be of the parameters' own kind: an inference tensor could never be trained again.
        with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
            together = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, together.split([w.shape[0] for w in weights]), strict=True):
                weight.data = part
        return together.view(shape)

    def _projections(self) -> list[tuple[nn.Module, ...]]:
        """The linear maps of every group, in the order of :attr:`letters`."""
        groups = []
        if hasattr(self, "k_proj"):
            groups += zip(*(getattr(self, f"{letter}_proj") for letter in self.letters), strict=True)
        if hasattr(self, "shared_k"):
            groups.append(tuple(getattr(self, f"shared_{letter}") for letter in self.letters))
        return groups

    @torch.no_grad()
    def reset_rule_parameters(self) -> None:
        """Draws A_log, dt_bias and their like anew, save for those that were loaded."""
        for name, value in self.rule.init_parameters(self.settings.num_heads, self.settings.head_dim).items():
            parameter = getattr(self, name)
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(value)

    def _apply(self, fn, recurse=True):
        with kept_exact(getattr(self, name) for name in self.rule.parameter_names):
            return super()._apply(fn, recurse)


def _lie_in_a_row(weights: list[torch.Tensor]) -> bool:
    """Whether the matrices follow one another in one piece of memory."""
    if torch.compiler.is_compiling():
        return False
    end = weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.dtype != weights[0].dtype or not weight.is_contiguous():
            return False
        end += weight.nbytes
    storage = weights[0].untyped_storage()
    return end <= storage.data_ptr() + storage.nbytes()


def _owned_by_others(weights: list[torch.Tensor]) -> bool:
    """Whether something may rely on where the weights lie: FSDP and ZeRO, which need several processes."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or any(type(weight) is not nn.Parameter for weight in weights)
