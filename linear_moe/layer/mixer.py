"""Mixture-of-Memories as Megatron's token mixer: projections sharded by head around :mod:`mom_layers`.

Shape legend: s tokens a sequence, b sequences, h hidden size, H heads here (all / tensor-parallel size), K key size,
V value size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from linear_moe.config import MomTransformerConfig, expert_exchange, splits_memories
from linear_moe.layer.checkpoint import split_for_checkpoint
from linear_moe.layer.router import MemoryRouter
from linear_moe.layer.sharded_parameters import store_shard, whole_parameters
from linear_moe.parallel.choices import Choices
from linear_moe.parallel.context import ContextSlice
from linear_moe.parallel.document_order import DocumentOrder
from linear_moe.parallel.expert import mix_memories_over_ranks
from linear_moe.parallel.sequence_counts import most_sequences
from linear_moe.parallel.sequence_order import SequenceOrder
from megatron_patches.torch_fsdp2 import APART
from mom_layers.mixing import MemoryParameters, mix_routed
from mom_layers.recur.rules import kept_exact


@dataclass
class MomTokenMixerSubmodules:
    """The two linear layers that Megatron shards: queries and output gate in, hidden states out."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class MomTokenMixer(MegatronModule):
    """Drop-in for a Megatron layer's ``self_attention``.

    Heads are sharded over the tensor-parallel group: queries, output gates, every memory's projection, convolutions and
    the rule's parameters by head; the router and the per-head norm are whole on every rank. Memories are sharded over
    the expert-parallel group where `linear_moe.config.splits_memories` says so: ``memory_proj`` then holds the
    projections of this rank's memories, and ``shared_proj`` the projection of the shared memory. Elsewhere
    ``memory_proj`` holds the projections of all memories, for one grouped product. Sequences are cut over the
    context-parallel group in Megatron's order (or, with ``contiguous_context_slices``, in the order of time); inside
    the mixer they are in the order of time.
    """

    def __init__(
        self,
        config: MomTransformerConfig,
        submodules: MomTokenMixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        **_,
    ):
        super().__init__(config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.layer_number = layer_number
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.ep_group = pg_collection.ep
        self.cp_group = pg_collection.cp
        self.splits_memories = splits_memories(config)
        self.order = None
        if self.cp_group.size() > 1 and not config.contiguous_context_slices:
            group = pg_collection.tp_cp if config.sequence_parallel else self.cp_group
            self.order = SequenceOrder(group, self.cp_group.size())
        # Multi-token prediction numbers its layers on from the last one of the model.
        layers = max(config.num_layers, layer_number)
        self.settings = replace(config.mixer_settings(), layer=layer_number - 1, num_layers=layers)
        self.rule = self.settings.update_rule

        heads, tp_size = config.mom_num_heads, pg_collection.tp.size()
        self.num_heads = heads // tp_size
        self.local_settings = replace(self.settings, num_heads=self.num_heads)
        self.key_width, self.value_width = self.local_settings.key_width, self.local_settings.value_width
        self.sizes = self.local_settings.projection_sizes

        self.router = MemoryRouter(config, layer_number, pg_collection)
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            self.settings.key_width + self.settings.value_width,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
            name=f"{name}.in_proj" if name else None,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            heads * config.mom_value_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
            name=f"{name}.out_proj" if name else None,
        )

        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()

        def parameter(*shape, dtype=config.params_dtype, sharded_dim=None):
            weight = torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
            if sharded_dim is not None:
                set_tensor_model_parallel_attributes(weight, True, sharded_dim, 1)
            return weight

        self.num_projections = self.settings.num_projections
        self.memories_here = slice(0, self.num_projections)
        self.shared_proj = None
        if self.splits_memories and not config.mom_single_kv_proj:
            count = config.mom_num_memories // self.ep_group.size()
            self.memories_here = slice(self.ep_group.rank() * count, (self.ep_group.rank() + 1) * count)
            if config.mom_shared_memory:
                self.shared_proj = parameter(1, sum(self.sizes), config.hidden_size, sharded_dim=1)
        count = self.memories_here.stop - self.memories_here.start
        self.memory_proj = parameter(count, sum(self.sizes), config.hidden_size, sharded_dim=1)
        if self._is_reduced_as_experts_are():
            self.memory_proj.allreduce = False
        width = config.mom_conv_kernel
        self.q_conv = parameter(self.key_width, width, sharded_dim=0)
        self.k_conv = parameter(self.key_width, width, sharded_dim=0)
        self.v_conv = parameter(self.value_width, width, sharded_dim=0)
        self.norm_weight = parameter(config.mom_value_dim)
        for own, shape in self.rule.parameter_shapes(config.mom_head_dim).items():
            # float32 whatever the model's type
            weight = parameter(self.num_heads, *shape, dtype=torch.float32, sharded_dim=0)
            self.register_parameter(own, weight.requires_grad_(own not in self.rule.fixed_parameters))
        if config.perform_initialization:
            self.reset_parameters()

    def _is_reduced_as_experts_are(self) -> bool:
        """Whether the gradient of ``memory_proj`` is summed over the expert-data group, and not over the data group.

        Without expert parallelism the two groups are the same. The expert-data group is taken all the same: so the
        optimizer's parameter groups, and its checkpoint, are the same at every size. A projection that every
        expert-parallel rank holds whole needs the data group.
        """
        config = self.config
        if config.use_megatron_fsdp:  # refuses such a parameter in a model without experts
            return False
        if config.mom_single_kv_proj or (config.expert_model_parallel_size > 1 and not self.splits_memories):
            return False
        return config.expert_tensor_parallel_size == config.tensor_model_parallel_size

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters. A parameter that is drawn on the CPU is drawn whole and cut by head, so that every
        tensor-parallel layout starts from the same weights."""
        config = self.config
        rank, tp_size = self.tp_group.rank(), self.tp_group.size()

        def cut(whole, dim, sizes):
            """This rank's heads of each piece of a fused dimension; sizes are the pieces' local widths."""
            pieces = whole.split([size * tp_size for size in sizes], dim)
            return torch.cat([p.chunk(tp_size, dim)[rank] for p in pieces], dim)

        def drawn(init, weight, dim, sizes):
            shape = list(weight.shape)
            shape[dim] *= tp_size
            whole = torch.empty(shape, dtype=torch.float32)
            init(whole)
            weight.copy_(cut(whole, dim, sizes))

        memories = self.memory_proj.new_empty(self.num_projections, *self.memory_proj.shape[1:])
        if config.use_cpu_initialization:
            drawn(config.init_method, self.in_proj.weight, 0, [self.key_width, self.value_width])
            drawn(config.init_method, memories, 1, self.sizes)
        else:
            with get_cuda_rng_tracker().fork():
                config.init_method(memories)
        self.memory_proj.copy_(memories[self.memories_here])
        if self.shared_proj is not None:
            self.shared_proj.copy_(memories[-1:])
        bound = config.mom_conv_kernel**-0.5
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            drawn(lambda weight: weight.uniform_(-bound, bound), conv, 0, [conv.shape[0]])
        for name, whole in self.settings.initial_parameters().items():
            getattr(self, name).copy_(whole.chunk(tp_size)[rank])
        torch.nn.init.ones_(self.norm_weight)

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
        weights, ids = self.router(hidden_states)
        projected, _ = self.in_proj(hidden_states)
        x, weights, ids = self._all_tokens(hidden_states, weights, ids)
        length, batch = x.shape[:2]
        borders, sequence_slice = self._token_borders(packed_seq_params, batch, length, x.device)
        # The plan takes ids sequence by sequence. All other tensors stay time first; the plan is reordered for them.
        ids = ids.transpose(0, 1).flatten(0, 1)
        q, output_gate = projected.flatten(0, 1).split([self.key_width, self.value_width], dim=1)
        routed = self.memory_parameters(self.memory_proj)
        if self.splits_memories:
            y = mix_memories_over_ranks(
                x.flatten(0, 1), q, output_gate, weights.flatten(0, 1),
                self._choices(ids, borders, packed_seq_params, batch > 1), routed, self._shared_parameters(),
                exchange=expert_exchange(self.config), sequence_slice=sequence_slice,
            )  # fmt: skip
        else:
            y, _ = mix_routed(
                x.flatten(0, 1), q, output_gate, weights.flatten(0, 1), ids, borders, routed,
                time_major=batch > 1, sequence_slice=sequence_slice, kernels=self.config.mom_kernels,
            )  # fmt: skip
        y = y.unflatten(0, (length, batch))
        out, bias = self.out_proj(y)
        return (out if order is None else order.to_zigzag(out)), bias

    def _order(self, hidden_states, packed_seq_params) -> SequenceOrder | DocumentOrder | None:
        """The order of the tokens over the context-parallel ranks; None for the order of time."""
        if self.order is None or packed_seq_params is None or not self.config.sft:
            return self.order
        borders = packed_seq_params.cu_seqlens_q_padded
        borders = packed_seq_params.cu_seqlens_q if borders is None else borders
        return DocumentOrder(self.order.group, self.cp_group.size(), borders, hidden_states.shape[0])

    def _choices(self, ids, borders, packed_seq_params, time_major: bool) -> Choices:
        """The choices of this rank's tokens, for the exchange over the expert-parallel ranks."""
        sequences, ragged = borders.shape[0] - 1, packed_seq_params is not None
        return Choices(
            ids,
            borders,
            num_memories=self.config.mom_num_memories,
            group=self.ep_group,
            most_sequences=most_sequences(packed_seq_params.cu_seqlens_q, sequences, self.ep_group)
            if ragged
            else sequences,
            ragged=ragged,
            time_major=time_major,
            context_size=self.cp_group.size(),
            kernels=self.config.mom_kernels,
        )

    def _all_tokens(self, hidden_states, weights, ids):
        """Every token on every tensor-parallel rank; backward sums what the ranks' heads contribute."""
        if self.config.sequence_parallel:
            group = {"group": self.tp_group}
            ids = gather_from_sequence_parallel_region(ids, tensor_parallel_output_grad=False, **group)
            return (
                gather_from_sequence_parallel_region(hidden_states, **group),
                gather_from_sequence_parallel_region(weights, **group),
                ids,
            )
        return (
            copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group),
            copy_to_tensor_model_parallel_region(weights, group=self.tp_group),
            ids,
        )

    def _token_borders(self, packed_seq_params, batch, length, device):
        """Borders [B + 1] int32: first token of every sequence or packed document, then the number of tokens. Under
        context parallelism also the slice that this rank holds, else None.
        """
        ranks = self.cp_group.size()
        if packed_seq_params is None:
            borders = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
            return borders, ContextSlice(self.cp_group, length) if ranks > 1 else None
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
        here = ContextSlice(self.cp_group, length, borders)
        return here.local_documents(), here

    def memory_parameters(self, projection: torch.Tensor) -> MemoryParameters:
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

    def _shared_parameters(self) -> MemoryParameters | None:
        """Parameters of the shared memory where memories are split over ranks; None without a shared memory."""
        if not self.config.mom_shared_memory:
            return None
        return self.memory_parameters(self.memory_proj if self.shared_proj is None else self.shared_proj)

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
            {
                "memory_proj": 1,
                "shared_proj": 1,
                "q_conv": 0,
                "k_conv": 0,
                "v_conv": 0,
                **dict.fromkeys(self.rule.parameter_names, 0),
            },
            sharded_offsets=sharded_offsets,
            tp_group=tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in children.items():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group
            )
        splits = {
            "in_proj.weight": {"dim": 0, "names": ["query", "gate"], "sizes": [self.key_width, self.value_width]},
            "memory_proj": {"dim": 1, "names": ["key", "value", *self.rule.gate_widths], "sizes": self.sizes},
        }
        if self.memory_proj.shape[0] < self.num_projections:
            routed = sharded[prefix + "memory_proj"]
            routed.replica_id = (*routed.replica_id[:2], self.pg_collection.expt_dp.rank())
            splits["memory_proj"] |= {"first": self.memories_here.start, "total": self.num_projections}
            if self.shared_proj is not None:
                sharded[prefix + "shared_proj"].key = routed.key
                splits["shared_proj"] = splits["memory_proj"] | {"first": self.num_projections - 1}
        for name, split in splits.items():
            tensor = sharded[prefix + name]
            if not isinstance(tensor, ShardedTensorFactory):
                sharded[prefix + name] = split_for_checkpoint(tensor, **split)
        return sharded
