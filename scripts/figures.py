"""What the training benchmarks found: as text, as JSON, and as the tables and bars of docs/performance.md.

    python scripts/figures.py RESULT.json ... [--page docs/performance.md] [--plot docs/performance.svg]

RESULT.json is what `--json` of bench_train.py, bench_tokens.py and bench_complexity.py wrote. A page holds a pair of
comments for each table, `<!-- figures NAME -->` and `<!-- end NAME -->`; what stands between them is replaced. Results
of a GPU have one place together, named gpu, which becomes a section with its heading; the others leave it as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GPU = "-gpu"  # how the names of results of a GPU end


@dataclass(frozen=True)
class Budget:
    """A limit, and what was found. `at_most` says which side of it is good."""

    what: str
    limit: float
    found: float
    at_most: bool = True

    @property
    def held(self) -> bool:
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.what} {sign} {self.limit:.2f}: {self.found:.3f}, {'held' if self.held else 'MISSED'}"


@dataclass(frozen=True)
class Result:
    """One table.

    Attributes:
        name: of the table, and of its place in the page; see `named`.
        title: of its bars, short.
        setting: one line, what was run with what.
        bars: {method: (ratio, lower, upper)}, for the plot; empty where there is nothing to draw.
    """

    name: str
    title: str
    setting: str
    columns: list[str]
    rows: list[list[str]]
    bars: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    budgets: list[Budget] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return all(budget.held for budget in self.budgets)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        budgets = "".join(f"\n- {budget}" for budget in self.budgets)
        return f"{self.setting}\n\n{table}\n" + (f"{budgets}\n" if budgets else "")

    def text(self) -> str:
        """The table in aligned columns, for a terminal."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.setting, *(line.rstrip() for line in shown), *(f"budget: {b}" for b in self.budgets)])


def named(name: str, device: str) -> str:
    """The name of a result that was measured on "cpu" or "cuda"."""
    return name + (GPU if device == "cuda" else "")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the results into this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")


def finish(results: Sequence[Result], options: argparse.Namespace) -> int:
    """Print and write the results of one script. The exit code: 1 if a budget was missed."""
    for result in results:
        print("\n" + (result.markdown() if options.markdown else result.text()))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.held for result in results) else 1


def read(paths: Sequence[Path]) -> list[Result]:
    """Results of several files. Of two with one name, the later file's counts.

    Raises:
        OSError, ValueError: a file is missing, or holds something else.
    """
    found: dict[str, Result] = {}
    for path in paths:
        try:
            for item in json.loads(path.read_text(encoding="utf-8")):
                item["budgets"] = [Budget(**budget) for budget in item["budgets"]]
                item["bars"] = {name: tuple(values) for name, values in item["bars"].items()}
                found[item["name"]] = Result(**item)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what a benchmark wrote with --json ({error}): run it again") from None
    return list(found.values())


def fill(page: str, results: Sequence[Result]) -> str:
    """A page with the tables of `results` in their places.

    Raises:
        ValueError: a result has no place.
    """
    tables = {result.name: result.markdown() for result in results if not result.name.endswith(GPU)}
    on_gpu = [f"### {result.title}\n\n{result.markdown()}" for result in results if result.name.endswith(GPU)]
    if on_gpu:
        tables["gpu"] = "\n".join(["\n## On a GPU\n", *on_gpu])
    for name, table in tables.items():
        begin, end = f"<!-- figures {name} -->", f"<!-- end {name} -->"
        found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", page, re.DOTALL)
        if found is None:
            raise ValueError(f"the page has no place for {name}: add {begin} and {end}")
        page = page[: found.start()] + f"{begin}\n{table}{end}" + page[found.end() :]
    return page


LOWEST = -1.0  # that a bar is drawn to


def plot(results: Sequence[Result], path: Path) -> None:
    """One panel of bars a result that has any, with quartiles as whiskers, into an SVG file.

    Raises:
        ValueError: none has any.
    """
    drawn = [result for result in results if result.bars]
    if not drawn:
        raise ValueError("none of these results has bars to draw: leave --plot out, or add those of bench_train.py")
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "multisbora", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    tallest = max(len(result.bars) for result in drawn)
    figure, axes = pyplot.subplots(len(drawn), 1, figsize=(7.5, len(drawn) * (0.7 + 0.22 * tallest)), squeeze=False)
    for axis, result in zip(axes[:, 0], drawn, strict=True):
        names = list(result.bars)
        middle = [result.bars[name][0] for name in names]
        spread: list[Any] = [
            [max(result.bars[name][0] - result.bars[name][1], 0) for name in names],
            [max(result.bars[name][2] - result.bars[name][0], 0) for name in names],
        ]
        colours = ["#1f6f8b" if name.startswith(("fa", "fb")) else "#b9b4a7" for name in names]
        axis.barh(names, middle, xerr=spread, color=colours, error_kw={"lw": 0.8, "capsize": 2})
        for row, value in enumerate(middle):
            axis.annotate(
                f" {value:.2f}",
                (0, row),
                va="center",
                color="white" if value > 0 and names[row].startswith(("fa", "fb")) else "black",
            )
        axis.axvline(1.0, color="black", lw=0.8, ls=":")
        axis.invert_yaxis()
        if min(middle) < LOWEST:  # or nothing could be told of the others
            axis.set_xlim(LOWEST, 1.05 * max(1.0, *(bar[2] for bar in result.bars.values())))
            axis.set_xlabel(f"bars are cut at {LOWEST:g}")
        axis.set_title(result.title, fontsize=9, loc="right")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--page", type=Path, help="put the tables into this Markdown file")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this SVG file (needs matplotlib)")
    options = parser.parse_args(arguments)
    try:
        results = read(options.results)
        page = fill(options.page.read_text(encoding="utf-8"), results) if options.page else None
        if options.plot:
            plot(results, options.plot)
        if page is not None:
            options.page.write_text(page, encoding="utf-8")
    except (OSError, ValueError, ImportError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    if not (options.page or options.plot):
        print("\n".join(result.markdown() for result in results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
