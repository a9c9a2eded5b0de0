"""Every family has its page, and what the index says of its files is so: counted and carried."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cogapp import Cog
from safetensors.torch import load_file, save_file
from torch import nn

from regraft.adapters import RankRule, cut
from regraft.adapters.families import families
from regraft.bases import Base, open_base
from regraft.dialects import load_adapter
from regraft.methods import methods
from regraft.training import FAMILIES as TRAINED
from tests.docs.family_index import (
    BLOCK,
    FREQUENCIES,
    IN,
    INSERTS,
    OUT,
    PAGES,
    RANK,
    ROWS,
    page_of,
    render,
)
from tests.docs.pages import commands, text

INDEX = PAGES / "README.md"
#: Pages of families, each once.
OWN = sorted(p for p in PAGES.glob("*.md") if p != INDEX)
#: Those of them that describe what has a row; the others describe ways of training.
OF_FAMILIES = [p for p in OWN if any(page_of(n).startswith(p.name) for n in (*ROWS, *INSERTS))]
SECTIONS = ["Equation", "Training", "What is stored", "What merges", "What carries"]


def sections(page: Path) -> list[str]:
    return re.findall(r"^## (.+)$", text(page), flags=re.MULTILINE)


def test_the_index_is_up_to_date(capsys):
    assert Cog().main(["cog", "--check", str(INDEX)]) == 0, (
        f"run `make docs`\n{capsys.readouterr().out}"
    )


def test_every_family_has_a_row():
    assert sorted(ROWS) == [f.name for f in families()]
    assert set(TRAINED) <= ROWS.keys() | INSERTS.keys()
    rows = re.findall(r"^\| \[`([\w-]+)`\]", render(), flags=re.MULTILINE)
    assert sorted(rows) == sorted([*ROWS, *INSERTS])


@pytest.mark.parametrize("name", [*ROWS, *INSERTS])
def test_every_family_has_a_page_or_a_section(name):
    page, _, anchor = page_of(name).partition("#")
    assert (PAGES / page).is_file(), f"docs/methods/families/{page}"
    if anchor:
        slugs = {
            re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in sections(PAGES / page)
        }
        assert anchor in slugs
    else:
        assert f"`{name}`" in text(PAGES / page) or page == f"{name}.md"


@pytest.mark.parametrize("page", OWN, ids=lambda p: p.stem)
def test_a_page_has_its_sections_and_its_papers(page):
    found = [title.partition(",")[0] for title in sections(page)]
    found = [title for title in found if title in SECTIONS]
    assert found == SECTIONS
    assert re.search(r"^\*\*Papers?\.\*\*", text(page), flags=re.MULTILINE)


@pytest.mark.parametrize("name", [n for n in ROWS if "#" in page_of(n)])
def test_a_section_says_keys_numbers_and_rank(name):
    page, _, _ = page_of(name).partition("#")
    own = {
        re.sub(r"[^\w\- ]", "", part.splitlines()[0].lower()): part
        for part in text(PAGES / page).split("\n## ")[1:]
    }[name]
    assert "`." in own, "a key of its tensors"
    assert re.search(r"[Rr]ank|full rank|refused", own)


@pytest.mark.parametrize("page", OF_FAMILIES, ids=lambda p: p.stem)
def test_commands_train_what_the_page_is_about(page):
    for words in commands(page):
        if words[0] == "train" and "--family" in words:
            family = words[words.index("--family") + 1]
            assert family in TRAINED
            assert page_of(family).partition("#")[0] == page.name


def test_the_index_names_every_method_that_carries_a_change_of_weights():
    named = set(re.findall(r"\[([a-z-]+)\]\(\.\./[a-z-]+\.md\)", text(INDEX)))
    assert {m.name for m in methods()} <= named


def test_a_reader_of_the_index_reaches_every_page():
    linked = set(re.findall(r"\]\(([\w-]+\.md)[)#]", text(INDEX)))
    assert {page.name for page in OWN} <= linked


# ---------------------------------------------------------------- what the index says of files

LORA = {"r": RANK, "lora_alpha": 2 * RANK}
FULL = 0
#: Family → PEFT's config, and the rank that arrives; FULL is the fewest with 99 % of the energy.
FILES: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "adalora": (peft.AdaLoraConfig, {"init_r": RANK, "target_r": 2, "total_step": 9}, RANK),
    "boft": (peft.BOFTConfig, {"boft_block_size": BLOCK}, FULL),
    "c3a": (peft.C3AConfig, {"block_size": BLOCK}, FULL),
    "deft": (peft.DeftConfig, {"r": RANK}, RANK),
    "delora": (peft.DeloraConfig, {"r": RANK}, RANK),
    "dora": (peft.LoraConfig, {**LORA, "use_dora": True}, FULL),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": FREQUENCIES}, FULL),
    "gralora": (peft.GraloraConfig, {"r": RANK}, 2 * RANK),
    "hira": (peft.HiraConfig, {"r": RANK}, FULL),
    "hra": (peft.HRAConfig, {"r": RANK}, RANK),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}, FULL),
    "loha": (peft.LoHaConfig, {"r": RANK, "alpha": 2 * RANK}, RANK**2),
    "lokr": (peft.LoKrConfig, {"r": RANK, "alpha": 2 * RANK}, FULL),
    "lora": (peft.LoraConfig, LORA, RANK),
    "miss": (peft.MissConfig, {"r": RANK}, RANK),
    "oft": (peft.OFTConfig, {"oft_block_size": BLOCK}, FULL),
    "olora": (peft.LoraConfig, {**LORA, "init_lora_weights": "olora"}, 2 * RANK),
    "pissa": (peft.LoraConfig, {**LORA, "init_lora_weights": "pissa"}, 2 * RANK),
    "road": (peft.RoadConfig, {"group_size": BLOCK}, FULL),
    "shira": (peft.ShiraConfig, {"r": RANK}, FULL),
    "vera": (peft.VeraConfig, {"r": RANK}, RANK),
    "waveft": (peft.WaveFTConfig, {"n_frequency": FREQUENCIES}, FULL),
}
#: What a file holds once for all layers.
SHARED = {"vera": RANK * (OUT + IN)}


@pytest.fixture(scope="module")
def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": nn.Linear(IN, OUT)})


@pytest.fixture(scope="module")
def base(layer: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Base:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file({name: t.clone() for name, t in layer.state_dict().items()}, path)
    return open_base(path)


def saved(layer: nn.Module, config: Any, folder: Path) -> Path:
    """A folder of PEFT's, every trained number moved."""
    model = nn.ModuleDict({"layer": nn.Linear(IN, OUT)})
    model.load_state_dict(layer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about one-layer models, and defaults
        hosted: Any = peft.get_peft_model(model, config)
        for name, parameter in hosted.named_parameters():
            if parameter.requires_grad:
                near_one = "ia3" in name or "magnitude" in name
                small = torch.randn_like(parameter) * 0.05
                parameter.data = (
                    parameter.data * (1 + small) if near_one else parameter.data + small
                )
        hosted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_numbers_and_arrival_are_as_the_index_says(name, layer, base, tmp_path):
    kind, options, rank = FILES[name]
    folder = saved(layer, kind(target_modules=["layer"], **options), tmp_path / name)
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == ROWS[name].count + SHARED.get(name, 0)
    (update,) = [
        u for s, u in load_adapter(folder, base).updates.items() if s.parameter == "weight"
    ]
    arrived = cut(update, RankRule())
    if rank != FULL:
        assert arrived.rank == rank
        assert arrived.energy() == pytest.approx(update.energy(), rel=1e-4)
        assert not ROWS[name].arrives.startswith("99 %")
        return
    assert 0.99 <= arrived.energy() / update.energy() < 1
    assert RANK < arrived.rank < IN
    assert ROWS[name].arrives.startswith("99 %") or name == "lokr"
