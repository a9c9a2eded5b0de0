"""Cutting an update to the rank a rule chooses; what needs no cut stays as it is."""

from __future__ import annotations

from regraft.adapters.ranks import RankRule
from regraft.adapters.update import LowRank, Spectral, Update, matrix_shape


def cut(update: Update, rule: RankRule | None) -> Update:
    """The update at the rank that the rule chooses.

    Parameters
    ----------
    update : Update
    rule : RankRule or None
        None keeps an update that is held in two factors, and shortens others by "auto".

    Returns
    -------
    Update
        ``update`` itself if it holds no more directions than the rule keeps; a change of one
        dimension (a bias, a normalisation) is never cut.
    """
    held = isinstance(update, LowRank | Spectral)
    if len(update.shape) < 2 or (rule is None and held):
        return update
    rule = rule or RankRule()
    if held and rule.kind == "rank" and update.rank <= int(rule.value or 0):
        return update
    found = update.spectrum()
    k = rule.choose(found.s, matrix_shape(update.shape))
    if held and k >= update.rank:
        return update
    left, right = found.top(k)
    return LowRank(left.contiguous(), right.contiguous(), 1.0, update.shape, update.layout)
