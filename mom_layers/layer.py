"""Token mixers as PyTorch modules, for any program; nothing of Megatron: Mixture-of-Memories (arXiv 2502.13685), and
one memory of the same rules alone.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from mom_layers.common.checks import FLOATING, TRUTH, WHOLE, check_borders, check_instance, check_tensors, check_whole
from mom_layers.mixing import MemoryParameters, TokenMaps, has_step, mix_tokens, step_tokens
from mom_layers.one_memory import mix_alone, step_alone
from mom_layers.recur.rules import kept_exact, warn_without_kernels
from mom_layers.settings import ONE_MEMORY, MixerSettings
from mom_layers.state import MemoryState


class _TokenMixer(nn.Module):
    """What both layers have: convolutions, the rule's parameters, norm and output projection; checks of the arguments.

    A layer adds its input projections as attributes, ``_weights``, ``memory_parameters``, ``_mix`` and ``_step``.
    """

    def __init__(self, hidden_size: int, settings: MixerSettings):
        super().__init__()
        self.settings = settings
        check_whole(1, hidden_size=hidden_size)
        if settings.kernels == "triton":
            settings.check_head_sizes()
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, settings.num_heads, settings.head_dim
        self.value_dim = settings.value_dim
        self.rule, self.kernels = settings.update_rule, settings.kernels
        warn_without_kernels(self.rule)

    def _make_shared_parameters(self) -> None:
        """The parameters behind the input projections, and all parameters' values."""
        settings = self.settings
        keys, values = settings.key_width, settings.value_width
        self.out_proj = nn.Linear(values, self.hidden_size, bias=False)
        for name, channels in (("q_conv", keys), ("k_conv", keys), ("v_conv", values)):
            if settings.conv_kernel > 1:
                setattr(self, name, nn.Parameter(torch.empty(channels, settings.conv_kernel)))
            else:  # no convolution: one fixed tap
                self.register_buffer(name, torch.ones(channels, 1), persistent=False)
        self.rule_parameters = nn.ParameterDict(
            {
                name: nn.Parameter(
                    torch.empty(settings.num_heads, *shape), requires_grad=name not in self.rule.fixed_parameters
                )
                for name, shape in self.rule.parameter_shapes(settings.head_dim).items()
            }
        )
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.reset_parameters()

    def _weights(self) -> list[torch.Tensor]:
        """The weights that :meth:`reset_parameters` draws from a normal distribution."""
        return [m.weight for m in self.children() if isinstance(m, nn.Linear)]

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal projections, uniform convolutions (PyTorch's for a depthwise filter), the rule's own parameters."""
        for weight in self._weights():
            nn.init.normal_(weight, std=std)
        convolutions = [self.q_conv, self.k_conv, self.v_conv] if self.settings.conv_kernel > 1 else []
        for conv in [*convolutions, *([self.text_conv] if self.settings.text_conv else [])]:
            bound = conv.shape[1] ** -0.5
            nn.init.uniform_(conv, -bound, bound)
        for name, value in self.settings.initial_parameters().items():
            self.rule_parameters[name].copy_(value)
        nn.init.ones_(self.norm_weight)

    def _apply(self, fn, recurse=True):
        with kept_exact(self.rule_parameters.values()):
            return super()._apply(fn, recurse)

    def _memory_parameters(self, projection: torch.Tensor | None) -> MemoryParameters:
        return MemoryParameters(
            settings=self.settings,
            projection=projection,
            q_conv=self.q_conv,
            k_conv=self.k_conv,
            v_conv=self.v_conv,
            rule_parameters=self.rule_parameters,
            norm_weight=self.norm_weight,
        )

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
            state: the state that an earlier call over the same sequences returned; T may be 1 (decoding).
            output_state: also return the state after the last token.
            cu_seqlens: [docs + 1] int32, for packed documents in one row (B = 1): nothing crosses their borders. Values
                are checked on the CPU; on a GPU with ``MOM_CHECK=1``, since the check waits for the device.
            token_mask: [B, T] bool, False at padding, which reaches no memory; its outputs are zero.

        Returns:
            out [B, T, D] and the new state or None.

        Raises:
            ValueError: shapes, types or devices that do not fit together.
            TypeError: an argument of another kind.
        """
        self._check_input(x, state)
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"x must be [B, T, {self.hidden_size}], got {list(x.shape)}")
        batch, length = x.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, batch * length + 1, max(length, 1), dtype=torch.int32, device=x.device)
            cu_seqlens = cu_seqlens if length else cu_seqlens.new_zeros(batch + 1)
        elif batch != 1:
            raise ValueError(f"cu_seqlens describes one packed row of tokens; got a batch of {batch}")
        else:
            check_tensors(WHOLE, x.device, cu_seqlens=cu_seqlens)
            check_borders(cu_seqlens, length)
        if state is not None and state.recurrent.shape[0] != cu_seqlens.shape[0] - 1:
            raise ValueError(
                f"the state holds {state.recurrent.shape[0]} sequences, the input {cu_seqlens.shape[0] - 1}"
            )
        if token_mask is not None:
            check_tensors(TRUTH, x.device, token_mask=token_mask)
        if token_mask is not None and token_mask.shape != x.shape[:2]:
            raise ValueError(f"token_mask must be {[batch, length]}, got {list(token_mask.shape)}")

        return self._mix(x, cu_seqlens, token_mask, state, output_state)

    @torch.no_grad()
    def step(self, x: torch.Tensor, state: MemoryState) -> torch.Tensor:
        """Decodes one token of every sequence and changes ``state`` in place: what :meth:`forward` computes with T = 1,
        in few launches, reading and writing only the memories that a token goes to. A CUDA graph can hold
        the step.

        Args:
            x: [B, D].
            state: the state of these sequences, from a prefill (``output_state=True``) or earlier steps.

        Returns:
            out [B, D].

        Raises:
            ValueError: shapes, types or devices that do not fit together.
            TypeError: an argument of another kind.
        """
        check_instance(MemoryState, state=state)
        self._check_input(x, state)
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x must be [B, {self.hidden_size}], got {list(x.shape)}")
        if state.recurrent.shape[0] != x.shape[0]:
            raise ValueError(f"the state holds {state.recurrent.shape[0]} sequences, the input {x.shape[0]}")
        if not has_step(self.rule, self.kernels, x):
            out, new_state = self(x[:, None], state=state, output_state=True)
            state.copy_(new_state)
            return out[:, 0]
        return self._step(x, state)

    def _check_input(self, x: torch.Tensor, state: MemoryState | None) -> None:
        """Raises an error that names the argument, where PyTorch's would name the operands of a product."""
        check_tensors(FLOATING, x=x)
        weight = self.out_proj.weight
        # A weight that a hook fetches before use may be of any type and anywhere until then.
        if type(self.out_proj) is nn.Linear and not hasattr(self.out_proj, "_hf_hook") and weight.device.type != "meta":
            if x.device != weight.device:
                raise ValueError(f"x must be on {weight.device} as the layer is, got {x.device}")
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise ValueError(f"x must be {weight.dtype} as the layer is, got {x.dtype}")
        if state is not None:
            check_instance(MemoryState, state=state)
            check_tensors(FLOATING, x.device, **{"state.recurrent": state.recurrent})


class MixtureOfMemories(_TokenMixer):
    """A token mixer with several memory states, a router over them and a shared memory.

    ``p = softmax(x Wr)``, top-k kept and renormalised; every chosen memory runs its update rule over the tokens that
    chose it; ``y = sum_m w^m o^m + o^shared``; ``out = Wo (RMSNorm_head(y) * SiLU(x Wg))``.

    Args:
        hidden_size: D.
        sizes: the fields of :class:`mom_layers.settings.MixerSettings`, in their order or by name: ``num_heads``,
            ``head_dim``, ``expand_v``, ``num_memories``, ``topk``, ``shared_memory``, ``conv_kernel``, ``rule``,
            ``single_kv_proj``, ``norm_eps``, ``kernels`` (in version 0.1 ``backend``), ``layer``, ``num_layers``,
            ``text_conv``. Every field has a default.

    Raises:
        ValueError, TypeError: a size or name that is not supported.
    """

    def __init__(self, hidden_size: int, *sizes, **named_sizes):
        if "backend" in named_sizes:
            named_sizes["kernels"] = named_sizes.pop("backend")
        super().__init__(hidden_size, MixerSettings(*sizes, **named_sizes))
        settings = self.settings
        if settings.alone:
            raise ValueError("num_memories must be at least 1, got 0: LinearAttentionLayer is the layer of one memory")
        self.num_memories, self.topk, self.shared_memory = settings.num_memories, settings.topk, settings.shared_memory
        keys, values, width = settings.key_width, settings.value_width, sum(settings.projection_sizes)
        self.router = nn.Linear(hidden_size, settings.num_memories, bias=False)
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.gate_proj = nn.Linear(hidden_size, values, bias=False)
        self.memory_proj = nn.Parameter(torch.empty(settings.num_projections, width, hidden_size))
        self.text_conv = nn.Parameter(torch.empty(hidden_size, settings.text_conv)) if settings.text_conv else None
        self._make_shared_parameters()

    def _weights(self) -> list[torch.Tensor]:
        return [*super()._weights(), self.memory_proj]

    def _token_maps(self) -> TokenMaps:
        return TokenMaps(query=self.q_proj, output_gate=self.gate_proj, out=self.out_proj, text_conv=self.text_conv)

    def memory_parameters(self) -> MemoryParameters:
        """The weights that act on rows."""
        return self._memory_parameters(self.memory_proj)

    def _mix(self, x, cu_seqlens, token_mask, state, output_state):
        return mix_tokens(
            x, self.router, self._token_maps(), self.memory_parameters(), cu_seqlens,
            token_mask=token_mask, state=state, output_state=output_state, kernels=self.kernels,
        )[:2]  # fmt: skip

    def _step(self, x, state):
        return step_tokens(x, self.router, self._token_maps(), self.memory_parameters(), state)[0]


class LinearAttentionLayer(_TokenMixer):
    """A token mixer with one memory of any update rule: linear attention, gated DeltaNet, GLA, ...

    ``q, k, v = SiLU(conv(x Wq)), SiLU(conv(x Wk)), SiLU(conv(x Wv))``, the rule's recurrence over every sequence, then
    ``out = Wo (RMSNorm_head(o) * SiLU(x Wg))``. The layer has no router, no routing plan and no gather: what
    :class:`MixtureOfMemories` computes with the shared memory alone.

    Args:
        hidden_size: D.
        rule: name of the update rule.
        sizes: ``num_heads``, ``head_dim``, ``expand_v``, ``conv_kernel``, ``norm_eps``, ``kernels``, ``layer`` and
            ``num_layers``, by name, as of :class:`mom_layers.settings.MixerSettings`.

    Raises:
        ValueError, TypeError: a size or name that is not supported.
    """

    def __init__(self, hidden_size: int, rule: str = "gated_deltanet", **sizes):
        if routers := sorted(sizes.keys() & ONE_MEMORY.keys()):
            raise TypeError(f"a layer of one memory has no {routers[0]}: MixtureOfMemories has")
        super().__init__(hidden_size, MixerSettings.of_one_memory(rule=rule, **sizes))
        self.in_proj = nn.Linear(hidden_size, sum(self.settings.fused_sizes), bias=False)
        self._make_shared_parameters()

    def memory_parameters(self) -> MemoryParameters:
        """The weights behind the input projection."""
        return self._memory_parameters(None)

    def _mix(self, x, cu_seqlens, token_mask, state, output_state):
        return mix_alone(
            x, self.in_proj, self.out_proj, self.memory_parameters(), cu_seqlens,
            token_mask=token_mask, state=state, output_state=output_state, kernels=self.kernels,
        )  # fmt: skip

    def _step(self, x, state):
        return step_alone(x, self.in_proj, self.out_proj, self.memory_parameters(), state)
