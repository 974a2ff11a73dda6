"""The documents of the project, and the commands and pieces of code in them."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
# A copy without its history has no list: the same files, by their places.
DOCUMENTS = LISTED or [
    path.relative_to(ROOT).as_posix() for place in ("*.md", "docs/*.md", "tools/*/*.md") for path in ROOT.glob(place)
]
FOR_USERS = [name for name in DOCUMENTS if name.split("/")[0] in ("README.md", "docs", "CONTRIBUTING.md")]
PROGRAMS = ("linear-moe", "python", "python3", "torchrun", "bash", "sbatch", "pip", "make", "lm_eval")
ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Command:
    """A command of a document: the environment before it, its words, and where a variable stands for words."""

    text: str
    environment: dict[str, str]
    words: tuple[str, ...]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def code_blocks(text: str) -> Iterator[str]:
    """Blocks that are indented by four columns or more, and fenced blocks without a language. A line that ends in a
    backslash is joined with the next one."""
    fenced = re.findall(r"^```(?:bash|sh|)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    without = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:(?<=\n\n)|\A)((?: {4,}\S.*\n)+)", without)
    for block in [*fenced, *indented]:
        yield re.sub(r"\\\n\s*", "", block)


def variables_of(text: str) -> dict[str, str]:
    """Shell variables that a document sets on lines of their own, by NAME="value"."""
    return dict(re.findall(r'^ {4,}([A-Z]+)="([^"]*)"$', text, re.MULTILINE))


def commands_in(text: str, variables: dict[str, str]) -> Iterator[Command]:
    """The commands of a document in its blocks of code and between backticks.

    variables: what stands for a variable such as $ARGUMENTS. A document's own assignments come first.
    """
    known = variables | variables_of(text)
    lines = [line.strip() for block in code_blocks(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in lines:
        replaced = re.sub(r"\$([A-Z]+)", lambda found: known.get(found[1], found[0]), line)
        try:
            words = shlex.split(replaced)
        except ValueError:  # an apostrophe in an output's line
            continue
        environment = {}
        while words and ASSIGNMENT.match(words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        # A single word in a sentence is a program's name, and no command.
        if len(words) > 1 and words[0] in PROGRAMS:
            yield Command(line, environment, tuple(words))


def python_code(name: str) -> str:
    """All pieces of Python in a document, one after another."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", read(name), re.DOTALL | re.MULTILINE))
