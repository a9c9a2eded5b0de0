"""What must hold of every file, however spoiled: a result or a RegraftError, in time, and every key
accounted for."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TypeVar

from regraft import convert, transfer
from regraft.adapters import Site
from regraft.bases import Base
from regraft.convert.run import Form
from regraft.dialects import DIALECTS, inspect_file, load_adapter
from regraft.dialects.lookup import resolve
from regraft.dialects.source import open_source
from regraft.errors import RegraftError
from regraft.files import TensorFile
from regraft.subspaces import SubspaceLibrary

T = TypeVar("T")

#: No case may take longer. Far above what any does.
SECONDS = 20


class Hang(Exception):
    """A case took too long."""


@contextmanager
def in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(work: Callable[[], T]) -> T | None:
    """What the work gives, or None if it is refused. Anything else escapes."""
    try:
        return work()
    except RegraftError:
        return None


def inspected(path: Path) -> None:
    """``inspect`` gives facts that are JSON, and leaves no key out."""
    facts = attempt(lambda: inspect_file(path, spectrum=True))
    if facts is not None:
        json.loads(json.dumps(facts), parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def loaded(path: Path, base: Base, *, allow_unknown: bool) -> None:
    """Every key belongs to a module that is carried or refused, or is refused itself."""
    adapter = attempt(lambda: load_adapter(path, base, allow_unknown=allow_unknown))
    if adapter is None:
        return
    source = open_source(path, allow_unknown=allow_unknown)
    parts = resolve(source.modules, base, str(path), optional=set(source.modules)).parts
    carried = {site.with_parameter("weight") for site in adapter.updates}
    for name, roles in source.modules.items():
        sites = {part.site.with_parameter("weight") for part in parts.get(name, ())}
        assert (
            sites & carried
            or name in adapter.refused
            or set(roles.values()) <= set(adapter.refused)
        ), name
    of_modules = {key for roles in source.modules.values() for key in roles.values()}
    lost = set(source.file) - of_modules - set(adapter.refused)
    assert not lost


def carried(
    path: Path, source: Base, target: Base, out: Path, library: SubspaceLibrary, rng: Random
) -> None:
    """A written file holds every site of the input, or its provenance says why not."""
    dialect = rng.choice(sorted(DIALECTS))
    output = out / ("x" if dialect == "peft" else "x.safetensors")

    def moved() -> None:
        transfer(path, source=source, target=target, method="copy", **options)

    def converted() -> None:
        form: Form = rng.choice(["lora", "diff"]) if dialect != "lora-x" else "lora"
        rank = rng.choice([None, 1, "exact", "sv_fro=0.9"]) if form == "lora" else None
        convert(path, base=rng.choice([source, None]), form=form, rank=rank, **options)

    options = {
        "output": output,
        "dialect": dialect,
        "allow_unknown": True,
        "overwrite": True,
        "library": library,
    }
    run, base = rng.choice([(moved, target), (converted, source)])
    attempt(run)
    if not output.exists():
        return
    adapter = attempt(lambda: load_adapter(path, source, allow_unknown=True))
    if adapter is None:  # what was converted without a base may not fit this one
        return
    written = output / "adapter_model.safetensors" if dialect == "peft" else output
    said = json.loads(TensorFile(written).metadata["regraft"])["sites_refused"]
    assert set(adapter.refused) <= set(said)
    again = load_adapter(output, base)
    for site in adapter.updates:
        # Without a base a name keeps what is in front of it in the file.
        bare = str(Site("", site.module, site.parameter))
        named = any(key.endswith(bare) for key in said)
        assert site in again.updates or named, site
