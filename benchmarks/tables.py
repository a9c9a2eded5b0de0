"""The results as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

Answer = dict[str, Any]


def show(found: Answer, console: Console) -> None:
    """Print the results of :mod:`benchmarks.transfer_sdxl`."""
    made = found["inputs"]
    console.print(
        f"\n{made['parameters'] / 1e9:.2f} B parameters, {made['base_bytes'] / 1e9:.2f} GB "
        f"per base; adapter of rank {found['scale']['rank']} on {made['sites']} sites, "
        f"{made['adapter_bytes'] / 1e6:.0f} MB; weights of those sites "
        f"{made['site_bytes'] / 1e9:.2f} GB, their subspaces of dimension "
        f"{found['scale']['dimension']} {made['subspace_bytes'] / 1e9:.2f} GB per base; "
        f"{found['threads']} threads.\n",
        highlight=False,
    )
    console.print(_runs(found))
    console.print(_shapes(found["svd"]))
    console.print(_totals(found), highlight=False)
    console.print(_targets(found["targets"]))
    if found["scale"]["name"] != "full":
        console.print("The targets are meant for --scale full; this run only shows that all works.")


def _runs(found: Answer) -> Table:
    table = Table(
        title="Transfers, each in a process of its own (warm: median)", title_justify="left"
    )
    table.add_column("run")
    for name in ("seconds", "× floor", "× floor,\n3 hashes", "decom-\nposed", "peak\nMB", "sites"):
        table.add_column(name, justify="right")
    plain, hashed = found["warm_to_floor"], found["warm_to_floor_with_three_hashes"]
    for name, run in found["runs"].items():
        table.add_row(
            name,
            f"{run['seconds']:.2f}",
            f"{plain[name]:.2f}" if name in plain else "",
            f"{hashed[name]:.2f}" if name in hashed else "",
            str(run.get("decompositions", "")),
            f"{run['peak_mb']:.0f}",
            str(run.get("sites_carried", "")),
        )
    return table


def _shapes(svd: Answer) -> Table:
    table = Table(
        title="torch.linalg.svd (thin; full as called by default) against decompose",
        title_justify="left",
    )
    table.add_column("shape", no_wrap=True)
    table.add_column("class", no_wrap=True)
    for name in ("sites", "thin s", "full s", "ours s", "× thin", "× full", "cos²"):
        table.add_column(name, justify="right")
    for row in svd["shapes"]:
        same = min(row["same_subspace_left"], row["same_subspace_right"])
        table.add_row(
            "×".join(map(str, row["shape"])),
            row["class"],
            str(row["sites"]),
            f"{row['seconds_svd']:.3f}",
            f"{row['seconds_svd_default']:.3f}",
            f"{row['seconds_decompose']:.3f}",
            f"{row['ratio']:.1f}",
            f"{row['ratio_default']:.1f}",
            f"{same:.7f}",
        )
    return table


def _totals(found: Answer) -> str:
    svd, first = found["svd"], found["runs"]["lora-x, first"]
    full, ours = svd["extrapolated_seconds_svd"], svd["extrapolated_seconds_decompose"]
    equal = found["same_bytes_every_time"]
    same = ", ".join(f"{name} {'yes' if yes else 'NO'}" for name, yes in equal.items())
    return (
        f"All {found['inputs']['sites']} weights by thin SVD: {full:.0f} s, "
        f"by decompose: {ours:.0f} s; ratio {full / ours:.1f} "
        f"(both extrapolated: {svd['extrapolated']}).\n"
        f"Measured, not extrapolated: the first lora-x run did {first['decompositions']} "
        f"decompositions and took {first['seconds']:.1f} s in all.\n"
        f"Same bytes every time: {same}. Decompositions in warm runs: "
        f"{found['warm_decompositions']}.\n"
    )


def _targets(targets: list[Answer]) -> Table:
    table = Table(title="Targets", title_justify="left")
    for name in ("target", "asked", "measured", ""):
        table.add_column(name)
    for row in targets:
        word = "[green]met[/]" if row["met"] else "[red]not met[/]"
        table.add_row(row["name"], row["asked"], row["measured"], word)
    return table
