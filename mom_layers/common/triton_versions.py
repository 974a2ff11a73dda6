"""What differs between Triton's versions.

Gluon, Triton's lower level, is experimental: its names change from version to version. The kernels written in Gluon
take these names from here:

    thread_barrier    all threads of a program wait for each other
    copy_to_shared    starts to copy elements from global to shared memory
    fetch_tile        starts to copy a tile of a tensor to shared memory, by the chip's copy unit (TMA)
    store_tile        starts to copy a tile back
    TileDescriptor    the tensor with its tiles, for fetch_tile and store_tile

Where :func:`gluon_problem` names a problem, they are None, and no kernel set that is written in Gluon runs.
"""

from __future__ import annotations

import functools
import re

import triton

VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
"""Major and minor number of the installed Triton."""
GLUON_VERSIONS = ((3, 6), (3, 9))
"""The first and the last version whose Gluon is known: the kernels were compiled with each of them."""

try:
    from triton.experimental.gluon import language as _gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy as _async_copy
    from triton.experimental.gluon.language.nvidia.hopper import tma as _tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as _TensorDescriptor
except ImportError as error:
    _missing = str(error)
    thread_barrier = copy_to_shared = fetch_tile = store_tile = TileDescriptor = None
else:

    def _first(module, *names):
        return next((getattr(module, name) for name in names if hasattr(module, name)), None)

    # Newer names come first: 3.9 has the older names too, as functions that raise an error.
    thread_barrier = _first(_gl, "barrier", "thread_barrier")  # since 3.7; 3.6
    copy_to_shared = _first(_async_copy, "async_load", "async_copy_global_to_shared")  # since 3.9; up to 3.8
    fetch_tile = _first(_tma, "async_load", "async_copy_global_to_shared")  # since 3.8; up to 3.8
    store_tile = _first(_tma, "async_store", "async_copy_shared_to_global")  # since 3.8; up to 3.8
    _missing = "" if all((thread_barrier, copy_to_shared, fetch_tile, store_tile)) else "a function of another name"

    class TileDescriptor(_TensorDescriptor):
        """Triton's descriptor of a tensor in tiles, without the checks of its arguments, which take longer than a
        launch should."""

        def __post_init__(self) -> None:
            """Checks nothing: the caller knows the tensor."""


def _shown(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@functools.cache
def gluon_problem() -> str | None:
    """Why kernels written in Gluon do not run with the installed Triton; None where they do."""
    first, last = GLUON_VERSIONS
    known = f"the kernels written in Gluon are known to compile with Triton {_shown(first)} to {_shown(last)}"
    if not first <= VERSION <= last:
        return f"{known}, and Triton {triton.__version__} is installed"
    if _missing:
        return f"{known}, but the Gluon of Triton {triton.__version__} lacks what they use: {_missing}"
    return None
