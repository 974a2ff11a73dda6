"""The documents agree with the code: paths, links, commands, tables and pieces of Python."""

import importlib
import re
import tomllib
from pathlib import Path

import make_docs
import plot_readme
import pytest
import torch
from documents import DOCUMENTS, FOR_USERS, ROOT, commands_in, python_code, read

from mom_layers import MixtureOfMemories
from mom_layers.recur.rules import registry
from mom_layers.reference import mixture_of_memories_reference

FOLDERS = ("docs", "examples", "linear_moe", "megatron_patches", "mom_layers", "tests", "tools")
LONGEST_README, LONGEST_PAGE, LONGEST_LINE = 150, 250, 130
PROJECT = tomllib.loads(read("pyproject.toml"))["project"]


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
    assert [path for path in paths_in(read(name)) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_exist(name):
    """A dotted name is a module or a package, or the last word of the name stands in the file of the module."""
    assert [module for module in modules_in(read(name)) if not found(module)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in {slug(h) for h in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)}, link


def test_wrong_names_are_found():
    assert found("mom_layers.mixing.mix_tokens") and found("linear_moe.plugin") and found("mom_layers.recur.rules")
    assert not any(map(found, ("mom_layers.ops", "mom_layers.mixing.mix_nothing", "mom_layers.ops.mom.route")))
    assert list(paths_in("`mom_layers/ops/mom.py` and\n    python tools/none.py --load x/y")) == [
        "mom_layers/ops/mom.py", "tools/none.py",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FOR_USERS)
def test_pages_are_short_and_their_lines_too(name):
    """Tables, links on lines of their own, and commands may have long lines."""
    lines = read(name).splitlines()
    assert len(lines) <= (LONGEST_README if name == "README.md" else LONGEST_PAGE)
    long = [line for line in lines if len(line) > LONGEST_LINE and not line.startswith(("|", "    "))]
    assert long == []


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[a-z-]+\.md)", read("README.md")))
    assert {name for name in DOCUMENTS if name.startswith("docs/")} <= linked


@pytest.mark.parametrize("name", [str(page.relative_to(ROOT)) for page in make_docs.PAGES])
def test_tables_are_current(name):
    """Tables that follow from the code. Mended by: python tools/make_docs.py"""
    text = read(name)
    assert {found[1] for found in make_docs.TABLE.findall(text)} <= {*make_docs.TABLES}
    assert make_docs.filled(text) == text


def test_a_table_that_is_not_current_is_found():
    page = read("docs/arguments.md")
    assert make_docs.filled(page.replace("| `4` |", "| `5` |", 1)) == page


def test_the_readmes_figures_are_those_of_the_files():
    rows = {row["layout"]: row for row in make_docs.read_rows("h200x2_layouts.csv") if row["commit"] == "819a6f0"}
    readme = read("README.md")
    for layout, gpus in (("one", 1), ("DP2", 2)):
        speed = float(rows[layout]["tokens_per_second"])
        shown = f"{round(speed, -3):,.0f} tokens/s | {15e9 / speed / 3600:.0f} hours"
        assert f"| {gpus} NVIDIA H200 | {float(rows[layout]['peak_gib']):.0f} GiB | {shown} |" in readme


def test_the_pictures_show_the_figures_of_the_files(tmp_path):
    speeds, where = plot_readme.training_speed()
    assert set(speeds) == {"mom", "softmax", "fla-mom"} and all(speeds.values()) and "NVIDIA H200" in where
    kept, _ = plot_readme.decoding_memory()
    assert len(set(kept["mom-model"].values())) == 1
    assert plot_readme.main(["--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in (ROOT / "docs/pictures").iterdir()}


def test_the_rooms_in_the_architecture_are_the_folders():
    """The first column of each package's table names files and folders of the package."""
    text = read("docs/architecture.md").partition("## The way of a token")[0]
    checked = 0
    for package, table in re.findall(r"\*\*`(\w+)`\*\*, from top to bottom:\n\n((?:\|.*\n)+)", text):
        for row in table.splitlines()[2:]:
            for room in re.findall(r"`([\w./]+)`", row.split("|")[1]):
                path = ROOT / package / room
                assert path.exists() or path.with_suffix(".py").exists(), f"{package}/{room}"
                checked += 1
    assert checked > 20


# Commands

MODEL = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
    "--micro-batch-size 4 --train-iters 20 --lr 1e-3"
)
VARIABLES = {"ARGUMENTS": MODEL, "MODEL": MODEL, "DATA": "--data-path data/corpus --split 99,1,0"}
COMMANDS = [
    pytest.param(name, command, id=f"{name}: {command.text}")
    for name in FOR_USERS
    for command in commands_in(read(name), VARIABLES)
]
SETTING_FILES = [*ROOT.glob("examples/*.sh"), ROOT / "tools/environment.sh", ROOT / "Makefile"]
SCRIPT_SETTINGS = "\n".join(path.read_text() for path in SETTING_FILES)
DRIVERS = ("--help-mom", "--help-all", "--verbose")


@pytest.fixture(scope="module")
def megatron_parser():
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from linear_moe.entry.arguments import add_mom_arguments, repair_help

    return repair_help(add_mom_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False))))


@pytest.fixture
def some_files(tmp_path, monkeypatch):
    """A folder with the inputs that commands of the documents name."""
    for folder in ("texts", "path/to/tokenizer", "data/corpus-tokenizer"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "corpus.jsonl.zst").touch()
    monkeypatch.chdir(tmp_path)


def check_command(words, megatron_parser):
    """Raises SystemExit or AssertionError for a command that does not parse."""
    program, *rest = words
    if program == "linear-moe":
        check_linear_moe(rest, megatron_parser)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(rest)
        check_python((["-m"] if parsed.module else []) + [parsed.training_script, *parsed.training_script_args],
                     megatron_parser)  # fmt: skip
    elif program.startswith("python"):
        check_python(rest, megatron_parser)
    elif program in ("bash", "sbatch"):
        (place,) = [index for index, word in enumerate(rest) if word.endswith(".sh")]
        assert (ROOT / rest[place]).is_file()
        script, *arguments = rest[place:]
        if script.endswith("train_recipe.sh"):
            recipe, *arguments = [word for word in arguments if word != "--tiny"]
            assert list((ROOT / "examples/recipes").glob(f"{recipe}.*")), recipe
        megatron_parser.parse_args(arguments)
    elif program == "pip":
        assert rest[0] in ("install", "show", "uninstall")
        for extras in re.findall(r"^(?:\.|linear-moe)\[(.*)\]$", "\n".join(rest), re.MULTILINE):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", read("Makefile"), re.MULTILINE)


def check_linear_moe(words, megatron_parser):
    from linear_moe.cli import COMMANDS as NAMES
    from linear_moe.cli import module_of

    command, *rest = words
    if command.startswith("--") or command.isupper():  # --version, or a word that stands for a command
        return
    assert command in NAMES
    if not rest:  # a command's name in a sentence
        return
    if command == "pretrain":
        megatron_parser.parse_args([word for word in rest if word not in DRIVERS])
    elif "--help" not in rest:
        importlib.import_module(f"linear_moe.commands.{module_of(command)}").parse_arguments(rest)


def check_python(words, megatron_parser):
    if words[0] in ("-c", "-W"):
        return
    if words[0] == "-m":
        module, *rest = words[1:]
        if module == "pytest":
            return
        if module == "linear_moe":
            if rest in ([], ["SCRIPT"]):
                return
            assert rest[0].endswith(".py")
            rest = rest[1:]
        else:
            assert found(module), module
        megatron_parser.parse_args(rest)
        return
    script, *rest = words
    if Path(script).name.startswith("pretrain_"):
        megatron_parser.parse_args(rest)
        return
    text = read(script)
    if "from linear_moe.cli import main" in text:  # with a rule of its own
        check_linear_moe(["gla" if word == "leaky" else word for word in rest], megatron_parser)
        return
    command = re.search(r"sys\.exit\(run\(\"(\w+)\"\)\)", text)
    if command:
        importlib.import_module(f"linear_moe.commands.{command[1]}").parse_arguments(rest)
        return
    text += read("tools/benchmark.py")
    assert [word for word in rest if word.startswith("--") and f'"{word}"' not in text] == []


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_commands_parse(name, command, megatron_parser, some_files):
    unknown = [name for name in command.environment if not re.search(rf"\b{name}\b", SCRIPT_SETTINGS)]
    settings = importlib.import_module("linear_moe.entry.environment")
    assert [name for name in unknown if name.lower() not in settings.NAMES] == []
    try:
        check_command(list(command.words), megatron_parser)
    except SystemExit as end:
        assert end.code in (0, None), command.text


def test_commands_are_found_and_wrong_ones_are_refused(megatron_parser, some_files):
    text = (
        'Use `linear-moe doctor`.\n\n    A="1 2"\n    N=3 python tools/generate.py --load x \\\n        --greedy $A\n'
    )
    first, second = commands_in(text, {})
    assert second.words == ("linear-moe", "doctor")
    assert first.environment == {"N": "3"} and first.words[3:] == ("x", "--greedy", "1", "2")
    assert len(COMMANDS) > 60
    for wrong in ("python tools/generate.py --lod x", "python -m linear_moe.pretrain --mom-nothing 3",
                  "torchrun --nproc-per-nodes 2 -m linear_moe.pretrain"):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            check_command(wrong.split(), megatron_parser)
        assert end.value.code == 2
    for wrong in ("make nothing", "python tools/bench_layers.py --nothing", "pip install .[nothing]"):
        with pytest.raises(AssertionError):
            check_command(wrong.split(), megatron_parser)


def test_every_environment_variable_is_documented_and_known():
    """Every MOM_ variable that Python code reads has a row, and a run with ``--spec`` takes none for a setting."""
    settings = importlib.import_module("linear_moe.entry.environment")
    packages = [path for package in FOLDERS[2:5] for path in (ROOT / package).rglob("*.py")]
    read_there = re.compile(r"""(?:environ\S*?[(\[]|^[A-Z]\w* = )"(MOM_[A-Z_]+)\"""", re.MULTILINE)
    names = {name for path in packages for name in read_there.findall(path.read_text())}
    assert {"MOM_CONFIG", "MOM_CHECK", "MOM_TRUST_CHECKPOINT", "MOM_TRACEBACK"} <= names
    documented = set(re.findall(r"^\| `(MOM_[A-Z_]+)", read("docs/arguments.md"), re.MULTILINE))
    assert names <= documented
    assert documented <= settings.OTHER_VARIABLES


def test_settings_of_the_script_exist():
    rows = read("docs/quickstart.md").partition("| setting | meaning |")[2].partition("\n\n")[0]
    names = re.findall(r"`([A-Z_]+)`", rows)
    assert len(names) > 15
    assert [name for name in names if not re.search(rf"\b{name}\b", SCRIPT_SETTINGS)] == []


FOREIGN = ("pybind11", "The checkpoint you are trying", "Target module", "No module named", "memory load", "first step",
           "after the installation", "the loss becomes", "out of memory", "two runs part")  # fmt: skip


def test_messages_in_the_troubleshooting_are_those_of_the_code():
    sources = [path for package in FOLDERS[2:5] for path in (ROOT / package).rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    text = " ".join(re.sub(r"[\"']\s*\n\s*f?[\"']", "", text).split())
    rows = re.findall(r"^\| (`.*?`|[^|]*?) \|", read("docs/troubleshooting.md"), re.MULTILINE)
    checked = 0
    for message in rows:
        if not message.startswith("`") or any(word in message for word in FOREIGN):
            continue
        for part in re.split(r"\.\.\.|\d+|`, `", message.strip("`")):
            if len(part.strip(" :'`.")) > 8:
                assert part.strip(" :'`.") in text, message
                checked += 1
    assert checked > 12


# Pieces of Python


def run_python(name, monkeypatch, folder):
    """Runs the pieces of Python of a document, one after another, in a folder."""
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(python_code(name), name, "exec"), names)
    return names


def test_the_layers_page_runs(monkeypatch, tmp_path, capsys):
    names = run_python("docs/layer.md", monkeypatch, tmp_path)
    shapes = names["state"]
    layer, settings = names["layer"], names["layer"].settings
    assert shapes.recurrent.shape == (2, settings.num_all_memories, layer.num_heads, layer.head_dim, layer.value_dim)
    assert shapes.k_tail.shape == (2, settings.num_all_memories, settings.conv_kernel - 1, settings.key_width)
    assert layer.router.weight.grad.any()


def test_the_layers_page_has_every_setting():
    from mom_layers.settings import MixerSettings

    table = read("docs/layer.md").partition("| argument | default | meaning |")[2].partition("\n\n")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", table, re.MULTILINE))
    fields = {name: field.default for name, field in MixerSettings.__dataclass_fields__.items()}
    assert shown.pop("hidden_size") == "required"
    assert {name: str(value) for name, value in shown.items()} == {
        name: f'"{value}"' if isinstance(value, str) else format_default(value) for name, value in fields.items()
    }


def format_default(value):
    return "1e-6" if value == 1e-6 else str(value)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A folder with an export under the name that the documents use."""
    from example_models import save_export

    folder = tmp_path_factory.mktemp("documents")
    save_export(folder / "runs/demo/hf")
    return folder


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/huggingface.md"])
def test_the_pieces_of_python_run(name, export, monkeypatch, capsys):
    names = run_python(name, monkeypatch, export)
    assert names["model"].config.model_type == "mom"


def test_the_example_of_a_rule_follows_its_plain_loop(monkeypatch):
    names = {}
    exec(compile(python_code("docs/architecture.md"), "docs/architecture.md", "exec"), names)
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
