"""The benchmark of switching at toy size: it does what it says it times, and counts what is left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ("figures", "methods", "bench_train", "bench_switch")
TOY = ["--shapes", "llama-3-8b", "--layers", "1", "--rank", "4", "--rounds", "2", "--switches", "6", "--threads", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(SCRIPTS)  # they import each other
    module, methods = __import__("bench_switch"), __import__("methods")
    monkeypatch.setitem(methods.SHAPES, "llama-3-8b", methods.Shape(48, 64, 3, 1, 2, 64, False))
    yield module
    torch.set_num_threads(threads)
    for name in NAMES:
        sys.modules.pop(name, None)


def test_what_is_measured_and_left(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "switch.json"
    assert bench.main([*TOY, "--json", str(out)]) == 0
    (result,) = __import__("figures").read([out])
    assert result.name == "switch-llama-3-8b"
    assert [row[0] for row in result.rows] == bench.METHODS
    assert all(len(row) == len(result.columns) for row in result.rows)
    rows = {row[0]: dict(zip(result.columns, row, strict=True)) for row in result.rows}
    # q, k, v, up and down of a layer that is 48 wide, with 64 inside and one head of three for keys: out, in.
    shapes = [(48, 48), (16, 48), (16, 48), (64, 48), (48, 64)]
    assert rows["fa merged"]["cells"] == f"{2 * 4 * sum(out for out, _ in shapes):,}"
    assert rows["fb composed"]["cells"] == f"{2 * 4 * sum(inner for _, inner in shapes):,}"
    assert rows["lora merged"]["cells"] == f"{2 * sum(out * inner for out, inner in shapes):,}"
    left = {method: int(row["cells left after 6"].replace(",", "")) for method, row in rows.items()}
    assert left.pop("lora merged") > 0 and not any(left.values())
    assert len(result.budgets) == 4
    assert rows["lora merged"]["/ lora merged"] == "1.000 (1.000 to 1.000)"


@pytest.mark.parametrize("method", ["fa composed", "fa merged", "fb composed", "fb merged", "lora merged"])
def test_what_it_holds_is_in_the_weights(bench: Any, method: str) -> None:
    methods = __import__("methods")
    shape = methods.Shape(48, 64, 3, 1, 1, 64, False)
    case = methods.Case("float32", "cpu", 4, 0, 0, 0, False, shape)
    base = methods.load(case).eval()
    switch = bench.Switch(base, method, 4)
    name = "model.layers.0.mlp.up_proj"
    before = base.get_submodule(name).weight.detach().clone()

    def held() -> torch.Tensor:
        return switch.weight(name).detach() - before

    with switch.holding("one"):
        first = held()
        with switch.holding("two"):
            second = held()
        assert torch.allclose(held(), first, atol=1e-6)
        with switch.holding("one", 0.5):
            half = held()
        assert torch.allclose(held(), first, atol=1e-6)
    assert torch.allclose(held(), torch.zeros(64, 48), atol=1e-6)
    assert 1e-3 < first.std() * (first.numel() / first.count_nonzero()) ** 0.5 < 8e-3  # bench.SIZE, in its own cells
    assert torch.allclose(half, first / 2, atol=1e-6) and not torch.allclose(second, first, atol=1e-3)
    if method != "lora merged":
        assert not (first * second).any() and first.count_nonzero() == second.count_nonzero() == 4 * len(
            before if method.startswith("fa") else before.t()
        )


def test_options_that_cannot_be(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--methods", "fa merged"], "every ratio is against 'lora merged'"),
        (["--switches", "3"], "give an even number"),
    ):
        with pytest.raises(SystemExit):
            bench.main(options)
        assert message in capsys.readouterr().err
