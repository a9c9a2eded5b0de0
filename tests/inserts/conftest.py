"""A base, the inserts on it, and other bases; made once."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from tests.inserts import made


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folders by name: "base", "same", "near", "other", "gpt2", and one per family."""
    root = tmp_path_factory.mktemp("inserts")
    found = {"base": made.base(root / "base"), "other": made.base(root / "other", 7)}
    found["near"] = made.moved(found["base"], root / "near", 0.1)
    found["gpt2"] = made.gpt2(root / "gpt2")
    for family in made.FAMILIES:
        found[family] = made.saved(found["base"], root / family, family)
    found["wide"] = made.wide(root / "wide")
    found["short"] = made.short(found["base"], root / "short", made.KEPT)
    for family in made.FAMILIES:
        found[f"wide-{family}"] = made.saved(found["wide"], root / f"wide-{family}", family)
    return found
