import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from megatron_patches import dataset_helpers


@pytest.fixture
def compile_helpers(monkeypatch):
    dataset_helpers.apply()
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("make was run"))
    yield import_module("megatron.core.datasets.utils").compile_helpers
    dataset_helpers.PATCH.undo()


def test_the_compiled_library_is_enough(compile_helpers):
    assert compile_helpers() is None
    assert hasattr(sys.modules["megatron.core.datasets.helpers_cpp"], "build_sample_idx_int32")


def test_no_library_is_an_error_that_says_so(compile_helpers, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(ImportError, match="megatron.core.datasets.helpers_cpp cannot be imported"):
        compile_helpers()


def test_a_clone_with_its_makefile_needs_no_patch(tmp_path, monkeypatch):
    assert dataset_helpers.is_needed()
    core = tmp_path / "megatron" / "core"
    (core / "datasets").mkdir(parents=True)
    (core / "datasets" / "Makefile").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(core / "__init__.py")))
    assert not dataset_helpers.is_needed()
