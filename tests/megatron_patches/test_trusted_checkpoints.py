"""Checkpoints whose files name code: nothing of the code runs, and the message names the first of it."""

import io
import pickle
import struct
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_patches import trusted_checkpoints
from megatron_patches.trusted_checkpoints import UnsafeCheckpoint, load_entry, load_metadata, trusting

METADATA = "torch.distributed.checkpoint.metadata"


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def on_stack(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def code(folder: str) -> bytes:
    return text(f"__import__('os').mkdir({folder!r})")


def nested(folder: str) -> bytes:
    """A whole pickle as a string of bytes."""
    inner = b"\x80\x04" + call(named("os", "mkdir"), text(folder)) + b"."
    return b"B" + struct.pack("<I", len(inner)) + inner


def saved(folder: str) -> bytes:
    """The same as a file of torch.save."""
    data = archive(b"\x80\x02" + call(named("os", "mkdir"), text(folder)) + b".")
    return b"B" + struct.pack("<I", len(data)) + data


def archive(data: bytes) -> bytes:
    """A file in the format of torch.save with a pickle of one's own."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return stream.getvalue()


# Every one makes the folder that it is given when Python's own unpickler reads it.
PAYLOADS = {
    "reduce": lambda folder: call(named("os", "mkdir"), text(folder)),
    "reduce of posix": lambda folder: call(named("posix", "mkdir"), text(folder)),
    "os.system": lambda folder: call(named("os", "system"), text(f"mkdir '{folder}'")),
    "stack global": lambda folder: call(on_stack("os", "mkdir"), text(folder)),
    "module in a module": lambda folder: call(on_stack(METADATA, "os.mkdir"), text(folder)),
    "globals of a method": lambda folder: call(
        named("operator", "getitem"), on_stack(METADATA, "TensorProperties.__setstate__.__globals__"), text("os")
    ) + b"0" + call(named("os", "mkdir"), text(folder)),
    "inst": lambda folder: b"(" + text(folder) + b"ios\nmkdir\n",
    "obj": lambda folder: b"(" + named("os", "mkdir") + text(folder) + b"o",
    "newobj": lambda folder: call(
        named("builtins", "list"),
        named("builtins", "map") + b"(" + named("os", "mkdir") + b"(" + text(folder) + b"lt\x81",
    ),
    "newobj_ex": lambda folder: call(
        named("functools", "partial") + b"(" + named("os", "mkdir") + text(folder) + b"t}"
        + text("mode") + b"K\x7fs\x92"
    ),
    "setstate": lambda folder: call(
        call(named("functools", "partial"), named("os", "getcwd"))
        + b"(" + named("os", "mkdir") + b"(" + text(folder) + b"t}}tb"
    ),
    "eval": lambda folder: call(named("builtins", "eval"), code(folder)),
    "exec": lambda folder: call(named("builtins", "exec"), code(folder)),
    "eval of Python 2": lambda folder: b"\x80\x02" + call(named("__builtin__", "eval"), code(folder)),
    "getattr": lambda folder: call(
        call(named("builtins", "getattr"), call(named("builtins", "__import__"), text("os")), text("mkdir")),
        text(folder),
    ),
    "import": lambda folder: call(named("importlib", "import_module"), text("os")) + b"0"
    + call(named("os", "mkdir"), text(folder)),
    "attrgetter": lambda folder: call(
        call(call(named("operator", "attrgetter"), text("mkdir")), call(named("builtins", "__import__"), text("os"))),
        text(folder),
    ),
    "partial": lambda folder: call(call(named("functools", "partial"), named("os", "mkdir"), text(folder))),
    "map": lambda folder: call(
        named("builtins", "list"), call(named("builtins", "map"), named("os", "mkdir"), b"(" + text(folder) + b"l")
    ),
    "pickle.loads": lambda folder: call(named("pickle", "loads"), nested(folder)),
    "pickle.loads of C": lambda folder: call(named("_pickle", "loads"), nested(folder)),
    "torch.load without a limit": lambda folder: call(
        named("functools", "partial") + b"(" + named("torch", "load") + b"t}" + text("weights_only") + b"\x89s\x92",
        call(named("io", "BytesIO"), saved(folder)),
    ),
    "runpy": lambda folder: call(named("runpy", "_run_code"), code(folder), b"}"),
    "code": lambda folder: call(
        named("builtins", "exec"), call(named("builtins", "compile"), code(folder), text("x"), text("exec"))
    ),
    "timeit": lambda folder: call(
        named("timeit", "timeit"), code(folder), text("pass"), named("time", "time"), b"K\x01"
    ),
    "NumPy's runstring": lambda folder: call(named("numpy.testing._private.utils", "runstring"), code(folder), b"}"),
    "memoized": lambda folder: named("os", "mkdir") + b"q\x00" + b"0h\x00(" + text(folder) + b"tR",
    "in a list of valid things": lambda folder: b"]" + named("torch", "float32") + b"a"
    + call(named("os", "mkdir"), text(folder)) + b"a",
}  # fmt: skip


def pickled(payload: str, folder: Path) -> bytes:
    return b"\x80\x04" + PAYLOADS[payload](str(folder)) + b"."


@pytest.fixture
def target(tmp_path) -> Path:
    """The folder that a payload makes."""
    return tmp_path / "made"


@pytest.fixture
def patched():
    trusted_checkpoints.PATCH.apply()
    yield
    trusted_checkpoints.PATCH.undo()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payload_in_metadata(target, payload):
    with pytest.raises(UnsafeCheckpoint, match=r"names [\w.]+, which no checkpoint of Megatron needs"):
        load_metadata(io.BytesIO(pickled(payload, target)))
    assert not target.exists()
    pickle.loads(pickled(payload, target))
    assert target.exists(), "the payload is none"


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("form", [archive, bytes], ids=["zip", "bare"])
def test_payload_in_an_entry(target, payload, form):
    with pytest.raises(pickle.UnpicklingError):
        load_entry(io.BytesIO(form(pickled(payload, target))))
    assert not target.exists()


@pytest.mark.parametrize("payload", ["reduce", "eval", "partial", "code", "NumPy's runstring"])
def test_what_an_entry_names_is_told(target, payload):
    for form in (archive, bytes):
        with pytest.raises(UnsafeCheckpoint, match=r"names \w+\.?\w+.*--trust-checkpoint \(in training: MOM_TRUST"):
            load_entry(io.BytesIO(form(pickled(payload, target))))


def test_metadata_cannot_change_classes():
    """A state may set attributes of what is below it on the stack, a class or a member of an enumeration too."""
    attribute = b"N}" + text("version") + b"K\x07s\x86b"
    for owner in (
        named(METADATA, "Metadata"),
        call(named(METADATA, "_MEM_FORMAT_ENCODING"), b"K\x00"),
        named(METADATA, "_MEM_FORMAT_ENCODING"),
    ):
        with pytest.raises(UnsafeCheckpoint, match="changes .*, which no checkpoint does"):
            load_metadata(io.BytesIO(b"\x80\x04" + owner + attribute + b"."))
    assert Metadata.version is None
    encoding = TensorProperties().__getstate__()[3]
    assert not hasattr(encoding, "version") and not hasattr(type(encoding), "version")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\x80\x04N.", b"\x80\x04P1\n.", b"\x80\x04\x82\x01.", b"not a pickle"],
    ids=["empty", "cut", "None", "persistent", "extension", "text"],
)  # fmt: skip
def test_damaged_metadata(data):
    with pytest.raises(pickle.UnpicklingError, match="is damaged, or of a newer PyTorch: "):
        load_metadata(io.BytesIO(data))


def test_plans_in_the_metadata():
    """Megatron adds to the metadata what each process saves, which newer releases of PyTorch write."""
    place, sizes = MetadataIndex("x", torch.Size([0])), torch.Size([4])
    data = TensorWriteData(ChunkStorageMetadata(torch.Size([0]), sizes), TensorProperties(), sizes)
    metadata = Metadata({}, storage_data={place: _StorageInfo("__0_0.distcp", 0, 1)})
    metadata.all_local_plans = [
        SavePlan([WriteItem(place, WriteItemType.SHARD, tensor_data=data), WriteItem(place, WriteItemType.BYTE_IO)])
    ]
    assert vars(load_metadata(io.BytesIO(pickle.dumps(metadata)))) == vars(metadata)


@pytest.mark.parametrize("shard", ["/etc/passwd", "../other/__0_0.distcp", "a/../../b"])
def test_shard_outside_the_folder(shard):
    metadata = Metadata({}, storage_data={MetadataIndex("x"): _StorageInfo(shard, 0, 1)})
    with pytest.raises(UnsafeCheckpoint, match=f"the shard '{shard}', which is outside"):
        load_metadata(io.BytesIO(pickle.dumps(metadata)))


class Stranger:
    """Of no checkpoint."""


def test_what_checkpoints_hold(tmp_path, patched):
    """Tensors of every type, and entries with the state of random generators, arguments, enumerations, data classes."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer.enums import AttnBackend

    types = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
    tensors = {str(dtype): torch.ones(3).to(dtype) for dtype in types}
    objects = {
        "rng": [{"np": np.random.get_state(), "torch": torch.get_rng_state()}],
        "args": Namespace(dtype=torch.bfloat16, backend=AttnBackend.auto, recipe=Fp8Recipe.delayed, path=Path("x")),
    }
    dcp.save(tensors | objects, checkpoint_id=tmp_path / "ck", no_dist=True)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()} | {"args": None}
    loaded["rng"] = [{"np": None, "torch": torch.zeros_like(objects["rng"][0]["torch"])}]
    dcp.load(loaded, checkpoint_id=tmp_path / "ck", no_dist=True)
    assert all(torch.equal(loaded[name].cfloat(), tensor.cfloat()) for name, tensor in tensors.items())
    assert loaded["args"] == objects["args"]
    np.random.set_state(loaded["rng"][0]["np"])
    assert torch.equal(loaded["rng"][0]["torch"], objects["rng"][0]["torch"])

    dcp.save({"x": Stranger()}, checkpoint_id=tmp_path / "stranger", no_dist=True)
    with pytest.raises(UnsafeCheckpoint, match="names .*Stranger"):
        dcp.load({"x": None}, checkpoint_id=tmp_path / "stranger", no_dist=True)


@pytest.mark.parametrize("where", [".metadata", "entry"])
def test_trust(tmp_path, target, patched, monkeypatch, where):
    """By `trusting` and by the environment; and only while either lasts."""
    folder = tmp_path / "ck"
    dcp.save({"x": [1]}, checkpoint_id=folder, no_dist=True)
    if where == ".metadata":
        (folder / ".metadata").write_bytes(pickled("reduce", target))
    else:
        data = archive(b"\x80\x02" + PAYLOADS["reduce"](str(target)) + b".")
        (folder / "__0_0.distcp").write_bytes(data)
        info = _StorageInfo("__0_0.distcp", 0, len(data))
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        metadata.storage_data = dict.fromkeys(metadata.storage_data, info)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    def load():
        try:
            dcp.load({"x": None}, checkpoint_id=folder, no_dist=True)
        except (UnsafeCheckpoint, CheckpointException) as error:
            return str(error)
        return ""

    for trust in (False, True):
        with trusting(trust):
            message = load()
        assert target.exists() == trust and ("names os.mkdir" in message) != trust
    target.rmdir()
    assert "names os.mkdir" in load() and not target.exists()
    monkeypatch.setenv("MOM_TRUST_CHECKPOINT", "1")
    load()
    assert target.exists()
    target.rmdir()
    monkeypatch.setenv("MOM_TRUST_CHECKPOINT", "0")
    assert "names os.mkdir" in load() and not target.exists()


def test_extra_state_of_transformer_engine(target, monkeypatch):
    """A stand-in for Transformer Engine, whose `set_extra_state` unpickles a tensor of bytes."""

    class Module:
        def set_extra_state(self, state):
            self.state = pickle.loads(state.numpy().tobytes())

    te = ModuleType("te_stand_in")
    te.Module = Module
    monkeypatch.setitem(sys.modules, te.__name__, te)
    patch = trusted_checkpoints.Patch("te", "to test", "never", (
        trusted_checkpoints.wrap("te_stand_in", "Module.set_extra_state", trusted_checkpoints._set_extra_state),
    ))  # fmt: skip
    patch.apply()
    try:
        module = Module()
        with pytest.raises(UnsafeCheckpoint, match="extra state of a Module: .*os.mkdir"):
            module.set_extra_state(torch.frombuffer(bytearray(pickled("reduce", target)), dtype=torch.uint8))
        assert not target.exists()
        good = {"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
        module.set_extra_state(torch.frombuffer(bytearray(pickle.dumps(good)), dtype=torch.uint8))
        assert torch.equal(module.state["scale_fwd"], good["scale_fwd"])
    finally:
        patch.undo()
