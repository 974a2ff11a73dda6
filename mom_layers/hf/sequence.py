"""The tokens of one forward call: their positions, their padding, and which token sees which."""

from __future__ import annotations

import copy

import torch

from mom_layers.common.checks import check_borders, checks_values
from mom_layers.hf.rotary import RopeScaling, frequencies

UNKNOWN_DOCUMENTS = (
    "segment_ids", "document_ids", "sequence_ids", "doc_ids", "cu_seqlens_q", "cu_seqlens_k", "seqlens",
)  # fmt: skip


def described_documents(
    cu_seqlens: torch.Tensor | None, keywords: dict
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Borders and numbers of packed documents from a forward call's arguments: (cu_seqlens, seq_idx).

    Raises:
        ValueError: arguments that disagree, or that describe documents under a name that is not read here.
    """
    unknown = [name for name in UNKNOWN_DOCUMENTS if keywords.get(name) is not None]
    if unknown:
        raise ValueError(f"{unknown[0]} is not supported: give packed documents as cu_seqlens, seq_idx or position_ids")
    given = {name: keywords[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k") if keywords.get(name) is not None}
    if cu_seqlens is not None:
        given["cu_seqlens"] = cu_seqlens
    borders = list(given.values())
    if any(other.shape != borders[0].shape for other in borders[1:]):
        raise ValueError(f"{', '.join(given)} must be the same borders: every token sees its own document alone")
    return (borders[-1] if borders else None), keywords.get("seq_idx")


def document_borders(
    shape: tuple[int, int],
    *,
    cu_seqlens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Borders of the documents that are packed into rows of tokens, from the argument that describes the documents.

    Args:
        shape: B, T.
        cu_seqlens: [documents + 1], first of the B T tokens of every document, then B T.
        seq_idx: [B, T], the number of every token's document: a border where the number changes.
        position_ids: [B or 1, T]: a border where positions do not grow.
        attention_mask: [B, T] bool, False at padding, whose positions mean nothing.

    Returns:
        [documents + 1] int32, or None where every row is one sequence. Waits for the device where ``seq_idx`` or
        ``position_ids`` are given.

    Raises:
        ValueError: shapes or values that describe no documents.
    """
    batch, length = shape
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must be [documents + 1], got {list(cu_seqlens.shape)}")
        check_borders(cu_seqlens, batch * length)
        return cu_seqlens.to(torch.int32)
    if seq_idx is not None:
        if seq_idx.shape != (batch, length):
            raise ValueError(f"seq_idx must be {[batch, length]}, got {list(seq_idx.shape)}")
        begins = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] < length:
            raise ValueError(f"position_ids must be {[batch, length]}, got {list(position_ids.shape)}")
        position_ids = position_ids[:, -length:]
        begins = (position_ids[:, 1:] <= position_ids[:, :-1]).expand(batch, -1)
        if attention_mask is not None:
            begins = begins & attention_mask[:, 1:] & attention_mask[:, :-1]
    else:
        return None
    starts = torch.nn.functional.pad(begins, (1, 0), value=True).flatten().nonzero()[:, 0]
    if starts.shape[0] == batch:
        return None
    return torch.nn.functional.pad(starts, (0, 1), value=batch * length).to(torch.int32)


class TokenSequence:
    """Positions, masks and borders of the tokens of one forward call, computed once for all layers.

    Attributes:
        batch, length, past: B sequences of T new tokens each, after ``past`` earlier ones (padding included).
        packed: documents are packed into the rows.
        cu_seqlens: [sequences + 1] int32, borders of the sequences or documents among the B * T tokens.
        token_mask: [B, T] bool, False at padding; None without padding among these tokens.
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
        seq_idx: torch.Tensor | None = None,
    ):
        """
        Args:
            attention_mask: [B, past + T], 0 at padding, 1 elsewhere.
            position_ids: [B, T] (or longer: the last T are used); counted from the mask when absent. A position that
                does not grow starts another document.
            cu_seqlens: [documents + 1] borders of packed documents.
            keep_mask: keep a mask that may be all ones: the check waits for the device.
            seq_idx: [B, T] numbers of packed documents.

        Raises:
            ValueError: shapes that do not fit together; packed documents after cached tokens.
        """
        self.batch, self.length, self.past, self.device = batch, length, past, device
        if length < 1:
            raise ValueError("the input must have at least one token a sequence")
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + length):
                raise ValueError(
                    f"attention_mask must be {[batch, past + length]} ({past} tokens are in the cache), "
                    f"got {list(attention_mask.shape)}"
                )
            if checks_values(attention_mask) and ((attention_mask != 0) & (attention_mask != 1)).any():
                raise ValueError(
                    "attention_mask must hold 0 at padding and 1 elsewhere, got other numbers: give packed documents "
                    "as cu_seqlens, seq_idx or position_ids"
                )
            attention_mask = attention_mask.to(device=device, dtype=torch.bool)
            if not keep_mask and attention_mask.all():
                attention_mask = None
        self.key_mask = attention_mask
        self.token_mask = None if attention_mask is None else attention_mask[:, past:]
        if self.token_mask is not None and past and not keep_mask and self.token_mask.all():
            self.token_mask = None  # only cached tokens are padding
        described = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        if length > 1 or not past:  # one new token after cached ones continues its sequence
            described["position_ids"] = position_ids
        borders = document_borders((batch, length), attention_mask=self.token_mask, **described)
        self.packed = borders is not None
        if self.packed and past:
            raise ValueError(f"packed documents must be read without a cache, got {past} cached tokens")
        if borders is None:
            borders = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
        self.cu_seqlens = borders.to(device)
        self._position_ids = position_ids
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self._rotations: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> TokenSequence:
        """The same on another device, for models whose layers lie on several devices (accelerate calls this)."""
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
            index = torch.arange(self.batch * self.length, dtype=torch.int32, device=self.device)
            first = self.cu_seqlens[self._documents().flatten().long()]
            return (index - first).unflatten(0, (self.batch, self.length))
        if self.key_mask is not None:
            return (self.key_mask.long().cumsum(1) - 1).clamp(min=0)[:, self.past :]
        return torch.arange(self.past, self.past + self.length, device=self.device)[None]

    def rotation(
        self, theta: float, width: int, dtype: torch.dtype, scaling: RopeScaling | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B or 1, 1, T, width / 2] of the rotary embedding (arXiv 2104.09864)."""
        key = (theta, width, dtype, scaling)
        if key not in self._rotations:
            turns = frequencies(theta, width, scaling, self.device, dtype)
            angles = self.positions()[:, None, :, None].to(dtype) * turns
            factor = 1.0 if scaling is None else scaling.rotation_factor
            self._rotations[key] = angles.cos() * factor, angles.sin() * factor
        return self._rotations[key]

    def attention_mask(self, num_keys: int, window: int | None) -> torch.Tensor | None:
        """Which of the last ``num_keys`` tokens each new token sees: bool [B or 1, 1, T, keys].

        None where plain causal attention is the same (no earlier tokens), or where the one new token sees every key. A
        padding token sees itself, so that its softmax has a key; the outputs of padding tokens are not read.
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
        seen = seen[None]
        if self.packed:
            documents = self._documents()
            seen = seen & (documents[:, :, None] == documents[:, None])
        if self.key_mask is not None:
            seen = seen & self.key_mask[:, None, total - num_keys :] | (keys == queries)
        return seen[:, None]

    def _documents(self) -> torch.Tensor:
        """[B, T] which packed document each token belongs to."""
        index = torch.arange(self.batch * self.length, dtype=torch.int32, device=self.device)
        documents = torch.searchsorted(self.cu_seqlens, index, right=True) - 1
        return documents.unflatten(0, (self.batch, self.length))
