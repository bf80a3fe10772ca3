"""The code blocks of README.md and docs/, and how each is tested.

A page is run from top to bottom in one folder: Python blocks share a namespace, bash blocks see
the files of earlier blocks. HTML comments on the lines before a block change this:

    <!-- test: replace A => B -->   run with A replaced by B (one comment each; \\n: a line break)
    <!-- test: parse, WHY -->       not run; the real parser checks the flags of each command
    <!-- test: file NAME -->        written to that file for the following blocks

Blocks in text, yaml and json are not run: yaml must be a valid --config, json must be JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
CODE = ("python", "bash")
NO_CODE = ("text", "yaml", "json")
MARK = re.compile(r"<!-- test: (.*?) -->", re.S)


@dataclass
class Block:
    page: str
    line: int
    language: str
    text: str
    marks: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def mark(self, kind: str) -> list[str]:
        return [m[len(kind) :].lstrip(", ") for m in self.marks if re.match(rf"{kind}\b", m)]

    def replaced(self) -> str:
        """The text after the replacements of its marks; each must occur in the text."""
        text = self.text
        for mark in self.mark("replace"):
            before, after = (part.strip() for part in mark.split(" => "))
            assert before in text, f"{self.place}: {before!r} is not in the block"
            text = text.replace(before, after.replace("\\n", "\n"))
        return text


def find_pages() -> list[Path]:
    """README, CONTRIBUTING and all pages of docs/, sorted."""
    docs = [p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(docs)]


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page. Indented code is an error, because no test would run it."""
    found: list[Block] = []
    marks: list[str] = []
    block: Block | None = None
    page = str(path.relative_to(ROOT))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if block is not None:
            if line.strip() == "```":
                found.append(block)
                block = None
            else:
                block.text += line + "\n"
        elif fence := re.fullmatch(r"\s*```(.*)", line):
            block = Block(page, number, fence[1].strip(), "", marks)
            marks = []
        elif mark := MARK.fullmatch(line.strip()):
            marks.append(mark[1])
        else:
            assert not marks, f"{page}:{number}: a test mark must be right before its block"
            code = re.match(
                r"    (python|pip|make|cpo-fast|pytest|torchrun|OMP_|import |from )", line
            )
            assert not code, f"{page}:{number}: code must be in a fenced block"
    assert block is None, f"{page}: the block at line {block and block.line} is not closed"
    return found


def split_commands(script: str) -> Iterator[list[str]]:
    """The words of every command in a script, without comments, continued lines joined."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for last, command in itertools.groupby(words, lambda word: word == "&&"):
            if not last:
                yield list(command)


class Parsed(BaseException):
    """Raised to end a command after its parser has accepted the flags."""


def parse_flags(name: str, argv: list[str], monkeypatch: Any) -> str | None:
    """The error, if any, of the parser of `cpo_fast.<name>` for these flags."""
    from cpo_fast import cli

    if name not in cli.COMMANDS:
        return f"no command {name}"
    plain = argparse.ArgumentParser.parse_args
    errors = io.StringIO()
    try:
        if name == "train":
            from cpo_fast.testing.runs import parse_arguments

            with contextlib.redirect_stderr(errors):
                parse_arguments(argv)
            return None
        with monkeypatch.context() as patch, contextlib.redirect_stderr(errors):

            def parse_and_stop(self: argparse.ArgumentParser, *words: Any, **more: Any) -> NoReturn:
                plain(self, *words, **more)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            cli.main([name, *argv])
    except Parsed:
        return None
    except SystemExit:
        return errors.getvalue().strip().splitlines()[-1]
    except Exception as error:
        return str(error)
    return "the command ended before it parsed its flags"


def parse_block(block: Block, monkeypatch: Any) -> int:
    """Check a block without running it; returns the number of checked commands."""
    text = block.replaced()
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    ours = 0
    for words in split_commands(text):
        line = shlex.join(words)
        for index, word in enumerate(words):
            name = None
            if word.startswith("cpo_fast.") and words[index - 1] == "-m":
                name = word.removeprefix("cpo_fast.")
            elif word == "cpo-fast":
                index, name = index + 1, words[index + 1]
            if name is None:
                continue
            error = parse_flags(name, words[index + 1 :], monkeypatch)
            assert error is None, f"{block.place}: {line}: {error}"
            ours += 1
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args(words[1:])
        for module in (word for word in words if word.startswith("bench.")):
            name = module.replace(".", "/") + ".py"
            assert (ROOT / name).is_file(), f"{block.place}: {line}"
            ours += 1
        if "pytest" in words:
            files = [word.split("::")[0] for word in words if word.startswith(("bench/", "tests/"))]
            assert all((ROOT / name).is_file() for name in files), f"{block.place}: {line}"
            ours += len(files)
        if words[:2] == ["pip", "install"]:
            pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
            unknown = [word for word in words[2:] if word != "./cpo_fast" and word not in pinned]
            assert not unknown, f"{block.place}: {line}: constraints.txt has no {unknown}"
            ours += 1
        if words[0] == "make":
            make = ["make", "-n", *words[1:]]
            done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block.place}: {line}: {done.stderr}"
            ours += 1
    return ours


def check_data(block: Block, folder: Path) -> None:
    """A data block must be valid in its language."""
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        from cpo_fast.run.arguments import read_flags_file

        path = folder / "block.yaml"
        path.write_text(block.text)
        read_flags_file(path)
