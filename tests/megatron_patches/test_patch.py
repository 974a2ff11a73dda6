"""The mechanism, on two small modules that stand for Megatron's."""

import logging
import sys
from types import ModuleType

import pytest

from megatron_patches import PatchError, applied
from megatron_patches.patch import Patch, apply_all, replace, wrap

SOURCE = """
LIMIT = 3

def double(number):
    "Twice the number."
    return 2 * number

def triple(number):
    return 3 * number

class Base:
    def name(self):
        return "base"

class Counter(Base):
    @staticmethod
    def add(left, right):
        return left + right

    @classmethod
    def label(cls):
        return cls.__name__
"""


@pytest.fixture
def library(monkeypatch):
    library = ModuleType("megatron.example_library")
    exec(SOURCE, vars(library))
    user = ModuleType("megatron.example_user")
    user.double, user.renamed = library.double, library.triple
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setitem(sys.modules, user.__name__, user)
    library.user = user
    return library


def make_patch(*targets, name="example"):
    return Patch(name=name, reason="to test", removed_when="never", targets=targets)


def add_one(original, *args):
    return original(*args) + 1


TARGETS = (
    wrap("megatron.example_library", "double", add_one),
    wrap("megatron.example_library", "Counter.add", add_one),
    wrap("megatron.example_library", "Counter.label", lambda original, cls: f"<{original(cls)}>"),
    wrap("megatron.example_library", "Counter.name", lambda original, self: "not " + original(self)),
    replace("megatron.example_library", "LIMIT", 4),
)


def test_apply_twice_changes_once_and_undo_restores_the_same_objects(library):
    before = dict(vars(library)), dict(vars(library.Counter)), dict(vars(library.user))
    patch = make_patch(*TARGETS)
    patch.apply()
    patch.apply()
    assert patch.is_applied and applied() == (patch,)
    assert library.double(5) == library.user.double(5) == 11
    assert library.double.__doc__ == "Twice the number."
    assert library.Counter.add(1, 2) == library.Counter().add(1, 2) == 4
    assert library.Counter.label() == "<Counter>"
    assert library.Counter().name() == "not base" and library.Base().name() == "base"
    assert library.LIMIT == 4

    patch.undo()
    patch.undo()
    assert applied() == ()
    after = vars(library), vars(library.Counter), vars(library.user)
    for names_before, names_after in zip(before, after, strict=True):
        assert names_before.keys() == names_after.keys()
        assert all(names_after[name] is value for name, value in names_before.items())


def test_a_module_imported_while_a_patch_is_applied_is_restored_too(library):
    original = library.double
    patch = make_patch(TARGETS[0])
    patch.apply()
    library.user.double = library.double
    patch.undo()
    assert library.user.double is original


def test_logs_itself_once(library, caplog):
    patch = make_patch(*TARGETS)
    with caplog.at_level(logging.INFO, logger="megatron_patches"):
        patch.apply()
        patch.apply()
    assert [record.getMessage() for record in caplog.records] == ["patch example applied: to test"]
    patch.undo()


@pytest.mark.parametrize(
    ("module", "attribute", "missing"),
    [
        ("megatron.example_library", "quadruple", "megatron.example_library.quadruple"),
        ("megatron.example_library", "Missing.__init__", "megatron.example_library.Missing.__init__"),
        ("megatron_of_another_time", "double", "megatron_of_another_time"),
    ],
)
def test_a_missing_symbol_is_named_and_nothing_is_changed(library, monkeypatch, module, attribute, missing):
    monkeypatch.setattr("megatron_patches.releases.installed_megatron_core", lambda: "0.99.0")
    original = library.double
    patch = make_patch(TARGETS[0], wrap(module, attribute, add_one))
    with pytest.raises(PatchError, match=r"'example'.*0\.99\.0 is installed, 0\.19 and 0\.18 are supported") as error:
        patch.apply()
    assert f"there is no {missing}" in str(error.value) or f"there is no module {missing}" in str(error.value)
    assert library.double is original and not patch.is_applied and applied() == ()


def test_a_target_that_cannot_be_assigned_takes_the_others_back(library):
    original = library.double
    patch = make_patch(TARGETS[0], wrap("builtins", "int.bit_length", add_one))
    with pytest.raises(PatchError, match="builtins.int.bit_length cannot be assigned"):
        patch.apply()
    assert library.double is original and applied() == ()


def test_another_version_that_fits_is_warned_of(library, monkeypatch, caplog):
    monkeypatch.setattr("megatron_patches.releases.installed_megatron_core", lambda: "0.99.0")
    patch = make_patch(*TARGETS)
    patch.apply()
    assert "0.99.0" in caplog.text
    patch.undo()


def test_undo_is_refused_under_a_later_patch(library):
    first, second = make_patch(TARGETS[0], name="first"), make_patch(TARGETS[0], name="second")
    first.apply()
    second.apply()
    assert library.double(5) == 12
    with pytest.raises(
        PatchError, match="'first' cannot be undone: a later patch replaced megatron.example_library.double"
    ):
        first.undo()
    second.undo()
    first.undo()
    assert library.double(5) == 10


def test_a_refused_patch_takes_back_those_applied_with_it(library):
    original = library.double
    before = make_patch(TARGETS[4], name="before")
    before.apply()
    with pytest.raises(PatchError):
        apply_all(
            (before, make_patch(TARGETS[0]), make_patch(replace("megatron.example_library", "none", 1), name="bad"))
        )
    assert library.double is original and applied() == (before,)
    before.undo()
