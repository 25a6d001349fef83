"""Projections of one input as one product, long ones as two: the same numbers, from the same memory, and no trace
afterwards."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deltakv
from deltakv.errors import UnsupportedUseError
from deltakv.integrations.hf import fused
from hf.harness import left_padded, tokens

SPARSE = deltakv.Delta(budget=64, recent=16, sinks=16, min_context=100)

PROMPTS = torch.stack([tokens(150, 1), tokens(150, 2)])

#: Products of a layer, as they are and fused: attention's four and the MLP's.
PRODUCTS = {"llama": (7, 4), "qwen2": (7, 4), "qwen3": (7, 4), "opt": (6, 4), "phi3": (4, 4)}


class Products(TorchDispatchMode):
    """Counts matrix products with a weight, and remembers their widths."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.widths.append(out.shape[-1])
        return out


def decode(model: Any, method: Any, steps: int = 3, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of a few steps from two prompts, and the products of the last."""
    seen = []
    with torch.no_grad(), deltakv.apply(model, method, **options) as handle:
        cache = handle.new_cache(200)
        model(PROMPTS, past_key_values=cache)
        for step in range(steps):
            with Products() as products:
                logits = model(torch.full((2, 1), 5 + step), past_key_values=cache).logits
            seen.append(logits)
    return torch.cat(seen, 1), products.widths


@pytest.mark.parametrize("kind", PRODUCTS)
def test_same_logits_from_fewer_products(tiny_model: Any, kind: str) -> None:
    model = tiny_model(kind)
    apart, together = PRODUCTS[kind]
    want, widths = decode(model, SPARSE, fuse=False)
    got, fused_widths = decode(model, SPARSE, fuse=True)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    layers = model.config.num_hidden_layers
    assert len(widths) == apart * layers + 1 and len(fused_widths) == together * layers + 1
    assert sum(widths) == sum(fused_widths)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_prompts_and_training_go_one_by_one(tiny_model: Any, kind: str) -> None:
    """Bit for bit as without: all results of a prompt at once would take more memory; a gradient has its parameters."""
    model, ids = tiny_model(kind), tokens(40, 3)[None]
    apart = PRODUCTS[kind][0] * model.config.num_hidden_layers + 1
    with torch.no_grad(), Products() as products:
        stock = model(ids, use_cache=False).logits
    with deltakv.apply(model, SPARSE, fuse=True):
        with torch.no_grad(), Products() as fused:
            assert torch.equal(model(ids, use_cache=False).logits, stock)
        model(ids[:, :1], use_cache=False).logits.sum().backward()
    assert len(fused.widths) == len(products.widths) == apart
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "proj" in name)


def test_memory_and_names_stay(tiny_model: Any) -> None:
    """No second copy while it lasts, and the model's own memory again afterwards."""
    model = tiny_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    with deltakv.apply(model, SPARSE, fuse=True):
        for layers in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
            assert len(storages) == 1
            assert layers[0].weight.untyped_storage().nbytes() == sum(layer.weight.nbytes for layer in layers)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    for layer in (attention.q_proj, attention.k_proj, mlp.up_proj):
        assert "forward" not in vars(layer)
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes


def test_a_removed_handle_keeps_no_weights(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers get their own back one joint weight after the other goes: no second model, not even in between."""
    model = tiny_model("qwen2")
    joint: list[Any] = []
    alive = []
    own = fused._own

    def watched(parameter: nn.Parameter) -> None:
        own(parameter)
        alive.append(sum(weight() is not None for weight in joint))

    monkeypatch.setattr(fused, "_own", watched)
    handle = deltakv.apply(model, SPARSE, fuse=True)
    joint += [weakref.ref(product._weight) for product in handle._forwards.fused]
    handle.remove()
    assert len(joint) == 2 * model.config.num_hidden_layers
    assert alive == sorted(alive, reverse=True) and alive[-1] == 0
    assert handle.stats is not None and not any(weight() is not None for weight in joint)


def test_new_values_in_place_count(tiny_model: Any) -> None:
    """`load_state_dict` and optimisers write into the weights; the product reads the same memory."""
    model, other = tiny_model("qwen2"), tiny_model("qwen2", seed=1)
    want, _ = decode(other, SPARSE)
    with torch.no_grad(), deltakv.apply(model, SPARSE, fuse=True) as handle:
        model.load_state_dict(other.state_dict())
        cache = handle.new_cache(200)
        model(PROMPTS, past_key_values=cache)
        got = model(torch.full((2, 1), 5), past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, :1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", ["cast", "assign"])
def test_a_model_with_other_weights_is_refused(tiny_model: Any, change: str) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad(), deltakv.apply(model, SPARSE, fuse=True):
        if change == "cast":
            model.double()
        else:
            model.load_state_dict(other.state_dict(), assign=True)
        with pytest.raises(UnsupportedUseError, match="remove the method first"):
            model(tokens(20, 1)[None])
    model(tokens(20, 1)[None])


def test_layers_that_are_not_plain_are_left_alone(tiny_model: Any) -> None:
    """A hook, another class, or an own forward: whoever put it there wants to see every call."""
    model = tiny_model("llama")
    calls = []

    class Own(nn.Linear):
        pass

    first, second, third, fourth = (layer.self_attn for layer in model.model.layers[:4])
    first.k_proj.register_forward_hook(lambda *_: calls.append("hook"))
    second.v_proj.__class__ = Own
    third.q_proj.forward = lambda x: nn.Linear.forward(third.q_proj, x)
    fourth.k_proj.weight = nn.Parameter(fourth.k_proj.weight.double())
    with deltakv.apply(model, SPARSE, fuse=True):
        for attention in (first, second, third, fourth):
            weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 3
        fourth.k_proj.float()
        _, widths = _one_step(model)
    apart, together = PRODUCTS["llama"]
    assert len(widths) == 4 * (apart - 1) + (model.config.num_hidden_layers - 4) * together + 1
    assert calls == ["hook"] * 2


def _one_step(model: Any) -> tuple[torch.Tensor, list[int]]:
    with torch.no_grad():
        cache = model(tokens(30, 1)[None]).past_key_values
        with Products() as products:
            logits = model(torch.tensor([[7]]), past_key_values=cache).logits
    return logits, products.widths


@pytest.mark.parametrize("bias", [False, True])
def test_long_products_in_halves(tiny_model: Any, bias: bool) -> None:
    """Four times as many inputs as outputs: at a step two products at once; a prompt as it was; nothing left behind."""
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = (nn.Linear(64, 256, bias=False) for _ in "ab")
    mlp.down_proj = nn.Linear(256, 64, bias=bias)
    want, widths = decode(model, SPARSE, fuse=False)
    got, fused_widths = decode(model, SPARSE, fuse=True)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    apart, together = (count * model.config.num_hidden_layers + 1 for count in PRODUCTS["llama"])
    assert len(widths) == apart and len(fused_widths) == together - 1  # no plain product in its place
    assert "forward" not in vars(mlp.down_proj)
    x = torch.randn(2, 5, 256)
    stock = mlp.down_proj(x)
    with deltakv.apply(model, SPARSE, fuse=True):
        assert torch.equal(mlp.down_proj(x), stock)
        with torch.no_grad():
            torch.testing.assert_close(mlp.down_proj(x[:, :1]), stock[:, :1])
            assert not torch.equal(mlp.down_proj(x[:, :1]), torch.zeros(2, 1, 64))


def test_odd_long_products_are_left_alone(tiny_model: Any) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp
    layer.down_proj = nn.Linear(264, 64)  # halves of 132 inputs
    with deltakv.apply(model, SPARSE, fuse=True):
        assert "forward" not in vars(layer.down_proj)


def test_another_input_gets_its_own_product(tiny_model: Any) -> None:
    """Who calls one projection alone, as recomputation does, gets that one, of what it was given."""
    model = tiny_model("qwen2")
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 3, 1, 64).unbind()
    with torch.no_grad():
        want = [layer(y) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        with deltakv.apply(model, SPARSE, fuse=True):
            attention.q_proj(x)
            assert torch.equal(attention.k_proj(y), want[1]) and torch.equal(attention.v_proj(y), want[2])
            torch.testing.assert_close(attention.q_proj(y), want[0])
            torch.testing.assert_close(attention.v_proj(y), want[2])


def test_one_graph(tiny_model: Any) -> None:
    """Compiled in one piece, with as many products in the code."""
    from torch._inductor.utils import run_and_get_code

    model = tiny_model("qwen2")
    with torch.no_grad(), deltakv.apply(model, SPARSE, fuse=True) as handle:
        cache = handle.new_cache(200, static=True)
        model(**left_padded([tokens(120, 1), tokens(60, 2)]), past_key_values=cache)

        def step(token: torch.Tensor) -> torch.Tensor:
            return model(token, past_key_values=cache).logits

        assert handle.announce(cache)
        torch.compiler.reset()
        _, code = run_and_get_code(torch.compile(step, fullgraph=True), torch.full((2, 1), 5))
    source = "\n".join(code)
    products = source.count("extern_kernels.mm(") + source.count("extern_kernels.addmm(")
    assert products == 4 * model.config.num_hidden_layers + 1


@pytest.mark.parametrize("how", ["replaced", "pointed elsewhere", "taken away"])
def test_another_bias_is_refused(tiny_model: Any, how: str) -> None:
    """Prompts would get the new one, and steps the old one."""
    model = tiny_model("qwen2")
    with deltakv.apply(model, SPARSE, fuse=True), pytest.raises(deltakv.UnsupportedUseError, match="biases"):
        layer = model.model.layers[1].self_attn.k_proj
        if how == "replaced":
            layer.bias = nn.Parameter(layer.bias.detach().clone())
        elif how == "pointed elsewhere":
            layer.bias.data = layer.bias.data.clone()
        else:
            layer.bias = None
        model(torch.ones((1, 4), dtype=torch.long))


def test_tied_projections_are_left_alone(tiny_model: Any) -> None:
    model = tiny_model("llama")
    one, other = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    one.v_proj.weight = one.k_proj.weight
    other.q_proj.weight = model.model.layers[2].self_attn.q_proj.weight
    want, _ = decode(model, SPARSE, fuse=False)
    got, _ = decode(model, SPARSE, fuse=True)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_weights_fused_in_inference_mode_can_be_trained(tiny_model: Any) -> None:
    model = tiny_model("qwen2")
    with torch.inference_mode():
        handle = deltakv.apply(model, SPARSE, fuse=True)
    with handle:
        model(torch.ones((1, 4), dtype=torch.long), use_cache=False).logits.sum().backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
