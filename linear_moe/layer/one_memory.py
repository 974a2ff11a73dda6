"""One memory of an update rule alone as Megatron's token mixer: ``--token-mixer gated_deltanet``, without a router.

Shape legend: s tokens a sequence, b sequences, h hidden size, H heads here (all / tensor-parallel size), K key size,
V value size, columns of the raw gates P.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from linear_moe.config import MomTransformerConfig
from linear_moe.layer.recurrent_mixer import RecurrentTokenMixer, TokenMixerSubmodules
from mom_layers.one_memory import mix_projected
from mom_layers.route.sequences import plan_sequences


class OneMemoryTokenMixer(RecurrentTokenMixer):
    """Drop-in for a Megatron layer's ``self_attention``.

    ``in_proj`` projects queries, keys, values, raw gates and output gates in one product, [h] -> [H (3 K + ...)]; with
    Transformer Engine the layer's input norm is a part of that module. There is nothing to split over the
    expert-parallel group.
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
        names = ["query", "key", "value", *self.rule.gate_widths, "output_gate"]
        self.make_linear_layers(submodules, names, self.local_settings.fused_sizes, name)
        self.make_inner_parameters()
        self.draw_parameters()

    def mix(self, hidden_states: torch.Tensor, packed_seq_params) -> tuple[torch.Tensor, int, int]:
        """See :meth:`RecurrentTokenMixer.mix`."""
        projected, _ = self.in_proj(hidden_states)
        length, batch = projected.shape[:2]
        borders, sequence_slice = self.token_borders(packed_seq_params, batch, length, projected.device)
        kernels = self.config.mom_kernels
        # Tokens lie time first. A single sequence lies in order; of several, the convolutions read every token's row.
        plan = plan_sequences(borders, length * batch, time_major=batch > 1, kernels=kernels)
        y, _ = mix_projected(
            projected.flatten(0, 1), plan, self.memory_parameters(None), sequence_slice=sequence_slice, kernels=kernels
        )
        return y, length, batch
