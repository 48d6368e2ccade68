"""Ternary layers with ``hadamard``: their rotation, what autocast makes of it, and where a layer may be made."""

import pytest
import torch
from torch.nn import functional

from sieve_attn.layers import PackedTernaryLinear, TernaryLinear
from sieve_attn.layers.rotation import Rotation


@pytest.mark.parametrize("width", [1, 2, 16, 32, 48, 96])
def test_rotations_are_orthogonal_and_cancel(width):
    rotate = Rotation(width)
    matrix = rotate(torch.eye(width))
    assert torch.allclose(matrix @ matrix.T, torch.eye(width), atol=1e-5)
    if width & (width - 1) == 0:
        signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(width)] for i in range(width)])
        assert torch.allclose(matrix, signs * width**-0.5, atol=1e-6)
    assert torch.equal(matrix, Rotation(width)(torch.eye(width)))
    layer = TernaryLinear(width, 9, hadamard=True)
    x = torch.randn(3, width)
    weight = layer.rotation(layer.weight)
    alpha = weight.abs().mean().clamp_min(1e-5)
    assert torch.allclose(layer(x), rotate(x) @ (torch.clamp(torch.round(weight / alpha), -1, 1) * alpha).T, atol=1e-5)
    assert torch.allclose(functional.linear(rotate(x), weight), functional.linear(x, layer.weight), atol=1e-4)
    assert not [name for name in layer.state_dict() if "rotation" in name]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"per_row": True}, {"lsq": True}])
@pytest.mark.parametrize("width", [64, 96])
def test_autocast_multiplies_by_the_trits_that_are_packed(width, options, compiled):
    torch.manual_seed(2)
    layer = TernaryLinear(width, 256, hadamard=True, **options)
    weights = lambda: layer.ternary_weight()  # noqa: E731
    if compiled:
        torch._dynamo.reset()
        weights = torch.compile(weights, fullgraph=True, backend="aot_eager")
    exact = layer.ternary_weight()
    with torch.autocast("cpu", torch.bfloat16):
        inside = weights()
        assert torch.equal(inside, exact)
        layer(torch.eye(width)).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.equal(inside.sign().to(torch.int8), layer.trits())


def emptied(module, state):
    module.to_empty(device="cpu").load_state_dict(state)


def moved_and_emptied(module, state):
    module.to_empty(device="cpu").to("meta").to_empty(device="cpu").to(torch.float64).float().load_state_dict(state)


def reset(module, state):
    module.to_empty(device="cpu")
    getattr(module, "reset_parameters", lambda: None)()
    module.load_state_dict(state)


def set_one_by_one(module, state):
    for name, value in state.items():
        held = module._parameters if name in module._parameters else module._buffers
        held[name] = torch.nn.Parameter(value) if held is module._parameters else value


def assigned(module, state):
    module.load_state_dict(state, assign=True)


@pytest.mark.parametrize("fill", [assigned, emptied, moved_and_emptied, reset, set_one_by_one])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [48, 64])
def test_a_layer_made_on_meta_keeps_its_rotation(width, packed, fill):
    layer, x = TernaryLinear(width, 8, hadamard=True, lsq=True), torch.randn(3, width)
    layer = layer.pack() if packed else layer
    with torch.device("meta"):
        made = PackedTernaryLinear(width, 8, hadamard=True) if packed else TernaryLinear(width, 8, hadamard=True, lsq=True)
    assert made(x.to("meta")).shape == (3, 8)
    fill(made, layer.state_dict())
    assert torch.equal(made(x), layer(x))


@pytest.mark.parametrize("width", [48, 64])
def test_rotations_are_exported_with_their_layer(width):
    layer, x = TernaryLinear(width, 8, hadamard=True), torch.randn(3, width)
    for strict in (False, True):
        exported = torch.export.export(layer, (x,), strict=strict).module()
        assert torch.allclose(exported(x), layer(x))
