"""Cut-Mix-Unmix: pictures of two subjects, and attention kept apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import BadOption
from regraft.tuners.svdiff.cut_mix import CutMix, unmix_loss

PROMPTS = ("a V1 dog", "a V2 cat")


def pictures(height=4, width=8):
    """Two pictures whose columns are numbered, the second's by hundreds."""
    columns = torch.arange(width, dtype=torch.float32).expand(3, height, width)
    return columns, 100 + 100 * columns


def test_six_in_ten_are_mixed_and_either_may_be_left():
    generator = torch.Generator().manual_seed(0)
    mixed = [CutMix()(*pictures(), PROMPTS, generator) for _ in range(1000)]
    made = [m for m in mixed if m is not None]
    assert 550 < len(made) < 650
    assert 0.4 < sum(m.left == PROMPTS[0] for m in made) / len(made) < 0.6


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 100))
def test_halves_are_the_middles_of_the_right_pictures(width, height, seed):
    first, second = pictures(height, width)
    generator = torch.Generator().manual_seed(seed)
    mixed = CutMix(probability=1.0)(first, second, PROMPTS, generator)
    assert mixed.image.shape == first.shape
    assert mixed.prompt == f"{mixed.left} on the left and {mixed.right} on the right"
    assert {mixed.left, mixed.right} == set(PROMPTS)
    of_first = mixed.image < 100
    on_left = mixed.mask.bool().expand_as(of_first)
    assert torch.equal(of_first, on_left if mixed.left == PROMPTS[0] else ~on_left)
    assert int(mixed.mask.sum()) == height * (width // 2)
    for half in (mixed.image[0, 0][of_first[0, 0]], mixed.image[0, 0][~of_first[0, 0]]):
        step = 1 if half[0] < 100 else 100
        assert torch.equal(half.diff(), torch.full((half.numel() - 1,), float(step)))
    middle = (width - int(of_first[0, 0].sum())) // 2
    assert mixed.image[0, 0][of_first[0, 0]][0] == middle


def test_a_generator_is_drawn_from_alike_whatever_comes_of_it():
    states = set()
    for probability in (0.0, 1.0):
        generator = torch.Generator().manual_seed(3)
        CutMix(probability)(*pictures(), PROMPTS, generator)
        states.add(bytes(generator.get_state().numpy()))
    assert len(states) == 1


def test_attention_in_its_own_half_costs_nothing():
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    attention = torch.zeros(2, 4, 4, 5)
    attention[:, :, :2, 1] = 0.9  # the left subject's word on the left
    attention[:, :, 2:, 3] = 0.7
    attention[:, :, :, 0] = 0.5  # no subject's
    assert unmix_loss(attention, mask, [1], [3]) == 0
    swapped = unmix_loss(attention, mask, [3], [1])
    assert torch.isclose(swapped, torch.tensor((0.9**2 + 0.7**2) / 4))


def test_the_loss_pulls_attention_back():
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    attention = torch.full((1, 2, 2, 3), 0.3, dtype=torch.float64, requires_grad=True)
    loss = unmix_loss(attention, mask, [0], [1])
    (grad,) = torch.autograd.grad(loss, attention)
    assert (grad[0, :, 1, 0] > 0).all()
    assert (grad[0, :, 0, 0] == 0).all()
    assert (grad[0, :, 0, 1] > 0).all()
    assert (grad[..., 2] == 0).all()
    assert torch.autograd.gradcheck(lambda a: unmix_loss(a, mask, [0], [1]), (attention,))


def test_what_cannot_be_is_said():
    generator = torch.Generator()
    first, second = pictures()
    for wrong in (
        lambda: CutMix(probability=1.5),
        lambda: CutMix(template="{left} and more"),
        lambda: CutMix()(first, second[:, :, :4], PROMPTS, generator),
        lambda: CutMix()(first, second, PROMPTS[:1], generator),
        lambda: unmix_loss(torch.zeros(1, 2, 2, 3), torch.ones(2, 2), [3], [1]),
        lambda: unmix_loss(torch.zeros(1, 2, 2, 3), torch.ones(2, 2), [], [1]),
    ):
        with pytest.raises(BadOption):
            wrong()
