"""What one forward call knows about its tokens: where they stand, which are padding, which see which."""

from __future__ import annotations

import copy

import torch


class TokenSequence:
    """Positions, masks and borders of the tokens of one forward call, worked out once for all layers.

    Attributes:
        batch, length, past: B sequences of T new tokens each, after ``past`` earlier ones (padding included).
        cu_seqlens: [sequences + 1] int32, borders of the sequences among the B * T tokens.
        token_mask: [B, T] bool, False at padding; None where there is none among these tokens.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        past: int,
        device: torch.device,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        keep_mask: bool = False,
    ):
        """
        Args:
            attention_mask: [B, past + T], 0 at padding.
            position_ids: [B, T] (or longer: the last T count); from the mask when absent.
            cu_seqlens: [documents + 1] borders of documents packed into one sequence (B = 1, past = 0).
            keep_mask: do not look whether the mask is all ones, which waits for the device.

        Raises:
            ValueError: shapes that do not fit together.
        """
        self.batch, self.length, self.past, self.device = batch, length, past, device
        self.packed = cu_seqlens is not None
        if length < 1:
            raise ValueError("the input must have at least one token a sequence")
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + length):
                raise ValueError(
                    f"attention_mask must be {[batch, past + length]} ({past} tokens are in the cache), "
                    f"got {list(attention_mask.shape)}"
                )
            attention_mask = attention_mask.to(device=device, dtype=torch.bool)
            if not keep_mask and attention_mask.all():
                attention_mask = None
        if self.packed:
            if batch != 1 or past or attention_mask is not None or cu_seqlens.dim() != 1:
                raise ValueError(
                    "cu_seqlens packs documents into a batch of one, without padding and without a cache; "
                    f"got a batch of {batch}, {past} cached tokens and cu_seqlens {list(cu_seqlens.shape)}"
                )
            self.cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int32)
        else:
            self.cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
        self.key_mask = attention_mask
        self.token_mask = None if attention_mask is None else attention_mask[:, past:]
        if self.token_mask is not None and past and not keep_mask and self.token_mask.all():
            self.token_mask = None  # padding in what the cache has seen only
        self._position_ids = position_ids
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self._rotations: dict[tuple[float, int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> TokenSequence:
        """The same on another device, for models whose layers are spread over several (accelerate calls this)."""
        if torch.device(device) == self.device:
            return self
        moved = copy.copy(self)
        moved.device = torch.device(device)
        for name in ("cu_seqlens", "key_mask", "token_mask", "_position_ids"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device, non_blocking=non_blocking))
        moved._masks, moved._rotations = {}, {}
        return moved

    def positions(self) -> torch.Tensor:
        """[B or 1, T] place of every token in its sequence or document, padding not counted."""
        if self._position_ids is not None:
            return self._position_ids[:, -self.length :]
        if self.packed:
            index = torch.arange(self.length, dtype=torch.int32, device=self.device)
            return (index - self.cu_seqlens[self._documents().long()])[None]
        if self.key_mask is not None:
            return (self.key_mask.long().cumsum(1) - 1).clamp(min=0)[:, self.past :]
        return torch.arange(self.past, self.past + self.length, device=self.device)[None]

    def rotation(self, theta: float, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B or 1, 1, T, width / 2] of the rotary embedding (arXiv 2104.09864)."""
        key = (theta, width, dtype)
        if key not in self._rotations:
            exponents = torch.arange(0, width, 2, device=self.device, dtype=dtype) / width
            angles = self.positions()[:, None, :, None].to(dtype) * theta**-exponents
            self._rotations[key] = angles.cos(), angles.sin()
        return self._rotations[key]

    def attention_mask(self, num_keys: int, window: int | None) -> torch.Tensor | None:
        """Which of the last ``num_keys`` tokens each new token sees: bool [B or 1, 1, T, keys].

        None where plain causal attention (no earlier tokens) or seeing every key (one new token) says the same. A
        padding token sees itself, so that its row of the softmax is not empty; nothing reads what comes out of it.
        """
        key = (num_keys, window)
        if key not in self._masks:
            self._masks[key] = self._build_mask(num_keys, window)
        return self._masks[key]

    def _build_mask(self, num_keys, window):
        total = self.past + self.length
        narrowed = window is not None and window < num_keys
        if self.key_mask is None and not self.packed and not narrowed and (self.length == 1 or num_keys == self.length):
            return None
        queries = torch.arange(self.past, total, device=self.device)[:, None]
        keys = torch.arange(total - num_keys, total, device=self.device)[None]
        seen = keys <= queries
        if narrowed:
            seen = seen & (keys > queries - window)
        if self.packed:
            documents = self._documents()
            seen = seen & (documents[:, None] == documents)
        seen = seen[None]
        if self.key_mask is not None:
            seen = seen & self.key_mask[:, None, total - num_keys :] | (keys == queries)
        return seen[:, None]

    def _documents(self) -> torch.Tensor:
        """[T] which packed document each token belongs to."""
        index = torch.arange(self.length, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.cu_seqlens, index, right=True) - 1
