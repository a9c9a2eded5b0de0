"""How a module name in a file finds its site: looked up in the base, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from regraft.adapters import Site
from regraft.bases import Base
from regraft.bases.native import Part, native_parts
from regraft.dialects.keys import PEFT_PREFIX
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

#: kohya prefix → the components it may mean, most likely first.
KOHYA_PREFIXES: dict[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer", ""),
    "lora_transformer_": ("transformer", "unet", ""),
    "lora_prior_unet_": ("prior", "unet"),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    # SD3's T5 is its third encoder, Flux's its second; trainers call both te3.
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
    "lora_te_": ("text_encoder",),
    "lycoris_": ("unet", "transformer", ""),
}
#: The same for dotted names.
DOTTED_PREFIXES: dict[str, tuple[str, ...]] = {
    "model.diffusion_model.": ("unet", "transformer", ""),
    "diffusion_model.": ("unet", "transformer", ""),
    "transformer.": ("transformer",),
    "unet.": ("unet",),
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_l.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.clip_g.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "text_encoder_2"),
    "text_encoders.t5xxl.": ("text_encoder_3", "text_encoder_2"),
}
_MODELS = ("unet", "transformer", "")

Parts = tuple[Part, ...]
Lookup = Callable[[str], Parts | None]


def split_kohya(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """(prefix, components it may mean, flattened module name) of a kohya module name."""
    if "." in name:
        return None
    for prefix, components in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            return prefix, components, name.removeprefix(prefix)
    return None


def split_dotted(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """(prefix, components it may mean, module name) of a dotted name with a component in front."""
    for prefix, components in DOTTED_PREFIXES.items():
        if name.startswith(prefix):
            return prefix, components, name.removeprefix(prefix)
    return None


def flatten(module: str) -> str:
    """kohya's way to write a module name: every dot becomes an underscore (not reversible)."""
    return module.replace(".", "_")


@dataclass
class Resolution:
    """Names that found their site, and names refused with a reason.

    A name may mean a fused weight that the base's sites divide: then it has several parts.
    """

    parts: dict[str, Parts] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    prefixed: bool = False


class NameTable:
    """Every name by which files may call the modules of one component."""

    def __init__(self, base: Base, component: str) -> None:
        self.component = component
        self.dotted: dict[str, Parts] = {}
        self._flat: dict[str, set[Parts]] = {}
        for site in (*base.weights, *base.others):
            if site.component == component:
                weight = base.at(site)
                own = _module_site(site)
                self._add(_called(site.module, site.parameter), (Part(own, ()),))
                if weight.native != site.module and not weight.rows:
                    self._add(_called(weight.native, site.parameter), (Part(own, ()),))
        for (module, parameter), parts in native_parts(base, component).items():
            whole = tuple(Part(_module_site(p.site), p.rows) for p in parts)
            self._add(_called(module, parameter), whole)

    def _add(self, name: str, parts: Parts) -> None:
        if name and name not in self.dotted:
            self.dotted[name] = parts
            self._flat.setdefault(flatten(name), set()).add(parts)

    def flat(self, name: str) -> Parts | None:
        """What a flattened name means.

        Raises
        ------
        SitesNotInBase
            Two modules flatten to it.
        """
        found = self._flat.get(name, set())
        if len(found) > 1:
            meant = sorted(str(part.site) for parts in found for part in parts)
            raise SitesNotInBase(
                f"Two modules of the base flatten to this name: {', '.join(meant)}.",
                tensor=name,
                fix="Save the adapter with dotted names (PEFT or diffusers) instead.",
            )
        return next(iter(found), None)

    def wrapped(self, names: list[str], *, flat: bool) -> dict[str, Parts]:
        """Resolve names that carry, or lack, one constant wrapper such as ``text_model``.

        The wrapper is read off the first name and must then hold for every name.
        """
        if not names:
            return {}
        known: Iterable[str] = self._flat if flat else self.dotted
        look: Lookup = self._only if flat else self.dotted.get
        join, first = "_" if flat else ".", names[0]
        answers: list[dict[str, Parts]] = []
        for candidate in known:
            if first.endswith(join + candidate):
                extra = first.removesuffix(candidate)
                tried = {n: look(n.removeprefix(extra)) for n in names if n.startswith(extra)}
            elif candidate.endswith(join + first):
                extra = candidate.removesuffix(first)
                tried = {n: look(extra + n) for n in names}
            else:
                continue
            found = {n: parts for n, parts in tried.items() if parts is not None}
            if len(found) == len(names) and found not in answers:
                answers.append(found)
        return answers[0] if len(answers) == 1 else {}

    def _only(self, name: str) -> Parts | None:
        found = self._flat.get(name, set())
        return next(iter(found)) if len(found) == 1 else None


def _module_site(site: Site) -> Site:
    """The site that stands for a module: its weight; a bare parameter stands for itself."""
    return site.with_parameter("weight") if site.parameter in ("weight", "bias") else site


def _called(module: str, parameter: str) -> str:
    return module if parameter in ("weight", "bias") else f"{module}.{parameter}".lstrip(".")


def resolve(names: Iterable[str], base: Base, file: str) -> Resolution:
    """Find the site, or the parts, of each module name of a file.

    kohya names are compared with the flattened names of the base's modules, dotted names with the
    names themselves, with or without a component in front.

    Raises
    ------
    SitesNotInBase
        The base has the component but not the module, or the name has two meanings.
    """
    tables = {c: NameTable(base, c) for c in base.components}
    result = Resolution()
    #: (component, or None for any; kohya) → names not found as they are
    missing: dict[tuple[str | None, bool], list[tuple[str, str]]] = {}
    for name in names:
        plain = name.removeprefix(PEFT_PREFIX)
        kohya = split_kohya(plain)
        split = kohya or _dotted(plain, tables)
        if split is None:
            _bare(name, plain, tables, file, result, missing)
            continue
        _, components, rest = split
        result.prefixed = True
        present = [c for c in components if c in tables]
        if not present:
            result.refused[name] = f"the source base was opened without its {components[0]}"
            continue
        for one in present:
            table = tables[one]
            try:
                found = table.flat(rest) if kohya else table.dotted.get(rest)
            except SitesNotInBase as error:
                raise SitesNotInBase(error.what, file=file, tensor=name, fix=error.fix) from None
            if found:
                result.parts[name] = found
                break
        else:
            missing.setdefault((present[0], bool(kohya)), []).append((name, rest))
    for (component, kohya_names), pairs in missing.items():
        for one in _model_first(tables) if component is None else [component]:
            rests = [rest for name, rest in pairs if name not in result.parts]
            found_wrapped = tables[one].wrapped(rests, flat=kohya_names)
            for name, rest in pairs:
                if rest in found_wrapped:
                    result.parts[name] = found_wrapped[rest]
    lost = [name for pairs in missing.values() for name, _ in pairs if name not in result.parts]
    _all_found(lost, base, file)
    return result


def _dotted(name: str, tables: dict[str, NameTable]) -> tuple[str, tuple[str, ...], str] | None:
    """The component in front of a dotted name, unless the bare name is a module as it stands."""
    split = split_dotted(name)
    bare = "" in tables or (split is not None and not set(split[1]) & set(tables))
    if split and bare and any(name in t.dotted for t in tables.values()):
        return None  # a language model's own "transformer.h.0"
    if split and "" in tables and "" not in split[1]:
        return None
    return split


def _model_first(tables: dict[str, NameTable]) -> list[str]:
    return sorted(tables, key=lambda c: (c not in _MODELS, c))


def _bare(
    name: str,
    plain: str,
    tables: dict[str, NameTable],
    file: str,
    result: Resolution,
    missing: dict[tuple[str | None, bool], list[tuple[str, str]]],
) -> None:
    """A dotted name without a component: the model's first, then the text encoders'."""
    if "." not in plain and not any(plain in t.dotted for t in tables.values()):
        known = ", ".join(KOHYA_PREFIXES)
        raise SitesNotInBase(
            "A module name has no prefix that kohya files use.",
            file=file,
            tensor=name,
            fix=f"Known prefixes: {known}.",
        )
    found = [
        (c, tables[c].dotted[plain]) for c in _model_first(tables) if plain in tables[c].dotted
    ]
    if len(found) > 1 and found[0][0].startswith("text_encoder"):
        meant = ", ".join(str(parts[0].site) for _, parts in found)
        raise SitesNotInBase(
            f"This module could be any of {meant}.",
            file=file,
            tensor=name,
            fix="Give the folder of the one text encoder this adapter was trained on.",
        )
    if found:
        result.parts[name] = found[0][1]
    else:
        missing.setdefault((None, False), []).append((name, plain))


def _all_found(missing: Iterable[str], base: Base, file: str) -> None:
    lost = sorted(missing)
    if lost:
        listed = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise SitesNotInBase(
            f"{len(lost)} module(s) of the adapter are not in the base {base.ref}: {listed}.",
            file=file,
            fix="Check that --from names the base this adapter was trained on "
            "(`regraft inspect` shows what the file says of itself).",
        )
