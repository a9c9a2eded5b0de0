"""What docs/formats.md and the method pages state, held against the program."""

from __future__ import annotations

import doctest
import json
import re

import pytest
import torch
from cogapp import Cog

from regraft.adapters.families import families
from regraft.dialects import DIALECTS
from regraft.dialects.metadata import _DROPPED
from regraft.dialects.names import KOHYA_PREFIXES
from regraft.files import TensorFile
from regraft.files.tensorwriter import _ORDER
from regraft.methods import choose, methods
from regraft.pairing.pairing import SMALLEST_COSINE
from regraft.transfer import transfer
from tests.docs.pages import ROOT, blocks, text
from tests.methods.worlds import make_base, moved, write_lora

FORMATS = text(ROOT / "docs" / "formats.md")
CHOOSING = text(ROOT / "docs" / "methods" / "choosing.md")


@pytest.fixture
def written(tmp_path):
    """A transfer to the LoRA-X form, and what was written."""
    source = make_base(tmp_path / "a", 0)
    target = moved(source, tmp_path / "b", 0.2)
    result = transfer(
        write_lora(tmp_path / "lora.safetensors"),
        source=source,
        target=target,
        output=tmp_path / "out.safetensors",
        dialect="lora-x",
        dtype="fp16",
    )
    return result, TensorFile(tmp_path / "out.safetensors")


def test_the_page_of_families_is_up_to_date(capsys):
    page = ROOT / "docs" / "families.md"
    assert Cog().main(["cog", "--check", str(page)]) == 0, (
        f"run `make docs`\n{capsys.readouterr().out}"
    )
    named = re.findall(r"^\| \[`([\w-]+)`\]\(", text(page), flags=re.MULTILINE)
    assert named == [family.name for family in families()]


def test_every_dialect_and_prefix_is_described():
    for name in (*DIALECTS, *KOHYA_PREFIXES):
        assert f"`{name}`" in FORMATS


def test_the_dropped_metadata_are_all_named():
    kept = FORMATS.partition("**Kept**")[2].partition("**Written**")[0]
    assert set(re.findall(r"`([\w.]+)`", kept)) == set(_DROPPED)


def test_the_order_of_dtypes_is_the_writers():
    assert ", ".join(_ORDER) in " ".join(FORMATS.split())


def test_the_provenance_has_the_listed_keys(written):
    _, file = written
    listed = FORMATS.partition("<!-- provenance -->")[2].partition("<!-- /provenance -->")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(json.loads(file.metadata["regraft"]))


def test_a_lora_x_file_is_as_specified(written):
    result, file = written
    assert file.metadata["regraft.format"] == "lora-x/1"
    assert {name.rpartition(".")[2] for name in file} == {"lora_x_U", "lora_x_S", "lora_x_V"}
    for site in result.sites:
        u, s, v = (file[f"{site.site}.lora_x_{part}"] for part in "USV")
        m, n = site.shape[0], torch.Size(site.shape[1:]).numel()
        r = site.rank_out
        assert (u.shape, s.shape, v.shape) == ((m, r), (r,), (n, r))
        assert (u.dtype, s.dtype, v.dtype) == (torch.float16, torch.float32, torch.float16)


def test_the_thresholds_are_those_of_the_code():
    for name, value in (
        ("RELATED", choose.RELATED),
        ("LEAST", choose.LEAST),
        ("COVERAGE", choose.COVERAGE),
        ("SMALLEST_COSINE", SMALLEST_COSINE),
    ):
        row = next(line for line in CHOOSING.splitlines() if line.startswith(f"| `{name}`"))
        assert re.search(rf"\b{value:g}\b", row)
    assert f"coverage < {choose.COVERAGE:g}" in CHOOSING
    assert f"cosine < {choose.RELATED:g}" in CHOOSING
    assert f"R̂ < {choose.LEAST:g}" in CHOOSING


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_every_method_has_a_page_with_its_paper(method):
    page = ROOT / "docs" / "methods" / f"{method.name}.md"
    assert method.paper in text(page)
    if method.default_threshold:
        assert f"{method.default_threshold:g}" in text(page)
    examples = "\n".join(blocks(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(examples, {}, page.name, str(page), 0)
    assert doctest.DocTestRunner().run(test).failed == 0
