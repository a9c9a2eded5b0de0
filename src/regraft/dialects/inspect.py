"""What an adapter file is, without any base: every fact the bytes and its own words give."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from regraft.bases.made_for import made_for
from regraft.bases.spelling import same_made_for
from regraft.dialects.alphas import scales_of
from regraft.dialects.inserted import insert_file
from regraft.dialects.inspect_insert import insert_facts
from regraft.dialects.kinds import component_of_name, kind_of_name
from regraft.dialects.shapes import sizes
from regraft.dialects.source import AdapterSource, open_source
from regraft.dialects.spectrum import spectrum as spectrum_of
from regraft.dialects.told import claims, concepts, provenance, tags, training
from regraft.errors import FamilyNotYet
from regraft.files import TensorFile, locate
from regraft.files.finite import is_finite
from regraft.files.pickle_gate import original
from regraft.files.select import weight_files

__all__ = ["inspect_file", "kind_of_name"]

#: Roles that stand beside the factors of ΔW: not zero when the update is.
_BESIDE = ("alpha", "dora_scale", "magnitude", "on_input", "rescale", "foura_mask", "ranknum")
#: Families whose ΔW is zero if any factor is; elsewhere all tensors have to be.
_PRODUCTS = ("lora", "loha", "lokr", "lora-x", "adalora")
_UNKNOWN = "fits no known rule"


def inspect_file(ref: str | Path, *, spectrum: bool = False) -> dict[str, Any]:
    """What an adapter file is, without any base.

    Parameters
    ----------
    ref : str or Path
        Hub id, PEFT folder, or single file.
    spectrum : bool
        Also decompose every update that needs no base.

    Returns
    -------
    dict
        The keys are in docs/inspect.md. A damaged file, unknown keys or a family that is not read
        are facts here, not errors.

    Raises
    ------
    NotAnAdapter
    MalformedFile
        The header is damaged, or a module lacks tensors.
    RegraftError
        And what else :func:`regraft.dialects.source.open_source` raises.
    """
    inserted = insert_file(locate(ref).path)
    if inserted is not None:
        own = inserted.open()
        return insert_facts(inserted, own) | _hashes(own.path, dict(own.metadata))
    try:
        source = open_source(ref, allow_unknown=True)
    except FamilyNotYet as error:
        return _unreadable(ref, error)
    found = _Numbers(source)
    scales = scales_of(source, found.alphas)
    meta = source.file.metadata
    shapes = {
        name: sizes({r: source.file[t].shape for r, t in roles.items()})
        for name, roles in source.modules.items()
    }
    candidates = made_for(shapes)
    conflict = same_made_for(meta, candidates) or ""
    unknown = [key for key, why in source.refused.items() if why.startswith(_UNKNOWN)]
    warnings = [*scales.warnings(meta)]
    if conflict:
        warnings.append(conflict)
    if found.nonfinite:
        warnings.append(
            f"{len(found.nonfinite)} tensor(s) hold NaN or infinity: the file is damaged."
        )
    if found.zero:
        warnings.append(f"{len(found.zero)} site(s) are all zero and change nothing.")
    if unknown:
        warnings.append(f"{len(unknown)} key(s) fit no known rule: transfer needs --allow-unknown.")
    facts: dict[str, Any] = {
        "kind": "adapter",
        "file": str(original(source.path)),
        "readable": True,
        "family": source.family,
        "families": dict(Counter(source.families.values()).most_common()),
        "dialect": source.dialect,
        "writer": getattr(source, "writer", "") or "",
        "title": meta.get("modelspec.title", meta.get("ss_output_name", "")),
        "made_for": [f"{c.label} (by {c.evidence})" for c in candidates],
        "made_for_by_metadata": claims(meta, source.config),
        "made_for_conflict": conflict,
        "sites": len(source.modules),
        "sites_by_component": dict(Counter(map(component_of_name, source.modules))),
        "sites_by_kind": dict(sorted(Counter(map(kind_of_name, source.modules)).items())),
        "ranks": _ranks(source),
        "alpha": scales.alphas,
        "alpha_from": scales.origin,
        "scale": scales.range,
        "dtypes": found.dtypes,
        "parameters": found.parameters,
        "bytes": original(source.path).stat().st_size,
        "zero_sites": found.zero,
        "nonfinite_tensors": found.nonfinite,
        "trigger_words": meta.get("modelspec.trigger_phrase", ""),
        "concepts": concepts(meta),
        "tags": tags(meta),
        "training": training(meta, source.config),
        "unknown_keys": unknown,
        "refused": {k: v for k, v in source.refused.items() if k not in unknown},
        "notes": list(source.notes),
        "carried_by_regraft": "regraft" in meta,
        "provenance": provenance(meta),
        **_hashes(source.path, meta),
        "warnings": warnings,
    }
    if facts["hash_matches"] is False:
        warnings.append("Its tensors are not those its metadata were written for (hash differs).")
    if spectrum:
        facts["spectrum"] = spectrum_of(source, scales.by_module, found.damaged)
    return facts


class _Numbers:
    """What one pass over the tensors tells."""

    def __init__(self, source: AdapterSource) -> None:
        self.nonfinite: list[str] = []
        self.damaged: set[str] = set()
        self.zero: list[str] = []
        self.parameters = 0
        self.alphas: dict[str, list[float]] = {}
        dtypes: Counter[str] = Counter()
        for name, roles in source.modules.items():
            nonzero = {}
            for role, key in roles.items():
                info, tensor = source.file[key], source.file.read(key)
                if not is_finite(tensor):
                    self.nonfinite.append(key)
                    self.damaged.add(name)
                if role == "alpha":
                    self.alphas[name] = tensor.double().flatten()[:2].tolist()
                    continue
                dtypes[str(info.dtype).removeprefix("torch.")] += 1
                self.parameters += math.prod(info.shape)
                if role not in _BESIDE:
                    narrow = tensor.dtype.itemsize == 1 and tensor.is_floating_point()
                    nonzero[role] = bool((tensor.float() if narrow else tensor).any())
            product = source.families[name] in _PRODUCTS
            factors = {r: n for r, n in nonzero.items() if r not in ("diff_b", "b_norm", "up_bias")}
            beside = any(n for r, n in nonzero.items() if r not in factors)
            changes = all(factors.values()) if product and factors else any(factors.values())
            if not changes and not beside and source.families[name] != "dora":
                self.zero.append(name)
        self.dtypes = dict(dtypes.most_common())


def _ranks(source: AdapterSource) -> dict[str, int]:
    found = Counter(source.rank(name) for name in source.modules)
    ordered = sorted(found.items(), key=lambda item: (item[0] is None, item[0] or 0))
    return {"none" if rank is None else str(rank): count for rank, count in ordered}


def _hashes(path: Path, meta: dict[str, str]) -> dict[str, Any]:
    """SHA-256 of the file, civitai's short forms, and kohya's hash of the data: said and real."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    file = original(path)
    with open(file, "rb") as stream:
        head = stream.read(8)
        whole.update(head)
        if file == path:
            whole.update(stream.read(int.from_bytes(head, "little")))
        while chunk := stream.read(1 << 22):
            whole.update(chunk)
            data.update(chunk)
    sha = whole.hexdigest()
    # A pickle has no header to leave out.
    own = data.hexdigest() if file == path else ""
    said = meta.get("sshs_model_hash", "").removeprefix("0x").lower()
    return {
        "sha256": sha,
        "autov2": sha[:10],
        "autov3": own[:12],
        "sshs_model_hash": said,
        "hash_matches": said == own if said and own else None,
    }


def _unreadable(ref: str | Path, error: FamilyNotYet) -> dict[str, Any]:
    """What can be said of a file whose family is not read."""
    path = locate(ref).path
    if path.is_dir():
        path = weight_files(path)[0]
    file = TensorFile(path)
    named = re.match(r"This (?:is|looks like) an? (.+?)(?: adapter| embedding)?, which", error.what)
    meta = file.metadata
    return {
        "kind": "adapter",
        "file": str(original(path)),
        "readable": False,
        "family": named[1] if named else "not read",
        "why": error.what,
        "title": meta.get("modelspec.title", meta.get("ss_output_name", "")),
        "made_for_by_metadata": claims(meta, {}),
        "tensors": len(file),
        "dtypes": dict(
            Counter(str(t.dtype).removeprefix("torch.") for t in file.values()).most_common()
        ),
        "parameters": sum(math.prod(t.shape) for t in file.values()),
        "bytes": original(path).stat().st_size,
        "keys": sorted(file)[:20],
        "trigger_words": meta.get("modelspec.trigger_phrase", ""),
        "concepts": concepts(meta),
        "tags": tags(meta),
        "training": training(meta, {}),
        **_hashes(path, dict(meta)),
        "warnings": [error.what],
    }
