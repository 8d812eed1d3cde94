"""What the Markdown files name exists: links and their headings, files, modules, settings, metrics, tests."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path

import pytest

from monitor.metrics import all_metrics
from monitor.settings import MonitorTable
from producer.settings import ProducerSettings
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parent.parent
TOP = ("producer", "trainer", "monitor", "deploy", "tests", "docs")
PACKAGES = ("producer", "trainer", "monitor")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for top in TOP for path in (ROOT / top).rglob("*.md"))])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
TABLES = {
    name: field.annotation
    for model in (ProducerSettings, TrainerSettings)
    for name, field in model.model_fields.items()
} | {"monitor": MonitorTable}


def is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def is_defined(dotted: str) -> bool:
    """Whether a module exists, or holds a definition or value of that name."""
    module, _, name = dotted.rpartition(".")
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    defined = path.is_file() and re.search(rf"^(class |def |){name}\b", path.read_text(), re.MULTILINE)
    return is_module(dotted) or bool(defined)


def is_setting(dotted: str) -> bool:
    """Whether `table.key` is a setting of the run file."""
    table, _, key = dotted.partition(".")
    models = [TABLES.get(table), *getattr(TABLES.get(table), "__args__", ())]  # `ModelSettings | None` has two
    return any(key in getattr(model, "model_fields", {}) for model in models)


def anchors(path: Path) -> set[str]:
    """The headings of a Markdown file as a browser addresses them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_code(text: str) -> list[str]:
    return CODE.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def missing_links(document: Path, text: str) -> Iterable[str]:
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def missing_names(document: Path, text: str) -> Iterable[str]:
    metrics = {metric.name for metric in all_metrics()}
    for module in re.findall(r"python -m ([\w.]+)", text):
        if module.split(".")[0] in (*PACKAGES, "deploy", "tests") and not is_module(module):
            yield f"python -m {module}"
    for code in inline_code(text):
        word = code.split(" ")[0].rstrip("/")
        first = re.split(r"[./]", word)[0]
        if re.search(r"[*{}…<>\[]", word):
            continue
        if re.fullmatch(r"sluice_\w+", word):
            exists = word in metrics
        elif (word.endswith((".py", ".md")) and first != "runs") or ("/" in word and first in TOP):
            exists = (document.parent / word).exists() or (ROOT / word).exists()
        elif re.fullmatch(r"[a-z_]+(\.\w+)+", word) and first in (*PACKAGES, "tests", *TABLES):
            exists = is_defined(word) or is_setting(word) or (document.parent / word).exists()
        else:
            continue
        if not exists:
            yield code


def missing_tests(text: str) -> Iterable[str]:
    """`test_x`, `test_x::test_name` or `test_name`, each perhaps the beginning of one."""
    sources = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for code in inline_code(text):
        if (match := re.fullmatch(r"(test_\w+)(?:::(\w+))?(…|\[…\])?", code)) is None:
            continue
        module, name = match[1], match[2]
        within = [sources[module]] if module in sources else [] if name else sources.values()
        prefix = name or (None if module in sources else module)
        ending = "" if match[3] == "…" else r"\b"
        is_prefix = bool(match[3]) and name is None and any(stem.startswith(module) for stem in sources)
        if prefix is None or is_prefix:
            continue
        if not any(re.search(rf"def {prefix}{ending}", source) for source in within):
            yield code


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(document: Path) -> None:
    """Relative links with their headings, files, modules, `table.key` settings, metrics and tests."""
    text = document.read_text()

    assert [*missing_links(document, text), *missing_names(document, text), *missing_tests(text)] == []


def test_what_does_not_exist_is_noticed(tmp_path: Path) -> None:
    """One of each kind; and what is allowed beside it."""
    text = """# A heading
[here](#a-heading) [nowhere](#another) [gone](gone.md)
`trainer/gone.py` `trainer/settings.py` `trainer.gone` `trainer.settings` `monitor.host` `monitor.gone` `corpus.kind`
`model.gone` `sluice_fvu` `sluice_gone` `python -m trainer.gone` `test_wire` `test_wire::test_gone` `summary.json`
"""
    document = tmp_path / "page.md"
    document.write_text(text)

    assert list(missing_links(document, text)) == ["#another", "gone.md"]
    assert list(missing_names(document, text)) == [
        "python -m trainer.gone", "trainer/gone.py", "trainer.gone", "monitor.gone", "model.gone", "sluice_gone"
    ]  # fmt: skip
    assert list(missing_tests(text)) == ["test_wire::test_gone"]


def replaced_names() -> set[tuple[str, str]]:
    """(test module, attribute) of all that tests replace, but for the switches of Hugging Face's libraries."""
    replaced = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
                constants = [one.value for one in node.args[:2] if isinstance(one, ast.Constant)]
                replaced |= {(path.stem, str(name).rpartition(".")[2]) for name in constants[:1]}
    return {(module, name) for module, name in replaced if not name.startswith("HF_")}


def test_what_tests_replace_is_said() -> None:
    """Each replaced function or value stands in the table of tests/README.md, and nothing else does."""
    section = (ROOT / "tests/README.md").read_text().partition("## What is replaced")[2]
    table = set()
    for line in re.findall(r"^\| `.*", section, re.MULTILINE):
        modules, names = (CODE.findall(cell) for cell in line.split("|")[1:3])
        table |= {(module, name.rpartition(".")[2]) for module in modules for name in names}

    assert replaced_names() <= table
    assert {module for module, _ in table} == {module for module, _ in replaced_names()}
    assert {name for _, name in table} - {name for _, name in replaced_names()} <= {"_clock"}  # set, not patched


def prose(source: str) -> str:
    """The docstrings of a Python file, those of its fields included, and its comments."""
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(strings + [token.string for token in tokens if token.type == tokenize.COMMENT])


def missing_modules(text: str) -> Iterable[str]:
    """Dotted names that begin like a module of ours and are neither that, nor defined in one, nor a setting."""
    for name in re.findall(r"(?<![\w./-])(?:producer|trainer|monitor|tests)(?:\.\w+)+(?![\w(])", text):
        owner = name.rpartition(".")[0]  # a class, perhaps, or a file such as tests.yml
        is_member = is_defined(owner) and not is_module(owner)
        if not (is_defined(name) or is_member or is_setting(name) or name.endswith((".yml", ".toml", ".NAME"))):
            yield name


@pytest.mark.parametrize("folder", TOP[:5])
def test_modules_that_comments_name_exist(folder: str) -> None:
    """In docstrings and comments of every Python file: what was moved is not named by its old place."""
    paths = (ROOT / folder).rglob("*.py")
    faults = {path.relative_to(ROOT).as_posix(): [*missing_modules(prose(path.read_text()))] for path in paths}

    assert {path: names for path, names in faults.items() if names} == {}


def test_the_readme_is_short() -> None:
    """A newcomer reads it to its end; what is longer belongs in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_pictures_are_small() -> None:
    """A clone carries them for ever."""
    assert {path.name for path in (ROOT / "docs/images").iterdir() if path.stat().st_size > 200_000} == set()
