"""Lets Megatron start from its wheel, which ships the data set helpers compiled and without their Makefile.

`compile_helpers` runs `make`, and ends the program when `make` fails: without the Makefile, on every machine. A clone
of Megatron-LM has the Makefile and needs no patch.
"""

import importlib
import importlib.util
from pathlib import Path

from megatron_patches.patch import Patch, wrap

_LIBRARY = "megatron.core.datasets.helpers_cpp"


def _use_compiled_library(compile_helpers) -> None:
    try:
        importlib.import_module(_LIBRARY)
    except ImportError as error:
        raise ImportError(
            f"{_LIBRARY} cannot be imported ({error}). Every megatron-core wheel has the library compiled for "
            "one Python version and platform: install the wheel for this Python and platform."
        ) from error


PATCH = Patch(
    name="dataset-helpers",
    reason="the wheel has the compiled data set helpers but not the Makefile that compile_helpers runs",
    removed_when="compile_helpers does nothing when megatron.core.datasets.helpers_cpp is importable",
    targets=(wrap("megatron.core.datasets.utils", "compile_helpers", _use_compiled_library),),
)


def is_needed() -> bool:
    """Whether the megatron.core that this process imports comes without the Makefile."""
    core = importlib.util.find_spec("megatron.core")
    return core is not None and not (Path(core.origin).parent / "datasets" / "Makefile").is_file()


def apply() -> None:
    """Makes `compile_helpers` check that the compiled library is importable instead of building it."""
    PATCH.apply()
