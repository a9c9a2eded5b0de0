"""From an adapter file and its base to an :class:`Adapter`: every update at its site, exact."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from regraft.adapters import Adapter, LowRank, Site, Spectral, Update
from regraft.adapters.update import Layout, matrix_shape
from regraft.bases import Base
from regraft.dialects.names import PEFT_PREFIX, resolve_dotted, resolve_kohya
from regraft.dialects.scale import component_config, config_scale
from regraft.dialects.source import AdapterSource, open_source
from regraft.errors import MalformedFile, ShapeMismatch


def load_adapter(ref: str | Path, base: Base) -> Adapter:
    """Read an adapter file against the base it was made for.

    Parameters
    ----------
    ref : str or Path
        Hub id, PEFT folder, or single ``.safetensors`` file.
    base : Base
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
    file = str(source.path)
    if source.dialect == "kohya":
        resolution = resolve_kohya(source.modules, base, file)
        by_name = resolution.sites
    else:
        plain = {n: n.removeprefix(PEFT_PREFIX) for n in source.modules}
        resolution = resolve_dotted(plain.values(), base, file)
        by_name = {n: resolution.sites[p] for n, p in plain.items() if p in resolution.sites}
    _no_site_twice(by_name, file)
    adapter = Adapter(
        updates={},
        family=source.family,
        dialect=source.dialect,
        naming=resolution.naming,
        prefixed=resolution.prefixed,
        metadata=dict(source.file.metadata),
        config=dict(source.config) if source.dialect == "peft" else {},
        notes=list(source.notes),
        sha256=source.sha256(),
        name=source.path.parent.name if source.dialect == "peft" else source.path.stem,
    )
    adapter.refused |= source.refused | resolution.refused
    if source.dialect == "peft" and not source.config:
        adapter.notes.append("No adapter_config.json beside the file: alpha is taken as the rank.")
    for name, site in by_name.items():
        adapter.updates[site] = _update(source, name, site, base)
    return adapter


def _no_site_twice(by_name: dict[str, Site], file: str) -> None:
    seen: dict[Site, str] = {}
    for name, site in by_name.items():
        if site in seen:
            raise MalformedFile(
                f"Two modules of the file mean the same weight {site}: {seen[site]} and {name}.",
                file=file,
            )
        seen[site] = name


def _update(source: AdapterSource, name: str, site: Site, base: Base) -> Update:
    roles = source.modules[name]
    read = {r: source.file.read(t, finite=True) for r, t in roles.items()}
    shape = base.weights[site].shape
    where = str(source.path)
    try:
        if "core" in read:
            return Spectral(read["u"], read["core"], read["v"], shape)
        if "embedding_a" in read:
            a, b, layout = read["embedding_a"], read["embedding_b"], "embedding"
        else:
            a, b = read["down"], read["up"]
            layout = "conv" if len(shape) > 2 else "linear"
        if a.ndim < 2 or b.ndim < 2 or 0 in a.shape or 0 in b.shape:
            raise ShapeMismatch(f"Factors {tuple(a.shape)} and {tuple(b.shape)} are empty or flat.")
        rank = a.shape[0]
        scale = _scale(source, name, site, rank, read.get("alpha"))
        return _low_rank(a, b, scale, shape, layout, bool(source.config.get("fan_in_fan_out")))
    except ShapeMismatch as error:
        raise ShapeMismatch(
            error.what,
            file=where,
            tensor=next(iter(roles.values())),
            fix=f"The weight {site} of {base.ref} is {shape}: is this the right source base?",
        ) from None


def _low_rank(
    a: Tensor, b: Tensor, scale: float, shape: tuple[int, ...], layout: str, turned: bool
) -> LowRank:
    if layout == "embedding" or (turned and len(shape) == 2):
        # The base stores (in, out): ΔW = (B A)ᵀ.
        kind: Layout = "embedding" if layout == "embedding" else "transposed"
        return LowRank(a.mT.contiguous(), b.mT.contiguous(), scale, shape, kind)
    if a.ndim > 2 and len(shape) > 2 and a.shape[1:] != shape[1:]:
        raise ShapeMismatch(f"A factor {tuple(a.shape)} does not fit a weight {shape}.")
    if b.ndim > 2 and math.prod(b.shape[2:]) != 1:
        raise ShapeMismatch(f"A factor {tuple(b.shape)} is not 1×1.")
    return LowRank(b.flatten(1), a.flatten(1), scale, shape, "conv" if len(shape) > 2 else "linear")


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
        inside = f"{site.component}."
        own = component_config(source.config, site.component)
        if own is not source.config:
            module = module.removeprefix(inside)
        return config_scale(own, module, rank, str(source.path))
    return 1.0


def inspect_file(ref: str | Path) -> dict[str, object]:
    """What an adapter file says of itself, without any base.

    Returns
    -------
    dict
        family, dialect, modules, ranks (rank → modules), dtype, alpha, base named, trigger words,
        hashes (sha256, AutoV2, AutoV3), refused keys, zero modules.
    """
    import hashlib
    from collections import Counter

    source = open_source(ref)
    ranks: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    alphas: Counter[str] = Counter()
    zero: list[str] = []
    parameters = 0
    for name, roles in source.modules.items():
        pair = {r: source.file[t] for r, t in roles.items() if r != "alpha"}
        first = pair.get("down") or pair.get("embedding_a")
        rank = first.shape[0] if first else pair["u"].shape[1]
        ranks[rank] += 1
        kinds[_kind(name, pair)] += 1
        for info in pair.values():
            dtypes[str(info.dtype).removeprefix("torch.")] += 1
            parameters += math.prod(info.shape)
        last = "up" if "up" in roles else ("embedding_b" if "embedding_b" in roles else "core")
        if not source.file.read(roles[last], finite=True).any():
            zero.append(name)
        for role in ("down", "embedding_a", "u", "v"):
            if role in roles:
                source.file.read(roles[role], finite=True)
        if "alpha" in roles:
            alphas[f"{float(source.file.read(roles['alpha'])):g}"] += 1
    sha = source.sha256()
    with open(source.path, "rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        body = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            body.update(chunk)
    meta = source.file.metadata
    if not alphas and "lora_alpha" in source.config:
        alphas[f"{source.config['lora_alpha']}"] = len(source.modules)
    return {
        "kind": "adapter",
        "file": str(source.path),
        "family": source.family,
        "dialect": source.dialect,
        "sites": len(source.modules),
        "sites_by_kind": dict(sorted(kinds.items())),
        "ranks": {str(k): v for k, v in sorted(ranks.items())},
        "alpha": dict(alphas) or {"none (scale 1)": len(source.modules)},
        "dtypes": dict(dtypes),
        "parameters": parameters,
        "zero_sites": zero,
        "made_for": _made_for(source),
        "trigger_words": meta.get("modelspec.trigger_phrase", ""),
        "title": meta.get("modelspec.title", meta.get("ss_output_name", "")),
        "refused": source.refused,
        "carried_by_regraft": "regraft" in meta,
        "sha256": sha,
        "autov2": sha[:10],
        "autov3": body.hexdigest()[:12],
    }


def _kind(name: str, infos: dict[str, object]) -> str:
    part = name.rsplit(".", 1)[-1] if "." in name else name.rsplit("_", 1)[-1]
    if part.isdigit() and "." in name:
        part = ".".join(name.rsplit(".", 2)[-2:])
    return part if "." in name else "_".join(name.rsplit("_", 2)[-2:])


def _made_for(source: AdapterSource) -> list[str]:
    meta, found = source.file.metadata, []
    if source.config.get("base_model_name_or_path"):
        found.append(str(source.config["base_model_name_or_path"]))
    for key in ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"):
        if meta.get(key):
            found.append(f"{meta[key]} ({key})")
    return found


__all__ = ["inspect_file", "load_adapter", "matrix_shape"]
