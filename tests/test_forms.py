"""Which form a layer takes: in place where its base weight is plain and its own, else sampled products beside it."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import Net, adapt, bits, config, error, fill, layers_of, linear, random_weight, randomise, two
from peft import get_peft_model
from torch import Tensor, nn

from multisbora.errors import UsageError
from multisbora.tuner import SboraConfig, SboraLayer

pytestmark = pytest.mark.usefixtures("unsaid")

INDICES = [1, 2, 5]
BASE = bits(random_weight())


def trained(base: nn.Module | None = None) -> SboraLayer:
    """An fp32 layer with one task whose values are not zero, which has run once and so holds it in its weight."""
    layer = adapt(linear(random_weight()) if base is None else base, default=config("fa", INDICES))
    fill(layer, "default", torch.randn(layer.sbora_values["default"].shape))
    layer(torch.randn(2, 9))
    return layer


def stored(layer: SboraLayer) -> Tensor:
    """Bits of the weight as it is at this moment."""
    return bits(layer.base_layer.weight)


def trained_itself(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    layer.base_layer.weight.requires_grad_()
    return "trained itself"


def offloaded(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    layer.base_layer._hf_hook = SimpleNamespace(offload=True)
    return "offloaded"


def partitioned(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    layer.base_layer.weight.ds_id = 7
    return "sharded"


def unsharded_by_fsdp(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    return "sharded"


def parametrised(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    return "no plain tensor"


def hooked(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    layer.base_layer.register_forward_hook(lambda module, args, output: None)
    return "more than a product"


def hooked_in_backward(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    layer.base_layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return "more than a product"


def patched(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    original = layer.base_layer.forward
    layer.base_layer.forward = lambda x: original(x)
    return "more than a product"


def of_all_processes(layer: SboraLayer, monkeypatch: pytest.MonkeyPatch) -> str:
    layer.share_memory()
    return "other processes"


OBSTACLES = (
    trained_itself,
    offloaded,
    partitioned,
    unsharded_by_fsdp,
    parametrised,
    hooked,
    hooked_in_backward,
    patched,
    of_all_processes,
)


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda f: f.__name__)
def test_the_gather_form_takes_over_and_says_so_once(
    obstacle: Callable[[SboraLayer, pytest.MonkeyPatch], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = trained()
    layer.restore()
    x = torch.randn(3, 9)
    wanted = layer(x).detach()
    layer.restore()
    reason = obstacle(layer, monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert error(layer(x), wanted) < 1e-6
            assert torch.equal(stored(layer), BASE)
    assert len(caplog.records) == 1 and reason in caplog.text and "gather form" in caplog.text


def test_a_weight_that_other_modules_use_stays_theirs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(self.embed(x))
            return output

    model = get_peft_model(Tied(), SboraConfig(r=2, alpha=2, target_modules=["head"]))
    before = bits(model.base_model.model.embed.weight)
    randomise(model)
    model(torch.tensor([1, 2]))
    assert torch.equal(bits(model.base_model.model.embed.weight), before)


def test_a_layer_that_squashes_its_output_keeps_its_gradients() -> None:
    class Squashed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    base = Squashed(9, 6).requires_grad_(False)
    base.weight.data = random_weight()
    layer = trained(base)
    assert torch.equal(stored(layer), BASE)
    x = torch.randn(3, 9, requires_grad=True)
    dense = random_weight().index_add(1, torch.tensor(INDICES), layer.sbora_values["default"].detach())
    # The update comes on top of what the layer gives, as with LoRA.
    wanted = torch.tanh(x @ random_weight().t() + base.bias) + x @ (dense - random_weight()).t()
    assert error(layer(x), wanted) < 1e-5


def test_modules_that_share_memory_without_sharing_a_parameter() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = nn.Parameter(self.one.weight.data)
            self.three = nn.Linear(4, 4, bias=False)
            self.again = nn.ModuleList([self.three])

    views = Views()
    before = bits(views.two.weight), bits(views.three.weight)
    model = get_peft_model(views, SboraConfig(r=2, alpha=2, target_modules=["one", "three"]))
    randomise(model)
    for layer in layers_of(model).values():
        layer(torch.randn(2, 4))
    assert torch.equal(bits(views.two.weight), before[0]) and torch.equal(bits(views.again[0].weight), before[1])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated:DeprecationWarning")
def test_a_traced_model_keeps_its_task() -> None:
    layer = trained()
    x = torch.randn(3, 9)
    wanted = layer(x).detach()
    layer.eval()
    with pytest.raises(UsageError, match="set_form"):
        torch.jit.trace(layer, (x,))
    layer.form = "gather"
    layer.restore()
    traced = torch.jit.trace(layer, (x,))
    assert error(traced(x), wanted) < 1e-6


def test_whole_weights_of_a_sharded_model_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapt(linear(random_weight()), default=config("fa", INDICES))
    whole = weakref.ref(layer.base_layer.weight)
    unsharded_by_fsdp(layer, monkeypatch)
    layer(torch.randn(2, 9))
    gc.collect()
    assert whole() is None


def test_dropout_gathers_in_training_alone() -> None:
    layer = adapt(linear(random_weight()), default=config("fa", INDICES, dropout=0.5))
    fill(layer, "default", torch.ones(6, 3))
    x = torch.randn(3, 9)
    layer.train()(x)
    assert torch.equal(stored(layer), BASE)
    layer.eval()(x)
    assert not torch.equal(stored(layer), BASE)


def test_a_replica_leaves_the_original_alone() -> None:
    """What nn.DataParallel does to a layer, by hand: a shallow copy, with a copy of the weight."""
    layer = trained()
    x = torch.randn(3, 9)
    wanted, live = layer(x).detach(), stored(layer)
    replica = layer._replicate_for_data_parallel()
    replica.base_layer = copy.deepcopy(layer.base_layer)
    assert torch.equal(stored(replica), live)
    for _ in range(2):
        assert error(replica(x), wanted) < 1e-6
    assert torch.equal(stored(replica), BASE)
    assert torch.equal(stored(layer), live)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(net: Net, mode: Callable[[], Any]) -> None:
    model = two(net)
    model.base_model.set_adapter(["math", "code"])
    x = torch.randn(3, 8)
    model.base_model.set_form("gather")
    wanted = model(x).detach()
    model.base_model.set_form("in_place")
    with mode():
        assert error(model(x), wanted) < 1e-6
    loss = model(x).sum()
    assert error(model(x), wanted) < 1e-6
    loss.backward()
    assert layers_of(model)["layers.0.up"].sbora_values["math"].grad is not None


def test_form_must_be_known(net: Net) -> None:
    with pytest.raises(UsageError, match="in_place or gather"):
        two(net).base_model.set_form("fast")


def test_an_adapter_for_each_row_is_refused(net: Net) -> None:
    with pytest.raises(UsageError, match="use set_adapter"):
        two(net)(torch.randn(2, 8), adapter_names=["math", "code"])


def test_layers_that_are_never_called_are_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

    with pytest.raises(UsageError, match=r"attention\.out_proj is never called"):
        get_peft_model(Attention(), SboraConfig(r=2, target_modules=["out_proj"]))
    net = nn.Sequential(nn.ModuleDict({"out_proj": nn.Linear(4, 4)}))
    net.config = SimpleNamespace(model_type="mamba")
    with pytest.raises(UsageError, match="out_proj of mamba"):
        get_peft_model(net, SboraConfig(r=2, target_modules=["out_proj"]))
