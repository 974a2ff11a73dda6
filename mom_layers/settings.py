"""The sizes and choices of a Mixture-of-Memories layer, checked once for every program that builds such a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mom_layers.common.checks import LARGEST_SIZE, check_number, check_truth, check_whole
from mom_layers.common.kernel_choice import check_kernels
from mom_layers.recur.rules import MemoryRule, get_rule

ONE_MEMORY = {"num_memories": 0, "topk": 0, "shared_memory": True, "single_kv_proj": False, "text_conv": 0}
"""The settings of a layer of one memory alone, which MoM calls the shared memory."""


@dataclass(frozen=True)
class MixerSettings:
    """What makes one layer differ from another.

    Attributes:
        num_heads: H.
        head_dim: key size K of a head.
        expand_v: value size V = K * expand_v.
        num_memories: M, without the shared memory. 0 for a layer of one memory alone: every token goes to the shared
            memory, and there is no router.
        topk: routed memories that a token goes to; 0 for a layer of one memory alone.
        shared_memory: add the memory that every token goes to.
        conv_kernel: width W of the causal convolutions on q, k and v; 1 for no convolution, so that q, k and v go
            through SiLU alone.
        rule: name of the memory update rule.
        single_kv_proj: one projection of keys, values and raw gates for all memories, instead of one a memory.
        text_conv: width of a causal convolution over the layer's input, before the router; 0 for none, as in the
            paper.
        norm_eps: of the output norm.
        kernels: "auto" (Triton on CUDA, PyTorch elsewhere), "torch" or "triton".
        layer, num_layers: number of the layer, from 0, and of all layers of the model: rules whose initial parameters
            depend on the layer read these.

    Raises:
        ValueError, TypeError: a size or a name that no layer can have. The message has the value.
    """

    num_heads: int = 4
    head_dim: int = 256
    expand_v: float = 1.0
    num_memories: int = 4
    topk: int = 2
    shared_memory: bool = True
    conv_kernel: int = 4
    rule: str = "gated_deltanet"
    single_kv_proj: bool = False
    norm_eps: float = 1e-6
    kernels: str = "auto"
    layer: int = 0
    num_layers: int = 1
    text_conv: int = 0

    def __post_init__(self) -> None:
        get_rule(self.rule)
        check_kernels(self.kernels)
        check_whole(1, num_heads=self.num_heads, head_dim=self.head_dim)
        check_whole(0, num_memories=self.num_memories)
        for name in ("topk", "conv_kernel", "text_conv"):
            check_whole(-LARGEST_SIZE, **{name: getattr(self, name)})
        check_number(expand_v=self.expand_v, norm_eps=self.norm_eps)
        check_whole(0, layer=self.layer)
        check_whole(self.layer + 1, num_layers=self.num_layers)
        check_truth(shared_memory=self.shared_memory, single_kv_proj=self.single_kv_proj)
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a number from 0 up to, but not including, 1, got {self.norm_eps}")
        if self.alone:
            self._check_alone()
        elif not 1 <= self.topk <= self.num_memories:
            raise ValueError(
                f"topk must be between 1 and the number of memories ({self.num_memories}), got {self.topk}"
            )
        value_dim = self.head_dim * self.expand_v
        if not 0 < value_dim <= LARGEST_SIZE or value_dim != int(value_dim):
            raise ValueError(
                "expand_v must be positive and make head_dim * expand_v a whole number, "
                f"got {self.head_dim} * {self.expand_v}"
            )
        if not 1 <= self.conv_kernel <= 8:
            raise ValueError(f"conv_kernel must be between 1 (no convolution) and 8, got {self.conv_kernel}")
        if self.text_conv != 0 and not 2 <= self.text_conv <= 8:
            raise ValueError(f"text_conv must be 0 (no convolution over the text) or 2 to 8, got {self.text_conv}")

    def _check_alone(self) -> None:
        for name, only in ONE_MEMORY.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"num_memories=0 makes a layer of one memory, which every token goes to: {name} must be {only}, "
                    f"got {getattr(self, name)}; or give num_memories of at least 1"
                )

    @classmethod
    def of_one_memory(cls, **sizes) -> MixerSettings:
        """The settings of a layer of one memory alone, without a router.

        Raises:
            TypeError: a setting of the router among ``sizes``.
        """
        return cls(**ONE_MEMORY, **sizes)

    @property
    def alone(self) -> bool:
        """Whether the layer has one memory and no router."""
        return self.num_memories == 0

    @property
    def update_rule(self) -> MemoryRule:
        """The rule of that name."""
        return get_rule(self.rule)

    @property
    def value_dim(self) -> int:
        """Value size V of a head."""
        return int(self.head_dim * self.expand_v)

    @property
    def num_all_memories(self) -> int:
        """Routed memories and the shared memory."""
        return self.num_memories + int(self.shared_memory)

    @property
    def key_width(self) -> int:
        """Columns of all heads' queries, and of all heads' keys."""
        return self.update_rule.num_key_heads(self.num_heads) * self.head_dim

    @property
    def value_width(self) -> int:
        """Columns of all heads' values."""
        return self.num_heads * self.value_dim

    @property
    def projection_sizes(self) -> list[int]:
        """Widths of the pieces of one memory's fused projection: keys, values, then each raw gate of the rule."""
        return self.update_rule.projection_sizes(self.num_heads, self.head_dim, self.value_dim)

    @property
    def fused_sizes(self) -> list[int]:
        """Widths of the pieces of the one input projection of a layer of one memory alone: queries, keys, values, each
        raw gate of the rule, output gate."""
        return [self.key_width, *self.projection_sizes, self.value_width]

    @property
    def num_projections(self) -> int:
        """Projections of keys, values and raw gates: one a memory, or one for all memories."""
        return 1 if self.single_kv_proj else self.num_all_memories

    def has_kernels(self) -> bool:
        """Whether the rule's Triton kernels take the head sizes."""
        return self.update_rule.has_kernels(self.head_dim, self.value_dim)

    def initial_parameters(self) -> dict[str, torch.Tensor]:
        """The rule's own parameters of this layer, float32 [H, ...] each, drawn with torch's global generator."""
        return self.update_rule.parameters_of_layer(self.num_heads, self.head_dim, self.layer, self.num_layers)

    def check_head_sizes(self) -> None:
        """Raises ValueError where the rule's Triton kernels do not take the head sizes."""
        for name, value, key in [("head_dim", self.head_dim, True), ("head_dim * expand_v", self.value_dim, False)]:
            sizes = self.update_rule.kernel_sizes(of_keys=key)
            if value not in sizes:
                raise ValueError(
                    f"{name} = {value} is not supported by the {self.rule} kernels: "
                    f"use one of {', '.join(map(str, sizes))}, or kernels='torch'"
                )
