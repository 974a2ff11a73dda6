"""Mixture-of-Memories as a PyTorch module (arXiv 2502.13685), for any program; nothing of Megatron."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn

from mom_layers.common.kernels import resolve_kernels
from mom_layers.convolve.operation import UNIT_LENGTH_EPS
from mom_layers.mixing import MemoryParameters, mix_memories, projection_sizes
from mom_layers.recur.rules import MemoryRule, get_rule, kept_exact
from mom_layers.route.plan import build_routing_plan
from mom_layers.route.router import route
from mom_layers.state import MemoryState


def check_sizes(
    *, rule: str, num_heads: int, head_dim: int, expand_v: float, num_memories: int, topk: int, conv_kernel: int
) -> None:
    """Raises ValueError, naming the value, for sizes that no MoM layer can have."""
    get_rule(rule)
    for name, value in [("num_heads", num_heads), ("head_dim", head_dim), ("num_memories", num_memories)]:
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 1 <= topk <= num_memories:
        raise ValueError(f"topk must be between 1 and the number of memories ({num_memories}), got {topk}")
    if expand_v <= 0 or head_dim * expand_v != int(head_dim * expand_v):
        raise ValueError(
            f"expand_v must be positive and make head_dim * expand_v a whole number, got {head_dim} * {expand_v}"
        )
    if not 2 <= conv_kernel <= 8:
        raise ValueError(f"conv_kernel must be between 2 and 8, got {conv_kernel}")


def steps_in_kernels(rule: MemoryRule, kernels: str, x: torch.Tensor) -> bool:
    """Whether one token of every sequence, x [B, D], is decoded by the rule's own kernels (``rule.decode_step``)."""
    return resolve_kernels(kernels, x) == "triton" and rule.decode_step is not None


def check_triton_head_sizes(rule: str, head_dim: int, value_dim: int) -> None:
    """Raises ValueError where the rule's Triton kernels do not take these key and value sizes."""
    sizes = get_rule(rule).head_sizes
    for name, value in [("head_dim", head_dim), ("head_dim * expand_v", value_dim)]:
        if value not in sizes:
            raise ValueError(
                f"{name} = {value} is not supported by the {rule} kernels: "
                f"use one of {', '.join(map(str, sizes))}, or the kernels 'torch'"
            )


class MixtureOfMemories(nn.Module):
    """A token mixer with several memory states, a router over them and a shared memory.

    ``p = softmax(x Wr)``, top-k kept and renormalised; every chosen memory runs its update rule over the tokens that
    chose it; ``y = sum_m w^m o^m + o^shared``; ``out = Wo (RMSNorm_head(y) * SiLU(x Wg))``.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: key size K of a head.
        expand_v: value size V = K * expand_v.
        num_memories: M, without the shared one.
        topk: memories a token goes to.
        shared_memory: add the memory that every token goes to.
        conv_kernel: width W of the causal convolutions on q, k and v.
        rule: name of the update rule.
        single_kv_proj: one key, value and gate projection for all memories instead of one each.
        norm_eps: of the output norm.
        kernels: "auto" (Triton on CUDA, PyTorch elsewhere), "torch" or "triton".

    Raises:
        ValueError: a size or name that is not supported.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        head_dim: int = 256,
        expand_v: float = 1.0,
        num_memories: int = 4,
        topk: int = 2,
        shared_memory: bool = True,
        conv_kernel: int = 4,
        rule: str = "gated_deltanet",
        single_kv_proj: bool = False,
        norm_eps: float = 1e-6,
        kernels: str = "auto",
    ):
        super().__init__()
        check_sizes(
            rule=rule, num_heads=num_heads, head_dim=head_dim, expand_v=expand_v,
            num_memories=num_memories, topk=topk, conv_kernel=conv_kernel,
        )  # fmt: skip
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.value_dim = int(head_dim * expand_v)
        self.num_memories = num_memories
        self.topk = topk
        self.shared_memory = shared_memory
        self.rule = get_rule(rule)
        self.norm_eps = norm_eps
        self.kernels = kernels
        if kernels == "triton":
            check_triton_head_sizes(rule, self.head_dim, self.value_dim)

        keys, values = num_heads * self.head_dim, num_heads * self.value_dim
        groups = num_memories + int(shared_memory)
        width = sum(projection_sizes(self.rule, num_heads, self.head_dim, self.value_dim))
        self.router = nn.Linear(hidden_size, num_memories, bias=False)
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.gate_proj = nn.Linear(hidden_size, values, bias=False)
        self.out_proj = nn.Linear(values, hidden_size, bias=False)
        self.memory_proj = nn.Parameter(torch.empty(1 if single_kv_proj else groups, width, hidden_size))
        self.q_conv = nn.Parameter(torch.empty(keys, conv_kernel))
        self.k_conv = nn.Parameter(torch.empty(keys, conv_kernel))
        self.v_conv = nn.Parameter(torch.empty(values, conv_kernel))
        self.rule_parameters = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(num_heads, *shape))
                for name, shape in self.rule.parameter_shapes(head_dim).items()
            }
        )
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal projections, uniform convolutions (PyTorch's for a depthwise filter), the rule's own parameters."""
        for weight in (*(m.weight for m in self.children() if isinstance(m, nn.Linear)), self.memory_proj):
            nn.init.normal_(weight, std=std)
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            bound = conv.shape[1] ** -0.5
            nn.init.uniform_(conv, -bound, bound)
        for name, value in self.rule.init_parameters(self.num_heads, self.head_dim).items():
            self.rule_parameters[name].copy_(value)
        nn.init.ones_(self.norm_weight)

    def _apply(self, fn, recurse=True):
        with kept_exact(self.rule_parameters.values()):
            return super()._apply(fn, recurse)

    def forward(
        self,
        x: torch.Tensor,
        *,
        state: MemoryState | None = None,
        output_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, MemoryState | None]:
        """Mixes tokens along time; the same computation in training, evaluation, prefill and decoding.

        Args:
            x: [B, T, D].
            state: of an earlier call over the same sequences, to continue from; T may be 1 (decoding).
            output_state: also return the state after the last token.
            cu_seqlens: [docs + 1] int32, for packed documents in one row (B = 1): nothing crosses their borders.
            token_mask: [B, T] bool, False at padding, which reaches no memory; its outputs are zero.

        Returns:
            out [B, T, D] and the new state or None.

        Raises:
            ValueError: shapes that do not fit together.
        """
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"x must be [B, T, {self.hidden_size}], got {list(x.shape)}")
        batch, length = x.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, batch * length + 1, max(length, 1), dtype=torch.int32, device=x.device)
            cu_seqlens = cu_seqlens if length else cu_seqlens.new_zeros(batch + 1)
        elif batch != 1:
            raise ValueError(f"cu_seqlens describes one packed row of tokens; got a batch of {batch}")
        if state is not None and state.recurrent.shape[0] != cu_seqlens.shape[0] - 1:
            raise ValueError(
                f"the state holds {state.recurrent.shape[0]} sequences, the input {cu_seqlens.shape[0] - 1}"
            )
        if token_mask is not None and token_mask.shape != x.shape[:2]:
            raise ValueError(f"token_mask must be {[batch, length]}, got {list(token_mask.shape)}")

        tokens = x.flatten(0, 1)
        weights, ids = route(self.router(tokens), self.topk, kernels=self.kernels)
        plan = build_routing_plan(
            ids,
            cu_seqlens,
            num_memories=self.num_memories,
            shared=self.shared_memory,
            token_mask=None if token_mask is None else token_mask.flatten(),
            kernels=self.kernels,
        )
        y, new_state = mix_memories(
            tokens,
            self.q_proj(tokens),
            partial(self.gate_proj, tokens),
            weights,
            plan,
            self.memory_parameters(),
            state=state,
            output_state=output_state,
            kernels=self.kernels,
        )
        out = self.out_proj(y).unflatten(0, (batch, length))
        if token_mask is not None:
            out = out * token_mask[..., None]
        return out, new_state

    @torch.no_grad()
    def step(self, x: torch.Tensor, state: MemoryState) -> torch.Tensor:
        """Decodes one token of every sequence and changes ``state`` in place: what :meth:`forward` computes with T = 1,
        in few launches, touching only the memories that a token goes to. A CUDA graph can hold it.

        Args:
            x: [B, D].
            state: of these sequences, from a prefill (``output_state=True``) or earlier steps.

        Returns:
            out [B, D].

        Raises:
            ValueError: shapes that do not fit together.
        """
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x must be [B, {self.hidden_size}], got {list(x.shape)}")
        if state.recurrent.shape[0] != x.shape[0]:
            raise ValueError(f"the state holds {state.recurrent.shape[0]} sequences, the input {x.shape[0]}")
        if not steps_in_kernels(self.rule, self.kernels, x):
            out, new_state = self(x[:, None], state=state, output_state=True)
            state.copy_(new_state)
            return out[:, 0]
        y = self.rule.decode_step(
            x.contiguous(), self.q_proj(x), self.gate_proj(x), self.router(x), self.memory_parameters(), state,
            self.topk, self.shared_memory, UNIT_LENGTH_EPS,
        )  # fmt: skip
        return self.out_proj(y)

    def memory_parameters(self) -> MemoryParameters:
        return MemoryParameters(
            rule=self.rule,
            projection=self.memory_proj,
            q_conv=self.q_conv,
            k_conv=self.k_conv,
            v_conv=self.v_conv,
            rule_parameters=self.rule_parameters,
            norm_weight=self.norm_weight,
            num_heads=self.num_heads,
            norm_eps=self.norm_eps,
        )
