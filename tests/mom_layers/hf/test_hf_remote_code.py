import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hf_models import HYBRID, random_tokens, tiny_model
from transformers.dynamic_module_utils import get_imports

from mom_layers.hf import save_remote_code
from mom_layers.hf.remote_code import bundle_sources

# Neither this package nor Triton can be imported here; torch and transformers can.
LOAD = """
import os, sys
sys.modules["mom_layers"] = sys.modules["triton"] = None
os.environ["HF_MODULES_CACHE"] = os.environ["HF_HOME"] = "modules"
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).model_type == "mom"
tokens = torch.load("tokens.pt")
with torch.no_grad():
    logits = model(tokens).logits
    hidden = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)(tokens).last_hidden_state
generated = model.generate(tokens, max_new_tokens=6, num_beams=2, do_sample=False)
torch.save((logits, hidden, generated), "out.pt")
model.save_pretrained("again")
"""


@pytest.fixture
def export(tmp_path):
    model = tiny_model(**HYBRID)
    model.save_pretrained(tmp_path / "export")
    save_remote_code(tmp_path / "export")
    return model, tmp_path / "export"


def load_elsewhere(export, folder):
    arguments = [sys.executable, "-I", "-c", LOAD, str(export)]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=240, env=os.environ)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


def test_an_export_loads_without_this_package(export, tmp_path):
    model, directory = export
    tokens = random_tokens(2, 20)
    torch.save(tokens, tmp_path / "tokens.pt")
    with torch.no_grad():
        expected = model(tokens).logits, model.model(tokens).last_hidden_state
    expected = *expected, model.generate(tokens, max_new_tokens=6, num_beams=2, do_sample=False)
    shutil.move(directory, tmp_path / "moved")
    for actual, e in zip(load_elsewhere(tmp_path / "moved", tmp_path), expected, strict=True):
        assert torch.equal(actual, e)
    # A model that was loaded this way can be saved again with its code.
    saved, first = tmp_path / "again", tmp_path / "moved"
    assert {p.name for p in first.glob("*.py")} == {p.name for p in saved.glob("*.py")}
    assert (saved / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_configuration_names_the_code(export):
    model, directory = export
    config = json.loads((directory / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_mom.MomConfig",
        "AutoModel": "modeling_mom.MomModel",
        "AutoModelForCausalLM": "modeling_mom.MomForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mom.MomForSequenceClassification",
    }
    before = {path: path.read_bytes() for path in directory.iterdir()}
    assert set(save_remote_code(directory)) <= set(before)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_the_bundle_is_complete_and_needs_no_more():
    sources = bundle_sources()
    for name, source in sources.items():
        compile(source, name, "exec")
        imports = [line.split() for line in source.splitlines() if line.strip().startswith(("from ", "import "))]
        assert not any(word.startswith("mom_layers.") for words in imports for word in words)
    assert {"modeling_mom", "configuration_mom", "mom_layers_mixing", "mom_layers_recur_rules_gla"} <= set(sources)


def test_the_files_require_no_other_package(export):
    """transformers refuses a model whose files import a missing package: no file requires Triton."""
    _, directory = export
    asked = {package for file in directory.glob("*.py") for package in get_imports(file)}
    assert asked - sys.stdlib_module_names <= {"torch", "transformers"}


def test_folders_that_are_not_mom_exports_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_remote_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type 'llama'"):
        save_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
