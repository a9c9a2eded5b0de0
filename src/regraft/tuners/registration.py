"""PEFT methods under string keys: three entries in PEFT's own tables, nothing in PEFT changed.

``peft.utils.register_peft_method`` accepts members of PEFT's enum of methods only. Its tables take
any key, and everything after looks methods up there.
"""

from __future__ import annotations

from typing import Any

from regraft.errors import MissingDependency

try:
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
except ImportError as error:
    raise MissingDependency(
        f"Tuners need the package {error.name!r}.", fix="pip install 'regraft[demo]'"
    ) from error


class MethodKey(str):
    """The name of a method in PEFT's tables; PEFT asks its own keys for ``.value`` in messages."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


def key(name: str) -> MethodKey:
    """What ``PeftConfig.peft_type`` is for the method ``name``: "lora_x" → "LORA_X"."""
    return MethodKey(name.upper())


def register(name: str, config_cls: Any, model_cls: Any, prefix: str) -> None:
    """Make a method known to PEFT. Doing it again changes nothing.

    Parameters
    ----------
    name : str
        In lower case; the key is :func:`key` of it.
    config_cls : subclass of ``peft.PeftConfig``
        Sets ``self.peft_type = key(name)`` in ``__post_init__``.
    model_cls : subclass of ``BaseTuner``
    prefix : str
        What the names of the trained parameters begin with.

    Raises
    ------
    MissingDependency
        This version of PEFT has another method of that name.
    """
    method = key(name)
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(method)
    if known is not None and known.__module__ != model_cls.__module__:
        raise MissingDependency(
            f"This version of PEFT has a method {method} of its own.",
            fix="Install an older PEFT (0.21), or a newer Regraft.",
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[method] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[method] = prefix
