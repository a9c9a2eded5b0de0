"""What each written dialect holds, kind of layer by kind of layer, and the table that says it."""

from __future__ import annotations

from tests.wild.case import LAYERS

#: Dialect → kind of layer → "exact", "exact: remark", or "refused: what the reason says".
WRITTEN: dict[str, dict[str, str]] = {
    "peft": {
        "norm": "refused: PEFT's LoRA layers do not exist for normalisations",
        "bias": "exact: as `lora_bias`, if every layer that the adapter changes has one; else "
        "refused by name",
    },
    "diffusers": {
        "norm": "refused: PEFT's LoRA layers do not exist for normalisations",
        "bias": "exact: as `lora_bias`, if every layer that the adapter changes has one; else "
        "refused by name",
    },
    "kohya": {
        "embedding": "refused: no names for this kind of base",
        "Conv1D": "refused: no names for this kind of base",
        "norm": "exact: whole, as `.w_norm` and `.b_norm`",
        "bias": "exact: whole, as `.diff_b`",
    },
    "comfyui": {
        "embedding": "refused: ComfyUI has no name",
        "Conv1D": "refused: ComfyUI has no name",
        "norm": "exact: whole, as `.w_norm` and `.b_norm`",
        "bias": "exact: whole, as `.diff_b`",
    },
    "lora-x": {
        "norm": "exact: its bias is refused by name",
        "bias": "refused: LoRA-X files hold weights, no biases",
    },
}


def outcome(dialect: str, layer: str) -> str:
    """What writing one kind of layer gives."""
    return WRITTEN[dialect].get(layer, "exact")


def render() -> str:
    """The table, in Markdown: one row per kind of layer."""
    out = [f"| | {' | '.join(f'`{dialect}`' for dialect in WRITTEN)} |"]
    out.append("|---" * (1 + len(WRITTEN)) + "|")
    for layer in LAYERS:
        cells = []
        for dialect in WRITTEN:
            kind, _, says = outcome(dialect, layer).partition(": ")
            cells.append(f"{kind} ({says})" if says else kind)
        out.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(out)
