"""What the Triton kernels take: sizes of a head, numbers of memories, types of floating-point tensors."""

from __future__ import annotations

import torch

# Powers of two, as a tile's sides are; at least 16, the least side of a tensor core's product.
HEAD_SIZES = (16, 32, 64, 128, 256)
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_MEMORIES = 1024  # a kernel's tile has a column for each memory
