"""The measurement's page: safe, self-contained, the same every time, whole for every figure."""

from __future__ import annotations

import copy
import re
from itertools import pairwise

import pytest
from test_report_page import EVIL, Reader

from regraft.errors import OutputExists
from regraft.report import render_measured, write_measured
from regraft.report.curves import bar_plot, line_plot


def a_way(name, figure, values=(0.2, 0.5), error=0.03):
    return {
        "name": name,
        "loss": 1 - figure / 2,
        "gain": figure / 2,
        "gain_error": error,
        "figure": figure,
        "figure_error": error,
        "retention": None,
        "curve": {
            "strengths": [0.5, 1.0],
            "values": list(values),
            "best": 1.0,
            "right_at_one": True,
        },
        "energy_kept": 0.4,
        "sites": 12,
        "refused": {"unet.x": "shapes differ"},
        "answers": None,
    }


@pytest.fixture
def found():
    return {
        "verdict": "copy",
        "why": "Plain copying is the best of 2 ways: R = 0.90 ± 0.03.",
        "best": "copy",
        "figure": "R",
        "metric": "denoising loss",
        "unit": "mean squared error",
        "items": 50,
        "ways": [a_way("copy", 0.9), a_way("lora-x", -0.2, (-0.1, -0.2))],
        "random": {"loss": 1.1, "figures": (-0.02, -0.01, 0.0), "mean": -0.01},
        "losses": {"target": 1.0, "retrained": 0.5},
        "refused": {"prolora": "shapes differ"},
        "answers": {},
        "predicted": {"verdict": "copy", "method": "copy", "why": "Close."},
        "adapter": {"ref": "/home/me/style.safetensors", "name": "style", "rank": 8},
        "source": {"ref": "org/base-a", "name": "org/base-a", "revision": "abc"},
        "target": {"ref": "/home/me/base b", "name": "base b", "revision": None},
        "retrained": {"ref": "again.safetensors", "name": "again"},
        "data": {"ref": "/home/me/held-out", "kind": "pictures"},
        "parameters": {
            "methods": ["lora-x"],
            "strengths": [0.5, 1.0],
            "limit": 50,
            "timesteps": 8,
            "seed": 0,
        },
        "notes": ["One note."],
        "versions": {"regraft": "0.1.0"},
        "report": None,
        "seconds": 3.0,
    }


def numbers_in(page):
    return [float(n) for n in re.findall(r' (?:x|y|width|height|x1|x2|cx|cy)="([^"]*)"', page)]


def test_the_page_shows_every_way_and_every_reference(found):
    page = render_measured(found)
    text = Reader(page).text
    words = ("copy", "lora-x", "0.90", "−0.20", "retrained", "random", "One note.", "50 items")
    assert all(word in text for word in words)
    assert "shapes differ" in text
    assert "built-in" not in text
    assert all(abs(n) < 1e4 for n in numbers_in(page))


def test_nothing_is_loaded_and_evil_text_stays_text(found):
    evil = copy.deepcopy(found)
    evil["why"] = evil["adapter"]["name"] = evil["notes"][0] = EVIL
    evil["ways"][0]["name"] = evil["best"] = evil["data"]["ref"] = EVIL
    evil["refused"] = {EVIL: EVIL}
    reader = Reader(render_measured(evil))
    assert reader.loads == []
    assert reader.handlers == []
    assert "script" not in reader.tags
    assert "\x1b" not in reader.text


def test_the_page_does_not_tell_where_it_was_made(found):
    page = render_measured(found)
    assert "/home/me" not in page
    assert "org/base-a" in page


def test_the_command_on_the_page_is_one_that_parses(found):
    import shlex

    from typer.main import get_command

    from regraft.cli.main import app
    from regraft.report.measured import command

    words = shlex.split(command(found).replace("\\\n", " "))[2:]
    parsed = get_command(app).commands["measure"].make_context("measure", words)
    assert parsed.params["adapter"] == "style.safetensors"
    assert parsed.params["target"] == "base b"
    assert parsed.params["source"] == "org/base-a"
    assert list(parsed.params["methods"]) == ["lora-x"]
    assert parsed.params["strengths"] == "0.5,1"
    assert (parsed.params["limit"], parsed.params["timesteps"]) == (50, 8)


@pytest.mark.parametrize("figure", ["R", "relative gain", "loss removed"])
def test_it_is_whole_for_every_figure_and_verdict(found, figure):
    found |= {"figure": figure, "source": None, "retrained": None, "predicted": None}
    found["parameters"]["methods"] = None
    for word in ("carry", "copy", "don't"):
        found["verdict"] = word
        reader = Reader(render_measured(found))
        assert ("R = 1 is as good" in reader.text) == (figure == "R")
        assert len(reader.ids) == len(set(reader.ids))


def test_answers_and_missing_errors_have_a_place(found):
    for row in found["ways"]:
        row |= {"gain_error": None, "figure_error": None, "energy_kept": None}
        row["answers"] = {"score": 0.75, "negative_flips": 0.125, "retention": None}
    found["answers"] = {"target": 0.5}
    text = Reader(render_measured(found)).text
    assert "75%" in text
    assert "12.5%" in text


def test_without_a_curve_there_is_no_chart_of_it(found):
    for row in found["ways"]:
        row["curve"] = {"strengths": [1.0], "values": [0.5], "best": 1.0, "right_at_one": True}
    assert line_plot(found) is None
    assert 'id="strength"' not in render_measured(found)


def test_bars_are_as_long_as_their_figures(found):
    plot = bar_plot(found)
    bars = {bar.label: bar for bar in plot.bars}
    unit = bars["retrained"].width
    assert bars["copy"].width == pytest.approx(0.9 * unit, rel=0.01)
    assert bars["lora-x"].width == pytest.approx(0.2 * unit, rel=0.05)
    assert bars["copy"].x == pytest.approx(plot.zero, abs=0.1)
    assert bars["lora-x"].x + bars["lora-x"].width == pytest.approx(plot.zero, abs=0.1)
    low, high = bars["copy"].whisker
    assert high - low == pytest.approx(0.06 * unit, rel=0.02)


def test_names_at_the_ends_of_curves_do_not_overlap(found):
    found["ways"] = [a_way(f"way {i}", 0.5, (0.1, 0.5)) for i in range(8)]
    found["best"] = "way 0"
    places = sorted(line.label_y for line in line_plot(found).lines)
    assert min(b - a for a, b in pairwise(places)) >= 12


def test_it_is_written_whole_and_not_over_another(found, tmp_path):
    path = tmp_path / "page.html"
    write_measured(found, path)
    assert path.read_text() == render_measured(found)
    with pytest.raises(OutputExists):
        write_measured(found, path)
    write_measured(found, path, overwrite=True)
