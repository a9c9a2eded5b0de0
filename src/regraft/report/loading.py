"""How to load the written file, in the tools that can, and a word on those that cannot."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.report.places import component_of
from regraft.report.words import file_name, inserts, quoted
from regraft.result import TransferResult

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Snippet:
    """One tool: code to paste, or steps to follow, or (neither) why it cannot load the file."""

    tool: str
    code: str = ""
    steps: tuple[str, ...] = ()
    note: str = ""

    @property
    def loads(self) -> bool:
        return bool(self.code or self.steps)


def snippets(result: TransferResult) -> list[Snippet]:
    """What to do with ``result.output``; nothing when nothing was written."""
    if result.output is None:
        return []
    parts = tuple(dict.fromkeys(component_of(s.site) for s in result.sites))
    name = file_name(result.output)
    target = str(result.target.get("name") or "the target base")
    if inserts(result):
        return [_insert(str(result.adapter.get("family")), parts, name, target)]
    if result.dialect == "lora-x":
        return _lora_x(parts)
    if parts == ("",):
        return _language_model(result.dialect, name, target)
    if result.dialect == "peft":
        return _peft_diffusion(parts[0] if parts else "unet", name, target)
    return [
        _diffusers(result.dialect, parts, name, target, bare=_bare(result, parts)),
        _comfyui(result.dialect, parts, name),
        _webui(result.dialect, parts, name),
        Snippet("PEFT", note=_again("PEFT alone reads folders", "peft", "a folder name")),
    ]


def _again(why: str, dialect: str, output: str) -> str:
    return f"{why}. Run the transfer again with --dialect {dialect} and {output} as output."


def _for_ui(parts: tuple[str, ...], dialect: str = "") -> str:
    """The dialect ComfyUI reads completely for these parts; the file's own if it does."""
    if all(p in _TEXT_ENCODERS for p in parts) and dialect == "diffusers":
        return dialect
    if dialect == "comfyui" or (dialect == "diffusers" and "transformer" in parts):
        return dialect
    return "comfyui" if "transformer" in parts else "kohya"


def _lora_x(parts: tuple[str, ...]) -> list[Snippet]:
    other = "peft" if parts == ("",) else "diffusers or kohya"
    return [
        Snippet(
            "diffusers, PEFT, ComfyUI",
            note="The LoRA-X form (U, ΔΣ, V) is read by Regraft only. "
            + _again("No other tool knows it", other, "a new name"),
        )
    ]


def _insert(family: str, parts: tuple[str, ...], name: str, target: str) -> Snippet:
    if parts == ("",):
        plain = _language_model("peft", name, target)[0]
        tuners = "import regraft.tuners  # bottlenecks are not PEFT's own\n"
        front = "Outputs of its virtual tokens come in front of the others."
        return Snippet(
            plain.tool,
            (tuners if family == "bottleneck" else "") + plain.code,
            note=front if family == "prompt" else "",
        )
    part = parts[0] if parts else "unet"
    code = f"""from diffusers import DiffusionPipeline
from regraft.tuners import load_onto

pipe = DiffusionPipeline.from_pretrained({quoted(target)})
load_onto(pipe.{part}, {quoted(name)})"""
    return Snippet("diffusers, PEFT and Regraft", code)


def _language_model(dialect: str, name: str, target: str) -> list[Snippet]:
    if dialect != "peft":
        return [Snippet("PEFT", note=_again("PEFT loads folders only", "peft", "a folder name"))]
    code = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

# Use the class of the adapter's task if it is not text generation.
model = AutoModelForCausalLM.from_pretrained({quoted(target)})
model = PeftModel.from_pretrained(model, {quoted(name)})"""
    return [Snippet("PEFT with transformers", code, note="Its strength is 1.0 as loaded.")]


def _peft_diffusion(part: str, name: str, target: str) -> list[Snippet]:
    code = f"""from diffusers import DiffusionPipeline
from peft import PeftModel

pipe = DiffusionPipeline.from_pretrained({quoted(target)})
pipe.{part} = PeftModel.from_pretrained(pipe.{part}, {quoted(name)})"""
    tools = "diffusers and PEFT", "ComfyUI", "A1111, Forge"
    ui = _for_ui((part,))
    found = [Snippet(tools[0], code, note="Its strength is 1.0 as loaded.")]
    why = "It does not read PEFT folders"
    found.append(Snippet(tools[1], note=_again(why, ui, "a .safetensors name")))
    if part != "transformer":
        found.append(Snippet(tools[2], note=_again(why, "kohya", "a .safetensors name")))
    return found


def _bare(result: TransferResult, parts: tuple[str, ...]) -> bool | None:
    """Whether the file names modules without their model in front; None when that is not known.

    Only a file of diffusers' own that came so is written so, and only of one model. Pipelines load
    nothing of such a file, and merely warn.
    """
    adapter = result.adapter
    if result.dialect != "diffusers" or adapter.get("dialect") != "diffusers":
        return False
    if parts not in (("unet",), ("transformer",)):
        return False
    prefixed = adapter.get("prefixed")
    return None if prefixed is None else not prefixed


def _diffusers(
    dialect: str, parts: tuple[str, ...], name: str, target: str, *, bare: bool | None
) -> Snippet:
    if dialect == "comfyui" or (dialect == "kohya" and "transformer" in parts):
        why = (
            "It reads ComfyUI's names of some models only"
            if dialect == "comfyui"
            else "It reads kohya's names of some diffusion transformers only"
        )
        return Snippet("diffusers", note=_again(why, "diffusers", "a new name"))
    part = parts[0] if parts else "unet"
    whole = f"""pipe.load_lora_weights(".", weight_name={quoted(name)}, adapter_name="carried")
pipe.set_adapters("carried", 1.0)"""
    alone = f"""pipe.{part}.load_lora_adapter(
    ".", weight_name={quoted(name)}, prefix=None, adapter_name="carried"
)
pipe.{part}.set_adapters(["carried"], weights=[1.0])"""
    if bare is None:
        other = "\n".join(f"# {line}" for line in alone.splitlines())
        code = f"""{whole}

# If the file's names do not start with "{part}." (regraft inspect shows them), the two lines
# above load nothing; use these instead:
{other}"""
    else:
        code = alone if bare else whole
    opening = f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({quoted(target)})
"""
    note = (
        "If the target is one checkpoint file, open it with the from_single_file method of its "
        "pipeline class."
    )
    return Snippet("diffusers", opening + code, note=note)


def _comfyui(dialect: str, parts: tuple[str, ...], name: str) -> Snippet:
    ui = _for_ui(parts, dialect)
    if dialect != ui:
        # ComfyUI's table has unet.….attn1.processor.to_q, not unet.….attn1.to_q: it would load the
        # convolutions, skip the attentions, and only say so in its log.
        why = (
            "It skips the attention layers of a U-Net under diffusers' names"
            if dialect == "diffusers"
            else "It does not read kohya's names of every diffusion transformer"
        )
        return Snippet("ComfyUI", note=_again(why, ui, "a new name"))
    text = any(p in _TEXT_ENCODERS for p in parts)
    node = (
        "Add the node “Load LoRA” with strength_model 1.0 and strength_clip 1.0."
        if text
        else "Add the node “LoraLoaderModelOnly” with strength_model 1.0: the file does not "
        "change a text encoder."
    )
    return Snippet("ComfyUI", steps=(f"Put {name} into ComfyUI/models/loras.", node))


def _webui(dialect: str, parts: tuple[str, ...], name: str) -> Snippet:
    if dialect != "kohya":
        note = "They read kohya files."
        if "transformer" not in parts:
            note = _again("They read kohya files", "kohya", "a new name")
        return Snippet("A1111, Forge", note=note)
    if "transformer" in parts:
        return Snippet("A1111, Forge", note="Not known to read this kind of model's names.")
    stem = name.removesuffix(".safetensors")
    return Snippet(
        "A1111, Forge",
        steps=(f"Put {name} into models/Lora.", f"Write <lora:{stem}:1> into the prompt."),
    )
