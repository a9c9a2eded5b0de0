"""Words, colours and bars."""

from __future__ import annotations

import math

import pytest
from report_results import SITES, site

from regraft.report.chart import bar_chart
from regraft.report.heatmap import COSINE, PHI, colour, heat_maps, similarity
from regraft.report.words import clean, file_name, number, percent, plain, quoted, seconds


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0000000000000004, "100%"),
        (0.99999, ">99.9%"),
        (0.5, "50%"),
        (0.0, "0%"),
        (1e-5, "<0.1%"),
        (1.3, "130%"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_percent(value: float | None, shown: str) -> None:
    assert percent(value) == shown


def test_words() -> None:
    assert number(-0.0001) == "0.000"
    assert number(None) == "–"
    assert plain(None) == "–"
    assert plain({"a": [1]}) == '{"a": [1]}'
    assert seconds(0.05) == "0.05 s"
    assert seconds(600) == "10.0 min"
    assert file_name("/a/b/c.safetensors") == "c.safetensors"
    assert file_name("C:\\a\\c.safetensors") == "c.safetensors"
    assert file_name("out/folder/") == "folder"
    assert clean("a\x1b[31m\u202eb\ud800") == "a�[31m�b�"
    assert quoted('a"b\n') == '"a\\"b\\n"'


def test_colour_is_bounded_and_readable() -> None:
    assert colour(-1) == colour(0) == ("#440154", "#fff")
    assert colour(2) == colour(1) == ("#fde725", "#000")
    assert colour(0.9, low=0.9) == colour(0)


def test_similarity_prefers_phi() -> None:
    assert similarity(site("x", phi_left=0.5, phi_right=0.4)) == (0.4, PHI)
    assert similarity(site("x")) == (0.97, COSINE)
    assert similarity(site("x", cosine=None)) is None


def test_heat_map_says_what_it_shows() -> None:
    maps = heat_maps([site("model.layers.0.mlp.up_proj", cosine=0.3)], {})
    assert (maps.measure, maps.mixed, maps.low) == (COSINE, False, 0.0)
    sites = [
        site("model.layers.0.mlp.up_proj", phi_left=0.95, phi_right=0.93),
        site("model.layers.10.mlp.up_proj"),
        site("model.layers.9.mlp.up_proj", cosine=None),
    ]
    refused = {"model.layers.9.self_attn.q_proj": "no", "some.tensor": "no"}
    maps = heat_maps(sites, refused)
    assert (maps.measure, maps.mixed, maps.low) == (PHI, True, 0.9)
    (only,) = maps.maps
    assert [c.label for c in only.columns] == ["0", "9", "10"]
    rows = {row.kind: row.cells for row in only.rows}
    assert [c.figure for c in rows["mlp.up_proj"]] == [".93", "?", ".97"]
    assert [c.other for c in rows["mlp.up_proj"]] == [False, False, True]
    assert [c.state for c in rows["self_attn.q_proj"]] == ["empty", "refused", "empty"]


def test_experts_share_a_cell() -> None:
    cosines = (0.2, 0.4)
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(2)]
    sites = [site(n, cosine=c) for n, c in zip(names, cosines, strict=True)]
    (only,) = heat_maps(sites, {}).maps
    (cell,) = only.rows[0].cells
    assert cell.figure == ".30"
    assert "mean of 2 sites" in cell.words


def test_no_sites_no_chart() -> None:
    assert bar_chart([]) is None
    assert heat_maps([], {"x": "y"}).maps == ()


def test_bars_stay_inside_for_any_number_and_gain() -> None:
    for count in (1, 40, 700):
        sites = [site(f"model.layers.{i}.mlp.up_proj", kept=0.01 * i) for i in range(count)]
        chart = bar_chart(sites)
        assert chart is not None
        assert len(chart.bars) == count
        for bar in chart.bars:
            assert chart.left <= bar.x <= bar.x + bar.width <= chart.width
            assert bar.kept[0] >= 0
            assert bar.copy_y >= 0
        assert bar_chart(sites) == chart


def test_bars_survive_odd_figures() -> None:
    odd = [site("a", kept=math.nan, share=0.0), site("b", kept=-1.0, share=0.0)]
    chart = bar_chart(odd)
    assert chart is not None
    assert [b.kept[1] for b in chart.bars] == [0.0, 0.0]


def test_uniform_bars_are_said_in_words() -> None:
    chart = bar_chart([site(n, kept=1.0) for n in SITES])
    assert chart is not None
    assert "all of its energy" in chart.uniform
