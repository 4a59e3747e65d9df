"""What the pages say exists: links, images, anchors, make targets, subcommands, settings, files."""

import re
from pathlib import Path

import pytest

from vllm_batch_dagster.cli.main import app
from vllm_batch_dagster.settings import PROJECT_ROOT, Settings

PACKAGE = PROJECT_ROOT / "vllm_batch_dagster"
PAGES = sorted([*PROJECT_ROOT.glob("*.md"), *(PROJECT_ROOT / "docs").rglob("*.md")])
MAKEFILE = (PROJECT_ROOT / "Makefile").read_text()

# Variables of other programs, and those that an example sets for itself.
FOREIGN = {
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "VLLM_CPU_KVCACHE_SPACE",
    *("BATCH_ID", "FILE_ID", "HOOK_ID", "SPARE_ID", "UPLOAD_ID"),
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY", "SUMMARY_FOLDER"),
    "O_EXCL",
}
# Files that exist only in an installation, a state folder or another project.
MADE_LATER = {"report.md", ".questions.jsonl", "models.yaml", ".models/models.yaml", "engine.json", "my_handler.py"}
MADE_LATER |= {"sft.jsonl", "dpo.jsonl", "kto.jsonl"}
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".svg", ".sql", ".txt", ".jsonl"}


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT_ROOT))


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def code(page: Path) -> str:
    """Return everything on a page that is set as code, one piece a line."""
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL) + inline_code(page))


ALL_CODE = "\n".join(code(page) for page in PAGES)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_and_image_resolves(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


def test_every_page_of_the_documentation_is_linked() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))
    }
    named = {PROJECT_ROOT / piece for page in PAGES for piece in inline_code(page)}
    pages = {page for page in PAGES if page.parent == PROJECT_ROOT / "docs"}
    assert pages - linked - named == set()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", ALL_CODE)) - targets == set()


def test_every_make_target_is_documented() -> None:
    listed = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    documented = code(PROJECT_ROOT / "README.md") + code(PROJECT_ROOT / "CONTRIBUTING.md")
    assert len(listed) > 10
    assert listed - set(re.findall(r"\bmake ([a-z][a-z-]*)", documented)) == set()


def test_the_subcommands_that_are_named_are_those_that_exist() -> None:
    callbacks = (command.callback for command in app.registered_commands if not command.hidden)
    commands = {callback.__name__ for callback in callbacks if callback is not None}
    commands |= {str(group.name) for group in app.registered_groups}
    assert len(commands) > 5
    assert set(re.findall(r"\bvllm-batch ([a-z]+)", ALL_CODE)) == commands


def test_every_variable_that_is_named_exists() -> None:
    named = set(re.findall(r"(?<![\w$./-])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b(?!\*)", ALL_CODE))
    settings = {name.upper() for name in Settings.model_fields}
    sources = [*(PROJECT_ROOT / "scripts").glob("*.py"), *(PROJECT_ROOT / "handlers").glob("*.py")]
    sources += (PACKAGE / "cli").glob("*.py")
    elsewhere = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", MAKEFILE + "".join(path.read_text() for path in sources)))
    assert len(named) > 20
    assert named - settings - elsewhere - FOREIGN == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page: Path) -> None:
    folders = {path.name for path in (*PROJECT_ROOT.iterdir(), *PACKAGE.iterdir()) if path.is_dir()}
    named = {piece for piece in inline_code(page) if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", piece)}
    paths = {
        piece
        for piece in named - MADE_LATER
        if Path(piece).suffix in SUFFIXES or ("/" in piece and piece.split("/")[0] in folders)
    }
    bases = (PROJECT_ROOT, PACKAGE, page.parent)
    assert [piece for piece in sorted(paths) if not any(list(base.glob(piece)) for base in bases)] == []
