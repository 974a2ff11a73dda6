"""Mixture-of-Memories as Megatron's token mixer: projections sharded by head around :mod:`mom_layers`.

Shape legend: s tokens a sequence, b sequences, h hidden size, H heads here (all / tensor-parallel size), K key size,
V value size.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)

from linear_moe.config import MomTransformerConfig, expert_exchange, splits_memories
from linear_moe.layer.recurrent_mixer import RecurrentTokenMixer, TokenMixerSubmodules
from linear_moe.layer.router import MemoryRouter
from linear_moe.parallel.choices import Choices
from linear_moe.parallel.expert import mix_memories_over_ranks
from linear_moe.parallel.peer_memory import PeerBuffers
from linear_moe.parallel.sequence_counts import compare_once, counts_now, counts_of_batch
from mom_layers.convolve.text import convolve_text
from mom_layers.mixing import MemoryParameters, mix_routed
from mom_layers.route.sequences import plan_sequences


class MomTokenMixer(RecurrentTokenMixer):
    """Drop-in for a Megatron layer's ``self_attention``.

    Every memory's projection is sharded by head over the tensor-parallel group, as queries and output gates are; the
    router is whole on every rank. Memories are sharded over the expert-parallel group where
    `linear_moe.config.splits_memories` says so: ``memory_proj`` then holds the projections of this rank's memories, and
    ``shared_proj`` the projection of the shared memory. Elsewhere ``memory_proj`` holds the projections of all
    memories, for one grouped product.
    """

    def __init__(
        self,
        config: MomTransformerConfig,
        submodules: TokenMixerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        **_,
    ):
        super().__init__(config, layer_number, pg_collection)
        self.ep_group = self.pg_collection.ep
        self.splits_memories = splits_memories(config)
        # Held by every layer that reads them, so that they go with the model.
        self.peer_buffers = PeerBuffers.of(self.ep_group) if self.splits_memories else None
        self.sizes = self.local_settings.projection_sizes
        self.router = MemoryRouter(config, layer_number, self.pg_collection)
        self.text_conv = None
        if config.mom_text_conv:
            self.text_conv = self.new_parameter(config.hidden_size, config.mom_text_conv)
            self._mark_text_conv()
        self.make_linear_layers(submodules, ["query", "gate"], [self.key_width, self.value_width], name)

        self.num_projections = self.settings.num_projections
        self.memories_here = slice(0, self.num_projections)
        self.shared_proj = None
        if self.splits_memories and not config.mom_single_kv_proj:
            count = config.mom_num_memories // self.ep_group.size()
            self.memories_here = slice(self.ep_group.rank() * count, (self.ep_group.rank() + 1) * count)
            if config.mom_shared_memory:
                self.shared_proj = self.new_parameter(1, sum(self.sizes), config.hidden_size, sharded_dim=1)
        count = self.memories_here.stop - self.memories_here.start
        self.memory_proj = self.new_parameter(count, sum(self.sizes), config.hidden_size, sharded_dim=1)
        if self._is_reduced_as_experts_are():
            self.memory_proj.allreduce = False
        self.make_inner_parameters()
        self.draw_parameters()

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

    def reset_memories(self) -> None:
        """Draws the projections of all memories, and keeps those of this rank."""
        config = self.config
        memories = self.memory_proj.new_empty(self.num_projections, *self.memory_proj.shape[1:])
        if config.use_cpu_initialization:
            self.draw(config.init_method, memories, 1, self.sizes)
        else:
            with get_cuda_rng_tracker().fork():
                config.init_method(memories)
        self.memory_proj.copy_(memories[self.memories_here])
        if self.shared_proj is not None:
            self.shared_proj.copy_(memories[-1:])
        if self.text_conv is not None:
            bound = config.mom_text_conv**-0.5
            self._mark_text_conv()  # memory in place of the meta device comes with new parameters
            self.text_conv.copy_(torch.empty(self.text_conv.shape, dtype=torch.float32).uniform_(-bound, bound))

    def _mark_text_conv(self) -> None:
        """Whole on every rank; with sequence parallelism every rank's gradient is that of its own tokens."""
        self.text_conv.sequence_parallel = self.config.sequence_parallel

    def mix(self, hidden_states: torch.Tensor, packed_seq_params) -> tuple[torch.Tensor, int, int]:
        """See :meth:`RecurrentTokenMixer.mix`."""
        if self.text_conv is not None:
            hidden_states = self._convolve_text(hidden_states, packed_seq_params)
        weights, ids = self.router(hidden_states)
        projected, _ = self.in_proj(hidden_states)
        x, weights, ids = self._all_tokens(hidden_states, weights, ids)
        length, batch = x.shape[:2]
        borders, sequence_slice = self.token_borders(packed_seq_params, batch, length, x.device)
        # The plan takes ids sequence by sequence. All other tensors stay time first; the plan is reordered for them.
        ids = ids.transpose(0, 1).flatten(0, 1)
        q, output_gate = projected.flatten(0, 1).split([self.key_width, self.value_width], dim=1)
        routed = self.memory_parameters(self.memory_proj)
        if self.splits_memories:
            y = mix_memories_over_ranks(
                x.flatten(0, 1), q, output_gate, weights.flatten(0, 1),
                self._choices(ids, borders, packed_seq_params, batch > 1), routed, self._shared_parameters(),
                exchange=self.exchange(), sequence_slice=sequence_slice,
            )  # fmt: skip
        else:
            y, _ = mix_routed(
                x.flatten(0, 1), q, output_gate, weights.flatten(0, 1), ids, borders, routed,
                time_major=batch > 1, sequence_slice=sequence_slice, kernels=self.config.mom_kernels,
            )  # fmt: skip
        return y, length, batch

    def exchange(self) -> str:
        """How tokens travel. In evaluation ranks may have batches of different sizes: there exactly the needed rows
        travel, as every other exchange needs the same number of tokens on every rank. CUDA graphs have one size."""
        fixed = self.training or self.config.cuda_graph_impl != "none"
        return expert_exchange(self.config) if fixed else "all-to-all"

    def _convolve_text(self, hidden_states: torch.Tensor, packed_seq_params) -> torch.Tensor:
        """The tokens of this rank [s, b, h] ([s / tp, b, h] with sequence parallelism) after the convolution over the
        text. The ranks of both groups hold parts of every sequence, in the order of time."""
        group = self.pg_collection.tp_cp if self.config.sequence_parallel else self.cp_group
        length, batch = hidden_states.shape[:2]
        borders, sequence_slice = self.token_borders(packed_seq_params, batch, length, hidden_states.device, group)
        kernels = self.config.mom_kernels
        plan = plan_sequences(borders, length * batch, time_major=batch > 1, kernels=kernels)
        tokens, _ = convolve_text(
            hidden_states.flatten(0, 1), self.text_conv, plan, sequence_slice=sequence_slice, kernels=kernels
        )
        return tokens.unflatten(0, (length, batch))

    def _choices(self, ids, borders, packed_seq_params, time_major: bool) -> Choices:
        """The choices of this rank's tokens, for the exchange over the expert-parallel ranks."""
        sequences, tokens, exchange = borders.shape[0] - 1, ids.shape[0], self.exchange()
        ragged, most = packed_seq_params is not None, sequences
        if ragged:
            counts = counts_of_batch(packed_seq_params.cu_seqlens_q, sequences, tokens, self.ep_group)
            most = counts.sequences
            if exchange != "all-to-all":
                counts.check_same_tokens(exchange)
        elif exchange != "all-to-all":
            compare_once(exchange, sequences, tokens, self.ep_group, ids.device)
        elif not self.training:
            most = counts_now(sequences, tokens, self.ep_group, ids.device).sequences
        return Choices(
            ids,
            borders,
            num_memories=self.config.mom_num_memories,
            group=self.ep_group,
            most_sequences=most,
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

    def _shared_parameters(self) -> MemoryParameters | None:
        """Parameters of the shared memory where memories are split over ranks; None without a shared memory."""
        if not self.config.mom_shared_memory:
            return None
        return self.memory_parameters(self.memory_proj if self.shared_proj is None else self.shared_proj)

    def fused_pieces(self, prefix: str, sharded: dict) -> dict[str, dict]:
        """The memories' projections have one name at any expert-parallel size."""
        splits = {
            **super().fused_pieces(prefix, sharded),
            "memory_proj": {"dim": 1, "names": ["key", "value", *self.rule.gate_widths], "sizes": self.sizes},
        }
        if self.memory_proj.shape[0] < self.num_projections:
            routed = sharded[prefix + "memory_proj"]
            routed.replica_id = (*routed.replica_id[:2], self.pg_collection.expt_dp.rank())
            splits["memory_proj"] |= {"first": self.memories_here.start, "total": self.num_projections}
            if self.shared_proj is not None:
                sharded[prefix + "shared_proj"].key = routed.key
                splits["shared_proj"] = splits["memory_proj"] | {"first": self.num_projections - 1}
        return splits
