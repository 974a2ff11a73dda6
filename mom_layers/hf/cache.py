"""What a model keeps between calls: states of MoM layers, of constant size, and keys and values of softmax layers."""

from __future__ import annotations

from dataclasses import fields

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.state import MemoryState

#: What transformers calls the cache in a model's arguments and outputs: "cache" from 5.24 on.
CACHE_NAME = next(f.name for f in fields(MoeModelOutputWithPast) if f.name in ("cache", "past_key_values"))


class MemoryLayer(CacheLayerMixin):
    """One MoM layer's state, and the number of tokens that the state has seen.

    Attributes:
        state: None before the first token.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: MemoryState | None = None
        self.num_tokens = 0

    def advance(self, state: MemoryState, new_tokens: int) -> None:
        """Replaces the state by the one after ``new_tokens`` more tokens."""
        self.state = state
        self.num_tokens += new_tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.state, self.num_tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self.state = self.state.select(indices.to(self.state.recurrent.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            index = torch.arange(self.state.recurrent.shape[0], device=self.state.recurrent.device)
            self.state = self.state.select(index.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("a memory state cannot be cropped: a state does not keep the tokens that wrote it")

    def lazy_initialization(self, key_states, value_states) -> None:
        raise TypeError("a MoM layer keeps a state, not keys and values")

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError("a MoM layer keeps a state, not keys and values")


class MomCache(Cache):
    """The cache that a MoM model reads and writes; pass it as ``past_key_values`` to go on from earlier calls.

    Its size does not depend on the number of tokens seen, save for the softmax layers of a hybrid model.
    """

    def __init__(self, config: MomConfig):
        windows = {layer: spec.window_size for spec in config.attention_specs() for layer in spec.layers}
        layers = []
        for index in range(config.num_hidden_layers):
            if index not in windows:
                layers.append(MemoryLayer())
            elif windows[index] is None:
                layers.append(DynamicLayer())
            else:
                layers.append(DynamicSlidingWindowLayer(sliding_window=windows[index]))
        super().__init__(layers=layers)

    def reset(self) -> None:
        """Drops all states, keys and values, so that the next call may have another batch size."""
        for layer in self.layers:
            if not isinstance(layer, MemoryLayer):  # transformers before 5.20 keeps keys and values, as zeros
                layer.keys = layer.values = None
                layer.is_initialized = False
            layer.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, MemoryLayer):
                total += 0 if layer.state is None else layer.state.nbytes
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total


def one_cache(past_key_values: MomCache | None, cache: MomCache | None) -> MomCache | None:
    """The cache that a caller has passed under one of transformers' two names.

    Raises:
        ValueError: two caches, or a cache of another class.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("pass either cache or past_key_values: these are two names of one argument")
    chosen = past_key_values if cache is None else cache
    if chosen is not None and not isinstance(chosen, MomCache):
        raise ValueError(f"past_key_values must be a MomCache, got {type(chosen).__name__}")
    return chosen
