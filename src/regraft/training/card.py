"""What is said of an adapter beside it: ``training.json`` and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
_OWN = ("lora-x", "svdiff", "foura", "qa-lora", "bottleneck")


#: Bytes of a completion that the card shows.
_SHOWN = 200


def model_card(
    facts: Mapping[str, Any], kind: str, name: str, samples: Sequence[Mapping[str, Any]] = ()
) -> str:
    """README.md of an adapter folder, with the fields the hub reads on top.

    Parameters
    ----------
    facts : what ``training.json`` holds
    kind : "diffusion" or "language"
    name : of the folder
    samples : completions at the checkpoints, as in ``samples.jsonl``
    """
    base, settings = facts["base"], facts["settings"]
    front = ["library_name: peft"]
    if "/" in str(base["name"]):
        front.append(f"base_model: {json.dumps(base['name'])}")
    front += ["tags:", f"- {json.dumps(settings['family'])}", "- regraft"]
    rows = [f"| {key} | {_cell(value)} |" for key, value in _used(facts).items()]
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
{_shown(facts, samples)}{_judging(facts, kind, name)}

Hashes and versions are in `training.json`, the losses in `log.csv`.
"""


def _used(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those of what was left out."""
    settings: Mapping[str, Any] = facts["settings"]
    found = {k: v for k, v in settings.items() if v not in (None, [], {}) and v is not False}
    gone: tuple[str, ...] = () if settings["cut_mix"] else ("cut_mix",)
    gone += () if settings["validation_prompts"] else ("validation_seeds",)
    gone += () if settings["prior_prompt"] else ("prior_count",)
    gone += () if "prior" in facts["data"] else ("prior_weight",)
    return {k: v for k, v in found.items() if not k.startswith(gone)}


def _shown(facts: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The pictures, or the completions of the bare base and of the end."""
    seeds = facts["settings"]["validation_seeds"]
    order = "".join(f"{i}. {_cell(prompt)}\n" for i, prompt in enumerate(facts["prompts"], 1))
    found = ""
    if facts["pictures"]:
        found = f"\n## Pictures\n\nA row for each prompt; seeds 0 to {seeds - 1} from the left. "
        found += f"Step 0 is the bare base.\n\n{order}"
        steps = [
            picture.removeprefix("step-").removesuffix(".png") for picture in facts["pictures"]
        ]
        for step, picture in zip(steps, facts["pictures"], strict=True):
            found += f"\nStep {step}:\n\n![step {step}](pictures/{picture})\n"
    elif samples:
        last = samples[-1]["step"]
        found = "\n## Completions\n\nSampled; all checkpoints are in `samples.jsonl`.\n\n"
        found += f"| prompt | seed | bare base | step {last} |\n|---|---|---|---|\n"
        bare = [one for one in samples if one["step"] == 0]
        end = [one for one in samples if one["step"] == last]
        for before, after in zip(bare, end, strict=True):
            texts = (before["prompt"], before["seed"], before["completion"], after["completion"])
            found += "| " + " | ".join(_cell(str(text)[:_SHOWN]) for text in texts) + " |\n"
    return found


def _judging(facts: Mapping[str, Any], kind: str, name: str) -> str:
    """The command that judges it as the settings say, and what it costs."""
    prompts = facts["settings"]["judging_prompts"]
    seeds = facts["settings"]["judging_seeds"]
    if kind != "diffusion" or prompts is None or seeds is None:
        return ""
    return f"""
## Judging

With {prompts} prompts and {seeds} seeds, from the captions of held-out pictures:

```console
$ regraft measure {name} --to {facts["base"]["name"]} --data HELD-OUT --strengths 1 \\
    --draw {seeds} --captions {prompts} --clip CLIP --dinov2 DINOV2 --hps HPSV2
```

It draws {prompts * seeds:,} pictures with the adapter and as many without: hours on one GPU with a
large base.
"""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def as_json(facts: Mapping[str, Any]) -> str:
    """JSON with sorted keys, ending in a newline."""
    return json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
