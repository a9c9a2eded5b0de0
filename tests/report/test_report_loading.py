"""Snippets: every dialect's tools, and only those."""

from __future__ import annotations

import ast

import pytest
from report_results import Make, site

from regraft.report.loading import Snippet, snippets
from regraft.result import TransferResult

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
FLUX = "transformer.transformer_blocks.0.attn.to_q"
LLM = "model.layers.0.self_attn.q_proj"


def by_tool(result: TransferResult) -> dict[str, Snippet]:
    found = snippets(result)
    for snippet in found:
        ast.parse(snippet.code)
        assert "/home/" not in snippet.code + snippet.note + "".join(snippet.steps)
    return {s.tool: s for s in found}


def loaders(result: TransferResult) -> set[str]:
    return {tool for tool, s in by_tool(result).items() if s.loads}


@pytest.mark.parametrize(
    ("dialect", "names", "tools"),
    [
        ("diffusers", [UNET], {"diffusers"}),
        ("diffusers", [TEXT], {"diffusers", "ComfyUI"}),
        ("diffusers", [FLUX], {"diffusers", "ComfyUI"}),
        ("diffusers", [LLM], set()),
        ("kohya", [UNET], {"diffusers", "ComfyUI", "A1111, Forge"}),
        ("kohya", [UNET, TEXT], {"diffusers", "ComfyUI", "A1111, Forge"}),
        ("kohya", [FLUX], set()),
        ("comfyui", [FLUX], {"ComfyUI"}),
        ("comfyui", [UNET], {"ComfyUI"}),
        ("peft", [UNET], {"diffusers and PEFT"}),
        ("peft", [TEXT], {"diffusers and PEFT"}),
        ("peft", [FLUX], {"diffusers and PEFT"}),
        ("peft", [LLM], {"PEFT with transformers"}),
        ("lora-x", [UNET], set()),
        ("lora-x", [LLM], set()),
    ],
)
def test_who_loads_what(make: Make, dialect: str, names: list[str], tools: set[str]) -> None:
    result = make(dialect=dialect, sites=[site(n) for n in names])
    assert loaders(result) == tools
    assert all(s.note for s in snippets(result) if not s.loads)


def test_kohya_steps_name_the_file(make: Make) -> None:
    found = by_tool(make(dialect="kohya", sites=[site(UNET)]))
    assert "<lora:style-b:1>" in found["A1111, Forge"].steps[1]
    assert "LoraLoaderModelOnly" in found["ComfyUI"].steps[1]
    both = by_tool(make(dialect="kohya", sites=[site(UNET), site(TEXT)]))
    assert "strength_clip 1.0" in both["ComfyUI"].steps[1]


def test_a_file_without_component_names_is_loaded_into_its_model(make: Make) -> None:
    def code(**adapter: object) -> str:
        result = make(sites=[site(UNET)], adapter={"dialect": "diffusers", **adapter})
        return by_tool(result)["diffusers"].code

    assert "load_lora_weights" in code(prefixed=True)
    assert "prefix=None" not in code(prefixed=True)
    assert "load_lora_weights" not in code(prefixed=False)
    assert "prefix=None" in code(prefixed=False)
    assert "load_lora_weights" in code()
    assert "prefix=None" in code()


def test_names_are_quoted(make: Make) -> None:
    evil = 'x"); import os; ("'
    result = make(target={"name": evil}, output=f"{evil}.safetensors")
    tree = ast.parse(by_tool(result)["diffusers"].code)
    assert not any(isinstance(n, ast.Import) for n in ast.walk(tree))


def test_nothing_written_nothing_to_load(make: Make) -> None:
    assert snippets(make(output=None)) == []
