"""Megatron's TransformerConfig with the fields of a Mixture-of-Memories model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig

from mom_layers.common.kernels import KERNELS
from mom_layers.settings import MixerSettings

TOKEN_MIXERS = ("attention", "mom")
MOM_REFUSES = "--token-mixer mom does not work with"
LOSS_SCALE_HOOK = "experimental_attention_variant_loss_scale_func"


def refuse(refusal: str, cases: Iterable[tuple[object, str, str]]) -> None:
    """Raises ValueError "refusal what: instead" for the first of (present, what, instead) that is present."""
    for present, what, instead in cases:
        if present:
            raise ValueError(f"{refusal} {what}: {instead}")


def has_memories(settings: object) -> bool:
    """Whether a model's arguments or configuration choose memories. Megatron's own have no token_mixer."""
    return getattr(settings, "token_mixer", "attention") == "mom"


@dataclass
class MomTransformerConfig(TransformerConfig):
    """TransformerConfig for a model whose token mixers may be Mixture-of-Memories layers.

    ``linear_attention_freq`` has Megatron's meaning, with MoM as the linear attention: an integer N makes every N-th
    layer softmax attention, a list names every layer's mixer (1 = MoM, 0 = softmax attention), None makes every layer
    MoM.

    Raises ValueError for a value, or a combination with Megatron's own settings, that does not work.
    """

    token_mixer: str = "attention"
    """Token mixer of the decoder's layers: "attention" (Megatron's own) or "mom"."""

    mom_rule: str = "gated_deltanet"
    """Name of the memory update rule."""

    mom_num_memories: int = 4
    """Memories of a layer, without the shared memory."""

    mom_topk: int = 2
    """Memories that the router sends a token to."""

    mom_shared_memory: bool = True
    """Whether a layer has one more memory, which every token goes to."""

    mom_num_heads: int = 4
    """Heads of a memory."""

    mom_head_dim: int = 256
    """Key size of a head."""

    mom_expand_v: float = 1.0
    """Value size of a head over its key size."""

    mom_conv_kernel: int = 4
    """Width of the causal convolutions on queries, keys and values."""

    mom_single_kv_proj: bool = False
    """Whether all memories use one key, value and gate projection."""

    mom_aux_loss_coeff: float = 1e-3
    """Coefficient of the memory router's load-balancing loss; 0 switches the loss off."""

    mom_z_loss_coeff: float | None = None
    """Coefficient of the memory router's z-loss; None switches the loss off."""

    mom_kernels: str = "auto"
    """Implementation of the mixer's operations: "auto" (Triton on GPUs, PyTorch elsewhere), "torch" or "triton"."""

    contiguous_context_slices: bool = False
    """Whether a context-parallel rank holds one contiguous slice of a sequence; Megatron's batches have two."""

    def __post_init__(self) -> None:
        size = self.expert_model_parallel_size
        if self.token_mixer == "mom" and self.num_moe_experts is None:
            self.expert_model_parallel_size = 1  # in a model without experts Megatron accepts only 1
        super().__post_init__()
        self.expert_model_parallel_size = size
        self._check_token_mixer()

    @classmethod
    def adopt(cls, config: TransformerConfig, **settings) -> None:
        """Makes a configuration of Megatron's class one of this class, with the given values of our fields and the
        defaults of the others.

        Changes the object in place: data parallelism, schedules and the optimizer hold a reference to it already.
        """
        config.__class__ = cls
        for field in fields(cls):
            if field.name not in TransformerConfig.__dataclass_fields__:
                setattr(config, field.name, settings.pop(field.name, field.default))
        assert not settings, settings
        config._check_token_mixer()

    def _check_token_mixer(self) -> None:
        if self.token_mixer not in TOKEN_MIXERS:
            raise ValueError(f"--token-mixer must be one of {', '.join(TOKEN_MIXERS)}, got {self.token_mixer!r}")
        if self.token_mixer == "mom":
            self._check_mom()
            if self.num_moe_experts is None and getattr(self, LOSS_SCALE_HOOK, None) is None:
                # Megatron passes the scale of the main loss to the router losses of models with experts, and to this
                # hook in every model. A release without the hook ignores the attribute, and says in
                # megatron_patches.releases what takes its place.
                setattr(self, LOSS_SCALE_HOOK, MoEAuxLossAutoScaler.set_loss_scale)

    @property
    def mom_value_dim(self) -> int:
        """Value size of a head."""
        return int(self.mom_head_dim * self.mom_expand_v)

    def mixer_settings(self) -> MixerSettings:
        """Sizes and choices of a MoM layer, of all tensor-parallel ranks together."""
        names = {f.name for f in fields(self)}
        settings = {f.name: getattr(self, f"mom_{f.name}") for f in fields(MixerSettings) if f"mom_{f.name}" in names}
        return MixerSettings(rule_name=self.mom_rule, norm_eps=self.layernorm_epsilon, **settings)

    def mom_layer_pattern(self) -> list[bool]:
        """For each of the model's layers, whether its token mixer is Mixture-of-Memories."""
        freq = self.linear_attention_freq
        if self.token_mixer != "mom":
            return [False] * self.num_layers
        if freq is None:
            return [True] * self.num_layers
        if isinstance(freq, int):
            return [(layer + 1) % freq != 0 for layer in range(self.num_layers)]
        return [bool(layer) for layer in freq]

    def _check_mom(self) -> None:
        if self.mom_kernels not in KERNELS:
            raise ValueError(f"--mom-kernels must be one of {', '.join(KERNELS)}, got {self.mom_kernels!r}")
        settings = self.mixer_settings()
        if self.mom_kernels != "torch":
            settings.check_head_sizes()
        if settings.rule.key_heads is not None and self.tensor_model_parallel_size > 1:
            raise ValueError(
                f"--mom-rule {self.mom_rule} shares keys between heads, which tensor parallelism would split: "
                f"--tensor-model-parallel-size must be 1, got {self.tensor_model_parallel_size}"
            )
        if self.mom_num_heads % self.tensor_model_parallel_size:
            raise ValueError(
                f"--mom-num-heads {self.mom_num_heads} does not divide over "
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size}"
            )
        if self.mom_num_memories % self.expert_model_parallel_size:
            raise ValueError(
                f"--mom-num-memories {self.mom_num_memories} does not divide over "
                f"--expert-model-parallel-size {self.expert_model_parallel_size}"
            )
        if self.expert_model_parallel_size > 1 and self.expert_tensor_parallel_size != self.tensor_model_parallel_size:
            raise ValueError(
                f"memories are split by head over --tensor-model-parallel-size {self.tensor_model_parallel_size}: with "
                f"expert parallelism --expert-tensor-parallel-size must be the same, got "
                f"{self.expert_tensor_parallel_size}"
            )
        self._check_context_parallel()
        for name, coefficient in [("aux", self.mom_aux_loss_coeff), ("z", self.mom_z_loss_coeff or 0.0)]:
            if not 0 <= coefficient < float("inf"):
                raise ValueError(f"--mom-{name}-loss-coeff must be a number that is not negative, got {coefficient}")
        self._check_pattern()
        if self.cuda_graph_impl != "none" and self.expert_model_parallel_size > 1:
            raise ValueError(
                f"with memories over ranks the host reads in every layer how many rows the ranks exchange: "
                f"--cuda-graph-impl {self.cuda_graph_impl} needs --expert-model-parallel-size 1, got "
                f"{self.expert_model_parallel_size}"
            )
        variant = self.experimental_attention_variant
        inference = self.transformer_impl == "inference_optimized"
        refuse(MOM_REFUSES, [
            (self.hybrid_context_parallel, "--hybrid-context-parallel", "use --context-parallel-size alone"),
            (self.multi_latent_attention, "--multi-latent-attention", "use plain or grouped-query attention layers"),
            (variant is not None, f"--experimental-attention-variant {variant}", "leave out one of the two mixers"),
            (self.heterogeneous_block_specs, "--heterogeneous-layers-config-path", "use --linear-attention-freq"),
            (inference, "--transformer-impl inference_optimized", "use local or transformer_engine"),
        ])  # fmt: skip

    def _check_context_parallel(self) -> None:
        size, experts = self.context_parallel_size, self.expert_model_parallel_size
        if size > 1 and experts > 1 and experts % size:
            raise ValueError(
                f"with memories over ranks a memory reads whole sequences: --expert-model-parallel-size {experts} "
                f"must be 1 or a multiple of --context-parallel-size {size}"
            )
        softmax = self.mtp_num_layers or not all(self.mom_layer_pattern())
        if size > 1 and self.transformer_impl == "local" and softmax:
            raise ValueError(
                f"softmax attention layers need --transformer-impl transformer_engine with --context-parallel-size "
                f"{size}; local attention cannot split a sequence: make every layer MoM (no --linear-attention-freq, "
                "no --mtp-num-layers)"
            )

    def _check_pattern(self) -> None:
        freq = self.linear_attention_freq
        if isinstance(freq, int) and freq < 2:
            raise ValueError(
                f"--linear-attention-freq {freq} leaves no MoM layer: give N >= 2 for one softmax layer in N, "
                "a list such as ([1]*7+[0])*3, or leave it out for MoM in every layer"
            )
        if isinstance(freq, list):
            if len(freq) != self.num_layers or set(freq) - {0, 1}:
                raise ValueError(
                    f"--linear-attention-freq must list a 0 or 1 for each of the {self.num_layers} layers, got {freq}"
                )
            if not any(freq):
                raise ValueError("--linear-attention-freq lists no MoM layer: use --token-mixer attention instead")
