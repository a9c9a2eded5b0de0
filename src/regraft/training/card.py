"""What is said of an adapter beside it: ``training.json`` and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_LOAD = {
    "language": """from peft import PeftModel
from transformers import AutoModelForCausalLM
{register}
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {folder})""",
    "diffusion": """from diffusers import UNet2DConditionModel
from peft import PeftModel
{register}
unet = UNet2DConditionModel.from_pretrained({base}, subfolder="unet")
unet = PeftModel.from_pretrained(unet, {folder})""",
}
_OWN = ("lora-x", "svdiff", "foura", "bottleneck")


def model_card(facts: Mapping[str, Any], kind: str, name: str) -> str:
    """README.md of an adapter folder, with the fields the hub reads on top."""
    base, settings = facts["base"], facts["settings"]
    front = ["library_name: peft"]
    if "/" in str(base["name"]):
        front.append(f"base_model: {json.dumps(base['name'])}")
    front += ["tags:", f"- {json.dumps(settings['family'])}", "- regraft"]
    rows = [f"| {key} | {_cell(value)} |" for key, value in settings.items() if value is not None]
    loss = facts["loss"]
    judged = ""
    if loss["validation_before"] is not None:
        judged = (
            f"\nOn {facts['data']['held_out']} items that were held out, the loss went from "
            f"{loss['validation_before']:.4g} (the base) to {loss['validation']:.4g}.\n"
        )
    register = "import regraft.tuners  # makes the family known to PEFT\n"
    code = _LOAD[kind].format(
        register=register if settings["family"] in _OWN else "",
        base=json.dumps(base["name"]),
        folder=json.dumps(name),
    )
    notes = "".join(f"\n- {note}" for note in facts["notes"])
    return f"""---
{chr(10).join(front)}
---

# {name}

A {settings["family"]} adapter for {base["name"]}, trained for {settings["steps"]} steps on
{facts["data"]["items"]} items of {facts["data"]["name"]}: {facts["parameters"]:,} numbers.

The training loss was {loss["first"]:.4g} over the first tenth of the steps and
{loss["last"]:.4g} over the last.
{judged}
```python
{code}
```

| setting | value |
|---|---|
{chr(10).join(rows)}
{notes}

Hashes and versions are in `training.json`, the losses in `log.csv`.
"""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def as_json(facts: Mapping[str, Any]) -> str:
    """JSON with sorted keys, ending in a newline."""
    return json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
