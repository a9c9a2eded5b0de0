"""The files of svdiff-pytorch: ``<module>.delta`` for each module, and no settings.

``spectral_shifts.safetensors`` holds the U-Net's shifts and ``spectral_shifts_te.safetensors`` the
text encoder's, under the names of diffusers 0.14 and transformers 4: the text encoder's begin with
``text_model.``, which transformers 5 leaves out of its modules.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from regraft.errors import BadOption, NotAnAdapter, ShapeMismatch, SitesNotInBase
from regraft.files import TensorFile, atomic_file, serialize
from regraft.tuners.config import exactly
from regraft.tuners.layer import kind_of
from regraft.tuners.saved import put
from regraft.tuners.svdiff.config import SVDiffConfig
from regraft.tuners.svdiff.layer import SVDiffLayer

UNET = "spectral_shifts.safetensors"
TEXT_ENCODER = "spectral_shifts_te.safetensors"
_END = ".delta"
_TEXT = "text_model."


def load_spectral_shifts(
    model: nn.Module, path: str | Path, adapter_name: str = "default", *, trainable: bool = False
) -> None:
    """Put the shifts of a file onto a diffusers U-Net or a CLIP text encoder.

    Parameters
    ----------
    model : nn.Module
    path : str or Path
        The ``.safetensors`` file.
    adapter_name : str
    trainable : bool

    Raises
    ------
    InputNotFound, MalformedFile
    NotAnAdapter
        It holds other tensors than shifts.
    SitesNotInBase, ShapeMismatch
        The model is not the one the shifts are for.
    """
    file = TensorFile(path)
    strange = [name for name in file if not name.endswith(_END)]
    if strange or not len(file):
        raise NotAnAdapter(
            "It holds something other than spectral shifts.",
            file=path,
            tensor=strange[0] if strange else None,
            fix="A file of svdiff-pytorch has one '.delta' for each module.",
        )
    layers = dict(_layers(model))
    tensors: dict[str, Tensor] = {}
    for key in file:
        name = key.removesuffix(_END)
        if name not in layers:
            name = name.removeprefix(_TEXT)
        if name not in layers:
            raise SitesNotInBase(
                f"The model has no module {name} with singular values to shift.",
                file=path,
                tensor=key,
                fix=f"{UNET} is for the U-Net, {TEXT_ENCODER} for the text encoder.",
            )
        shift = file.read(key, finite=True).flatten()
        if shift.numel() != layers[name]:
            raise ShapeMismatch(
                f"{shift.numel()} shifts for {layers[name]} singular values.",
                file=path,
                tensor=key,
                fix="Load it on the kind of model it was trained on.",
            )
        tensors[name + _END] = shift
    config = SVDiffConfig(target_modules=exactly(k.removesuffix(_END) for k in tensors))
    put(model, config, tensors, adapter_name, Path(path), trainable)


def write_spectral_shifts(
    model: nn.Module, path: str | Path, adapter_name: str = "default", *, overwrite: bool = False
) -> None:
    """Write an adapter's shifts as svdiff-pytorch does: fp32, canonical bytes.

    Parameters
    ----------
    model : nn.Module
        With SVDiff layers; a ``PeftModel``'s own wrapping is left out of the names.
    path : str or Path
        A file named as in :data:`UNET` or :data:`TEXT_ENCODER`; the latter's names get
        ``text_model.`` in front.

    Raises
    ------
    BadOption
        No layer has this adapter.
    OutputExists, OutputFailed
    """
    path = Path(path)
    front = _TEXT if path.name == TEXT_ENCODER else ""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, SVDiffLayer) and adapter_name in module.delta:
            plain = name.removeprefix("base_model.model.").removeprefix(front)
            tensors[f"{front}{plain}{_END}"] = module.delta[adapter_name].detach().float()
    if not tensors:
        raise BadOption(
            f"No layer of the model has SVDiff shifts called {adapter_name}.",
            fix="Give the adapter's name.",
        )
    with atomic_file(path, overwrite=overwrite) as temporary:
        serialize(temporary, tensors, {})


def _layers(model: nn.Module) -> list[tuple[str, int]]:
    """Every module with a weight, and its number of singular values."""
    found = []
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, SVDiffLayer) else module
        if ".base_layer" not in f".{name}" and kind_of(base) is not None:
            shape = base.weight.shape
            size = 1 if len(shape) == 1 else min(shape[0], shape[1:].numel())
            found.append((name, size))
    return found
