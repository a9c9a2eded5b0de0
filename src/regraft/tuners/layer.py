"""A layer whose adapters change one weight of the layer they wrap, by ΔW = left · right.

Everything PEFT and diffusers ask of such a layer: merging, scales, switching. A tuner says what
``left`` and ``right`` are. ΔW is the change of the weight *as stored*, seen as a matrix: a
convolution (out, in, kh, kw) is (out, in·kh·kw), transformers' Conv1D is (in, out), a vector (d,)
is (1, d).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from regraft.errors import NonFiniteTensor, QuantisedWeight
from regraft.tuners.packed import is_packed, shape_of, whole

Kind = Literal["linear", "transposed", "conv", "embedding", "vector"]


def kind_of(module: nn.Module) -> Kind | None:
    """How a module uses its weight, or None if a change of it cannot be hosted.

    Packed weights of linear layers are, of bitsandbytes and torchao. Not hosted: those of other
    quantisers, and the output projection of torch's own attention, whose weight is used without the
    module being run.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if is_packed(module):
        return "linear" if isinstance(module, nn.Linear) else None
    if not weight.is_floating_point() or type(weight).__module__.partition(".")[0] != "torch":
        return None  # quanto's weights pass for floats
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "transposed"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "vector" if weight.ndim == 1 else None


def wide(tensor: Tensor) -> Tensor:
    """At least fp32: what is trained, and ΔW, never in less."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def exact(tensor: Tensor) -> Iterator[None]:
    """Compute once and for all, whatever mode the model runs in: autocast, inference."""
    autocast = torch.autocast(tensor.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


class DeltaLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """What tuners that change one weight have in common.

    A subclass sets ``adapter_layer_names`` and gives :meth:`factors`; its ``update_layer`` ends
    with :meth:`_ready`.

    Parameters
    ----------
    base_layer : nn.Module
        A module that :func:`kind_of` knows, or another tuner's layer around one.
    adapter_name : str
    """

    # What comes from PEFT's half, for type checkers, which cannot see it.
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], Any]
    merged: bool
    set_adapter: Callable[..., None]
    _get_embed_scale: Callable[[], Tensor | None]
    # What a subclass adds to.
    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...] = ("scaling",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        #: Adapter → strength. Not saved: files mean strength 1.
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        #: What is in the base's weight now: adapter → the strength it was merged at.
        self._merged: dict[str, float] = {}
        #: The base's weight while something is merged into it, so that unmerging is exact.
        self._unmerged: Tensor | None = None
        base = self.get_base_layer()
        kind = kind_of(base)
        assert kind is not None, "the model checks what it wraps"
        self.kind: Kind = kind
        self._shape = shape_of(base)
        self._rows, self._columns = self._matrix_shape(self._shape)

    @staticmethod
    def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
        return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1:].numel())

    # What a subclass says

    @abstractmethod
    def factors(self, scales: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """(left (m, k), right (k, n)) in fp32, their product the joint ΔW of adapters at strengths.

        Every adapter in ``scales`` is on this layer; there is at least one.
        """

    @abstractmethod
    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter with the settings of ``config``."""

    # The base's weight

    def base_weight(self) -> Tensor:
        """The base's weight as it was before any merging, unpacked if it is quantised."""
        base = self.get_base_layer()
        if is_packed(base):
            held: Any = self._unmerged
            return whole(base) if held is None else held.dequantize()
        weight: Tensor = base.weight.detach()
        return weight if self._unmerged is None else self._unmerged.to(weight.device)

    def base_matrix(self) -> Tensor:
        """The same as a matrix (m, n) in fp32."""
        return self.base_weight().float().reshape(self._rows, self._columns)

    # Adding

    def _ready(self, adapter_name: str, inference_mode: bool) -> None:
        """Last step of ``update_layer``: strength, place, and who is trained."""
        self.scaling[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To the base's device. Unlike PEFT's, never to its dtype: what is trained stays fp32."""
        where = device or self.get_base_layer().weight.device
        for name in self.adapter_layer_names + self.other_param_names:
            held: Any = getattr(self, name)
            if not isinstance(held, dict) and adapter_name in held:
                tensor = held[adapter_name]
                if tensor.device.type != "meta":
                    held[adapter_name] = tensor.to(where, torch.float32)

    # Strength, as diffusers and PEFT set it

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of every active adapter."""
        for name in self._on_this_layer(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of every active adapter; without ``scale``, set it back to 1."""
        for name in self._on_this_layer(self.active_adapters):
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def _on_this_layer(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.scaling]

    # ΔW

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter at its strength: the weight's shape, fp32."""
        return self._change({adapter: self.scaling[adapter]})

    def _change(self, scales: Mapping[str, float]) -> Tensor:
        left, right = self.factors(scales)
        change: Tensor = (left @ right).reshape(self._shape)
        return change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base's weight, which is kept until it is unmerged.

        Parameters
        ----------
        safe_merge : bool
            Leave the weight as it is if the sum is not finite.
        adapter_names : list of str or None
            None means the active ones.

        Raises
        ------
        NonFiniteTensor
            With ``safe_merge``.
        QuantisedWeight
            The base's weight is packed.
        """
        names = self._on_this_layer(check_adapters_to_merge(self, adapter_names) or [])
        if not names:
            return
        if is_packed(self.get_base_layer()):
            raise QuantisedWeight(
                "The base's weight is quantised; a change added to it would be rounded away.",
                fix="Merge into the base as it was before quantisation, or keep the adapter beside "
                "it. QA-LoRA merges into bases quantised by groups.",
            )
        after = self._merged | {name: self.scaling[name] for name in names}
        weight, plain = self.get_base_layer().weight, self.base_weight()
        with exact(weight):
            total = (wide(plain) + self._change(after)).to(weight.dtype)
        if safe_merge and not torch.isfinite(total).all():
            raise NonFiniteTensor(
                f"Merging {', '.join(names)} gives a weight that is not finite.",
                fix="The adapter is damaged, or its training diverged.",
            )
        weight.data, self._unmerged = total, plain
        self._merged = after
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data = self.base_weight().to(weight.dtype)  # the model may have been cast since
        self._merged, self._unmerged = {}, None
        self.merged_adapters.clear()

    # Running

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters else self._on_this_layer(self.active_adapters)
        if self.merged or not names:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        scales = {name: self.scaling[name] for name in names}
        if self.kind == "vector":
            return self._with_changed_vector(scales, x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result + self._added(x, scales).to(result.dtype)

    def _added(self, x: Tensor, scales: Mapping[str, float]) -> Tensor:
        """What the adapters at these strengths add to the output."""
        return self._through(x, *self.factors(scales))

    def _through(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """What ΔW = left · right adds to the output, without forming ΔW."""
        base: Any = self.get_base_layer()
        if self.kind == "embedding":
            found = functional.embedding(x, left) @ right
            scale = self._get_embed_scale()  # some models scale inside the embedding
            return found if scale is None else found * scale
        x = x.to(left.dtype)
        if self.kind == "linear":
            return functional.linear(functional.linear(x, right), left)
        if self.kind == "transposed":
            return x @ left @ right
        if base.groups > 1:  # each group of outputs has inputs of its own: no common right factor
            return self._convolved(base, x, (left @ right).reshape(base.weight.shape))
        kernel = right.reshape(-1, *base.weight.shape[1:])
        across = left.reshape(*left.shape, *[1] * (base.weight.ndim - 2))
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[base.weight.ndim - 3]
        return convolve(self._convolved(base, x, kernel), across)

    @staticmethod
    def _convolved(base: Any, x: Tensor, kernel: Tensor) -> Tensor:
        """A convolution with the base's stride, padding and dilation, and another kernel."""
        result: Tensor = base._conv_forward(x, kernel, None)
        return result

    def _with_changed_vector(
        self, scales: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Tensor:
        """A norm run with its weight changed."""
        base = self.get_base_layer()
        weight = base.weight + self._change(scales).to(base.weight.dtype)
        result: Tensor = torch.func.functional_call(base, {"weight": weight}, args, kwargs)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``peft.convert_to_lora`` can convert it: matrices only."""
        return self.kind in ("linear", "transposed")
