"""Bottlenecks on another base: h ↦ s (W_up f(W_down h + b_down) + b_up), read and written there.

With h_t ↦ A h_t + a ≈ h_s and B h_s + b ≈ h_t the maps between what the two modules read and give
(:func:`regraft.inserts.maps.towards`), *mapped*:

    W_down' = W_down A,   b_down' = b_down + W_down a,   W_up' = B W_up,   b_up' = B b_up

(b stays out: what a bottleneck adds is a difference). Width, activation and scale stay.

*Followed* (ours): the mapped W_down' reads the target, and W_up' is solved for, site by site in the
order in which they run, so that the residual stream changes as the source's did. With u_s the
source's stream behind the site, ũ_s the same with its bottlenecks, P the map between the streams,
u_t the target's bare stream, u_now the one with what is on it so far, and
F = s f(W_down' h_now + b_down'),

    W_up', b_up' = argmin Σ ‖F W_upᵀ + s b_up − (u_t + P (ũ_s − u_s) − u_now)‖² + λ‖W_up − B W_up‖²

What an earlier site could not do is then made good by a later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from regraft.adapters import Site
from regraft.errors import BadOption
from regraft.inserts.hooks import Parts, Seen
from regraft.inserts.insert import Insert
from regraft.inserts.layers import as_they_ran, block_of, counterparts, rows_alike, shares
from regraft.inserts.maps import RIDGES, Affine, energy_kept, ridge, towards
from regraft.inserts.places import pattern_of
from regraft.inserts.spaces import Side, site_at
from regraft.tuners.bottleneck.parts import ACTIVATIONS, Bottleneck


def mapped(
    part: Bottleneck, module: str, into: Affine, out: Affine, share: float = 1.0
) -> Bottleneck:
    """The bottleneck between maps.

    Parameters
    ----------
    part : Bottleneck
    module : str
        Where it goes.
    into : Affine
        From what the target's module reads to what the source's does, (n_s, n_t).
    out : Affine
        From what the source's module gives to what the target's does, (m_t, m_s).
    share : float
        Of what it adds.

    Raises
    ------
    BadOption
        It has a layer norm of h, which an affine map does not commute with.
    """
    if part.norm is not None:
        raise BadOption(
            "A bottleneck with a layer norm of its own cannot be carried.",
            fix="Train it without (norm = false).",
        )
    down, up = part.down.double(), part.up.double()
    dtype = part.down.dtype
    return replace(
        part,
        module=module,
        down=(down @ into.matrix).to(dtype),
        down_bias=(part.down_bias.double() + down @ into.offset).to(dtype),
        up=(share * out.matrix @ up).to(dtype),
        up_bias=(share * out.linear(part.up_bias)).to(dtype),
    )


def solved(part: Bottleneck, read: Tensor, goal: Tensor) -> Bottleneck:
    """The bottleneck with the W_up and b_up that give ``goal`` (r, m) for ``read`` (r, n), as near
    to its own as λ draws them."""
    inner = functional.linear(read.float(), part.down.float(), part.down_bias.float())
    features = ACTIVATIONS[part.activation](inner) * part.scale
    found = ridge(features, goal, prior=part.up, ridges=(*RIDGES, 1.0, 10.0))
    return replace(
        part,
        up=found.matrix.to(part.up.dtype),
        up_bias=(found.offset / part.scale).to(part.up.dtype),
    )


@dataclass(frozen=True)
class Spaces:
    """Bottleneck sites of one base: what to watch, and how their results reach the stream.

    Attributes
    ----------
    names : list of str
    blocks : dict of str to str
        Module → its block; only blocks whose stream is their input and what these modules give.
    parallel : set of str
        Those modules whose bottleneck reads their input.
    """

    side: Side
    names: list[str]
    blocks: dict[str, str]
    parallel: set[str]

    def run(self, parts: Parts | None = None, only: str | None = None) -> Seen:
        """Run with parts on, and keep what following needs, for all modules or for one."""
        names = set(self.names)
        if only is not None:
            block = self.blocks[only]
            names = {n for n in names if block and self.blocks[n] == block} | {only}
        blocks = {self.blocks[n] for n in names} - {""}
        return self.side.run(parts, inputs=blocks | (names & self.parallel), outputs=blocks | names)

    def added(self, seen: Seen, parts: Parts, name: str) -> Tensor:
        """What the module gives, its bottleneck included, (r, m)."""
        given = seen.outputs[name]
        part = parts.get(site_at(self.side, name, "bottleneck"))
        if not isinstance(part, Bottleneck):
            return given
        return given + part(read_by(part, seen, name).float())

    def stream(self, seen: Seen, parts: Parts, name: str) -> Tensor:
        """The residual stream behind the module: its block's input and all that was given since;
        where a block does not add up like that, what the module gives."""
        block = self.blocks[name]
        if not block:
            return self.added(seen, parts, name)
        here = [n for n in as_they_ran(self.names, seen.outputs) if self.blocks[n] == block]
        if here[-1] == name:
            return seen.outputs[block]
        before = here[: here.index(name) + 1]
        return seen.inputs[block] + sum(self.added(seen, parts, n) for n in before)

    def before(self, seen: Seen, name: str) -> Tensor | None:
        """The stream in front of the module's block."""
        block = self.blocks[name]
        return seen.inputs[block] if block else None


def read_by(part: Bottleneck, seen: Seen, name: str) -> Tensor:
    """What a bottleneck on a module reads, (r, n)."""
    return seen.inputs[name] if part.position == "parallel" else seen.outputs[name]


def spaces(side: Side, kinds: Mapping[str, bool]) -> tuple[Spaces, Seen]:
    """The modules of some kinds, and what they see of a bare run.

    ``kinds``: pattern → whether its bottlenecks are parallel.
    """
    # A layer beside its dropout has a name of the same pattern (``to_out.0``, ``to_out.1``).
    names = [
        name
        for name, part in side.root.named_modules()
        if name and pattern_of(name) in kinds and any(True for _ in part.parameters())
    ]
    blocks = {name: block_of(side.root, name) for name in names}
    made = Spaces(side, names, blocks, {n for n in names if kinds[pattern_of(n)]})
    seen = made.run()
    checked = dict(made.blocks)
    for block in set(made.blocks.values()) - {""}:
        inside = [n for n in names if made.blocks[n] == block]
        whole = seen.inputs[block].shape == seen.outputs[block].shape and all(
            seen.outputs[n].shape == seen.outputs[block].shape for n in inside
        )
        total = seen.inputs[block] + sum(seen.outputs[n] for n in inside) if whole else None
        alone = len(inside) == 1 and whole
        if not alone and (total is None or not rows_alike(total, seen.outputs[block])):
            checked |= dict.fromkeys(inside, "")
    return replace(made, blocks=checked), seen


@dataclass
class Found:
    """Bottlenecks for the target, and the evidence, by target module."""

    mapped: dict[str, Bottleneck]
    followed: dict[str, Bottleneck]
    sources: dict[str, str]
    fit: dict[str, float]
    kept: dict[str, float]


def carry(parts: Parts, source: Side, target: Side, follow: bool = True) -> Found:
    """Both forms, for every module of the target that takes after one with a bottleneck."""
    own = {site.module: part for site, part in parts.items() if isinstance(part, Bottleneck)}
    kinds: dict[str, bool] = {}
    for name, part in own.items():
        kinds[pattern_of(name)] = kinds.get(pattern_of(name), False) or part.position == "parallel"
    (here, s0), (there, t0) = spaces(source, kinds), spaces(target, kinds)
    told = counterparts(
        {n: s0.outputs[n] for n in here.names},
        {n: t0.outputs[n] for n in as_they_ran(there.names, t0.outputs)},
    )
    pairs = {name: s for name, (s, _) in told.items() if s in own}
    found = Found({}, {}, pairs, {}, {})
    s1 = here.run(parts)
    share = shares(pairs)
    on: dict[Site, Insert] = {}
    for name, like in pairs.items():
        part = own[like]
        into = towards(read_by(part, t0, name), read_by(part, s0, like))
        out = towards(s0.outputs[like], t0.outputs[name])
        which, many = share[name]
        plain = mapped(part, name, into, out, 1 / many)
        found.mapped[name], found.fit[name] = plain, into.fit
        gave = here.added(s1, parts, like) - s1.outputs[like]
        back = towards(t0.outputs[name], s0.outputs[like])
        found.kept[name] = energy_kept(gave, back.linear(out.linear(gave)))
        if not follow:
            continue
        now = there.run(on, name) if on else t0
        goal = _goal(here, there, (s0, s1, t0, now), parts, on, (like, name), (which, many))
        made = solved(plain, read_by(part, now, name), goal)
        found.followed[name] = made
        on[site_at(target, name, "bottleneck")] = made
    return found


def _goal(
    here: Spaces,
    there: Spaces,
    seen: tuple[Seen, Seen, Seen, Seen],
    parts: Parts,
    on: Parts,
    names: tuple[str, str],
    share: tuple[int, int],
) -> Tensor:
    """What the bottleneck on a target module is to add, (r, m), fp32."""
    s0, s1, t0, now = seen
    like, name = names
    change = here.stream(s1, parts, like) - here.stream(s0, {}, like)
    first, last = here.before(s0, like), here.before(s1, like)
    if first is not None and last is not None and share[1] > 1:
        # Several blocks do what one did: each has done its share when it is through.
        change = (last - first) + (change - (last - first)) * (share[0] / share[1])
    elif share[1] > 1:
        change = change / share[1]
    bare = there.stream(t0, {}, name)
    across = towards(here.stream(s0, {}, like), bare)
    return bare + across.linear(change).float() - there.stream(now, on, name)
