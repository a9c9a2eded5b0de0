"""What each dialect calls things: suffixes, prefixes, and how a name finds its site."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from regraft.adapters import Site
from regraft.bases import Base
from regraft.bases.unet_names import to_ldm
from regraft.errors import SitesNotInBase

#: The dialects this version writes, with what reads them.
DIALECTS: dict[str, str] = {
    "peft": "PEFT folder (adapter_config.json + adapter_model.safetensors)",
    "diffusers": "single .safetensors with diffusers names (diffusers; ComfyUI for transformers)",
    "kohya": "single .safetensors as kohya sd-scripts writes it (A1111, Forge, ComfyUI)",
    "lora-x": "single .safetensors in LoRA-X form, U ΔΣ Vᵀ (docs/formats.md)",
}

#: What a LoRA-X file says of itself in its metadata, under ``regraft.format``.
LORA_X_FORMAT = "lora-x/1"

#: Key suffix → role. A dot-free kohya module name ends at the first dot, so this is unambiguous.
SUFFIXES: dict[str, str] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_B.bias": "bias",
    ".alpha": "alpha",
    ".lora_x_U": "u",
    ".lora_x_S": "core",
    ".lora_x_V": "v",
}

#: kohya prefix → the components it may mean, most likely first.
KOHYA_PREFIXES: dict[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer", ""),
    "lora_transformer_": ("transformer",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
    "lora_te_": ("text_encoder",),
    "lycoris_": ("unet", "transformer", ""),
}
PEFT_PREFIX = "base_model.model."
#: diffusers before 0.20 hung the LoRA on the attention's processor.
_OLD_DIFFUSERS = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def split_key(key: str) -> tuple[str, str] | None:
    """(module name, role) of a key, or None if no suffix is known."""
    if old := _OLD_DIFFUSERS.fullmatch(key):
        layer = "to_out.0" if old[2] == "to_out" else old[2]
        return f"{old[1]}.{layer}", old[3]
    for suffix, role in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return None


def split_kohya(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """(prefix, components it may mean, flattened module name) of a kohya module name."""
    for prefix, components in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            return prefix, components, name.removeprefix(prefix)
    return None


def flatten(module: str) -> str:
    """kohya's way to write a module name: every dot becomes an underscore (not reversible)."""
    return module.replace(".", "_")


@dataclass
class Resolution:
    """Names that found their site, and names refused with a reason."""

    sites: dict[str, Site]
    refused: dict[str, str]
    prefixed: bool = False


def _wrapped(names: Iterable[str], known: dict[str, Site], join: str) -> dict[str, Site]:
    """Resolve names that carry, or lack, one constant wrapper such as ``text_model``.

    The wrapper is read off the first name and must then hold for every name.
    """
    names = list(names)
    tries: list[Callable[[str], str | None]] = []
    if not names:
        return {}
    for candidate in known:
        if names[0].endswith(join + candidate):
            extra = names[0].removesuffix(candidate)
            tries.append(lambda n, e=extra: n.removeprefix(e) if n.startswith(e) else None)  # type: ignore[misc]
        elif candidate.endswith(join + names[0]):
            extra = candidate.removesuffix(names[0])
            tries.append(lambda n, e=extra: e + n)  # type: ignore[misc]
    answers = []
    for attempt in tries:
        found = {n: known[t] for n in names if (t := attempt(n)) is not None and t in known}
        if len(found) == len(names) and found not in answers:
            answers.append(found)
    return answers[0] if len(answers) == 1 else {}


def _tables(
    base: Base,
) -> tuple[dict[str, dict[str, Site]], dict[str, dict[str, set[Site]]]]:
    """Per component: dotted names, and flattened names with every site they could mean."""
    dotted: dict[str, dict[str, Site]] = {}
    flat: dict[str, dict[str, set[Site]]] = {}
    for component in base.components:
        sites = [s for s in base.weights if s.component == component]
        ldm = to_ldm(s.module for s in sites) if component == "unet" else {}
        table: dict[str, Site] = {}
        flats: dict[str, set[Site]] = {}
        for site in sites:
            names = {site.module, base.weights[site].native}
            if site.module in ldm:
                names.add(ldm[site.module])
            for name in names:
                table[name] = site
                flats.setdefault(flatten(name), set()).add(site)
        dotted[component], flat[component] = table, flats
    return dotted, flat


def resolve_kohya(names: Iterable[str], base: Base, file: str) -> Resolution:
    """Find the site of each kohya name by flattening the base's real module names.

    Raises
    ------
    SitesNotInBase
        The base has the component but not the module, or two modules flatten to the same name.
    """
    _, tables = _tables(base)
    result = Resolution({}, {})
    missing: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        split = split_kohya(name)
        if split is None:
            raise SitesNotInBase(
                "A module name has no prefix that kohya files use.",
                file=file,
                tensor=name,
                fix=f"Known prefixes: {', '.join(KOHYA_PREFIXES)}.",
            )
        _, components, flat = split
        present = [c for c in components if c in tables]
        if not present:
            wanted = components[0] or "model"
            result.refused[name] = f"the source base was opened without its {wanted}"
            continue
        found = tables[present[0]].get(flat, set())
        if len(found) > 1:
            raise SitesNotInBase(
                "Two modules of the base flatten to this name: "
                f"{', '.join(sorted(map(str, found)))}.",
                file=file,
                tensor=name,
                fix="Save the adapter with dotted names (PEFT or diffusers) instead.",
            )
        if found:
            result.sites[name] = next(iter(found))
        else:
            missing.setdefault(present[0], []).append((name, flat))
    for component, pairs in missing.items():
        known = {f: next(iter(s)) for f, s in tables[component].items() if len(s) == 1}
        found_wrapped = _wrapped([f for _, f in pairs], known, "_")
        for name, flat in pairs:
            if flat in found_wrapped:
                result.sites[name] = found_wrapped[flat]
    _all_found([n for pairs in missing.values() for n, _ in pairs], result.sites, base, file)
    return result


def resolve_dotted(names: Iterable[str], base: Base, file: str) -> Resolution:
    """Find the site of each dotted name, with or without a component in front.

    Raises
    ------
    SitesNotInBase
    """
    tables, _ = _tables(base)
    result = Resolution({}, {})
    missing: list[str] = []
    order = sorted(tables, key=lambda c: (c not in ("", "unet", "transformer"), c))
    for name in names:
        first, _, rest = name.partition(".")
        if first in tables and first and rest in tables[first]:
            result.sites[name] = tables[first][rest]
            result.prefixed = True
            continue
        plain = [tables[c][name] for c in order if name in tables[c]]
        if len(plain) > 1 and plain[0].component.startswith("text_encoder"):
            raise SitesNotInBase(
                f"This module could be any of {', '.join(map(str, plain))}.",
                file=file,
                tensor=name,
                fix="Give the folder of the one text encoder this adapter was trained on.",
            )
        if plain:
            result.sites[name] = plain[0]
        elif first in _COMPONENTS and first not in tables and "" not in tables:
            result.refused[name] = f"the source base was opened without its {first}"
            result.prefixed = True
        else:
            missing.append(name)
    for component in order:
        inside = f"{component}."
        own = [n.removeprefix(inside) for n in missing if n.startswith(inside)]
        found = _wrapped(own, tables[component], ".")
        result.sites |= {inside + n: s for n, s in found.items()}
        result.prefixed |= bool(found)
        left = [n for n in missing if n not in result.sites]
        result.sites |= _wrapped(left, tables[component], ".")
    _all_found(missing, result.sites, base, file)
    return result


def _all_found(missing: Iterable[str], sites: dict[str, Site], base: Base, file: str) -> None:
    lost = sorted(n for n in missing if n not in sites)
    if lost:
        listed = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise SitesNotInBase(
            f"{len(lost)} module(s) of the adapter are not in the base {base.ref}: {listed}.",
            file=file,
            fix="Check that --from names the base this adapter was trained on "
            "(`regraft inspect` shows what the file says of itself).",
        )
