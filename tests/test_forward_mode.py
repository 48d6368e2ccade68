"""Forward-mode differentiation of what is no attention: an operator would give derivatives of zero, so it refuses tangents."""

import pytest
import torch
from torch.autograd import forward_ad

from sieve_attn import aether
from sieve_attn.layers import LocalPath, StatePath, TernaryLinear, TilelliBlock

# torch scripts some decompositions of its own when it first sees a tangent
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
MEANS, RADII = torch.ones(1, 9, 2, 16), torch.ones(1, 9, 2)
REFUSED = {
    "packed weights": (TernaryLinear(16, 16).pack(), "`x` .*: packed weights differentiate in reverse mode only"),
    "state": (StatePath(16), "`x, decay, start` .*: the recurrence differentiates in reverse mode only"),
    "block": (TilelliBlock(16, ["state"]), "`x, decay, start` .*: the recurrence"),
    "geometry": (lambda x: aether.compute_block_geometry(x[:, :, None], 4)[0], "`k` .*: what chooses blocks has no derivative"),
    "metadata": (lambda x: aether.precompute_metadata(x[:, None], 4)[0], "`keys` .*: what chooses blocks"),
    "gate": (lambda x: aether.run_aether_sparse(x, MEANS, RADII)[1], "`query, means, radii` .*: what chooses blocks"),
}


def by_transform(call, x, tangent):
    return torch.func.jvp(call, (x,), (tangent,))[1]


def by_level(call, x, tangent):
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent


WAYS = pytest.mark.parametrize("way", [by_transform, by_level])


@WAYS
@pytest.mark.parametrize("case", REFUSED)
def test_tangents_are_refused(case, way):
    call, words = REFUSED[case]
    x = torch.randn(1, 9, 16)
    with pytest.raises(ValueError, match=words):
        way(call, x, x)
    with forward_ad.dual_level():
        call(x)  # what carries none is no matter


@WAYS
@pytest.mark.parametrize("layer", [TernaryLinear(16, 16), LocalPath(16)], ids=lambda layer: type(layer).__name__)
def test_layers_of_plain_operations_give_tangents(layer, way):
    x, tangent = torch.randn(2, 1, 9, 16)
    # both are linear
    assert torch.allclose(way(layer, x, tangent), layer(tangent), atol=1e-5)
