"""The base class of Megatron's token mixers: everything around :mod:`mom_layers` that does not depend on a router.

Heads are sharded over the tensor-parallel group: projections, convolutions and the rule's parameters by head; the
per-head norm is whole on every rank. Sequences are cut over the context-parallel group in Megatron's order (or, with
``contiguous_context_slices``, in the order of time); inside a mixer they are in the order of time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from linear_moe.config import MomTransformerConfig
from linear_moe.layer.checkpoint import split_for_checkpoint
from linear_moe.layer.sharded_parameters import store_shard, whole_parameters
from linear_moe.parallel.context import ContextSlice
from linear_moe.parallel.document_order import DocumentOrder
from linear_moe.parallel.sequence_order import SequenceOrder
from megatron_patches.torch_fsdp2 import APART
from mom_layers.mixing import MemoryParameters
from mom_layers.recur.rules import kept_exact, warn_without_kernels


@dataclass
class TokenMixerSubmodules:
    """The two linear layers that Megatron shards: a projection of the tokens in, hidden states out."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class RecurrentTokenMixer(MegatronModule):
    """A Megatron layer's ``self_attention`` with recurrent memories. A subclass has the input projections.

    Attributes:
        settings, local_settings: sizes with all heads, and with the heads of this rank.
        in_sizes: a class's widths of the pieces of ``in_proj``, set by the subclass before :meth:`make_in_proj`.
    """

    def __init__(
        self,
        config: MomTransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None,
    ):
        super().__init__(config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number = layer_number
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.order = None
        if self.cp_group.size() > 1 and not config.contiguous_context_slices:
            group = pg_collection.tp_cp if config.sequence_parallel else self.cp_group
            self.order = SequenceOrder(group, self.cp_group.size())
        # Multi-token prediction numbers its layers on from the last one of the model.
        layers = max(config.num_layers, layer_number)
        self.settings = replace(config.mixer_settings(), layer=layer_number - 1, num_layers=layers)
        self.rule = self.settings.update_rule
        warn_without_kernels(self.rule)
        self.num_heads = config.mom_num_heads // pg_collection.tp.size()
        self.local_settings = replace(self.settings, num_heads=self.num_heads)
        self.key_width, self.value_width = self.local_settings.key_width, self.local_settings.value_width

    def make_linear_layers(self, submodules: TokenMixerSubmodules, in_names, in_sizes, name: str | None) -> None:
        """Builds ``in_proj`` and ``out_proj``.

        Args:
            in_names, in_sizes: of the pieces of the input projection, in order; the sizes are of this rank's heads.
        """
        config, tp_size = self.config, self.tp_group.size()
        self.in_names, self.in_sizes = list(in_names), list(in_sizes)
        options = {"config": config, "bias": False, "skip_bias_add": False, "is_expert": False}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            sum(self.in_sizes) * tp_size,
            init_method=config.init_method,
            gather_output=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
            name=f"{name}.in_proj" if name else None,
            **options,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            config.mom_num_heads * config.mom_value_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
            name=f"{name}.out_proj" if name else None,
            **options,
        )

    def new_parameter(self, *shape, dtype=None, sharded_dim=None) -> torch.nn.Parameter:
        """A parameter without values, marked as sharded by head along ``sharded_dim``."""
        weight = torch.nn.Parameter(torch.empty(*shape, dtype=dtype or self.config.params_dtype, device=self._device()))
        if sharded_dim is not None:
            set_tensor_model_parallel_attributes(weight, True, sharded_dim, 1)
        return weight

    def _device(self) -> torch.device:
        """Where parameters are made. With --init-model-with-meta-device: nowhere. Megatron FSDP gives the modules
        memory one after another, and calls their :meth:`reset_parameters`."""
        if getattr(self.config, "init_model_with_meta_device", False):
            return torch.device("meta")
        return torch.device("cpu" if self.config.use_cpu_initialization else torch.cuda.current_device())

    def draw_parameters(self) -> None:
        """Draws the parameters, where these have memory and no checkpoint supplies their values."""
        if self.config.perform_initialization and self._device().type != "meta":
            self.reset_parameters()

    def make_inner_parameters(self) -> None:
        """The convolutions, the per-head norm and the rule's own parameters."""
        config, width = self.config, self.config.mom_conv_kernel
        for name, channels in (
            ("q_conv", self.key_width),
            ("k_conv", self.key_width),
            ("v_conv", self.value_width),
        ):
            if width > 1:
                setattr(self, name, self.new_parameter(channels, width, sharded_dim=0))
            else:  # no convolution: one fixed tap
                ones = torch.ones(channels, 1, dtype=config.params_dtype, device=self._device())
                self.register_buffer(name, ones, persistent=False)
        self.norm_weight = self.new_parameter(config.mom_value_dim)
        for own, shape in self.rule.parameter_shapes(config.mom_head_dim).items():
            # float32 whatever the model's type
            weight = self.new_parameter(self.num_heads, *shape, dtype=torch.float32, sharded_dim=0)
            self.register_parameter(own, weight.requires_grad_(own not in self.rule.fixed_parameters))

    @torch.no_grad()
    def draw(self, init, weight: torch.Tensor, dim: int, sizes: list[int]) -> None:
        """Draws a parameter whole on the CPU and cuts it by head, so that every tensor-parallel layout starts from the
        same weights; sizes are the local widths of the pieces of a fused dimension."""
        rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        shape = list(weight.shape)
        shape[dim] *= tp_size
        whole = torch.empty(shape, dtype=torch.float32)
        init(whole)
        pieces = whole.split([size * tp_size for size in sizes], dim)
        weight.copy_(torch.cat([piece.chunk(tp_size, dim)[rank] for piece in pieces], dim))

    def sharded_dimensions(self) -> dict[str, int]:
        """The dimension along which the heads of a parameter are sharded, by the parameter's name."""
        by_head = dict.fromkeys(("q_conv", "k_conv", "v_conv", *self.rule.parameter_names), 0)
        return {"memory_proj": 1, "shared_proj": 1} | by_head

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters."""
        config = self.config
        for name, dimension in self.sharded_dimensions().items():
            # Memory in place of the meta device comes with new parameters, without Megatron's marks.
            weight = self._parameters.get(name)
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, dimension, 1)
        if config.use_cpu_initialization and not self.in_proj.weight.is_meta:
            self.draw(config.init_method, self.in_proj.weight, 0, self.in_sizes)
        self.reset_memories()
        bound = config.mom_conv_kernel**-0.5
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            if config.mom_conv_kernel > 1:
                self.draw(lambda weight: weight.uniform_(-bound, bound), conv, 0, [conv.shape[0]])
            else:
                conv.fill_(1.0)
        rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        for name, whole in self.settings.initial_parameters().items():
            getattr(self, name).copy_(whole.chunk(tp_size)[rank])
        torch.nn.init.ones_(self.norm_weight)

    def reset_memories(self) -> None:
        """Draws the memories' own projections, where a mixer has such projections."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context=None,
        packed_seq_params=None,
        **_,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [s, b, h] ([s / tp, b, h] with sequence parallelism). Returns the same shape and a None bias.

        A recurrence reads neither an attention mask nor rotary embeddings. ``packed_seq_params`` has the borders of
        packed documents. Under context parallelism rank r of P holds s tokens of each sequence: chunks r and
        2 P - 1 - r of 2 P. With packed documents the row of all documents is cut so, and the borders count the tokens
        of that whole row, as ``get_batch_on_this_cp_rank`` makes it with ``use_per_sequence_balancing``. With --sft
        every document is cut so by itself.
        """
        if inference_context is not None:
            raise NotImplementedError(
                "Megatron's inference engines do not keep the memories' states: convert the checkpoint with "
                "tools/convert_to_hf.py and generate text from the export"
            )
        order = self._order(hidden_states, packed_seq_params)
        if order is not None:
            hidden_states = order.to_contiguous(hidden_states)
        y, length, batch = self.mix(hidden_states, packed_seq_params)
        out, bias = self.out_proj(y.unflatten(0, (length, batch)))
        return (out if order is None else order.to_zigzag(out)), bias

    def _order(self, hidden_states, packed_seq_params) -> SequenceOrder | DocumentOrder | None:
        """The order of the tokens over the context-parallel ranks; None for the order of time."""
        if self.order is None or packed_seq_params is None or not self.config.sft:
            return self.order
        borders = packed_seq_params.cu_seqlens_q_padded
        borders = packed_seq_params.cu_seqlens_q if borders is None else borders
        return DocumentOrder(self.order.group, self.cp_group.size(), borders, hidden_states.shape[0])

    def mix(self, hidden_states: torch.Tensor, packed_seq_params) -> tuple[torch.Tensor, int, int]:
        """The outputs before the output projection [s b, H V] of all tokens, time first; s and b."""
        raise NotImplementedError

    def token_borders(self, packed_seq_params, batch, length, device, group=None):
        """Borders [B + 1] int32: first token of every sequence or packed document, then the number of tokens. Where
        sequences are cut over ``group``, by default the context-parallel group, also the slice that this rank holds,
        else None.
        """
        group = self.cp_group if group is None else group
        ranks = group.size()
        if packed_seq_params is None:
            borders = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
            return borders, ContextSlice(group, length) if ranks > 1 else None
        if batch != 1:
            raise ValueError(f"packed documents come as one row of tokens; got a batch of {batch}")
        borders = packed_seq_params.cu_seqlens_q_padded
        if borders is None:
            borders = packed_seq_params.cu_seqlens_q
        # Tokens after the last document are padding: one more sequence, which is empty without padding.
        last = torch.full((1,), length * ranks, dtype=torch.int32, device=device)
        borders = torch.cat([borders.to(torch.int32), last])
        if ranks == 1:
            return borders, None
        here = ContextSlice(group, length, borders)
        return here.local_documents(), here

    def memory_parameters(self, projection: torch.Tensor | None) -> MemoryParameters:
        """What :mod:`mom_layers` reads of this rank's heads."""
        return MemoryParameters(
            settings=self.local_settings,
            projection=projection,
            q_conv=self.q_conv,
            k_conv=self.k_conv,
            v_conv=self.v_conv,
            rule_parameters={name: getattr(self, name) for name in self.rule.parameter_names},
            # Every rank sees only its heads' part of this weight's gradient.
            norm_weight=copy_to_tensor_model_parallel_region(self.norm_weight, group=self.tp_group),
        )

    def backward_dw(self) -> None:
        """Computes the weight gradients that --delay-wgrad-compute put off: of the two linear layers, where these are
        Transformer Engine's. Local linear layers compute theirs in the backward pass, as the memories' projections,
        the convolutions and the router do."""
        for linear in (self.in_proj, self.out_proj):
            if hasattr(linear, "backward_dw"):
                linear.backward_dw()

    def names_sharded_apart(self) -> list[str]:
        """Names of the parameters that torch's FSDP2 shards apart from the others (`megatron_patches.torch_fsdp2`)."""
        return list(self.rule.parameter_names) if self.config.params_dtype != torch.float32 else []

    def _apply(self, fn, recurse=True):
        with kept_exact(self._parameters[name] for name in self.rule.parameter_names if name in self._parameters):
            return super()._apply(fn, recurse)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None):
        """Parameters for a distributed checkpoint. Every piece of a fused parameter has a name of its own, so that the
        piece loads at any tensor-parallel size; the memories' projections have one name at any expert-parallel size."""
        with whole_parameters(self) as shards:
            sharded = self._sharded_state_dict(prefix, sharded_offsets, metadata, tp_group)
        for name, tensor in sharded.items():
            if id(getattr(tensor, "data", None)) in shards:
                sharded[name] = store_shard(tensor, shards[id(tensor.data)])
        return sharded

    def _sharded_state_dict(self, prefix, sharded_offsets, metadata, tp_group):
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        tp_group = self.tp_group if tp_group is None else tp_group
        own: dict = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        children = dict(self.named_children())
        if (apart := children.pop(APART, None)) is not None:
            own |= dict(apart.named_parameters())
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            self.sharded_dimensions(),
            sharded_offsets=sharded_offsets,
            tp_group=tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in children.items():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group
            )
        for name, split in self.fused_pieces(prefix, sharded).items():
            tensor = sharded[prefix + name]
            if not isinstance(tensor, ShardedTensorFactory):
                sharded[prefix + name] = split_for_checkpoint(tensor, **split)
        return sharded

    def fused_pieces(self, prefix: str, sharded: dict) -> dict[str, dict]:
        """The fused parameters, by name, with the arguments of `split_for_checkpoint` that say their pieces."""
        return {"in_proj.weight": {"dim": 0, "names": self.in_names, "sizes": self.in_sizes}}
