"""Run the examples of the documentation: Python blocks of README.md and docs/, and the doctests of every module.

The ``python`` blocks of a page run in order, in one namespace and in an empty directory; blocks with prompts
(``>>>``) are compared with the output they show. A page that needs a package which is not installed is skipped.
"""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import hashemb

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(hashemb.__file__).parent
DOCS = ROOT / "docs"
#: Every page with links, and those whose Python blocks run: decisions are notes of their day, and stay as they are.
LINKED = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")), *sorted(DOCS.rglob("*.md"))]
PAGES = [path for path in LINKED if path.is_file() and DOCS / "decisions" not in path.parents]
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"]
OLD_NAMES = {"hashemb.ctr.readers", "hashemb.ctr.fields", "hashemb.ctr.deep"}  # they warn, and have no examples
MODULES = [".".join(("hashemb", *path.with_suffix("").parts)).removesuffix(".__init__") for path in FILES]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks(page: str) -> list[tuple[int, str]]:
    """Return (line number, code) for every block of a page that is fenced as ``python``."""
    pattern = re.compile(r"^```python *\n(.*?)^``` *$", re.MULTILINE | re.DOTALL)
    return [(page.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in pattern.finditer(page)]


def run_page(name: str, page: str) -> int:
    """Run the Python blocks of a page and return how many there were."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = python_blocks(page)
    for line, code in blocks:
        if ">>>" in code:
            examples = doctest.DocTestParser().get_doctest(code, namespace, name, name, line - 1)
            doctest.DebugRunner(optionflags=OPTIONS).run(examples, clear_globs=False)
            namespace.update(examples.globs)
        else:
            # The newlines make tracebacks show the line numbers of the page.
            exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)
    return len(blocks)


def broken_links(page: str, folder: Path) -> list[str]:
    """Return relative links of a page that lead nowhere, or into the package, which release tests have elsewhere."""
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)[^)]*\)", page)
    return [link for link in links if re.match(r"(\.\./)+hashemb/", link) or not (folder / link).exists()]


def is_missing_extra(error: BaseException) -> bool:
    """Return whether an import failed because a third-party package is missing."""
    name = getattr(error, "name", None)
    return isinstance(error, ImportError) and not (name or "").startswith("hashemb")


@pytest.fixture
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=page_name)
@pytest.mark.usefixtures("empty_directory")
def test_page_runs(path: Path) -> None:
    try:
        run_page(page_name(path), path.read_text(encoding="utf-8"))
    except ImportError as error:
        if not is_missing_extra(error):
            raise
        pytest.skip(f"{page_name(path)} needs a package that is not installed: {error}")


@pytest.mark.parametrize("path", [path for path in LINKED if path.is_file()], ids=page_name)
def test_links_lead_somewhere(path: Path) -> None:
    broken = broken_links(path.read_text(encoding="utf-8"), path.parent)
    if not (ROOT / "hashemb").is_dir():  # the tests of an installed package, next to which its source is not found
        broken = [link for link in broken if not link.startswith("hashemb/")]
    assert broken == []


def test_canary_links(tmp_path: Path) -> None:
    page = "[a](gone.md#part) [b](https://example.com) [c](#here) [d](there.md) [e](../hashemb/__init__.py)"
    (tmp_path / "there.md").touch()
    assert broken_links(page, tmp_path) == ["gone.md", "../hashemb/__init__.py"]


def test_every_section_is_found_and_has_programs() -> None:
    """The pages are in folders; a folder that is not searched would have no program here."""
    found = {page_name(path).rpartition("/")[0] for path in PAGES if python_blocks(path.read_text(encoding="utf-8"))}
    assert found >= {"", "docs", "docs/start", "docs/howto", "docs/reference", "docs/explanation"}


@pytest.mark.parametrize("module", ["hashemb", "hashemb.errors", "hashemb.ctr", "hashemb.sklearn", "hashemb.torch"])
def test_the_reference_lists_every_public_name(module: str) -> None:
    try:
        public = set(importlib.import_module(module).__all__) - {"__version__", "errors", "reference"}
    except ImportError as error:
        if not is_missing_extra(error):
            raise
        pytest.skip(f"{module} needs a package that is not installed: {error}")
    page = (DOCS / "reference" / "api" / f"{module.removeprefix('hashemb.')}.rst").read_text(encoding="utf-8")
    assert public - set(re.findall(r"^   (\w+)$", page, re.MULTILINE)) == set()


@pytest.mark.parametrize("module", [module for module in MODULES if module not in OLD_NAMES])
@pytest.mark.usefixtures("empty_directory")
def test_doctests_of(module: str) -> None:
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        if not is_missing_extra(error):
            raise
        pytest.skip(f"{module} needs a package that is not installed: {error}")
    assert doctest.testmod(loaded, optionflags=OPTIONS).failed == 0


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("Text\n```python\nimport hashemb\nhashemb.no_such_name\n```\n", AttributeError),
        ("```python\nx = 1\n```\nand\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\n>>> 1 + 1\n3\n```\n", doctest.DocTestFailure),
        ("```python\nx = 1\n```\n```python\n>>> y\n```\n", doctest.UnexpectedException),
    ],
)
def test_canary_page(page: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run_page("canary", page)


def test_blocks_share_names_and_other_languages_are_left_alone() -> None:
    blocks = (
        "python\nx = 1\n",
        "console\n$ hashemb demo\n",
        "python\n>>> x\n1\n>>> y = 2\n",
        "python\nassert y == 2\n",
    )
    page = "".join(f"```{block}```\n" for block in blocks)
    assert [line for line, _ in python_blocks(page)] == [2, 8, 13]
    assert run_page("canary", page) == 3


def test_canary_missing_extra() -> None:
    """A missing module of hashemb is an error; a missing third-party package is an extra that is not installed."""
    for module, expected in (("hashemb.no_such_module", False), ("no_such_package", True)):
        with pytest.raises(ImportError) as caught:
            importlib.import_module(module)
        assert is_missing_extra(caught.value) is expected
    assert is_missing_extra(hashemb.errors.MissingExtraError("pandas", "ctr"))
