"""From an adapter file and its base to an :class:`Adapter`: every update at its site, exact."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from regraft.adapters import Adapter, LowRank, Rows, Site, Update, matrix_shape
from regraft.adapters.families import Family, Module, get_family
from regraft.adapters.update import Layout
from regraft.bases import Base, open_base
from regraft.bases.native import Part
from regraft.dialects.experts import expert_updates, stacked
from regraft.dialects.keys import BESIDE, PEFT_PREFIX
from regraft.dialects.lookup import Parts, resolve
from regraft.dialects.pinned import pinned
from regraft.dialects.scale import component_config, config_scale
from regraft.dialects.source import AdapterSource, open_source
from regraft.errors import FamilyNotYet, MalformedFile, RegraftError, ShapeMismatch, SitesNotInBase
from regraft.parallel import in_order

#: transformers' model types whose layers are Conv1D, which stores its weight as (in, out).
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_ENDS = (".c_attn", ".q_attn", ".c_fc", ".c_proj")
#: Roles whose tensors are not trained numbers.
_WHOLE_NUMBERS = ("alpha", "on_input", "ranknum", "shira_indices")
#: Layers that read the latents; control LoRAs give them the control image besides.
_FIRST_LAYERS = ("x_embedder", "conv_in", "patch_embedding", "pos_embed.proj")
#: Roles that change a bias.
_BIAS_ROLES = ("up_bias", *BESIDE)
#: Roles of modules that may be missing from the base: trained whole, beside the adapter.
_OPTIONAL = {"whole", "whole_bias", "tokens"}


def load_adapter(
    ref: str | Path, base: str | Path | Base, *, allow_unknown: bool = False
) -> Adapter:
    """Read an adapter file against the base it was made for.

    Parameters
    ----------
    ref : str or Path
        Hub id, PEFT folder, or single ``.safetensors`` file.
    base : str, Path or Base
        The base it was trained on: names and shapes come from it, and for some families the
        weights themselves.
    allow_unknown : bool
        Leave out tensors that fit no rule, and record them in ``refused``; else they are an error.

    Returns
    -------
    Adapter
        Every update in its exact form, scale included; what is not carried is in ``refused``.

    Raises
    ------
    SitesNotInBase, ShapeMismatch, MalformedFile, NonFiniteTensor
        And everything :func:`regraft.dialects.source.open_source` raises.
    """
    source = open_source(ref, allow_unknown=allow_unknown)
    base = open_base(base) if isinstance(base, str | Path) else base
    file = str(source.path)
    optional = {n for n, roles in source.modules.items() if roles.keys() <= _OPTIONAL}
    experts = {n: stack for n in source.modules if (stack := stacked(n, base))}
    names = [name for name in source.modules if name not in experts]
    resolution = resolve(names, base, file, optional=optional)
    if not resolution.parts and not experts:
        why = next(iter(resolution.refused.values()), "no module of it is there")
        raise SitesNotInBase(
            f"Nothing of this adapter can sit on the base {base.ref}: {why}.",
            file=file,
            fix="Give the whole pipeline that this adapter was trained on.",
        )
    hasher = ThreadPoolExecutor(1)
    sha256 = hasher.submit(source.sha256)  # beside the reading below
    hasher.shutdown(wait=False)
    adapter = Adapter(
        updates={},
        family=source.family,
        dialect=source.dialect,
        prefixed=resolution.prefixed,
        metadata=dict(source.file.metadata),
        config=dict(source.config) if source.dialect == "peft" else {},
        notes=[*source.notes, *_carried_as(source)],
        name=source.name,
    )
    adapter.refused |= source.refused | resolution.refused
    if source.dialect == "peft" and not source.config:
        adapter.notes.append("No adapter_config.json beside the file: alpha is taken as the rank.")
    found = in_order(lambda pair: _updates(source, *pair, base), resolution.parts.items())
    by_name = dict(zip(resolution.parts, found, strict=True))
    for name, stack in experts.items():
        by_name[name] = (_experts(source, name, stack, base), {})
    whose: dict[Site, str] = {}
    for name, (updates, refused) in by_name.items():
        adapter.refused |= refused
        for site, update in updates.items():
            if site in whose:
                raise MalformedFile(
                    f"Two modules of the file mean the same weight {site}: {whose[site]} and "
                    f"{name}.",
                    file=file,
                    fix="Remove one of them.",
                )
            whose[site] = name
            adapter.updates[site] = update
            adapter.families[site] = source.families[name]
    adapter.sha256 = sha256.result()
    return adapter


def _carried_as(source: AdapterSource) -> list[str]:
    """What is carried in the place of forms whose ΔW is not simply what the file holds."""
    pairs = zip(source.families.values(), source.modules.values(), strict=True)
    said = (get_family(name).carried_as(roles) for name, roles in pairs)
    return [sentence for sentence in dict.fromkeys(said) if sentence]


def _updates(
    source: AdapterSource, name: str, parts: Parts, base: Base
) -> tuple[dict[Site, Update], dict[str, str]]:
    """The updates of one module of the file, each at its site; and what has no site, with why."""
    roles = source.modules[name]
    read = {r: source.file.read(t, finite=True) for r, t in roles.items()}
    for role, tensor in read.items():
        if role not in _WHOLE_NUMBERS and not tensor.is_floating_point():
            raise MalformedFile(
                f"A factor is stored as {str(tensor.dtype).removeprefix('torch.')}; quantised "
                "adapters are not read.",
                file=source.path,
                tensor=roles[role],
                fix="Use the adapter as it was before quantisation.",
            )
    first = parts[0].site
    if why := _widens(read, first, base):
        return {}, {name: why}
    try:
        built: dict[str, Update] = {}
        for family, own in _by_family(source, name, read):
            made = _built(family, pinned(_module(source, name, parts, own, base)))
            if made.keys() & built.keys():
                raise MalformedFile(
                    f"The module {name} changes its {next(iter(made.keys() & built.keys()))} twice."
                )
            built |= made
        placed: dict[Site, Update] = {}
        refused: dict[str, str] = {}
        for parameter, update in built.items():
            lost = [p.site for p in parts if _site(p, parameter) not in base]
            if lost and parameter == "bias":
                key = next((roles[r] for r in _BIAS_ROLES if r in roles), name)
                refused[key] = f"a change of the bias of {lost[0]}, which the base does not have"
            else:
                placed |= _placed(update, parameter, parts, base)
        return placed, refused
    except RegraftError as error:
        if error.file:
            raise
        whole = " and ".join(f"{p.site} {base.at(p.site).shape}" for p in parts if p.site in base)
        wrong = isinstance(error, ShapeMismatch)
        raise type(error)(
            error.what,
            file=source.path,
            tensor=roles.get("down") or next(iter(roles.values())),
            fix=f"The weight {whole or first} is of {base.ref}: is this the right source base?"
            if wrong
            else error.fix,
        ) from None


def _built(family: Family, module: Module) -> dict[str, Update]:
    """The updates of one module.

    Raises
    ------
    MalformedFile
        Its tensors or settings are none that the family's equations take.
    """
    try:
        return family.build(module)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise MalformedFile(
            f"The tensors or settings of {module.name} make no {family.title} ({str(e)[:200]})."
        ) from e


def _experts(
    source: AdapterSource, name: str, experts: list[dict[str, Site]], base: Base
) -> dict[Site, Update]:
    """The updates of a stack of experts, each at its site."""
    roles = source.modules[name]
    if set(roles) != {"down", "up"}:
        raise FamilyNotYet(
            f"The stacked experts {name} hold {', '.join(sorted(roles))}; only LoRA is read there.",
            file=source.path,
            tensor=next(iter(roles.values())),
        )
    a, b = (source.file.read(roles[role], finite=True) for role in ("down", "up"))
    scale = _scale(source, name, next(iter(experts[0].values())), len(a) // len(experts), None)
    try:
        return expert_updates(experts, a, b, scale, base)
    except ShapeMismatch as error:
        raise ShapeMismatch(error.what, file=source.path, tensor=roles["down"]) from None


def _widens(read: Mapping[str, Tensor], site: Site, base: Base) -> str:
    """Why a control LoRA's change of the first layer is not carried: it has more inputs."""
    if site.module not in _FIRST_LAYERS or not {"down", "up"} <= read.keys() or site not in base:
        return ""
    shape, a, b = base.at(site).shape, read["down"], read["up"]
    more = a.ndim == b.ndim == len(shape) and b.shape[0] == shape[0] and a.shape[1] > shape[1]
    if not more:
        return ""
    return f"it widens {site} from {shape[1]} inputs to {a.shape[1]}; the base has it as it is"


def _by_family(
    source: AdapterSource, name: str, read: Mapping[str, Tensor]
) -> list[tuple[Family, dict[str, Tensor]]]:
    """The family of a module with its tensors; a bias change beside it is a family of its own."""
    family = get_family(source.families[name])
    own = {r: t for r, t in read.items() if BESIDE.get(r, family.name) == family.name}
    found = [(family, own)]
    for other in sorted({BESIDE[r] for r in read.keys() - own.keys()}):
        found.append((get_family(other), {r: read[r] for r in read if BESIDE.get(r) == other}))
    return found


def _module(
    source: AdapterSource, name: str, parts: Parts, read: Mapping[str, Tensor], base: Base
) -> Module:
    first = parts[0].site
    shapes = [base.at(p.site).shape for p in parts if p.site in base]
    if not shapes and first.with_parameter("bias") in base:
        shapes = [base.at(first.with_parameter("bias")).shape]
    shape = shapes[0] if len(parts) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])
    alpha = _alpha(source, name, read.get("alpha"))
    flat: Layout = "transposed" if is_conv1d(first, base) else "linear"

    def whole(parameter: str) -> Tensor | None:
        """The weight or bias as the file's module means it, put together from its parts."""
        sites = [p.site if parameter == "weight" else p.site.with_parameter("bias") for p in parts]
        if any(site not in base for site in sites):
            return None
        if len(parts) == 1 and not parts[0].rows:
            return base.read(sites[0])
        pieces = [base.read(site) for site in sites]
        out = torch.empty(sum(len(p) for p in pieces), *pieces[0].shape[1:])
        for part, piece in zip(parts, pieces, strict=True):
            start = 0
            for begin, end in part.rows:
                out[begin:end] = piece[start : start + end - begin]
                start += end - begin
        return out

    def weight() -> Tensor:
        found = whole("weight")
        if found is None:
            raise ShapeMismatch(f"The base has no weight {first}.")
        return found

    return Module(
        name=name,
        tensors={r: t for r, t in read.items() if r != "alpha"},
        shape=shape,
        layout="conv" if len(shape) > 2 else flat,
        scale=lambda rank: _scale(source, name, first, rank, alpha),
        alpha=alpha,
        weight=weight,
        bias=lambda: whole("bias"),
        settings=source.settings(name),
    )


def _placed(update: Update, parameter: str, parts: Parts, base: Base) -> dict[Site, Update]:
    """A module's update at the site, or cut into the sites, that its name means."""
    found: dict[Site, Update] = {}
    for part in parts:
        site = _site(part, parameter)
        if site not in base:
            raise ShapeMismatch(f"The base has no {site}.")
        own = update if len(parts) == 1 and not part.rows else update.rows(_rows(part, update))
        if own is None:
            continue
        if matrix_shape(own.shape) != matrix_shape(base.at(site).shape):
            raise ShapeMismatch(
                f"A change {own.shape} does not fit {site}, which is {base.at(site).shape}."
            )
        found[site] = own
    if not found:  # an update of zeros stays an update, so that nothing goes missing
        shape = base.at(parts[0].site).shape
        m, n = matrix_shape(shape)
        found[parts[0].site] = LowRank(torch.zeros(m, 1), torch.zeros(1, n), 1.0, shape)
    return found


def _site(part: Part, parameter: str) -> Site:
    return part.site.with_parameter(parameter) if parameter == "bias" else part.site


def _rows(part: Part, update: Update) -> Rows:
    return part.rows or ((0, update.shape[0]),)


def is_conv1d(site: Site, base: Base) -> bool:
    """Whether a weight is stored as (in, out), as transformers' Conv1D does."""
    kind = base.configs.get(site.component, {}).get("model_type")
    return kind in _CONV1D and f".{site.module}".endswith(_CONV1D_ENDS)


def _alpha(source: AdapterSource, name: str, tensor: Tensor | None) -> float | None:
    if tensor is None:
        return None
    if tensor.numel() != 1:
        raise MalformedFile(
            "An alpha is not a single number.",
            file=source.path,
            tensor=source.modules[name]["alpha"],
        )
    return float(tensor)


def _own_config(source: AdapterSource, name: str, site: Site) -> tuple[dict[str, object], str]:
    """The settings that speak of a module, and the module's name as they know it."""
    module = name.removeprefix(PEFT_PREFIX)
    own = component_config(source.config, site.component)
    if own is not source.config:
        module = module.removeprefix(f"{site.component}.")
    return own, module


def _scale(source: AdapterSource, name: str, site: Site, rank: int, alpha: float | None) -> float:
    if alpha is not None:
        return alpha / rank if alpha else 1.0
    if source.config:
        own, module = _own_config(source, name, site)
        return config_scale(own, module, rank, str(source.config_path or source.path))
    return 1.0
