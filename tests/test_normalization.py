"""Residual normalization against torch's own instance norm, and what it is there for: invariance to a device."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from asc_ray.models.config import NormalizationConfig
from asc_ray.models.normalization import normalization

shapes = st.tuples(*(st.integers(1, 3), st.integers(1, 5), st.integers(2, 7), st.integers(2, 6)))
lambdas = st.floats(0, 2)


def random_input(shape: tuple[int, ...]) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 2


@settings(max_examples=30)
@given(shapes, lambdas)
def test_rn_is_lambda_x_plus_instance_norm(shape, lambda_start):
    x = random_input(shape)
    config = NormalizationConfig(kind="rn", lambda_start=lambda_start)
    out = normalization(config, shape[1]).double()(x)
    torch.testing.assert_close(out, lambda_start * x + F.instance_norm(x, eps=config.eps), rtol=1e-6, atol=1e-6)


@settings(max_examples=30)
@given(shapes, lambdas)
def test_rn_frequency_is_rn_with_channel_and_frequency_exchanged(shape, lambda_start):
    x = random_input(shape)
    rn, rn_frequency = (
        normalization(NormalizationConfig(kind=kind, lambda_start=lambda_start), shape[1]).double()
        for kind in ("rn", "rn_frequency")
    )
    torch.testing.assert_close(rn_frequency(x), rn(x.transpose(1, 2)).transpose(1, 2))


@settings(max_examples=30)
@given(st.floats(0.2, 5), st.floats(-5, 5))
def test_in_removes_gain_and_offset_of_every_clip_and_channel(gain, offset):
    x = random_input((2, 3, 8, 6))
    layer = normalization(NormalizationConfig(kind="in", eps=1e-12), 3)
    gains = torch.tensor([1.0, gain, gain**2], dtype=x.dtype).view(1, 3, 1, 1)
    torch.testing.assert_close(layer(gains * x + offset), layer(x))


def test_lambda_is_the_only_parameter_and_learns():
    layer = normalization(NormalizationConfig(lambda_start=0.25), 4)
    (parameter,) = layer.parameters()
    assert parameter.item() == 0.25
    x = random_input((2, 4, 5, 6)).float()
    layer(x).sum().backward()
    # d/d lambda of sum(lambda x + IN(x)) is sum(x)
    torch.testing.assert_close(parameter.grad, x.sum())


@pytest.mark.parametrize(("kind", "parameters"), [("rn", 1), ("rn_frequency", 1), ("in", 0), ("bn", 8), ("none", 0)])
def test_parameters_by_kind(kind, parameters):
    assert sum(p.numel() for p in normalization(NormalizationConfig(kind=kind), 4).parameters()) == parameters


@pytest.mark.parametrize("kind", ["rn", "rn_frequency", "in"])
def test_in_half_precision_the_statistics_are_of_float32(kind):
    """Where the mean is thirty deviations, a difference in bf16 would be of three steps."""
    layer = normalization(NormalizationConfig(kind=kind, lambda_start=0.0), 4)
    x = (30 + random_input((2, 4, 16, 8))).bfloat16()
    exact = layer.double()(x.double())
    found = layer.float()(x).detach()
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max()) < 0.02
