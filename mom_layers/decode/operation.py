"""One token of every sequence, for the gated delta rule: from the projections to the output gate, changing the state in
place. Only the memories that a token goes to are read and written.

Shape legend: sequences B, routed memories M, all memories A, routed memories that a token goes to k, heads H, key size
K, value size V, filter width W, hidden size D.
"""

from __future__ import annotations

import torch


def _steps(state) -> tuple[int, int]:
    """The distance between two sequences and between two memories in the state's tensors, counted in the parts that a
    tensor holds for one memory of one sequence. All four tensors must have the same two distances."""
    tensors = (state.recurrent, state.q_tail, state.k_tail, state.v_tail)
    found = set()
    for tensor in tensors:
        if tensor.numel() == 0:  # a tail where there is no convolution
            continue
        part = tensor[0, 0]
        # A dimension of size 1 has no distance: PyTorch's stride there may be any number.
        steps = tuple(tensor.stride(d) // part.numel() if tensor.shape[d] > 1 else 0 for d in (0, 1))
        found.add(steps if part.is_contiguous() else None)
    if len(found) > 1 or None in found:
        raise ValueError(
            "recurrent, q_tail, k_tail and v_tail of the state must place sequences and memories alike, with every "
            f"memory's part contiguous, got strides {[tensor.stride() for tensor in tensors]}"
        )
    return found.pop()


def decode_step(
    x: torch.Tensor,
    q: torch.Tensor,
    output_gate: torch.Tensor,
    logits: torch.Tensor | None,
    parameters,
    state,
    topk: int,
    shared: bool,
    unit_length_eps: float,
) -> torch.Tensor:
    """Decodes one token of every sequence with the rule gated_deltanet, in Triton, and changes ``state`` in place.

    For each of the token's memories m, the shared memory with weight 1:

        q, k, v = unit(SiLU(conv(q))), unit(SiLU(conv(x Wk^m))), SiLU(conv(x Wv^m))
        S^m <- exp(g) S^m;   S^m <- S^m + k (beta (v - k^T S^m))^T
        y = RMSNorm(sum_m w^m (q / sqrt(K))^T S^m) * norm_weight * SiLU(output_gate)

    The host reads no data, so that a CUDA graph can hold the step.

    Args:
        x: [B, D] tokens, contiguous. Where ``parameters`` has no projection (a layer of one memory alone), the tokens'
            keys, values and raw gates in place of the tokens, which may be columns of a wider tensor.
        q: [B, H K] queries before convolution; may be columns of a wider tensor, as may ``output_gate``.
        output_gate: [B, H V] before SiLU.
        logits: [B, M] the router's; None without routed memories.
        parameters: :class:`~mom_layers.mixing.MemoryParameters`, with contiguous weights.
        state: :class:`~mom_layers.state.MemoryState` of the B sequences.
        topk: k.
        shared: the last of all memories is the shared memory.
        unit_length_eps: added to the squared length of q and k.

    Returns:
        y [B, H V] before the output projection, in x's type.

    Raises:
        ValueError: a state whose tensors place sequences and memories differently, or not contiguously.
    """
    # Imported on use, because Triton is not installed on every machine.
    from mom_layers.decode.triton import decode_step_triton

    steps = _steps(state)
    return decode_step_triton(x, q, output_gate, logits, parameters, state, steps, topk, shared, unit_length_eps)
