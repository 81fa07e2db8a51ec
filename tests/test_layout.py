"""The tree's rules: imports go left, every folder is mapped and linked, one subject a file."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ["kernels", "primitives", "genome", "proxies", "search"]
LONGEST = 500


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_folders(path: Path, text: str) -> set[str]:
    """The project's folders that a module at `path` imports, however it spells them."""
    package = ("mendel", *path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(p for p in (base, node.module or "") if p)
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        found |= {t.split(".")[1] for t in targets if t.startswith("mendel.")}
    return found & set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_left(folder: str) -> None:
    allowed = set(FOLDERS[: FOLDERS.index(folder) + 1])
    upward = {
        str(p): bad
        for p in modules(folder)
        if (bad := imported_folders(p, p.read_text()) - allowed)
    }
    assert not upward


@pytest.mark.parametrize(
    "text", ["from ..search import cli", "import mendel.search.cli", "from mendel import search"]
)
def test_the_import_reader_sees_every_spelling(text: str) -> None:
    assert imported_folders(ROOT / "genome" / "model.py", text) == {"search"}


def test_every_folder_is_packaged() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.relative_to(ROOT).as_posix() for f in FOLDERS for p in modules(f)}
    names = {"mendel." + f.replace("/", ".") for f in folders}
    assert names == set(setuptools["packages"])
    assert setuptools["package-dir"] == {
        n: n.removeprefix("mendel.").replace(".", "/") for n in names
    }


def test_typings_link_every_folder() -> None:
    links = ROOT / "typings" / "mendel"
    assert {p.name for p in links.iterdir()} == set(FOLDERS)
    for link in links.iterdir():
        assert link.is_symlink()
        assert link.resolve() == ROOT / link.name


def test_kernels_is_no_package_of_its_own() -> None:
    # A bare `kernels` on sys.path would hide Hugging Face's package of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for folder in FOLDERS[1:]:
        assert (ROOT / folder / "__init__.py").exists()


def test_no_file_is_two_things() -> None:
    files = [p for f in [*FOLDERS, "tests", "benchmarks"] for p in modules(f)]
    long = {
        str(p.relative_to(ROOT)): n
        for p in files
        if (n := len(p.read_text().splitlines())) > LONGEST
    }
    assert not long


def test_no_pickle() -> None:
    words = ("import pickle", "torch.load(", "yaml.load(", "torch.save(")
    found = {
        str(p.relative_to(ROOT)): w
        for f in FOLDERS
        for p in modules(f)
        for w in words
        if w in p.read_text()
    }
    assert not found


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "studies" / "LOG.md",
]


def relative_links(text: str) -> list[str]:
    """The targets of a page's links and images that are files beside it, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", text)
    found = [(a or b).partition("#")[0] for a, b in targets]
    return [t for t in found if t and not re.match(r"[a-z]+:", t)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_relative_link_points_at_a_file(page: Path) -> None:
    missing = [t for t in relative_links(page.read_text()) if not (page.parent / t).exists()]
    assert not missing


def test_the_link_reader_sees_links_images_and_anchors() -> None:
    text = '[a](a.md#top) ![b](b.png "title") [c](https://c.org/x) [d](#here) <img src="e.png">'
    assert relative_links(text) == ["a.md", "b.png", "e.png"]
