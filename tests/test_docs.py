"""The documentation is true: its code runs, its links lead somewhere, its commands and names exist."""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gvu
from gvu.cli import train
from gvu.cli.parser import parse
from gvu.config import TrainConfig, leaves, load_config
from gvu.models.registry import EMBEDDED, assets

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
HAVE_MODELS = all((assets() / name / "model.safetensors").is_file() for name in EMBEDDED)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(first line, text) of the fenced blocks in a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


def prose(page: Path) -> str:
    """The text outside of fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def run(source: str, page: Path, first: int, names: dict[str, Any]) -> None:
    """Execute statement by statement; `expression  # -> value` must have that value."""
    lines = source.splitlines()
    for statement in ast.parse(source).body:
        where = f"{page}:{first + statement.lineno}"
        wanted = re.search(r"  # -> (.+)$", lines[(statement.end_lineno or 0) - 1])
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), where, "eval"), names)
            assert wanted is None or repr(value) == wanted[1], f"{where} gives {value!r}"
        else:
            assert wanted is None, f"{where}: only an expression has a value to check"
            exec(compile(ast.Module([statement], []), where, "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=named)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks(page, "python")
    if not HAVE_MODELS and any(f'"{name}"' in text for _, text in code for name in EMBEDDED):
        pytest.skip("the embedded checkpoints are not in this tree (gvu mini pretrain all makes them)")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for first, text in code:
        run(text, page, first, names)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", prose(page))
    inside = [link for link in links if "://" not in link and (HAVE_MODELS or not link.endswith(".png"))]
    missing = [link for link in inside if not (page.parent / link).exists()]
    assert not missing, f"{named(page)} links to {missing}"


def commands(page: Path) -> list[list[str]]:
    """The command lines in shell blocks and in code spans, as words, without redirections."""
    spans = re.findall(r"`((?:gvu|make|python) [^`\n]+)`", prose(page))
    lines = [line for _, block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in [*lines, *spans]]
    return [words[: next((i for i, w in enumerate(words) if w in (">", "|")), None)] for words in found if words]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words[0] == "gvu":
            check_gvu(words[1:])
        elif words[0] == "python":
            script(words[1]).parser().parse_intermixed_args(words[2:])
        elif words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets, words
        else:
            raise AssertionError(f"{named(page)} has an unknown command: {words}")


def check_gvu(words: list[str]) -> None:
    """A `gvu` line parses; settings of `gvu train` are known and well-typed."""
    if words in ([], ["COMMAND", "--help"]) or words[-1] == "--help":
        return
    args = parse(words)
    if args.command == "train":
        load_config(TrainConfig, file=args.config, overrides=train.overrides(args))


def script(name: str) -> ModuleType:
    """A script of the repository as a module."""
    path = ROOT / name
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def resolve(name: str) -> object:
    """What a dotted name stands for: a module, or an attribute of one."""
    parts, found = name.split("."), None
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_exist(page: Path) -> None:
    """`gvu.x.y` can be imported, `section.key` is a setting, `test_x` is a test."""
    spans = set(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    settings = set(leaves(TrainConfig))
    sections = {key.partition(".")[0] for key in settings if "." in key}
    for span in spans:
        if re.fullmatch(r"gvu(\.\w+)+", span):
            resolve(span)
        elif re.fullmatch(r"test_\w+", span):
            assert f"def {span}(" in tests, f"{named(page)}: there is no {span}"
        elif (key := re.match(r"(\w+)\.\w+(?=$|: )", span)) and key[1] in sections - {"eval"}:
            assert key[0] in settings, f"{named(page)}: there is no setting {key[0]}"


def test_conformance_checks_in_the_paper_index_exist() -> None:
    from gvu.testing import CHECKS

    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    named_there = set(re.findall(r"`(\w+)` \(conformance\)", text))
    assert named_there
    assert named_there <= {check.__name__ for check in CHECKS}


@pytest.mark.parametrize("recipe", RECIPES, ids=named)
def test_recipes_load_and_are_indexed(recipe: Path) -> None:
    load_config(TrainConfig, file=recipe)
    assert f"recipes/{recipe.name}" in (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")


def test_the_fast_recipe_is_the_default() -> None:
    assert load_config(TrainConfig, file=ROOT / "recipes" / "mini_fast.yaml") == TrainConfig()


def test_the_public_names_are_documented() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    hidden = [name for name in gvu.__all__ if f"gvu.{name}" not in pages and name not in ("Images", "Score")]
    assert hidden in ([], ["TrainSummary"])
