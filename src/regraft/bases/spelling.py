"""The many spellings of one architecture in adapters' metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from regraft.bases.made_for import Candidate

#: Metadata that name a base: sd-scripts and musubi-tuner, ModelSpec, others.
_KEYS = ("ss_base_model_version", "modelspec.architecture", "base_model_name")
#: A pattern in the text without case and punctuation → family. The first that is found counts.
_SPELLINGS = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"sdxl|stablediffusionxl|ssd1b|illustrious|noobai|^pony", "sdxl"),
        (r"stablediffusion(v)?3|^sd(v)?3", "sd3"),
        (r"stablediffusion(v)?2|^sd(v)?2", "sd2"),
        (r"stablediffusion(v)?1|^sd(v)?1", "sd1"),
        (r"chroma", "chroma"),
        (r"flux2", "flux-2"),
        (r"flux3", "flux-3"),
        (r"flux", "flux"),
        (r"framepack", "framepack"),
        (r"hunyuanvideo15|hunyuanimage", "hunyuan-other"),
        (r"hunyuanvideo", "hunyuan-video"),
        (r"wan2|^wan", "wan"),
        (r"qwenimage21", "qwen-image-2.1"),
        (r"qwenimage", "qwen-image"),
        (r"krea2", "krea-2"),
        (r"zimage", "z-image"),
        (r"ltx(v|video)?2", "ltx-2"),
        (r"ltx", "ltx-video"),
        (r"auraflow", "auraflow"),
        (r"lumina(image)?2", "lumina-2"),
        (r"hidreami1", "hidream"),
        (r"cosmospredict2", "cosmos-2"),
        (r"mochi", "mochi"),
        (r"^sana", "sana"),
        (r"qwen", "qwen"),
        (r"gemma", "gemma"),
        (r"llama|mistral|smollm", "llama"),
        (r"gpt2", "gpt2"),
    )
)
#: Families whose adapters look alike in names and shapes.
_ALIKE = ({"hunyuan-video", "framepack"},)


def family_of_spelling(text: str) -> str | None:
    """The family a piece of metadata speaks of, whatever its spelling.

    >>> family_of_spelling("stable-diffusion-xl-v1-base/lora"), family_of_spelling("sdxl_")
    ('sdxl', 'sdxl')
    >>> family_of_spelling("Flux.1-dev/lora"), family_of_spelling("flux1")
    ('flux', 'flux')
    """
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    return next((family for pattern, family in _SPELLINGS if pattern.search(plain)), None)


def same_made_for(metadata: Mapping[str, str], candidates: Sequence[Candidate]) -> str | None:
    """What is wrong if a file's metadata name another base than its layers do.

    Parameters
    ----------
    metadata : mapping of str to str
        The file's own.
    candidates : sequence of Candidate
        What :func:`regraft.bases.made_for.made_for` found.

    Returns
    -------
    str or None
        One sentence, or None if they agree or if either says nothing.
    """
    found = {c.family for c in candidates}
    for key in _KEYS if found else ():
        said = family_of_spelling(metadata.get(key, ""))
        if said is None or said in found:
            continue
        if any(said in alike and found & alike for alike in _ALIKE):
            continue
        labels = " or ".join(dict.fromkeys(c.label for c in candidates))
        return (
            f"Its metadata say it is made for {metadata[key]} ({key}), but its layers are those of "
            f"{labels} ({candidates[0].evidence})."
        )
    return None
