"""Outputs appear whole or not at all, whatever fails and whenever."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from regraft.errors import OutputExists, OutputFailed
from regraft.files import atomic, atomic_file, atomic_folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def broken(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(path, content):
    """Write, or fail half-way if the content is an exception."""
    if isinstance(content, BaseException):
        path.write_text("half")
        raise content
    path.write_text(content)


def write(path, content="new", **kwargs):
    with atomic_file(path, **kwargs) as temporary:
        fill(temporary, content)


def write_folder(path, content="new", **kwargs):
    with atomic_folder(path, replaceable=("a", "b"), **kwargs) as temporary:
        fill(temporary / "a", content)


def test_a_file_appears_with_ordinary_permissions(tmp_path):
    write(tmp_path / "deep" / "er" / "a.txt")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert (tmp_path / "deep/er/a.txt").read_text() == "new"
    assert names(tmp_path / "deep/er") == ["a.txt"]
    assert (tmp_path / "deep/er/a.txt").stat().st_mode == plain.stat().st_mode


def test_an_existing_file_stays_unless_told(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OutputExists, match="already exists"):
        write(path)
    assert path.read_text() == "old"
    write(path, overwrite=True)
    assert path.read_text() == "new"


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputExists, match="folder"):
        write(tmp_path / "a", overwrite=True)
    (tmp_path / "b").write_text("")
    with pytest.raises(OutputExists, match="is a file"):
        write_folder(tmp_path / "b", overwrite=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_while_writing_leaves_all_as_it_was(tmp_path, error, existing):
    path, folder = tmp_path / "a", tmp_path / "f"
    if existing:
        path.write_text("old")
        folder.mkdir()
        (folder / "a").write_text("old")
    before = names(tmp_path)
    with pytest.raises(error):
        write(path, error(), overwrite=True)
    with pytest.raises(error):
        write_folder(folder, error(), overwrite=True)
    assert names(tmp_path) == before
    if existing:
        assert path.read_text() == (folder / "a").read_text() == "old"


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("writer", [write, write_folder])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_system_call_leaves_all_as_it_was(tmp_path, monkeypatch, step, writer, existing):
    path = tmp_path / "out"
    if existing:
        writer(path, "old")
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, step, broken)
        patch.setattr(atomic, "_exchange", lambda a, b: False)
        with pytest.raises(OutputFailed, match="No space left") as caught:
            writer(path, overwrite=True)
    assert caught.value.exit_code == 1
    assert str(path) in str(caught.value)
    assert names(tmp_path) == before
    if existing:
        assert (path / "a" if path.is_dir() else path).read_text() == "old"


def test_a_swap_that_fails_half_way_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "out"
    write_folder(path, "old")
    real, calls = os.replace, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            broken()
        real(a, b)

    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    monkeypatch.setattr(atomic.os, "replace", second_fails)
    with pytest.raises(OutputFailed):
        write_folder(path, overwrite=True)
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_swapped(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    path = tmp_path / "out"
    write_folder(path, "old")
    (path / "b").write_text("of the old one")
    with pytest.raises(OutputExists):
        write_folder(path)
    write_folder(path, overwrite=True)
    assert names(path) == ["a"]
    assert (path / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_other_peoples_files_are_kept(tmp_path):
    path = tmp_path / "out"
    write_folder(path, "old")
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists, match=r"thesis\.txt"):
        write_folder(path, overwrite=True)
    assert (path / "thesis.txt").read_text() == "years of work"
    assert (path / "a").read_text() == "old"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "out"
    write_folder(path, "old")
    context = atomic_folder(path, overwrite=True, replaceable=("a",))
    temporary = context.__enter__()
    (temporary / "a").write_text("new")
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists):
        context.__exit__(None, None, None)
    assert names(path) == ["a", "thesis.txt"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("writer", [write, write_folder])
@pytest.mark.parametrize("bad", ["file/inside/out", "x" * 300, "nul\0byte"])
def test_places_where_nothing_can_be_written(tmp_path, writer, bad):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed):
        writer(tmp_path / bad)
    assert names(tmp_path) == ["file"]


def test_a_name_as_long_as_the_system_allows(tmp_path):
    write(tmp_path / ("n" * 250))
    write_folder(tmp_path / ("m" * 250))
    assert len(names(tmp_path)) == 2


KILLED = """
import sys, time
from pathlib import Path
from regraft.files import atomic_file, atomic_folder
with atomic_file(Path(sys.argv[1]) / "a", overwrite=True) as a, atomic_folder(
    Path(sys.argv[1]) / "f", overwrite=True, replaceable=("a",)
) as f:
    a.write_text("half")
    (f / "a").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_kill_minus_nine_in_the_middle(tmp_path):
    write(tmp_path / "a", "old")
    write_folder(tmp_path / "f", "old")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        os.kill(child.pid, signal.SIGKILL)
    assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "f" / "a").read_text() == "old"
    write(tmp_path / "a", overwrite=True)
    write_folder(tmp_path / "f", overwrite=True)
    assert (tmp_path / "a").read_text() == (tmp_path / "f" / "a").read_text() == "new"
    # Only the killed process's own hidden temporaries may be left.
    assert all(n.startswith(".") for n in names(tmp_path) if n not in ("a", "f"))


def test_writers_at_once_leave_one_whole_file(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom regraft.files import atomic_folder\n"
        "for i in range(20):\n"
        "    with atomic_folder(Path(sys.argv[1]), overwrite=True, replaceable=('a','b')) as f:\n"
        "        [(f / n).write_text(sys.argv[2] * 1000) for n in 'ab']\n"
    )
    path = tmp_path / "out"
    write_folder(path, "old")
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(path), letter]) for letter in "xy"
    ]
    while any(child.poll() is None for child in children):
        assert path.is_dir()
        time.sleep(0.01)
    assert [child.wait() for child in children] == [0, 0]
    assert (path / "a").read_text() == (path / "b").read_text()
