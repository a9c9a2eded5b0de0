"""What a training run is told: defaults, presets, TOML, and every check before a base is opened."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from regraft.errors import BadOption, InputNotFound, MalformedFile
from regraft.running.quantised import FORMS


@dataclass(frozen=True)
class Family:
    """What sets a family apart when it is trained.

    Parameters
    ----------
    rank : float or None
        Default of ``rank``; None where the family has a default of its own, or no rank.
    lr : float
        Default learning rate.
    ranked, alpha : bool
        Whether it has a rank, and an alpha.
    language_only : bool
        It lives in front of a language model's tokens.
    """

    rank: float | None
    lr: float
    ranked: bool = True
    alpha: bool = False
    language_only: bool = False


FAMILIES: dict[str, Family] = {
    "lora": Family(8, 1e-4, alpha=True),
    "lora-x": Family(320, 1e-3),
    "dora": Family(8, 1e-4, alpha=True),
    "pissa": Family(8, 1e-4, alpha=True),
    "svdiff": Family(None, 1e-3, ranked=False),
    "foura": Family(8, 1e-4, alpha=True),
    "qa-lora": Family(8, 1e-4, alpha=True),
    "loha": Family(8, 1e-4, alpha=True),
    "lokr": Family(8, 1e-4, alpha=True),
    "bottleneck": Family(None, 1e-4),
    "prompt": Family(16, 1e-2, language_only=True),
    "prefix": Family(16, 1e-2, language_only=True),
}
#: Names that mean a family with settings of its own; what is given beside them wins.
ALIASES: dict[str, dict[str, Any]] = {"qlora": {"family": "lora", "quantise": "nf4"}}
#: LoRA-X's own training (docs/train.md); its LoRA had rank 32. What a family lacks is left out.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "family": "lora-x",
        "batch": 8,
        "lr": 1e-3,
        "schedule": "constant",
        "warmup": 0,
        "snr_gamma": 5.0,
        "steps": 5000,
        "judging_prompts": 30,
        "judging_seeds": 30,
    }
}
_PAPER_RANKS = {"lora-x": 320, "lora": 32}
#: No layer has a smaller side of more.
_WIDEST = 65536
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
#: Of Cut-Mix, as SVDiff's paper has it.
SIDES = "{left} on the left and {right} on the right"


@dataclass(frozen=True)
class Settings:
    """One training run. The names are those of the command's options and of the TOML file.

    Parameters
    ----------
    base, data : str
        As :func:`regraft.running.open_model` and ``regraft measure`` take them.
    family : str
        A key of :data:`FAMILIES` or of :data:`ALIASES`.
    rank : float, optional
        Rank; directions or share of energy (lora-x); width (bottleneck); virtual tokens (prompt,
        prefix). Default the family's.
    alpha : float, optional
        Default the rank, so that the change is not scaled.
    steps, batch, accumulate : int
        Optimiser steps; items that are run at a time; how many such batches make a step.
    lr : float, optional
        Default the family's.
    schedule : "constant" or "cosine"
        After ``warmup`` steps of linear rise; cosine falls to zero at the last step.
    snr_gamma : float, optional
        Min-SNR weights of the loss (Hang et al. 2023, arXiv:2303.09556); diffusion only.
    precision : "fp32", "bf16" or "fp16"
        Of the base and of autocast. What is trained is always fp32.
    quantise : str, optional
        Quantise the base before training, to a key of :data:`regraft.running.quantised.FORMS`.
    group : int, optional
        Inputs that share a scale and a zero point when quantising to integers, and that QA-LoRA
        pools. Default the base's own, or 32.
    targets : str, optional
        Pattern of whole module names, as PEFT's ``target_modules``.
    length : int
        Tokens per item; language only.
    validation : float
        Share of the data that is held out, 256 items at most; 0 for none.
    save_every : int
        Steps between checkpoints, and between validations.
    prior : str, optional
        Pictures of the class with captions, as ``data``, for prior preservation.
    prior_prompt : list of str
        Captions of class pictures that are drawn from the bare base before the first step.
    prior_count : int
        How many for each of these.
    prior_weight : float
        Of the loss on class pictures.
    cut_mix : float
        How often a picture is put beside one of another subject; 0 for never.
    cut_mix_prompt : str
        The prompt of such a picture, with ``{left}`` and ``{right}``.
    unmix_weight : float, optional
        Of the attention that one subject's words have in the other's half.
    validation_prompts : list of str
        Prompts, .txt files of them, or "held-out": what is drawn or completed at checkpoints.
    validation_seeds : int
        How often each.
    judging_prompts, judging_seeds : int, optional
        What `regraft measure` shall draw afterwards; the model card has the command.
    tensorboard : bool
        Write event files beside the output.
    weight_decay, clip : float
        AdamW's, and the largest norm of the gradient.
    device : str
        As :func:`regraft.running.open_model` takes it.
    options : dict
        Further arguments of the family's PEFT config.
    preset : str, optional
        A key of :data:`PRESETS`; what is given beside it wins.

    Raises
    ------
    BadOption
    """

    base: str
    data: str
    family: str = "lora"
    rank: float | None = None
    alpha: float | None = None
    steps: int = 1000
    batch: int = 8
    lr: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    snr_gamma: float | None = None
    precision: str = "fp32"
    quantise: str | None = None
    group: int | None = None
    targets: str | None = None
    length: int = 512
    validation: float = 0.1
    seed: int = 0
    save_every: int = 250
    weight_decay: float = 0.01
    clip: float = 1.0
    gradient_checkpointing: bool = False
    accumulate: int = 1
    prior: str | None = None
    prior_prompt: list[str] = field(default_factory=list)
    prior_count: int = 200
    prior_weight: float = 1.0
    cut_mix: float = 0.0
    cut_mix_prompt: str = SIDES
    unmix_weight: float | None = None
    validation_prompts: list[str] = field(default_factory=list)
    validation_seeds: int = 1
    judging_prompts: int | None = None
    judging_seeds: int | None = None
    tensorboard: bool = False
    device: str = "auto"
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from what was given, over the preset that was given, over the defaults.

        None counts as not given.

        Raises
        ------
        BadOption
            An unknown name, a value of the wrong type or out of range, or two that exclude each
            other.
        """
        given = _as_wanted(given)
        for name in ("base", "data"):
            if name not in given:
                raise BadOption(f"No {name} was named.", fix=f"Give --{name}, or {name} in TOML.")
        preset = given.get("preset")
        if preset is not None:
            _one_of("preset", preset, PRESETS)
            given = {**PRESETS[preset], **given}
            rank = _PAPER_RANKS.get(given["family"])
            if rank is not None:
                given.setdefault("rank", rank)
        if (alias := ALIASES.get(given.get("family", ""))) is not None:
            given = {**alias, **given, "family": alias["family"]}
        settings = cls(**given)
        settings._check()
        return settings

    @property
    def rate(self) -> float:
        """The learning rate at its height."""
        return FAMILIES[self.family].lr if self.lr is None else self.lr

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.rate
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * part))

    @property
    def size(self) -> float | None:
        """The rank that is meant."""
        return FAMILIES[self.family].rank if self.rank is None else self.rank

    def _check(self) -> None:
        _one_of("family", self.family, FAMILIES, (*FAMILIES, *ALIASES))
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        if self.quantise is not None:
            _one_of("form to quantise to", self.quantise, FORMS)
        grouped = (self.quantise or "").startswith("int") or self.family == "qa-lora"
        if self.group is not None and not grouped:
            raise BadOption(
                "A group size is given, but nothing here is in groups.",
                fix="It goes with --quantise int8, int4, int3 or int2, and with --family qa-lora.",
            )
        family = FAMILIES[self.family]
        if self.rank is not None and not family.ranked:
            raise BadOption(f"{self.family} has no rank.", fix="Leave it out.")
        if self.alpha is not None and not family.alpha:
            raise BadOption(f"{self.family} has no alpha.", fix="Leave it out.")
        share = self.family == "lora-x" and self.rank is not None and 0 < self.rank < 1
        if self.rank is not None and not share and (self.rank < 1 or self.rank % 1):
            raise BadOption(
                f"The rank {self.rank:g} is not a number of directions.",
                fix="Give a whole number above 0, such as 8.",
            )
        if self.rank is not None and self.rank > _WIDEST:
            raise BadOption(f"The rank {self.rank:g} is beyond any layer.", fix="Give a lower one.")
        if self.targets is not None and family.language_only:
            raise BadOption(f"{self.family} changes no modules.", fix="Leave out the targets.")
        self._check_pictures()
        low: dict[str, float] = {"steps": 1, "batch": 1, "length": 2, "save_every": 1}
        low |= {"warmup": 0, "weight_decay": 0, "validation": 0, "seed": 0, "cut_mix": 0}
        low |= {"accumulate": 1, "prior_count": 1, "validation_seeds": 1, "group": 1}
        low |= {"judging_prompts": 1, "judging_seeds": 1}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise BadOption(f"{name} is {value}.", fix=f"At least {least:g}.")
        for name in ("rate", "clip", "alpha", "snr_gamma", "prior_weight", "unmix_weight"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                shown = "lr" if name == "rate" else name
                raise BadOption(f"{shown} is {value}.", fix="Give a number above 0.")
        if self.validation >= 1:
            raise BadOption(
                f"validation is {self.validation:g}.",
                fix="Give the share of the data to hold out, below 1; 0 for none.",
            )

    def _check_pictures(self) -> None:
        if self.cut_mix > 1:
            raise BadOption(f"cut_mix is {self.cut_mix:g}.", fix="A probability, such as 0.6.")
        if self.unmix_weight is not None and not self.cut_mix:
            raise BadOption(
                "unmix_weight is of mixed pictures, and none are made.", fix="Pass --cut-mix 0.6."
            )
        if "{left}" not in self.cut_mix_prompt or "{right}" not in self.cut_mix_prompt:
            raise BadOption("cut_mix_prompt lacks {left} or {right}.", fix=f"Such as {SIDES!r}.")
        if not all(text.strip() for text in (*self.prior_prompt, *self.validation_prompts)):
            raise BadOption("A prompt is empty.", fix="Leave it out, or write one.")


def _known(names: Mapping[str, Any]) -> str:
    return f"Known: {', '.join(names)}."


def _one_of(name: str, value: str, known: Any, shown: Any = None) -> None:
    if value not in known:
        raise BadOption(f"{value!r} is no {name}.", fix=f"Known: {', '.join(shown or known)}.")


def _as_wanted(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, each of its type."""
    types = {f.name: str(f.type) for f in fields(Settings)}
    for name in given:
        if name not in types:
            raise BadOption(f"Training has no setting {name!r}.", fix=_known(types))
    return {
        name: _typed(name, value, types[name]) for name, value in given.items() if value is not None
    }


def _typed(name: str, value: Any, type_: str) -> Any:
    """A value as its field wants it; numbers are not taken for truths, nor the reverse."""
    wanted = type_.removesuffix(" | None")
    truth = isinstance(value, bool)
    match wanted:
        case "str" if isinstance(value, str | Path):
            return str(value)
        case "int" if isinstance(value, int) and not truth:
            return value
        case "float" if isinstance(value, int | float) and not truth:
            return float(value)
        case "bool" if truth:
            return value
        case "list[str]" if isinstance(value, str):
            return [value]
        case "list[str]" if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return list(dict.fromkeys(value))
        case _ if wanted.startswith("dict") and isinstance(value, Mapping):
            return dict(value)
    word = {"dict[str, Any]": "table", "list[str]": "list of texts"}.get(wanted, wanted)
    fix = {
        "int": "Give a whole number.",
        "float": "Give a number.",
        "bool": "Give true or false.",
        "str": "Give a text, in quotes.",
        "list of texts": 'Give texts in brackets, such as ["a dog", "a fox"].',
        "table": "Give its values under [options].",
    }.get(word, "Correct the value.")
    raise BadOption(f"{name} is {value!r}, not of type {word}.", fix=fix)


def read_config(path: str | Path) -> dict[str, Any]:
    """A training config: top-level names of :class:`Settings`, ``output``, a table ``options``.

    Raises
    ------
    InputNotFound, MalformedFile
    BadOption
        An unknown name, or a value of the wrong type; the file is named.
    """
    path = Path(path).expanduser()
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputNotFound(
            "No such training config.", file=path, fix="Give a .toml file, or options alone."
        ) from error
    except OSError as error:
        raise MalformedFile(f"It cannot be read: {error.strerror}.", file=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFile(
            f"Not valid TOML ({error}).", file=path, fix="docs/train.md shows a config."
        ) from error
    try:
        _as_wanted({name: value for name, value in told.items() if name != "output"})
    except BadOption as error:
        raise BadOption(error.what, file=path, fix=error.fix) from error
    return told
