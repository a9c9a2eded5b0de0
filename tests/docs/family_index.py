"""What docs/methods/families/README.md says in its table: a row for each family, none left out."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.adapters.families import families
from regraft.methods.inserts import insert_methods
from regraft.training.settings import FAMILIES as TRAINED
from tests.docs.pages import ROOT, text

PAGES = ROOT / "docs" / "methods" / "families"
#: Of the layer that the last column counts for: outputs, inputs, rank or virtual tokens.
OUT, IN, RANK = 64, 48, 4
#: Size of a block, a width, and a number of frequencies, for families that have these.
BLOCK, WIDTH, FREQUENCIES = 8, 4, 100
#: Layers times key heads times their width, for a prefix: one layer as wide as the inputs.
CACHE = IN

_FULL = "99 % of the energy"


@dataclass(frozen=True)
class Row:
    """What the table says of one family, beside what the program knows.

    Attributes
    ----------
    page : str
        File, and anchor if the page holds several families.
    stored : str
        Numbers stored for a weight (m × n) at rank r.
    count : int
        The same for the layer above, alpha not counted.
    arrives : str
        The form it has on a target, written as an ordinary file.
    """

    page: str
    stored: str
    count: int
    arrives: str


_LORA = RANK * (OUT + IN)

#: Families that have a ΔW.
ROWS: dict[str, Row] = {
    "adalora": Row("others.md#adalora", "r (m + n + 1)", _LORA + RANK, "LoRA of rank r"),
    "boft": Row("oft.md", "stages · n b + m", IN * BLOCK + OUT, _FULL),
    "c3a": Row("others.md#c3a", "m n / b", OUT * IN // BLOCK, _FULL),
    "deft": Row("others.md#deft", "r (m + n)", _LORA, "LoRA of rank r"),
    "delora": Row("others.md#delora", "r (m + n) + n + 1", _LORA + IN + 1, "LoRA of rank r"),
    "dora": Row("dora.md", "r (m + n) + m", _LORA + OUT, _FULL),
    "foura": Row("foura.md", "r (m + n + 1), frozen", _LORA + RANK, "LoRA of rank 2r; DCT: r"),
    "fourierft": Row("others.md#fourierft", "frequencies", FREQUENCIES, _FULL),
    "full": Row("full.md", "m n, m of the bias", OUT * IN + OUT, _FULL),
    "glora": Row("others.md#glora", "r (m + 3n)", RANK * (OUT + 3 * IN), "LoRA of rank 2r"),
    "gralora": Row("others.md#gralora", "r (m + n)", _LORA, "LoRA of rank k r"),
    "hira": Row("others.md#hira", "r (m + n)", _LORA, _FULL),
    "hra": Row("others.md#hra", "r n", RANK * IN, "LoRA of rank r"),
    "ia3": Row("others.md#ia3", "m or n", OUT, _FULL),
    "loha": Row("loha.md", "2 r (m + n)", 2 * _LORA, "LoRA of rank r²"),
    "lokr": Row("lokr.md", "a b + c d", 8 * 6 + 8 * 8, "LoRA of rank(W1) · rank(W2)"),
    "lora": Row("lora.md", "r (m + n)", _LORA, "itself"),
    "lora-x": Row("lora-x.md", "r (m + n + 1)", _LORA + RANK, "LoRA of rank r, or itself"),
    "miss": Row("others.md#miss", "r m", RANK * OUT, "LoRA of rank r"),
    "mutated": Row("pissa.md", "r (m + n)", _LORA, "LoRA of rank 2r, if the start is known"),
    "oft": Row("oft.md", "n (b − 1) / 2", IN * (BLOCK - 1) // 2, _FULL),
    "olora": Row("pissa.md", "r (m + n)", _LORA, "LoRA of rank 2r"),
    "pissa": Row("pissa.md", "r (m + n)", _LORA, "LoRA of rank 2r"),
    "qa-lora": Row("qa-lora.md", "r (m + n / L)", RANK * (OUT + IN // BLOCK), "LoRA of rank r"),
    "road": Row("others.md#road", "m", OUT, _FULL),
    "shira": Row("others.md#shira", "r (m + n), and two places each", 3 * _LORA, _FULL),
    "svdiff": Row("svdiff.md", "min(m, n)", min(OUT, IN), _FULL),
    "t-lora": Row("others.md#t-lora", "r (m + n + 1)", _LORA + RANK, "LoRA of rank 2r"),
    "vera": Row("others.md#vera", "m + r, shared matrices", OUT + RANK, "LoRA of rank r"),
    "waveft": Row("others.md#waveft", "frequencies", FREQUENCIES, _FULL),
    "whole": Row("full.md", "m n", OUT * IN, _FULL),
}
#: Families without a ΔW: title, what they insert, and the row.
INSERTS: dict[str, tuple[str, str, Row]] = {
    "bottleneck": (
        "bottleneck adapters",
        "h ← h + s (W_up f(W_down h + b_down) + b_up)",
        Row("bottleneck.md", "w (n + m + 1) + m", WIDTH * (IN + OUT + 1) + OUT, "bottlenecks"),
    ),
    "prefix": (
        "prefix tuning",
        "K ← [P_K; K], V ← [P_V; V]",
        Row("prefix.md", "2 l L h e", 2 * RANK * CACHE, "a prefix"),
    ),
    "prompt": (
        "prompt tuning",
        "E ← [P; E]",
        Row("prompt.md", "l d", RANK * IN, "a prompt"),
    ),
}
#: What merges only in one of its forms.
_MERGES = {"foura": "gate frozen"}


def page_of(name: str) -> str:
    """Where a family is described, from docs/methods/families."""
    return ROWS[name].page if name in ROWS else INSERTS[name][2].page


def _line(name: str, title: str, equation: str, row: Row, merges: str, by: str) -> str:
    equation = equation.replace("|", "\\|")
    trained = "yes" if name in TRAINED else ""
    cells = (f"[`{name}`]({row.page})", title, equation, row.stored, f"{row.count:,}", merges, by,
             row.arrives, trained)  # fmt: skip
    return f"| {' | '.join(cells)} |"


def render() -> str:
    """The table, in Markdown: what has a ΔW by name, then what has none."""
    inserted = ", ".join(f"[{m.name}](../{m.name}.md)" for m in reversed(insert_methods()))
    heads = ("family", "what", "change", "stored for m × n", f"{OUT} × {IN}", "merges",
             "carried by", "arrives as", "trained here")  # fmt: skip
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for family in families():
        merges, by = _MERGES.get(family.name, "exact"), "every method"
        out.append(_line(family.name, family.title, family.equation, ROWS[family.name], merges, by))
    for name, (title, equation, row) in INSERTS.items():
        out.append(_line(name, title, equation, row, "no", inserted))
    shown = {"README.md", *(page_of(name).partition("#")[0] for name in (*ROWS, *INSERTS))}
    more = [p for p in sorted(PAGES.glob("*.md")) if p.name not in shown]
    if more:
        links = (f"[{text(p).partition(chr(10))[0].removeprefix('# ')}]({p.name})" for p in more)
        out += ["", f"Ways of training one of these: {', '.join(links)}."]
    return "\n".join(out)
