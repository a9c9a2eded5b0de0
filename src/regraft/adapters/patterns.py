"""Regular expressions that come from an adapter's config: other people's, so they are limited."""

from __future__ import annotations

import re

from regraft.errors import MalformedFile

#: Steps that matching one expression may take.
_MOST_STEPS = 10**9


def matches(expression: object, name: str) -> bool:
    """Whether a whole name matches an expression of a config (PEFT uses ``re.fullmatch``).

    Matching takes up to ``len(name)`` to the power of the repeats, and no end of time where a group
    is repeated.

    Raises
    ------
    MalformedFile
        It is no expression, or matching it could take too long.
    """
    text = str(expression)
    repeats = len(re.findall(r"[*+{]", text))
    if re.search(r"\)[*+{]", text) or max(len(name), 1) ** repeats > _MOST_STEPS:
        raise MalformedFile(
            f"The config's expression {text[:80]!r} could take too long to match.",
            fix="Write the module names instead.",
        )
    try:
        return re.fullmatch(text, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise MalformedFile(
            f"The config's expression {text[:80]!r} is not one ({error}).",
            fix="Restore the adapter_config.json that was saved with these weights.",
        ) from error


def matches_end(expression: object, name: str) -> bool:
    """Whether a name, or its end after any dot, matches: PEFT's rule for its patterns.

    Raises
    ------
    MalformedFile
    """
    return matches(rf"(.*\.)?({expression})", name)
