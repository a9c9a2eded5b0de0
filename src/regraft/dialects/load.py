"""From an adapter file and its base to an :class:`Adapter`: every update at its site, exact."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from regraft.adapters import Adapter, LowRank, Site, Spectral, Update
from regraft.adapters.update import Layout
from regraft.bases import Base, open_base
from regraft.dialects.names import PEFT_PREFIX, resolve_dotted, resolve_kohya
from regraft.dialects.scale import component_config, config_scale
from regraft.dialects.source import AdapterSource, open_source
from regraft.errors import MalformedFile, ShapeMismatch, SitesNotInBase
from regraft.parallel import in_order

#: transformers' model types whose layers are Conv1D, which stores its weight as (in, out).
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_ENDS = (".c_attn", ".q_attn", ".c_fc", ".c_proj")


def load_adapter(ref: str | Path, base: str | Path | Base) -> Adapter:
    """Read an adapter file against the base it was made for.

    Parameters
    ----------
    ref : str or Path
        Hub id, PEFT folder, or single ``.safetensors`` file.
    base : str, Path or Base
        The base it was trained on: names and shapes come from it.

    Returns
    -------
    Adapter
        Every update in factors, scale included; what is not carried is in ``refused``.

    Raises
    ------
    SitesNotInBase, ShapeMismatch, MalformedFile, NonFiniteTensor
        And everything :func:`regraft.dialects.source.open_source` raises.
    """
    source = open_source(ref)
    base = open_base(base) if isinstance(base, str | Path) else base
    file = str(source.path)
    if source.dialect == "kohya":
        resolution = resolve_kohya(source.modules, base, file)
        by_name = resolution.sites
    else:
        plain = {n: n.removeprefix(PEFT_PREFIX) for n in source.modules}
        resolution = resolve_dotted(plain.values(), base, file)
        by_name = {n: resolution.sites[p] for n, p in plain.items() if p in resolution.sites}
    if not by_name:
        why = next(iter(resolution.refused.values()), "no module of it is there")
        raise SitesNotInBase(
            f"Nothing of this adapter can sit on the base {base.ref}: {why}.",
            file=file,
            fix="Give the whole pipeline that this adapter was trained on.",
        )
    _no_site_twice(by_name, file)
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
        notes=list(source.notes),
        name=source.name,
    )
    adapter.refused |= source.refused | resolution.refused
    if source.dialect == "peft" and not source.config:
        adapter.notes.append("No adapter_config.json beside the file: alpha is taken as the rank.")
    found = in_order(lambda pair: _update(source, *pair, base), by_name.items())
    adapter.updates = dict(zip(by_name.values(), found, strict=True))
    adapter.sha256 = sha256.result()
    return adapter


def _no_site_twice(by_name: dict[str, Site], file: str) -> None:
    seen: dict[Site, str] = {}
    for name, site in by_name.items():
        if site in seen:
            raise MalformedFile(
                f"Two modules of the file mean the same weight {site}: {seen[site]} and {name}.",
                file=file,
                fix="Remove one of them.",
            )
        seen[site] = name


def _update(source: AdapterSource, name: str, site: Site, base: Base) -> Update:
    roles = source.modules[name]
    read = {r: source.file.read(t, finite=True) for r, t in roles.items()}
    shape = base.weights[site].shape
    tensor = roles.get("down") or next(iter(roles.values()))
    for role, factor in read.items():
        if role != "alpha" and not factor.is_floating_point():
            raise MalformedFile(
                f"A factor is stored as {str(factor.dtype).removeprefix('torch.')}; quantised "
                "adapters are not read yet.",
                file=source.path,
                tensor=roles[role],
                fix="Use the adapter as it was before quantisation.",
            )
    try:
        if "core" in read:
            return _spectral(read["u"], read["core"], read["v"], site, base)
        if "embedding_a" in read:
            a, b = read["embedding_a"], read["embedding_b"]
        else:
            a, b = read["down"], read["up"]
        if a.ndim < 2 or b.ndim < 2 or 0 in a.shape or 0 in b.shape:
            raise ShapeMismatch(f"Factors {tuple(a.shape)} and {tuple(b.shape)} are empty or flat.")
        scale = _scale(source, name, site, a.shape[0], read.get("alpha"))
        if "embedding_a" in read:
            layout: Layout = "embedding"
        elif len(shape) > 2:
            layout = "conv"
        else:
            said = bool(source.config.get("fan_in_fan_out"))
            layout = "transposed" if _is_turned(a, b, site, base, said) else "linear"
        return _low_rank(a, b, scale, shape, layout)
    except ShapeMismatch as error:
        raise ShapeMismatch(
            error.what,
            file=source.path,
            tensor=tensor,
            fix=f"The weight {site} of {base.ref} is {shape}: is this the right source base?",
        ) from None


def _is_conv1d(site: Site, base: Base) -> bool:
    kind = base.configs.get(site.component, {}).get("model_type")
    return kind in _CONV1D and f".{site.module}".endswith(_CONV1D_ENDS)


def _is_turned(a: Tensor, b: Tensor, site: Site, base: Base, said: bool) -> bool:
    """Whether the base stores this weight as (in, out).

    PEFT keeps one ``fan_in_fan_out`` for all layers and goes by each layer's class, so a saved
    flag can be wrong for a layer. The shapes decide; for a square weight the kind of model does,
    and only then what the file says.
    """
    shape = base.weights[site].shape
    out, inside = b.shape[0], math.prod(a.shape[1:])
    straight, turned = shape == (out, inside), shape == (inside, out)
    if straight != turned:
        return turned
    return _is_conv1d(site, base) or said


def _spectral(u: Tensor, core: Tensor, v: Tensor, site: Site, base: Base) -> Spectral:
    shape = base.weights[site].shape
    if u.ndim != 2 or v.ndim != 2 or 0 in u.shape:
        raise ShapeMismatch(f"Bases {tuple(u.shape)} and {tuple(v.shape)} are not matrices.")
    if u.shape[1] != v.shape[1]:
        raise ShapeMismatch(f"Bases {tuple(u.shape)} and {tuple(v.shape)} differ in rank.")
    flat: Layout = "transposed" if _is_conv1d(site, base) else "linear"
    return Spectral(u, core, v, shape, "conv" if len(shape) > 2 else flat)


def _low_rank(
    a: Tensor, b: Tensor, scale: float, shape: tuple[int, ...], layout: Layout
) -> LowRank:
    if a.shape[0] != b.shape[1]:
        raise ShapeMismatch(f"Factors {tuple(a.shape)} and {tuple(b.shape)} differ in rank.")
    if layout in ("embedding", "transposed"):
        # The base stores (in, out): ΔW = (B A)ᵀ.
        a, b = a.flatten(1), b.flatten(1)
        return LowRank(a.mT.contiguous(), b.mT.contiguous(), scale, shape, layout)
    if a.ndim > 2 and len(shape) > 2 and tuple(a.shape[1:]) != shape[1:]:
        raise ShapeMismatch(f"A factor {tuple(a.shape)} does not fit a weight {shape}.")
    if b.ndim > 2 and math.prod(b.shape[2:]) != 1:
        raise ShapeMismatch(f"A factor {tuple(b.shape)} is not 1×1.")
    return LowRank(b.flatten(1), a.flatten(1), scale, shape, layout)


def _scale(source: AdapterSource, name: str, site: Site, rank: int, alpha: Tensor | None) -> float:
    if alpha is not None:
        if alpha.numel() != 1:
            raise MalformedFile(
                "An alpha is not a single number.",
                file=source.path,
                tensor=source.modules[name]["alpha"],
            )
        value = float(alpha)
        return value / rank if value else 1.0
    if source.config:
        module = name.removeprefix(PEFT_PREFIX)
        own = component_config(source.config, site.component)
        if own is not source.config:
            module = module.removeprefix(f"{site.component}.")
        return config_scale(own, module, rank, str(source.config_path or source.path))
    return 1.0
