"""Where a file keeps its alpha, the scales that follow, and what about them should alarm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.dialects.keys import PEFT_PREFIX
from regraft.dialects.kinds import component_of_name
from regraft.dialects.scale import component_config, config_scale, pattern_value
from regraft.dialects.source import AdapterSource
from regraft.errors import MalformedFile

#: Scales beyond these are rarely meant.
_WEAK, _STRONG = 0.05, 16.0


@dataclass
class Scales:
    """The alpha convention of one file.

    Attributes
    ----------
    origin : str
        "tensors", "adapter_config.json", "lora_adapter_metadata" or "none".
    alphas : dict of str to int
        alpha, as text → modules.
    by_module : dict of str to float
        alpha / rank, for modules with a rank.
    odd : list of str
        Sentences about alphas that mean nothing.
    """

    origin: str = "none"
    alphas: dict[str, int] = field(default_factory=dict)
    by_module: dict[str, float] = field(default_factory=dict)
    weakest: tuple[str, int] | None = None
    odd: list[str] = field(default_factory=list)

    @property
    def range(self) -> dict[str, float] | None:
        """The smallest and largest scale; None if no module has one."""
        known = [s for s in self.by_module.values() if math.isfinite(s)]
        return {"smallest": min(known), "largest": max(known)} if known else None

    def warnings(self, metadata: Mapping[str, str]) -> list[str]:
        """One sentence for each thing a user should look at."""
        found = list(self.odd)
        limits = self.range
        if limits and self.weakest and abs(limits["smallest"]) < _WEAK:
            alpha, rank = self.weakest
            found.append(
                f"alpha {alpha} with rank {rank}: strength {limits['smallest']:.3g}. "
                "If it seems to do nothing, this is why."
            )
        if limits and limits["largest"] > _STRONG:
            found.append(f"The largest scale is {limits['largest']:.3g}: unusually strong.")
        said = metadata.get("ss_network_alpha", "")
        try:
            told = float(said)
        except ValueError:
            return found
        ranked = bool(self.by_module)
        if self.origin == "none" and ranked and limits and str(told) != metadata.get("dim"):
            dim = metadata.get("ss_network_dim", "")
            if dim.isdigit() and told != float(dim):
                found.append(
                    f"Its metadata say alpha {said} with rank {dim}, but it has no alpha tensors: "
                    "every reader takes strength 1."
                )
        elif self.origin == "tensors" and ranked and f"{told:g}" not in self.alphas:
            found.append(f"Its metadata say alpha {said}; its tensors say otherwise.")
        return found


def scales_of(source: AdapterSource, alphas: Mapping[str, list[float]]) -> Scales:
    """The alpha convention of a file.

    Parameters
    ----------
    source : AdapterSource
    alphas : mapping of module to list of float
        The numbers of each alpha tensor (two at most).
    """
    found = Scales()
    counts: Counter[str] = Counter()
    config = source.config if isinstance(source.config, dict) else {}
    if alphas:
        found.origin = "tensors"
    elif "lora_alpha" in str(list(config)) or "alpha" in config:
        found.origin = "adapter_config.json" if source.config_path else "lora_adapter_metadata"
    weakest = math.inf
    for name in source.modules:
        rank = source.rank(name)
        alpha, scale = _scale(source, name, rank, alphas.get(name), config, found)
        counts[alpha] += 1
        if rank and scale is not None:
            found.by_module[name] = scale
            if abs(scale) < weakest:
                weakest, found.weakest = abs(scale), (alpha, rank)
    found.alphas = dict(counts.most_common())
    found.odd = list(dict.fromkeys(found.odd))
    return found


def _scale(
    source: AdapterSource,
    name: str,
    rank: int | None,
    alpha: list[float] | None,
    config: dict[str, Any],
    found: Scales,
) -> tuple[str, float | None]:
    """(alpha as text, alpha / rank) of one module."""
    if alpha is not None and source.families[name] in ("oft", "boft"):
        return f"{alpha[0]:g} (a constraint)" if len(alpha) == 1 else "not a number", None
    if alpha is not None:
        if len(alpha) != 1:
            found.odd.append(f"The alpha of {name[:80]} is not a single number.")
            return "not a number", None
        if not math.isfinite(alpha[0]) or alpha[0] < 0:
            found.odd.append(f"The alpha of {name[:80]} is {alpha[0]:g}.")
        if alpha[0] == 0:
            return "0 (means the rank)", 1.0
        return f"{alpha[0]:g}", alpha[0] / rank if rank else None
    if found.origin in ("none", "tensors") or rank is None:
        return "none (scale 1)", 1.0 if rank else None
    module = name.removeprefix(PEFT_PREFIX)
    component = component_of_name(name)
    own = component_config(config, component)
    if own is not config:
        module = module.removeprefix(f"{component}.")
    try:
        scale = config_scale(own, module, rank, str(source.path))
        said = own.get("lora_alpha", own.get("alpha", rank))
        said = pattern_value(own.get("alpha_pattern") or {}, module, said)
        return f"{float(said):g}", scale
    except MalformedFile as error:
        found.odd.append(error.what)
        return "not usable", None
