"""A MoM layer under the parameter names of the Hugging Face format: one matrix a memory and purpose."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn

from mom_layers.convolve.operation import UNIT_LENGTH_EPS
from mom_layers.hf.cache import MemoryLayer
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.layers import RMSNorm
from mom_layers.hf.sequence import TokenSequence
from mom_layers.layer import steps_in_kernels
from mom_layers.mixing import MemoryParameters, mix_memories, projection_sizes
from mom_layers.recur.rules import get_rule, kept_exact
from mom_layers.route.plan import build_routing_plan
from mom_layers.route.router import route

# The format's letter for a gate of the rule: gate "beta" is projected by b_proj.M and shared_b.
GATE_LETTERS = {"beta": "b"}


class MomAttention(nn.Module):
    """Mixture of Memories with `q_proj`, `gate` (the router), `k_proj.M`, `shared_k`, `q_conv1d`, `A_log`, ...

    The separate matrices of keys, values and gates are read as the one matrix [G, O, D] that the kernels take; see
    :meth:`memory_projection`.
    """

    def __init__(self, config: MomConfig):
        super().__init__()
        self.rule = get_rule(config.mom_backend)
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.num_memories = config.num_memories
        self.topk = config.topk
        self.shared_mem = config.shared_mem
        self.norm_eps = config.norm_eps
        value_dim = round(config.head_dim * config.expand_v)
        hidden, keys, values = config.hidden_size, config.num_heads * config.head_dim, config.num_heads * value_dim

        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.gate = nn.Linear(hidden, config.num_memories, bias=False)
        self.letters = ["k", "v", *(GATE_LETTERS.get(name, name) for name in self.rule.gate_widths)]
        sizes = projection_sizes(self.rule, config.num_heads, config.head_dim, value_dim)
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
        self.o_norm = RMSNorm(value_dim, config.norm_eps)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        has_kernels = config.head_dim in self.rule.head_sizes and value_dim in self.rule.head_sizes
        self.kernels = "auto" if has_kernels else "torch"

    def forward(
        self, x: torch.Tensor, sequence: TokenSequence, past: MemoryLayer | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, T, D] after the tokens that ``past`` has seen, which gets the state after these ones.

        Returns out [B, T, D], zero at padding, which reaches no memory, and the router's logits [B * T, M].
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tokens = x.flatten(0, 1)
        kernels = "torch" if x.dtype == torch.float64 else self.kernels
        router_logits = self.gate(tokens)
        mask = sequence.token_mask
        if self._decodes(tokens, sequence, past, kernels):
            y = self.rule.decode_step(
                tokens.contiguous(), self.q_proj(tokens), self.g_proj(tokens), router_logits,
                self.memory_parameters(x.dtype), past.state, self.topk, self.shared_mem, UNIT_LENGTH_EPS,
            )  # fmt: skip
            past.advance(past.state, 1)
            return self.o_proj(y)[:, None], router_logits
        weights, ids = route(router_logits, self.topk, kernels=kernels)
        plan = build_routing_plan(
            ids,
            sequence.cu_seqlens,
            num_memories=self.num_memories,
            shared=self.shared_mem,
            token_mask=None if mask is None else mask.flatten(),
            kernels=kernels,
        )
        y, state = mix_memories(
            tokens,
            self.q_proj(tokens),
            partial(self.g_proj, tokens),
            weights,
            plan,
            self.memory_parameters(x.dtype),
            state=None if past is None else past.state,
            output_state=past is not None,
            kernels=kernels,
        )
        if past is not None:
            past.advance(state, sequence.length)
        out = self.o_proj(y).unflatten(0, x.shape[:2])
        return out if mask is None else out * mask[..., None], router_logits

    def _decodes(self, tokens, sequence: TokenSequence, past: MemoryLayer | None, kernels: str) -> bool:
        """Whether the new tokens, one of every sequence, can go through the kernels that change the state in place."""
        one_each = sequence.length == 1 and sequence.token_mask is None and past is not None and past.state is not None
        if not one_each or torch.is_grad_enabled() or self.q_conv1d.weight.dtype != tokens.dtype:
            return False
        return steps_in_kernels(self.rule, kernels, tokens)

    def memory_parameters(self, dtype: torch.dtype) -> MemoryParameters:
        return MemoryParameters(
            rule=self.rule,
            projection=self.memory_projection().to(dtype),
            q_conv=self.q_conv1d.weight.squeeze(1),
            k_conv=self.k_conv1d.weight.squeeze(1),
            v_conv=self.v_conv1d.weight.squeeze(1),
            rule_parameters={name: getattr(self, name) for name in self.rule.parameter_names},
            norm_weight=self.o_norm.weight,
            num_heads=self.num_heads,
            norm_eps=self.norm_eps,
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
        for name, value in self.rule.init_parameters(self.num_heads, self.head_dim).items():
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
