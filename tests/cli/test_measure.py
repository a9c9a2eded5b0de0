"""``regraft measure`` as a user meets it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from regraft.demo import pair
from tests.cli.test_cli import cli  # noqa: F401  (a fixture)
from tests.retention.test_drawn import fast  # noqa: F401  (a fixture)
from tests.retention.test_measure import flipped
from tests.retention.test_scorers import dinov2_folder  # noqa: F401  (a fixture)

KEYS = {
    *("verdict", "why", "best", "figure", "metric", "unit", "items", "ways", "random", "losses"),
    *("refused", "answers", "predicted", "adapter", "source", "target", "retrained", "data"),
    "pictures",
    *("parameters", "notes", "versions", "report", "seconds"),
}
FEW = ("--limit", "2", "--timesteps", "1", "--strengths", "1")


def as_it_is(*more, adapter=pair.ADAPTER, data="demo"):
    return ("measure", adapter, "--to", pair.TARGET, "--data", data, *FEW, *more)


def test_json_is_alone_on_stdout(cli, tmp_path):  # noqa: F811
    page = tmp_path / "page.html"
    code, out, _ = cli(
        *as_it_is("--retrained", pair.RETRAINED, "--from", pair.SOURCE, "--method", "copy"),
        *("--json", "--report", page),
    )
    found = json.loads(out)
    assert code == 0
    assert set(found) == KEYS
    assert found["figure"] == "R"
    assert [way["name"] for way in found["ways"]] == ["copy"]
    assert found["report"] == str(page)
    assert "R of every way" in page.read_text()


def test_the_table_has_a_row_per_way_and_reference(cli):  # noqa: F811
    code, out, _ = cli(*as_it_is("--strengths", "0.5,1"))
    assert code == 0
    assert "Verdict: carry." in out
    for words in ("as it is", "random", "target", "loss removed", "×0.5", "R needs --retrained"):
        assert words in " ".join(out.split())


def test_names_stay_whole_in_a_narrow_terminal(cli):  # noqa: F811
    _, out, _ = cli(*as_it_is("--from", pair.SOURCE, "--strengths", "0.25,0.5,0.75,1,1.25,1.5,2"))
    lines = out.splitlines()
    assert any(line.startswith("source with adapter ") for line in lines)
    curves = lines[lines.index(next(x for x in lines if "other strengths" in x)) + 1 :]
    assert curves[0].split() == ["way", "×0.25", "×0.5", "×0.75", "×1", "×1.25", "×1.5", "×2"]
    assert len(curves[1].split()) == 8


def test_drawn_pictures_have_a_table_and_reasons_for_what_did_not_score(
    cli,  # noqa: F811
    dinov2_folder,  # noqa: F811
    fast,  # noqa: F811
):
    code, out, err = cli(*as_it_is("--draw", "2", "--captions", "2", "--dinov2", dinov2_folder))
    assert code == 0
    out, err = " ".join(out.split()), " ".join(err.split())
    assert "2 captions × 2 seeds" in out
    assert "style similarity (DINOv2) diversity (DINOv2)" in out
    assert "CLIP score, style similarity (CLIP), HPSv2: no weights were named" in err


def test_quiet_says_nothing(cli):  # noqa: F811
    code, out, _ = cli(*as_it_is("--quiet"))
    assert (code, out) == (0, "")


def test_dont_exits_1_and_still_prints(cli, tmp_path):  # noqa: F811
    harm = flipped(tmp_path / "harm.safetensors")
    code, out, _ = cli(*as_it_is("--json", adapter=harm))
    assert code == 1
    assert json.loads(out)["verdict"] == "don't"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--data", "nowhere"), "No such file or folder of data"),
        (("--to", "nowhere"), "No such file or folder"),
        (("--strengths", "much"), "not a list of strengths"),
        (("--strengths", "-1"), "not all positive"),
        (("--method", "copy"), "--from"),
        (("--limit", "0"), "not a positive number"),
        (("--draw", "-1"), "not a positive number"),
        (("--clip", "clip"), "no pictures to score"),
    ],
)
def test_what_is_wrong_exits_2_and_says_what(cli, more, says, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*as_it_is(*more))
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())


def test_a_report_in_the_way_is_found_before_anything_is_measured(cli, tmp_path):  # noqa: F811
    page = tmp_path / "page.html"
    page.write_text("mine")
    code, _, err = cli(*as_it_is("--report", page))
    assert code == 2
    assert "already exists" in err
    assert page.read_text() == "mine"
