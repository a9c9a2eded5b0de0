"""How a module name in a file finds its site: looked up in the base, never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from regraft.adapters import Site
from regraft.bases import Base
from regraft.bases.native import Part, native_parts
from regraft.dialects.keys import PEFT_PREFIX
from regraft.dialects.names import KOHYA_PREFIXES, Split, flatten, split_dotted, split_kohya
from regraft.errors import SitesNotInBase

_MODELS = ("unet", "transformer", "")

Parts = tuple[Part, ...]
Lookup = Callable[[str], Parts | None]

#: A native name, what else files call it, and how many of its parts that means (None: all).
_ALIASES: tuple[tuple[re.Pattern[str], str, int | None], ...] = tuple(
    (re.compile(pattern), alias, parts)
    for pattern, alias, parts in (
        # XLabs' trainer names the processor that it hangs its factors on.
        (r"(double_blocks\.\d+)\.img_attn\.(qkv|proj)", r"\1.processor.\2_lora1", None),
        (r"(double_blocks\.\d+)\.txt_attn\.(qkv|proj)", r"\1.processor.\2_lora2", None),
        (r"(single_blocks\.\d+)\.linear1", r"\1.processor.qkv_lora", 3),
        (r"(single_blocks\.\d+)\.linear2", r"\1.processor.proj_lora", None),
        # ComfyUI gives HunyuanVideo's layers Flux's names.
        (r"(double_blocks\.\d+\.(?:img|txt)_mlp)\.fc1", r"\1.0", None),
        (r"(double_blocks\.\d+\.(?:img|txt)_mlp)\.fc2", r"\1.2", None),
        (r"(double_blocks\.\d+\.(?:img|txt)_mod)\.linear", r"\1.lin", None),
        (r"(single_blocks\.\d+\.modulation)\.linear", r"\1.lin", None),
        (r"(txt_in\.individual_token_refiner\.blocks\.\d+\.mlp)\.fc1", r"\1.0", None),
        (r"(txt_in\.individual_token_refiner\.blocks\.\d+\.mlp)\.fc2", r"\1.2", None),
        (r"(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.0", r"\1.in_layer", None),
        (r"(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.2", r"\1.out_layer", None),
        (r"(txt_in\.c_embedder)\.linear_1", r"\1.in_layer", None),
        (r"(txt_in\.c_embedder)\.linear_2", r"\1.out_layer", None),
        (r"(.+_attn)_q_norm", r"\1.norm.query_norm", None),
        (r"(.+_attn)_k_norm", r"\1.norm.key_norm", None),
        (r"(single_blocks\.\d+)\.q_norm", r"\1.norm.query_norm", None),
        (r"(single_blocks\.\d+)\.k_norm", r"\1.norm.key_norm", None),
        # ComfyUI calls these parameters weight.
        (r"(.+)\.scale", r"\1", None),
    )
)


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
        native = {
            _called(module, parameter): tuple(Part(_module_site(p.site), p.rows) for p in parts)
            for (module, parameter), parts in native_parts(base, component).items()
        }
        for name, parts in native.items():
            self._add(name, parts)
        for name, parts in native.items():
            self._add_aliases(name, parts)

    def _add_aliases(self, name: str, parts: Parts) -> None:
        if len(parts) > 1:  # OMI numbers the parts of a fused layer
            for i, part in enumerate(parts):
                self._add(f"{name}.{i}", (Part(part.site, ()),))
        for pattern, alias, count in _ALIASES:
            if match := pattern.fullmatch(name):
                self._add(match.expand(alias), parts[:count])

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

    def find(self, name: str, *, flat: bool) -> Parts | None:
        """What a name means, as it stands.

        A dotted name may have its dots and underscores confused (musubi-tuner guesses them back);
        it is taken if exactly one module flattens like it.
        """
        return self.flat(name) if flat else self.dotted.get(name) or self._only(flatten(name))

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

    def all(self, rests: Iterable[str], *, flat: bool) -> dict[str, Parts]:
        """Those of the names that are found, as they stand or inside one constant wrapper."""
        found = {r: parts for r in rests if (parts := self.find(r, flat=flat)) is not None}
        return found | self.wrapped([r for r in rests if r not in found], flat=flat)

    def _only(self, name: str) -> Parts | None:
        found = self._flat.get(name, set())
        return next(iter(found)) if len(found) == 1 else None


def _module_site(site: Site) -> Site:
    """The site that stands for a module: its weight; a bare parameter stands for itself."""
    return site.with_parameter("weight") if site.parameter in ("weight", "bias") else site


def _called(module: str, parameter: str) -> str:
    return module if parameter in ("weight", "bias") else f"{module}.{parameter}".lstrip(".")


def resolve(
    names: Iterable[str], base: Base, file: str, *, optional: Collection[str] = ()
) -> Resolution:
    """Find the site, or the parts, of each module name of a file.

    kohya names are compared with the flattened names of the base's modules, dotted names with the
    names themselves, with or without a component in front. All names of one prefix are of one
    component. Names in ``optional`` are refused where the base lacks the module.

    Raises
    ------
    SitesNotInBase
        The base has the component but not the module, or the name has two meanings.
    """
    tables = {c: NameTable(base, c) for c in base.components}
    result = Resolution()
    groups: dict[tuple[bool, tuple[str, ...], str], list[tuple[str, str]]] = {}
    bare: list[tuple[str, str]] = []
    for name in names:
        plain = name.removeprefix(PEFT_PREFIX)
        kohya = split_kohya(plain)
        split = kohya or _dotted(plain, tables)
        if split is None:
            bare.append((name, plain))
        else:
            prefix, components, rest = split
            groups.setdefault((kohya is not None, components, prefix), []).append((name, rest))
    lost: list[str] = []
    for (flat, components, _), pairs in groups.items():
        result.prefixed = True
        try:
            lost += _one_component(pairs, components, tables, flat, result)
        except SitesNotInBase as error:
            name = next(n for n, rest in pairs if rest == error.tensor)
            raise SitesNotInBase(error.what, file=file, tensor=name, fix=error.fix) from None
    lost += _without_component(bare, tables, file, result)
    lost = [name for name in lost if not _is_tied_head(name, base, result)]
    why = "a module trained whole that the base does not have"
    result.refused |= {name: why for name in lost if name in optional}
    lost = [name for name in lost if name not in optional]
    _all_found(lost, base, file)
    return result


def _one_component(
    pairs: list[tuple[str, str]],
    components: tuple[str, ...],
    tables: dict[str, NameTable],
    flat: bool,
    result: Resolution,
) -> list[str]:
    """Names with one prefix → the component that has them all, or most; gives those not found."""
    best: dict[str, Parts] = {}
    rests = [rest for _, rest in pairs]
    for component in components:
        if component in tables:
            found = tables[component].all(rests, flat=flat)
            best = found if len(found) > len(best) else best
            if len(best) == len(set(rests)):
                break
    absent = [c for c in components if c not in tables]
    if not best and (len(absent) == len(components) or (absent and "" not in components)):
        why = f"the source base was opened without its {absent[0]}"
        result.refused |= {name: why for name, _ in pairs}
        return []
    result.parts |= {name: best[rest] for name, rest in pairs if rest in best}
    return [name for name, rest in pairs if rest not in best]


def _dotted(name: str, tables: dict[str, NameTable]) -> Split | None:
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


def _without_component(
    pairs: list[tuple[str, str]], tables: dict[str, NameTable], file: str, result: Resolution
) -> list[str]:
    """Dotted names without a component: the model's first, then the text encoders'."""
    missing: list[tuple[str, str]] = []
    for name, plain in pairs:
        found = [(c, p) for c in _model_first(tables) if (p := tables[c].dotted.get(plain))]
        if not found and "." not in plain and name == plain:
            raise SitesNotInBase(
                "A module name has no prefix that kohya files use.",
                file=file,
                tensor=name,
                fix=f"Known prefixes: {', '.join(KOHYA_PREFIXES)}.",
            )
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
            missing.append((name, plain))
    for component in _model_first(tables):
        rests = [plain for name, plain in missing if name not in result.parts]
        more = tables[component].all(rests, flat=False)
        result.parts |= {n: more[p] for n, p in missing if n not in result.parts and p in more}
    return [name for name, _ in missing if name not in result.parts]


def _is_tied_head(name: str, base: Base, result: Resolution) -> bool:
    """Record a change of an output head that the base ties to its embeddings."""
    tied = any(c.get("tie_word_embeddings") for c in base.configs.values())
    if not tied or name.rpartition(".")[2] not in ("lm_head", "embed_out", "output"):
        return False
    result.refused[name] = (
        "the base ties this head to its embeddings and stores it once; a change of the head alone "
        "has no weight to sit on"
    )
    return True


def _all_found(missing: Iterable[str], base: Base, file: str) -> None:
    lost = sorted(missing)
    if lost:
        listed = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise SitesNotInBase(
            f"{len(lost)} module(s) of the adapter are not in the base {base.ref}: {listed}.",
            file=file,
            fix="Check that the base given is the one this adapter was trained on "
            "(`regraft inspect` shows what the file says of itself).",
        )
