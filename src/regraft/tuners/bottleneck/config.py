"""What bottleneck adapters are told, and where they sit by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from regraft.errors import BadOption
from regraft.tuners.bottleneck.parts import ACTIVATIONS
from regraft.tuners.config import TunerConfig
from regraft.tuners.registration import key

Position = Literal["houlsby", "pfeiffer", "parallel"]
POSITIONS: tuple[str, ...] = get_args(Position)

#: Position → activation, reduction, scale of its paper's setting.
_USUAL: dict[str, tuple[str, float, float]] = {
    "houlsby": ("swish", 16, 1.0),
    "pfeiffer": ("relu", 16, 1.0),
    "parallel": ("relu", 2, 4.0),
}


@dataclass
class BottleneckConfig(TunerConfig):
    """Bottleneck adapters: h ← h + s (W_up f(W_down h + b_down) + b_up).

    Parameters
    ----------
    position : str
        "houlsby" (arXiv 1902.00751): after the outputs of attention and of feed-forward;
        "pfeiffer" (arXiv 2005.00247): after that of feed-forward; "parallel" (arXiv 2110.04366):
        beside feed-forward, from its input to its output.
    reduction : float or None
        Hidden size over the width of the bottleneck; None for 16 (parallel: 2).
    width : int or None
        That width itself, instead.
    activation : str or None
        f: "swish", "relu" or "gelu"; None for swish (houlsby) or relu.
    scale : float or None
        s; None for 1 (parallel: 4).
    norm : bool
        A trained layer norm of h before W_down.
    target_modules
        None for what the position means in a model type that is known: see :data:`SITES`.
    init_weights : bool
        W_up = 0 and b_up = 0, so that a new adapter changes nothing; False draws W_up, for tests.

    Raises
    ------
    BadOption
    """

    position: str = "houlsby"
    reduction: float | None = None
    width: int | None = None
    activation: str | None = None
    scale: float | None = None
    norm: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = key("bottleneck")
        if self.position not in POSITIONS:
            raise BadOption(
                f"Bottleneck adapters have no position {self.position!r}.",
                fix=f"Known: {', '.join(POSITIONS)}.",
            )
        activation, reduction, scale = _USUAL[self.position]
        self.activation = self.activation or activation
        self.scale = scale if self.scale is None else self.scale
        if self.width is None and self.reduction is None:
            self.reduction = reduction
        elif self.width is not None and self.reduction is not None:
            raise BadOption("A bottleneck has a width and a reduction.", fix="Give one of them.")
        if self.activation not in ACTIVATIONS:
            raise BadOption(
                f"Bottleneck adapters have no activation {self.activation!r}.",
                fix=f"Known: {', '.join(ACTIVATIONS)}.",
            )
        if (self.reduction or self.width or 0) <= 0:
            raise BadOption("The width of a bottleneck is not positive.", fix="Give another.")

    def width_of(self, hidden: int) -> int:
        """Rows of W_down for a hidden size; at least 1."""
        return self.width or max(1, int(hidden // (self.reduction or 1)))


def _sites(attention: str, feed_forward: str, block: str | None) -> dict[str, Any]:
    return {
        "houlsby": [attention, feed_forward],
        "pfeiffer": [feed_forward],
        "parallel": None if block is None else [block],
    }


_LLAMA = _sites("self_attn.o_proj", "mlp.down_proj", "mlp")
_BERT = {
    "houlsby": ["output.dense"],
    # Attention's output ends the same way.
    "pfeiffer": r"(.*\.)?layer\.\d+\.output\.dense",
    # Its feed-forward is two modules, with the residual inside the second one.
    "parallel": None,
}
_T5 = _sites("o", "wo", "DenseReluDense")
_OPT = _sites("out_proj", "fc2", None)

#: transformers' model type, or diffusers' class → position → ``target_modules``; None where no one
#: module fits.
SITES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"),
        _LLAMA,
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("opt", "bart", "mbart"), _OPT),
    "gpt2": _sites("attn.c_proj", "mlp.c_proj", "mlp"),
    "gpt_neox": _sites("attention.dense", "mlp.dense_4h_to_h", "mlp"),
    "distilbert": _sites("attention.out_lin", "ffn.lin2", "ffn"),
    "clip_text_model": _sites("self_attn.out_proj", "mlp.fc2", "mlp"),
    # diffusers' models have a class and no model type.
    "UNet2DConditionModel": {
        "houlsby": r".*\.(attn[12]\.to_out\.0|ff\.net\.2)",
        "pfeiffer": r".*\.ff\.net\.2",
        "parallel": r".*\.ff",
    },
}
