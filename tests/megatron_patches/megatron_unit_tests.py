"""A pytest plugin for Megatron's own unit tests, run with our patches in effect, on a GPU or without one.

    cd path/to/Megatron-LM && PYTHONPATH=.:path/to/this/repository:path/to/this/folder WORLD_SIZE=1 LOCAL_RANK=0 \\
        python -m pytest -p megatron_unit_tests tests/unit_tests/transformer/test_transformer_layer.py

With `WITHOUT_PATCHES=1` in the environment no patch of ours is applied, for a comparison. Without a GPU the `cpu-*`
patches stay, because Megatron does not start without them; the tests then run over gloo. Tests marked as in need of
CUDA run too, on the replacements that these patches give. The reader of the results judges the failures.
"""

import contextlib
import gc
import os
from pathlib import Path

import pytest
import torch

from linear_moe.entry import machine, model_patches
from megatron_patches.patch import Patch, applied, wrap

os.environ.setdefault("RANK", os.environ.get("LOCAL_RANK", "0"))
if not torch.cuda.is_available():
    Patch(
        name="unit-tests-gloo",
        reason="the unit tests name nccl",
        removed_when="they ask for the device's backend",
        targets=(
            wrap(
                "torch.distributed",
                "init_process_group",
                lambda original, *args, **keywords: original(*args, **{**keywords, "backend": "gloo"}),
            ),
        ),
    ).apply()


def _free_groups(destroy_model_parallel):
    """Destroys the groups that Megatron only forgets: gloo's groups hold threads, thousands after many tests."""
    destroy_model_parallel()
    if torch.distributed.is_initialized():
        world = torch.distributed.distributed_c10d._world
        for group in list(world.pg_map):
            if group is not world.default_pg:
                torch.distributed.destroy_process_group(group)
    gc.collect()


machine.start()
if not torch.cuda.is_available():
    Patch(
        name="unit-tests-groups",
        reason="groups of gloo hold threads",
        removed_when="destroy_model_parallel destroys the groups",
        targets=(wrap("megatron.core.parallel_state", "destroy_model_parallel", _free_groups),),
    ).apply()
if "WITHOUT_PATCHES" not in os.environ:
    model_patches.install(mom=True)


def pytest_report_header():
    return f"patches in effect: {', '.join(patch.name for patch in applied())}"


@contextlib.contextmanager
def _cuda_to_see():
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = available


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path: Path):
    """Marks such as skipif(not torch.cuda.is_available()) are evaluated while a test file is imported."""
    module = yield
    collect = module._getobj

    def import_file():
        with _cuda_to_see():
            return collect()

    module._getobj = import_file
    return module
