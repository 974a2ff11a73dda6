"""The documents agree with the code: paths exist, links lead somewhere, the example of a rule computes what it says."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from mom_layers import MixtureOfMemories
from mom_layers.recur.rules import registry
from mom_layers.reference import mixture_of_memories_reference

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
# A copy without its history has no list: the same files, by their places.
DOCUMENTS = LISTED or [
    path.relative_to(ROOT).as_posix() for place in ("*.md", "docs/*.md", "tools/*/*.md") for path in ROOT.glob(place)
]
FOLDERS = ("docs", "examples", "linear_moe", "megatron_patches", "mom_layers", "tests", "tools")


def paths_in(text):
    """Paths of this repository in text between backticks and in indented commands."""
    pieces = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (?:python|bash) .*$", text, re.MULTILINE)
    for word in " ".join(pieces).split():
        path = word.strip(",;:()")
        if path.split("/")[0] in FOLDERS and "/" in path and not set("*{<$") & set(path):
            yield path


def modules_in(text):
    """Modules of this repository, by their dotted names."""
    return re.findall(r"\b(?:linear_moe|megatron_patches|mom_layers)(?:\.[a-z_0-9]+)+\b", text)


def found(module):
    """Whether a dotted name is a module, a package, or a name in the file of either."""
    path, (*owner, last) = ROOT / module.replace(".", "/"), module.split(".")
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    above = ROOT.joinpath(*owner)
    file = above / "__init__.py" if above.is_dir() else above.with_suffix(".py")
    return file.exists() and re.search(rf"\b{last}\b", file.read_text()) is not None


def slug(heading):
    """The anchor that GitHub makes from a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name):
    missing = [path for path in paths_in((ROOT / name).read_text()) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_exist(name):
    """A dotted name is a module or a package, or the last word of the name stands in the file of the module."""
    for module in modules_in((ROOT / name).read_text()):
        assert found(module), module


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in {slug(h) for h in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)}, link


def test_the_layout_in_the_readme_is_the_tree():
    """Folders end in a slash, files in .py; a line two spaces deeper is inside the folder above."""
    how = (ROOT / "README.md").read_text().partition("## How it works")[2]
    tree = re.search(r"(?:^    .*\n)+", how, re.MULTILINE)[0]
    package, checked = ROOT, 0
    for line in tree.splitlines():
        place = package
        if not line.startswith("      "):
            package, place = ROOT / line.split()[0], ROOT
        for word in re.findall(r"[\w.]+(?:/|\.py)(?![\w/])", line):
            around = (place, package, place / line.split()[0], ROOT)
            assert any((folder / word).exists() for folder in around), f"{word} in {line!r}"
            checked += 1
    assert checked > 20


def test_the_readme_names_every_patch():
    sources = [*ROOT.glob("megatron_patches/*.py"), *ROOT.glob("linear_moe/**/*.py")]
    names = {
        name
        for path in sources
        if path.name != "patch.py"  # its docstring has an example
        for name in re.findall(r'Patch\(\n +name="([a-z0-9-]+)"', path.read_text())
    }
    assert {"arguments", "model", "run-checks", "stop-signal", "cpu-start"} <= names
    readme = (ROOT / "README.md").read_text()
    assert [name for name in sorted(names) if not name.startswith("cpu-") and f"`{name}`" not in readme] == []


def test_wrong_names_are_found():
    assert found("mom_layers.mixing.mix_tokens") and found("linear_moe.plugin") and found("mom_layers.recur.rules")
    assert not any(map(found, ("mom_layers.ops", "mom_layers.mixing.mix_nothing", "mom_layers.ops.mom.route")))
    assert list(paths_in("`mom_layers/ops/mom.py` and\n    python tools/none.py --load x/y")) == [
        "mom_layers/ops/mom.py", "tools/none.py",
    ]  # fmt: skip


def test_the_example_of_a_rule_follows_its_plain_loop(monkeypatch):
    text = (ROOT / "docs/architecture.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(code, "docs/architecture.md", "exec"), names)
    rule = names["RULE"]
    monkeypatch.setitem(registry._RULES, rule.name, rule)
    torch.manual_seed(0)
    layer = MixtureOfMemories(24, num_heads=2, head_dim=16, num_memories=3, rule=rule.name, kernels="torch").double()
    x = torch.randn(1, 70, 24, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    expected = mixture_of_memories_reference(x[0], parameters, num_heads=2, topk=2, shared=True, rule=rule.name)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0][0], expected)
        first, state = layer(x[:, :40], output_state=True)
        torch.testing.assert_close(torch.cat([first, layer(x[:, 40:], state=state)[0]], dim=1)[0], expected)
