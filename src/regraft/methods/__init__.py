"""Methods: ways to compute the target's update, one file each, and choosing among them.

A method is a function from one :class:`SiteJob` to an update or a :class:`Refusal`, registered with
its paper, equations, needs, cost and invariants. The contract tests run over every registered one.
"""

from regraft.methods import copy, lora_x, prolora  # noqa: F401  (importing registers)
from regraft.methods.inserts import InsertMethod, get_insert_method, insert_methods
from regraft.methods.registry import (
    Method,
    MethodOptions,
    Refusal,
    SiteJob,
    get_method,
    methods,
)

__all__ = [
    "InsertMethod",
    "Method",
    "MethodOptions",
    "Refusal",
    "SiteJob",
    "get_insert_method",
    "get_method",
    "insert_methods",
    "methods",
]
