"""What the pages tell people to type is there, and what they say of outputs is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from regraft.cli.main import app
from regraft.dialects import DIALECTS
from regraft.methods import insert_methods, methods
from regraft.transfer import DTYPES
from tests.docs.pages import BY_NAME, ROOT, blocks, commands, prose, text
from tests.methods.worlds import make_base, moved, write_lora

PAGES = pytest.mark.parametrize("page", BY_NAME.values(), ids=list(BY_NAME))
GROUP = get_command(app)
LINES = [(name, words) for name, page in BY_NAME.items() for words in commands(page)]
#: Options in the pages' text that are not Regraft's.
FOREIGN = {"--group"}
#: Values that are checked only when a command runs.
VALUES = {
    "method": {"auto", *(m.name for m in (*methods(), *insert_methods()))},
    "dialect": {None, *DIALECTS},
    "dtype": {None, *DTYPES},
    "align": {"none", "rank-order"},
    "pairing": {"auto", "name", "similarity"},
}
#: Files that are added by hand.
PENDING: set[str] = set()


def options() -> set[str]:
    every = [p for command in (GROUP, *GROUP.commands.values()) for p in command.params]
    return {o for p in every for o in (*p.opts, *p.secondary_opts)} | {"--help"}


def test_the_readme_shows_commands():
    assert {words[0] for name, words in LINES if name == "README.md"} == set(GROUP.commands)


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{n}: {' '.join(w)}" for n, w in LINES])
def test_every_command_line_parses(page, words):
    assert words[0] in GROUP.commands
    try:
        context = GROUP.commands[words[0]].make_context(f"regraft {words[0]}", list(words[1:]))
    except typer.Exit:
        return  # --help
    for name, allowed in VALUES.items():
        if name in context.params:
            assert context.params[name] in allowed


@PAGES
def test_every_option_in_the_text_exists(page):
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)[^`]*`", prose(page)))
    assert named <= options() | FOREIGN


@PAGES
def test_every_link_and_path_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(page))
    for link in links:
        if "://" not in link:
            target = (page.parent / link).resolve()
            assert target.exists() or str(target.relative_to(ROOT)) in PENDING, link
    for path in re.findall(r"`((?:src|docs|tests|benchmarks|lab)/[^`\s*]+)`", prose(page)):
        if path.rpartition("/")[2].split(".")[0].isupper() and path.endswith(
            ("NAME.py", "NAME.md")
        ):
            continue
        assert (ROOT / path).exists(), path


@PAGES
def test_every_anchor_exists(page):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        other = page if not link else (page.parent / link)
        titles = re.findall(r"^#+ (.+)$", text(other), flags=re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
        assert anchor in slugs, f"{link}#{anchor}"


@PAGES
def test_the_text_names_no_place_of_its_making(page):
    assert not re.search(r"(?<![\w.:/~])/(home|root|work|tmp|usr|mnt)/", text(page))
    assert "localhost" not in text(page)


@PAGES
def test_every_make_target_exists(page):
    named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text(page)))
    targets = re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), flags=re.MULTILINE)
    assert named <= set(targets)


@pytest.fixture
def readme_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the README's examples name, tiny."""
    source = make_base(tmp_path / "base-a", 0)
    moved(source, tmp_path / "base-b", 0.2)
    write_lora(tmp_path / "style.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_runs(readme_world, capsys):
    (example,) = [b for b in blocks(ROOT / "README.md", "python") if "import regraft" in b]
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "copy" in out
    assert (readme_world / "style-b.safetensors").is_file()


def test_the_local_commands_of_the_readme_run(readme_world, capsys):
    local = [w for n, w in LINES if n == "README.md" and "base-a" in w]
    assert len(local) >= 2
    for words in local:
        app(words, standalone_mode=False)
    assert "Verdict: copy." in capsys.readouterr().out


def test_the_keys_of_the_json_are_those_of_the_readme(readme_world, capsys):
    words = ["transfer", "style.safetensors", "--from", "base-a", "--to", "base-b", "-o", "o"]
    app([*words, "--dialect", "peft", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    section = text(ROOT / "README.md").partition("**`--json`**")[2].partition("With the verdict")[0]
    listed = [cell for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for cell in
              re.findall(r"`(\w+)`", row)]  # fmt: skip
    assert sorted(listed) == sorted(found)
