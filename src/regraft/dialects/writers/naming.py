"""Which module of a file stands for which sites: diffusers' names, or those of the original code.

Trainers and ComfyUI run many models from their original code, where layers are fused and named
otherwise; files for them carry those names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from regraft.adapters import LowRank, Rows, Site, Update
from regraft.bases import Base
from regraft.bases.native import architecture_of_names, native_parts
from regraft.dialects.writers.factors import joined, plain, whole
from regraft.dialects.writers.registry import Task

#: The parts of a pipeline that denoise.
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a module as a file names it, and the updates it takes in.

    ``shape`` is the parameter's; ``parts`` are the updates with their rows of it (none: all rows).
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[Site, Update, Rows], ...]

    @property
    def single(self) -> Update | None:
        """The only update, if it is the whole parameter as it stands."""
        return self.parts[0][1] if len(self.parts) == 1 and not self.parts[0][2] else None

    def low_rank(self) -> LowRank:
        """Its change as a LoRA. Exact but for rounding noise."""
        if self.single is not None:
            return plain(self.single)
        return joined([(plain(u), rows) for _, u, rows in self.parts], self.shape)

    def diff(self) -> Tensor:
        """Its change as a whole, fp32."""
        every = ((0, self.shape[0]),)
        return whole([(u, rows or every) for _, u, rows in self.parts], self.shape)


@dataclass
class FileModule:
    """One module of a file: its dotted name, its component, and its parameters by name."""

    component: str
    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)


def model_of(base: Base) -> str:
    """What a base's denoiser is: "sdxl", "sd", the name of a table of native names, or "".

    FramePack is told from HunyuanVideo by the layers that it adds.
    """
    modules = {s.module for s in (*base.weights, *base.others) if s.component in DENOISERS}
    if any(s.component == "unet" for s in base.weights):
        return "sdxl" if any(m.startswith("add_embedding.") for m in modules) else "sd"
    found = architecture_of_names(modules) or ""
    framepack = found == "hunyuan-video" and any(m.startswith("clean_x_emb") for m in modules)
    return "framepack" if framepack else found


def by_own_names(task: Task) -> list[FileModule]:
    """The sites of a task under diffusers' and transformers' names."""
    modules: dict[tuple[str, str], FileModule] = {}
    for site, update in task.adapter.updates.items():
        _parameter(modules, site.component, site.module, site.parameter, _alone(site, update))
    return list(modules.values())


def by_native_names(task: Task) -> list[FileModule]:
    """The same under the names, and in the fused layers, of the original code.

    Text encoders, and what has no other name, stand under their own.
    """
    modules: dict[tuple[str, str], FileModule] = {}
    left = dict(task.adapter.updates)
    for component in (c for c in task.components if c in DENOISERS):
        for (module, parameter), parts in native_parts(task.target, component).items():
            here = [(p.site, left.pop(p.site), p.rows) for p in parts if p.site in left]
            if not here:
                continue
            shapes = [task.target.at(p.site).shape for p in parts]
            shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
            known = Parameter(shape, tuple(here))
            _parameter(modules, component, module, parameter, known)
    for site, update in left.items():
        _parameter(modules, site.component, site.module, site.parameter, _alone(site, update))
    return list(modules.values())


def _alone(site: Site, update: Update) -> Parameter:
    return Parameter(update.shape, ((site, update, ()),))


def _parameter(
    modules: dict[tuple[str, str], FileModule],
    component: str,
    module: str,
    parameter: str,
    what: Parameter,
) -> None:
    own = modules.setdefault((component, module), FileModule(component, module))
    own.parameters[parameter] = what


def has_modules(base: Base, component: str, part: str) -> bool:
    """Whether any module of a component has ``part`` in its name."""
    return any(s.component == component and part in s.module for s in base.weights)


def is_t5(base: Base, component: str) -> bool:
    """Whether a text encoder is a T5."""
    return has_modules(base, component, ".SelfAttention.")


def is_clip(base: Base, component: str) -> bool:
    """Whether a text encoder is a CLIP."""
    return has_modules(base, component, "encoder.layers.") and not is_t5(base, component)
