"""A prefix's keys and values on another base (Li & Liang 2021, arXiv:2101.00190).

A head with query q, its own tokens' scores (total T = log Σ exp) and their result z, gives with
prefix keys k_m and values v_m

    z + Σ_m w_m (v_m − z),    w_m = exp(s q·k_m) / (Σ_n exp(s q·k_n) + exp T)

*Mapped*: K, V ↦ A K, A V with A the Procrustes map from the source layer's cache to the target's,
all heads at once, fitted on keys and values of the same positions (keys after their rotation).

*Followed* (ours): layer by layer, keys and values are solved for by what they do. A target head j
takes after the source head i whose scores its queries tell best. Its keys give, on the target's
queries, the same share of attention as the source's do:

    k'_m = argmin_k Σ (s_t q_t·k + T_s − T_t − s_s q_s·k_m)² + λ‖k‖²

and the values of all heads together give the attention's part in the residual stream's change:

    V' = argmin Σ ‖Σ_j O_j Σ_m w'_jm (v'_jm − z_j) − (u_t + P (ũ_s − u_s) − u_now)‖² + λ‖V' − V₀‖²

with O the output projection, u_s, ũ_s the source's stream behind the attention without and with its
prefix, P the map between the streams, u_now the target's with the layers before, and V₀ the values
whose results are nearest to the source's: V₀ = O_j⁺ P O_i v_m. The second is solved by conjugate
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from regraft.adapters import Site
from regraft.errors import CannotRun
from regraft.inserts.hooks import Attention, Parts, Seen, prefix_weights
from regraft.inserts.insert import Insert, KeysValues
from regraft.inserts.layers import block_of, counterparts, shares
from regraft.inserts.maps import KEPT_BACK, energy_kept, procrustes, r2, ridge, towards
from regraft.inserts.spaces import Side, attentions, site_at

#: λ of the values, over the mean size of what they are multiplied by.
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_STEPS = 60


@dataclass
class Found:
    """Prefixes for the target, and the evidence, by target attention."""

    mapped: dict[str, KeysValues] = field(default_factory=dict)
    followed: dict[str, KeysValues] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    fit: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)


def carry(parts: Parts, source: Side, target: Side, follow: bool = True) -> Found:
    """Both forms, for every attention of the target."""
    own = {site.module: part for site, part in parts.items() if isinstance(part, KeysValues)}
    (here, s0), (there, t0) = _bare(source), _bare(target)
    told = counterparts({n: s0.outputs[n] for n in here}, {n: t0.outputs[n] for n in there})
    if lacking := [n for n in there if n not in told or told[n][0] not in own]:
        raise CannotRun(f"Nothing of the prefix is for the target's attention {lacking[0]}.")
    found = Found(sources={name: told[name][0] for name in there})
    share = shares(found.sources)
    s1 = _run(source, here, parts)
    on: dict[Site, Insert] = {}
    for name, like in found.sources.items():
        a, b = s0.attention[like], t0.attention[name]
        keys, fit = _through(own[like].keys, a.keys, b.keys)
        values, value_fit = _through(own[like].values, a.values, b.values)
        found.mapped[name] = KeysValues(keys, values)
        out = towards(_stream(source, s0, like), _stream(target, t0, name))
        back = towards(_stream(target, t0, name), _stream(source, s0, like))
        gave = _stream(source, s1, like) - _stream(source, s0, like)
        found.kept[name] = energy_kept(gave, back.linear(out.linear(gave)))
        found.fit[name] = (fit + value_fit) / 2
        if not follow:
            continue
        now = _run(target, [name], on) if on else t0
        which, many = share[name]
        first = s1.inputs[block_of(source.root, like)] - s0.inputs[block_of(source.root, like)]
        change = first + (gave - first) * (which / many)
        goal = _stream(target, t0, name) + out.linear(change).float() - _stream(target, now, name)
        made = _followed(
            own[like],
            s1.attention[like],
            now.attention[name],
            goal,
            (_projection(source, like), _projection(target, name)),
            out.matrix,
        )
        found.followed[name] = made
        on[site_at(target, name, "prefix")] = made
    return found


def _bare(side: Side) -> tuple[list[str], Seen]:
    names = attentions(side.model)  # type: ignore[arg-type]
    return names, _run(side, names, {})


def _run(side: Side, names: list[str], parts: Parts) -> Seen:
    blocks = [block_of(side.root, name) for name in names]
    return side.run(parts, inputs=blocks, outputs=names, attention=names)


def _stream(side: Side, seen: Seen, name: str) -> Tensor:
    """The residual stream behind an attention."""
    return seen.inputs[block_of(side.root, name)] + seen.outputs[name]


def _through(cache: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Keys or values (h, l, e) through the map from the source's (r, h, e) to the target's."""
    along = procrustes(x.flatten(1), y.flatten(1))
    whole = along(cache.transpose(0, 1).flatten(1))
    heads = whole.reshape(-1, *y.shape[1:]).transpose(0, 1)
    return heads.to(cache.dtype).contiguous(), along.fit


def _projection(side: Side, name: str) -> Tensor:
    """The weight of an attention's output projection, (d, h · e)."""
    from transformers.pytorch_utils import Conv1D

    found = None
    for part in side.root.get_submodule(name).modules():
        if isinstance(part, nn.Linear):
            found = part.weight
        elif isinstance(part, Conv1D):
            found = part.weight.mT
    if found is None or found.ndim != 2 or not found.is_floating_point():
        raise CannotRun(f"The attention {name} has no output projection that is known.")
    return found.detach().float().cpu()


def _followed(
    part: KeysValues,
    s: Attention,
    t: Attention,
    goal: Tensor,
    projections: tuple[Tensor, Tensor],
    across: Tensor,
) -> KeysValues:
    """Keys and values by what they do."""
    groups = s.queries.shape[1] // len(part.keys)
    spread = part.keys.float().repeat_interleave(groups, dim=0)
    scores = torch.einsum("rhe,hle->rhl", s.queries, spread) * s.scaling
    odds = scores - s.total[..., None]  # log of the prefix token's share over that of all others
    heads = _heads(odds, t)
    few = t.keys.shape[1]
    many = t.queries.shape[1] // few
    keys = []
    for group in range(few):
        inside = range(group * many, (group + 1) * many)
        # Position by position, so that the rows kept back are of positions, not of a head.
        x = torch.stack([t.queries[:, j] for j in inside], dim=1).flatten(0, 1) * t.scaling
        each = [odds[:, heads[j]] + t.total[:, j, None] for j in inside]
        y = torch.stack(each, dim=1).flatten(0, 1)
        keys.append(ridge(x, y, offset=False).matrix)
    made = torch.stack(keys).float()  # (g, l, e)
    weights = prefix_weights(t.queries.transpose(0, 1), made, t.total.mT, t.scaling)
    first = _first_values(part, heads, few, projections, across)
    values = _values(weights, t, goal, projections[1], first)
    return KeysValues(made.to(part.keys.dtype).contiguous(), values.to(part.values.dtype))


def _heads(odds: Tensor, t: Attention) -> list[int]:
    """For each target head the source head that it takes after: best fit first, none more often
    than need be."""
    h, most = odds.shape[1], -(-t.queries.shape[1] // odds.shape[1])
    scored = []
    for j in range(t.queries.shape[1]):
        y = (odds + t.total[:, j, None, None]).flatten(1)
        x = (t.queries[:, j] * t.scaling).double()
        back = max(1, int(len(x) * KEPT_BACK))
        found = ridge(x[:-back], y[:-back], offset=False, ridges=(1e-3,))
        got = found(x[-back:]).reshape(-1, *odds.shape[1:])
        true = y[-back:].double().reshape(-1, *odds.shape[1:])
        scored += [(r2(true[:, i], got[:, i]), j, i) for i in range(h)]
    chosen: dict[int, int] = {}
    for _, j, i in sorted(scored, reverse=True):
        if j not in chosen and list(chosen.values()).count(i) < most:
            chosen[j] = i
    return [chosen[j] for j in range(t.queries.shape[1])]


def _first_values(
    part: KeysValues, heads: list[int], few: int, projections: tuple[Tensor, Tensor], across: Tensor
) -> Tensor:
    """V₀, (g, l, e)."""
    width = part.values.shape[-1]
    o_s, o_t = projections
    source_heads = o_s.shape[1] // width
    spread = part.values.float().repeat_interleave(source_heads // len(part.values), dim=0)
    many = len(heads) // few
    e = o_t.shape[1] // len(heads)
    found = []
    for group in range(few):
        inside = range(group * many, (group + 1) * many)
        like = [heads[j] for j in inside]
        out = [across.float() @ o_s[:, i * width : (i + 1) * width] for i in like]
        goal = torch.cat([way @ spread[i].mT for way, i in zip(out, like, strict=True)])
        ways = torch.cat([o_t[:, j * e : (j + 1) * e] for j in inside])
        found.append((torch.linalg.pinv(ways) @ goal).mT)
    return torch.stack(found)


def _values(weights: Tensor, t: Attention, goal: Tensor, o_t: Tensor, first: Tensor) -> Tensor:
    """The values (g, l, e) whose part in the stream is nearest to ``goal`` (r, d).

    ``weights``: (h, r, l), the attention that goes to the prefix.
    """
    h, r, _ = weights.shape
    e = o_t.shape[1] // h
    ways = o_t.double().reshape(-1, h, e).permute(1, 0, 2)  # (h, d, e)
    w = weights.double()
    lost = torch.einsum("hr,rhe->rhe", w.sum(-1), t.own.double())
    wanted = goal.double() + lost.flatten(1) @ o_t.double().mT
    groups = h // len(first)
    start = first.double()

    span = torch.einsum("hde,kdf->hkef", ways, ways)

    def solver(rows: slice) -> Callable[[float], Tensor]:
        gram = torch.einsum("hrl,krm->hklm", w[:, rows], w[:, rows])
        felt = torch.einsum("hrl,rd->hld", w[:, rows], wanted[rows])
        cross = _grouped(torch.einsum("hld,hde->hle", felt, ways), groups)
        mean = [float(part.diagonal(0, 0, 1).diagonal(0, 0, 1).mean()) for part in (gram, span)]

        def solve(strength: float) -> Tensor:
            size = strength * mean[0] * mean[1]

            def apply(v: Tensor) -> Tensor:
                # In this order: all at once the product in between is large.
                seen = torch.einsum("hklm,kmf->hklf", gram, v.repeat_interleave(groups, dim=0))
                full = torch.einsum("hklf,hkef->hle", seen, span)
                return _grouped(full, groups) + size * v

            return _conjugate(apply, cross + size * start, start)

        return solve

    def result(v: Tensor, rows: slice) -> Tensor:
        each = torch.einsum("hrl,hle->hre", w[:, rows], v.repeat_interleave(groups, dim=0))
        return torch.einsum("hre,hde->rd", each, ways)

    back = max(1, int(r * KEPT_BACK))
    solve, test = solver(slice(0, r - back)), slice(r - back, r)
    tried = []
    for strength in _STRENGTHS:
        wrong = wanted[test] - result(solve(strength), test)
        tried.append((float(wrong.square().sum()), strength))
    return solver(slice(0, r))(min(tried)[1]).float()


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Heads (h, …) summed over the groups that share their keys and values, (g, …)."""
    return x.reshape(-1, groups, *x.shape[1:]).sum(1)


def _conjugate(apply: Callable[[Tensor], Tensor], wanted: Tensor, start: Tensor) -> Tensor:
    """Conjugate gradients for a symmetric positive system."""
    x = start.clone()
    rest = wanted - apply(x)
    step, size = rest.clone(), rest.square().sum()
    first = float(wanted.square().sum())
    for _ in range(_STEPS):
        if float(size) <= 1e-16 * first or float(size) == 0:
            break
        along = apply(step)
        length = size / (step * along).sum()
        x, rest = x + length * step, rest - length * along
        new = rest.square().sum()
        step, size = rest + (new / size) * step, new
    return x
