"""Megatron's TransformerConfig with the fields of a Mixture-of-Memories model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from mom_layers.common.kernel_choice import KERNELS
from mom_layers.recur.rules import rule_names
from mom_layers.settings import ONE_MEMORY, MixerSettings

OUR_SPEC = "linear_moe.layer_specs mom_layer_spec"
"""The value of --spec that is this project's."""
EXPERT_PARALLEL = ("auto", "on", "off")
EXPERT_EXCHANGES = ("auto", "all-to-all", "all-gather", "peer-memory")
LOSS_SCALE_HOOK = "experimental_attention_variant_loss_scale_func"


def token_mixers() -> tuple[str, ...]:
    """What --token-mixer takes: Megatron's attention, Mixture-of-Memories, and every update rule alone."""
    return ("attention", "mom", *rule_names())


def refuse_beside_mixer(settings: object, cases: Iterable[tuple[object, str, str]]) -> None:
    """:func:`refuse` for what a model with one of our token mixers does not work with."""
    refuse(f"--token-mixer {settings.token_mixer} does not work with", cases)


def refuse(refusal: str, cases: Iterable[tuple[object, str, str]]) -> None:
    """Raises ValueError "refusal what: instead" for the first of (present, what, instead) that is present."""
    for present, what, instead in cases:
        if present:
            raise ValueError(f"{refusal} {what}: {instead}")


def expert_exchange(settings: object) -> str:
    """How tokens and outputs travel where the memories are split: a name of EXPERT_EXCHANGES other than "auto".

    "auto" is "all-to-all", which works between all GPUs and keeps no spare rows.
    """
    choice = settings.mom_expert_exchange
    return "all-to-all" if choice == "auto" else choice


def why_memories_are_whole(settings: object) -> str | None:
    """Why the memories cannot be split over the expert-parallel ranks; None where they can be split.

    Args:
        settings: a model's arguments or configuration, with an expert-parallel size above 1.
    """
    experts, tensor = settings.expert_model_parallel_size, settings.tensor_model_parallel_size
    expert_tensor = settings.expert_tensor_parallel_size or tensor
    context, graphs = settings.context_parallel_size, settings.cuda_graph_impl
    exchange = expert_exchange(settings)
    reasons = [
        (
            settings.mom_num_memories % experts,
            f"--mom-num-memories {settings.mom_num_memories} does not divide over --expert-model-parallel-size "
            f"{experts}",
        ),
        (
            expert_tensor != tensor,
            f"--tensor-model-parallel-size {tensor} splits each memory by head, and --expert-tensor-parallel-size "
            f"{expert_tensor} is another size",
        ),
        (
            context > 1 and experts % context,
            f"a memory reads whole sequences, and --expert-model-parallel-size {experts} is no multiple of "
            f"--context-parallel-size {context}",
        ),
        (
            graphs != "none" and exchange == "all-to-all",
            f"--cuda-graph-impl {graphs} lets no layer wait for the host, which reads how many rows the ranks exchange "
            "(--mom-expert-exchange all-gather and peer-memory read nothing)",
        ),
        (
            settings.overlap_moe_expert_parallel_comm,
            "--overlap-moe-expert-parallel-comm runs two micro-batches at once, and the host would wait in every layer "
            "for the number of rows that the ranks exchange"
            if exchange == "all-to-all"
            else "--overlap-moe-expert-parallel-comm runs two micro-batches at once, whose exchanges would share a "
            "stream",
        ),
        (
            settings.use_megatron_fsdp or settings.use_torch_fsdp2,
            f"{'--use-megatron-fsdp' if settings.use_megatron_fsdp else '--use-torch-fsdp2'} shards all parameters but "
            "experts over every data-parallel rank",
        ),
    ]
    return next((reason for present, reason in reasons if present), None)


def splits_memories(settings: object) -> bool:
    """Whether a model's memories are split over the expert-parallel ranks, from its arguments or configuration."""
    if settings.expert_model_parallel_size == 1 or settings.mom_expert_parallel == "off" or not has_router(settings):
        return False
    return why_memories_are_whole(settings) is None


def check_expert_parallel(settings: object) -> None:
    """Raises ValueError where --mom-expert-parallel or --mom-expert-exchange has an unknown value, or the first of them
    asks for a split that cannot be.
    """
    if settings.mom_expert_exchange not in EXPERT_EXCHANGES:
        raise ValueError(
            f"--mom-expert-exchange must be one of {', '.join(EXPERT_EXCHANGES)}, got {settings.mom_expert_exchange!r}"
        )
    choice = settings.mom_expert_parallel
    if choice not in EXPERT_PARALLEL:
        raise ValueError(f"--mom-expert-parallel must be one of {', '.join(EXPERT_PARALLEL)}, got {choice!r}")
    if choice == "on" and not has_router(settings):
        raise ValueError(
            f"--mom-expert-parallel on: --token-mixer {settings.token_mixer} has one memory: leave out "
            "--mom-expert-parallel"
        )
    if choice == "on" and settings.expert_model_parallel_size > 1 and (reason := why_memories_are_whole(settings)):
        raise ValueError(
            f"--mom-expert-parallel on: {reason}: change that, or give --mom-expert-parallel auto, which then keeps "
            "all memories on every rank"
        )


def describe_memories(settings: object) -> str | None:
    """A line for the start of a run: where the memories of a model are; None without expert parallelism."""
    experts, memories = settings.expert_model_parallel_size, settings.mom_num_memories
    if experts == 1:
        return None
    if not has_router(settings):
        return f"--token-mixer {settings.token_mixer} has one memory, whole on each of {experts} expert-parallel ranks"
    if splits_memories(settings):
        return (
            f"memories: {memories // experts} of {memories} on each of {experts} expert-parallel ranks, which exchange "
            f"tokens by {expert_exchange(settings)}"
        )
    reason = "--mom-expert-parallel off" if settings.mom_expert_parallel == "off" else why_memories_are_whole(settings)
    return f"memories: all {memories} on each of {experts} expert-parallel ranks, because {reason}"


def has_memories(settings: object) -> bool:
    """Whether a model's arguments or configuration choose one of our token mixers: Mixture-of-Memories, or an update
    rule alone. Megatron's own have no token_mixer."""
    return getattr(settings, "token_mixer", "attention") != "attention"


def has_router(settings: object) -> bool:
    """Whether a model's arguments or configuration choose Mixture-of-Memories, and not an update rule alone."""
    return getattr(settings, "token_mixer", "attention") == "mom"


def settle_token_mixer(settings: object, unset: Mapping[str, object]) -> None:
    """Where --token-mixer names an update rule, sets --mom-rule and the router's settings to what a layer of one memory
    has, so that all that reads them needs to know nothing of such layers.

    Args:
        settings: a model's arguments or configuration, changed in place.
        unset: the value that a setting has where the user gave none.

    Raises:
        ValueError: a setting that a layer of one memory does not have.
    """
    rule = settings.token_mixer
    if rule not in rule_names():
        return
    for name, only in {"rule": rule, **ONE_MEMORY}.items():
        given = getattr(settings, f"mom_{name}", only)
        if given not in (only, unset.get(f"mom_{name}")):
            option = f"--mom-{name.replace('_', '-')} {given}"
            raise ValueError(f"{option}: --token-mixer {rule} is one memory of that rule alone: leave the option out")
        setattr(settings, f"mom_{name}", only)


def argument(default, help: str, *, choices=None, fixed: bool = False, kind: type | None = None):
    """A field of the configuration that is an argument of the command line too.

    Args:
        help: for ``--help``, without the default.
        choices: the accepted values, or a function that returns them.
        fixed: a checkpoint fixes the value: another value gives the weights another meaning.
        kind: type of a value on the command line; the default's type where absent.
    """
    metadata = {"help": help, "choices": choices, "fixed": fixed, "kind": kind or type(default)}
    return field(default=default, metadata=metadata)


@dataclass
class MomTransformerConfig(TransformerConfig):
    """TransformerConfig for a model whose token mixers may be Mixture-of-Memories layers, or layers of one memory.

    ``linear_attention_freq`` has Megatron's meaning, with MoM as the linear attention: an integer N makes every N-th
    layer softmax attention, a list names every layer's mixer (1 = MoM, 0 = softmax attention), None makes every layer
    MoM.

    Raises ValueError for a value, or a combination with Megatron's own settings, that does not work.
    """

    token_mixer: str = argument(
        "attention", "Token mixer of the decoder's layers: Megatron's attention, Mixture-of-Memories (mom), or one "
        "memory of an update rule alone.", choices=token_mixers, fixed=True,
    )  # fmt: skip
    mom_rule: str = argument("gated_deltanet", "Memory update rule.", choices=rule_names, fixed=True)
    mom_num_memories: int = argument(4, "Memories of a layer, without the shared memory.", fixed=True)
    mom_topk: int = argument(2, "Memories that the router sends a token to.", fixed=True)
    mom_shared_memory: bool = argument(True, "Keep one more memory, which every token goes to.", fixed=True)
    mom_num_heads: int = argument(4, "Heads of a memory.", fixed=True)
    mom_head_dim: int = argument(256, "Key size of a head.", fixed=True)
    mom_expand_v: float = argument(1.0, "Value size of a head over its key size.", fixed=True)
    mom_conv_kernel: int = argument(
        4, "Width of the causal convolutions on queries, keys and values; 1 for no convolution.", fixed=True
    )  # fmt: skip
    mom_single_kv_proj: bool = argument(
        False, "One projection of keys, values and raw gates for all memories.", fixed=True
    )  # fmt: skip
    mom_text_conv: int = argument(
        0, "Width of a causal convolution over the text, before the router; 0 for none, as in the paper.", fixed=True
    )  # fmt: skip
    mom_aux_loss_coeff: float = argument(
        1e-3, "Coefficient of the memory router's load-balancing loss; 0 switches the loss off."
    )  # fmt: skip
    mom_z_loss_coeff: float | None = argument(
        None, "Coefficient of the memory router's z-loss; None switches the loss off.", kind=float
    )  # fmt: skip
    mom_expert_parallel: str = argument(
        "auto", "Whether --expert-model-parallel-size splits the memories; auto: where that works.",
        choices=EXPERT_PARALLEL,
    )  # fmt: skip
    mom_expert_exchange: str = argument(
        "auto", "How tokens travel to the ranks of their memories and back: all-to-all sends what is needed, and the "
        "host waits in every layer; all-gather sends every token to every rank; peer-memory reads the other GPUs of a "
        "machine. auto: all-to-all.", choices=EXPERT_EXCHANGES,
    )  # fmt: skip
    mom_loss_chunk: int = argument(
        0, "Tokens of a rank whose logits exist at once: the output layer and the loss go through a micro-batch in "
        "chunks, for long sequences. 0: all tokens.",
    )  # fmt: skip
    mom_kernels: str = argument(
        "auto", "Implementation of the mixer's operations: Triton, PyTorch, or auto for Triton on GPUs and PyTorch "
        "elsewhere.", choices=KERNELS,
    )  # fmt: skip

    contiguous_context_slices: bool = False
    """Whether a context-parallel rank holds one contiguous slice of a sequence; Megatron's batches have two."""
    sft: bool = False
    use_megatron_fsdp: bool = False
    use_torch_fsdp2: bool = False
    """Megatron's arguments of these names, which its own configuration does not have."""

    def __post_init__(self) -> None:
        size = self.expert_model_parallel_size
        if has_memories(self) and self.num_moe_experts is None:
            self.expert_model_parallel_size = 1  # in a model without experts Megatron accepts only 1
        super().__post_init__()
        self.expert_model_parallel_size = size
        self._check_token_mixer()

    @classmethod
    def adopt(cls, config: TransformerConfig, **settings) -> None:
        """Makes a configuration of Megatron's class one of this class (with multi-latent attention, one of
        `MomMLATransformerConfig`), with the given values of our fields and the defaults of the others.

        Changes the object in place: data parallelism, schedules and the optimizer hold a reference to it already.
        """
        config.__class__ = MomMLATransformerConfig if isinstance(config, MLATransformerConfig) else cls
        for ours in fields(cls):
            if ours.name not in TransformerConfig.__dataclass_fields__:
                setattr(config, ours.name, settings.pop(ours.name, ours.default))
        assert not settings, settings
        config._check_token_mixer()

    def _check_token_mixer(self) -> None:
        if self.token_mixer not in token_mixers():
            raise ValueError(f"--token-mixer must be one of {', '.join(token_mixers())}, got {self.token_mixer!r}")
        settle_token_mixer(self, {f.name: f.default for f in fields(self)})
        if has_memories(self):
            self._check_mom()
            if has_router(self) and self.num_moe_experts is None and getattr(self, LOSS_SCALE_HOOK, None) is None:
                # Megatron passes the scale of the main loss to the router losses of models with experts, and to this
                # hook in every model. A release without the hook ignores the attribute, and says in
                # megatron_patches.releases what takes its place.
                setattr(self, LOSS_SCALE_HOOK, self._scale_router_losses())

    def _scale_router_losses(self) -> Callable[[torch.Tensor], None]:
        """Sets the scale of the memory routers' losses, and that of sparse attention's loss, whose place this takes."""
        if self.experimental_attention_variant != "dsa":
            return MoEAuxLossAutoScaler.set_loss_scale
        from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler

        def scale(value: torch.Tensor) -> None:
            MoEAuxLossAutoScaler.set_loss_scale(value)
            DSAIndexerLossAutoScaler.set_loss_scale(value)

        return scale

    @property
    def mom_value_dim(self) -> int:
        """Value size of a head."""
        return int(self.mom_head_dim * self.mom_expand_v)

    def mixer_settings(self) -> MixerSettings:
        """Sizes and choices of a layer of memories, of all tensor-parallel ranks together."""
        names = {f.name for f in fields(self)}
        settings = {f.name: getattr(self, f"mom_{f.name}") for f in fields(MixerSettings) if f"mom_{f.name}" in names}
        return MixerSettings(norm_eps=self.layernorm_epsilon, **settings)

    def mom_layer_pattern(self) -> list[bool]:
        """For each of the model's layers, whether its token mixer is ``token_mixer``, and not softmax attention."""
        freq = self.linear_attention_freq
        if not has_memories(self):
            return [False] * self.num_layers
        if freq is None:
            return [True] * self.num_layers
        if isinstance(freq, int):
            return [(layer + 1) % freq != 0 for layer in range(self.num_layers)]
        return [bool(layer) for layer in freq]

    def _check_mom(self) -> None:
        if self.mom_kernels not in KERNELS:
            raise ValueError(f"--mom-kernels must be one of {', '.join(KERNELS)}, got {self.mom_kernels!r}")
        if has_router(self) and self.mom_num_memories == 0:
            raise ValueError(
                "--mom-num-memories must be at least 1, got 0: "
                f"--token-mixer {self.mom_rule} trains one memory alone, without a router"
            )
        if not 0 <= self.mom_loss_chunk < 2**31:
            raise ValueError(
                f"--mom-loss-chunk must be a number of tokens below {2**31}, or 0 for all, got {self.mom_loss_chunk}"
            )
        settings = self.mixer_settings()
        if self.mom_kernels != "torch":
            settings.check_head_sizes()
        if settings.update_rule.key_heads is not None and self.tensor_model_parallel_size > 1:
            raise ValueError(
                f"--mom-rule {self.mom_rule} shares keys between heads, which tensor parallelism would split: "
                f"--tensor-model-parallel-size must be 1, got {self.tensor_model_parallel_size}"
            )
        if self.mom_num_heads % self.tensor_model_parallel_size:
            raise ValueError(
                f"--mom-num-heads {self.mom_num_heads} does not divide over "
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size}: give a multiple of "
                f"{self.tensor_model_parallel_size}"
            )
        check_expert_parallel(self)
        self._check_pattern()
        self._check_context_parallel()
        for name, coefficient in [("aux", self.mom_aux_loss_coeff), ("z", self.mom_z_loss_coeff or 0.0)]:
            if not 0 <= coefficient < float("inf"):
                raise ValueError(f"--mom-{name}-loss-coeff must be a number that is not negative, got {coefficient}")
        variant = self.experimental_attention_variant
        inference = self.transformer_impl == "inference_optimized"
        refuse_beside_mixer(self, [
            (self.hybrid_context_parallel, "--hybrid-context-parallel", "use --context-parallel-size alone"),
            (
                variant is not None and not (variant == "dsa" and self.is_hybrid_model),
                f"--experimental-attention-variant {variant}", "leave out one of the two mixers",
            ),
            (self.heterogeneous_block_specs, "--heterogeneous-layers-config-path", "use --linear-attention-freq"),
            (inference, "--transformer-impl inference_optimized", "use local or transformer_engine"),
        ])  # fmt: skip

    def _check_context_parallel(self) -> None:
        size = self.context_parallel_size
        softmax = self.mtp_num_layers or not all(self.mom_layer_pattern())
        if size > 1 and self.transformer_impl == "local" and softmax:
            raise ValueError(
                f"softmax attention layers need --transformer-impl transformer_engine with --context-parallel-size "
                f"{size}; local attention cannot split a sequence: make every layer MoM (no --linear-attention-freq, "
                "no --mtp-num-layers)"
            )
        settings = self.mixer_settings()
        if size > 1 and settings.update_rule.check_slices is not None:
            settings.update_rule.check_slices(settings.head_dim, settings.value_dim, size)

    def _check_pattern(self) -> None:
        freq = self.linear_attention_freq
        if isinstance(freq, int) and freq < 2:
            raise ValueError(
                f"--linear-attention-freq {freq} leaves no MoM layer: give N >= 2 for one softmax layer in N, "
                "a list such as ([1]*7+[0])*3, or leave the argument out for MoM in every layer"
            )
        if isinstance(freq, list):
            if len(freq) != self.num_layers or set(freq) - {0, 1}:
                raise ValueError(
                    f"--linear-attention-freq must list a 0 or 1 for each of the {self.num_layers} layers, got {freq}"
                )
            if not any(freq):
                raise ValueError("--linear-attention-freq lists no MoM layer: use --token-mixer attention instead")


@dataclass
class MomMLATransformerConfig(MomTransformerConfig, MLATransformerConfig):
    """MomTransformerConfig for a model whose softmax layers are multi-latent attention."""

    multi_latent_attention: bool = True


def configure(core_transformer_config_from_args, args) -> TransformerConfig:
    """Configuration of a model that may have memories, from Megatron's function and the arguments of a run.

    Megatron's function replaces every class by MLATransformerConfig where --multi-latent-attention is given.
    """
    if not args.multi_latent_attention:
        return core_transformer_config_from_args(args, MomTransformerConfig)
    without_split = copy.copy(args)
    if not args.num_experts:
        without_split.expert_model_parallel_size = 1  # in a model without experts Megatron accepts only 1
    config = core_transformer_config_from_args(without_split)
    config.expert_model_parallel_size = args.expert_model_parallel_size
    ours = {field.name for field in fields(MomTransformerConfig)} - TransformerConfig.__dataclass_fields__.keys()
    MomTransformerConfig.adopt(config, **{name: getattr(args, name) for name in ours if hasattr(args, name)})
    return config
