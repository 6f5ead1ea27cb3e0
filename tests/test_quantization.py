"""Quantization-aware training and the int8 model: what is rounded, what it agrees with, resuming, saving."""

import copy
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization.pt2e import FakeQuantize

from asc_ray.artifacts import Artifact
from asc_ray.audio.config import FrontendConfig
from asc_ray.int8 import conversion, preparation, scheme
from asc_ray.int8.onnx_form import OnnxModel, export_onnx
from asc_ray.int8.train import FAKE_QUANTIZED, load_int8
from asc_ray.models.config import (
    BSConvConfig,
    ChannelPlan,
    CPMobileConfig,
    CPResNetConfig,
    DCASE22BaselineConfig,
    DSFlexiNetConfig,
    NormalizationConfig,
    Stage,
    TFSepNetConfig,
)
from asc_ray.models.registry import build
from asc_ray.runtime.onnx_file import read_model
from asc_ray.training.config import Recipe

# Copying an exported graph, torch uses what it deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

SHAPE = (1, 32, 16)
CLASSES = 4
STAGES = (
    Stage(channels=16, blocks=2),
    Stage(channels=24, blocks=1, pool=(2, 2)),
)  # a sum with, one without projection
PLAN = ChannelPlan(stem=(8, 16), stages=STAGES)
TINY = DSFlexiNetConfig(size=None, plan=PLAN)
CYCLES = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [2.0, 2.0]])  # of a scene's stripes: frequency, time
NOISE = 1.5


def labelled(seed: int, size: int = 32, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """Stripes of the scene's direction and width, at a random phase, in noise."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randint(CLASSES, (size,), generator=generator)
    frequency, time = (torch.arange(bins) / bins for bins in shape[1:])
    place = CYCLES[scene, :1, None] * frequency[:, None] + CYCLES[scene, 1:, None] * time
    phase = torch.rand(size, 1, 1, generator=generator)
    noise = torch.randn(size, *shape[1:], generator=generator)
    return (torch.cos(2 * torch.pi * (place + phase)) + NOISE * noise)[:, None], scene


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def train(model: nn.Module, steps: range, size: int = 32, shape: tuple[int, ...] = SHAPE) -> None:
    update = optimizer(model)
    for step in steps:
        x, scene = labelled(step, size, shape)
        update.zero_grad()
        F.cross_entropy(model(x), scene).backward()
        update.step()


def accuracy(logits: Tensor, scene: Tensor) -> float:
    return float((logits.argmax(1) == scene).float().mean())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Trained:
    float32: nn.Module
    before: dict[str, Tensor]
    fresh: nn.Module
    fake: nn.Module
    int8: nn.Module


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    model = build(TINY, CLASSES).train()
    train(model, range(60))
    before = state(model.eval())
    fresh = preparation.prepare(model, torch.zeros(2, *SHAPE))
    fake = copy.deepcopy(fresh)
    preparation.set_training(fake, True)
    train(fake, range(60, 90))
    preparation.freeze(fake)
    train(fake, range(90, 95))
    conversion.round_biases(fake)
    return Trained(model, before, fresh, fake, conversion.convert(fake))


def test_int8_computes_what_fake_quantization_trained(trained):
    x, _ = labelled(1000, 512)
    fake, real = trained.fake(x).detach(), trained.int8(x)
    assert (fake.argmax(1) == real.argmax(1)).float().mean() >= 0.99
    # Rounding of sums in float may move a value by one step of its grid; a wrong grid would move all of them.
    assert (fake - real).abs().mean() < 0.002 * real.std()


def test_rounding_alone_changes_little(trained):
    """Without an update of the weights: both networks take batch-norm statistics from the same clips."""
    float32, fake = copy.deepcopy(trained.float32).train(), copy.deepcopy(trained.fresh)
    preparation.set_training(fake, True)
    with torch.no_grad():
        for step in range(40):
            float32(labelled(step)[0])
            fake(labelled(step)[0])
        x, _ = labelled(1500, 512)
        expected, found = float32.eval()(x), conversion.convert(fake)(x)
    assert (found - expected).abs().mean() < 0.1 * expected.std()


def test_calibration_takes_ranges_and_leaves_the_weights(trained):
    """Post-training quantization: nothing but observers moves, and float's answers stay."""
    fake = copy.deepcopy(trained.fresh)
    before = state(fake)
    with preparation.observing(fake), torch.no_grad():
        for step in range(20):
            fake(labelled(step)[0])
    after = state(fake)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("activation_post_process" in name for name in moved)
    assert any(name.endswith("scale") for name in moved)
    fake(labelled(99)[0] * 10)
    assert all(torch.equal(value, after[name]) for name, value in state(fake).items()), "followed after the calibration"
    x, scene = labelled(2500, 512)
    assert accuracy(conversion.convert(fake)(x), scene) > accuracy(trained.float32(x), scene) - 0.05


def test_observed_ranges_take_half_of_uint8(trained):
    """Reduced range: minimum to maximum, zero included, is 127 steps."""
    observed = [m for m in trained.fake.modules() if isinstance(m, scheme.FakeQuantizeActivation)]
    assert len(observed) == 18
    for module in observed:
        low, high = module.activation_post_process.min_val.clamp(max=0), module.activation_post_process.max_val
        torch.testing.assert_close(127 * module.scale[0], high - low)
        assert abs(module.zero_point[0] + low / module.scale[0]) <= 0.5


def test_int8_recognizes_what_float_does(trained):
    x, scene = labelled(2000, 512)
    expected = accuracy(trained.float32(x), scene)
    assert expected > 0.8
    assert accuracy(trained.int8(x), scene) > expected - 0.05


def test_weights_are_the_folded_ones_on_the_symmetric_grid_of_their_channel(trained):
    tensors = trained.fake.state_dict()
    conv = tensors["features.stem.0.weight"]
    scale = tensors["features.stem.1.weight"] / torch.sqrt(tensors["features.stem.1.running_var"] + 1e-5)
    folded = conv * scale.reshape(-1, 1, 1, 1)
    node = next(node for node in trained.int8.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    stored, grid, zero = (trained.int8.get_buffer(source.target) for source in node.args[1].args[:3])
    assert stored.dtype == torch.int8
    assert not zero.any()
    assert torch.equal(stored, torch.round(folded / grid.reshape(-1, 1, 1, 1)).clamp(-128, 127).to(torch.int8))
    shift = tensors["features.stem.1.bias"] - tensors["features.stem.1.running_mean"] * scale
    bias = trained.int8.get_parameter(node.args[2].target)
    torch.testing.assert_close(bias, shift)
    steps = bias / (grid * node.args[0].args[1])
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=0.01)  # as int32, in steps of input x weight scale
    assert steps.abs().max() > 10


def test_rounded_biases_are_within_half_a_step_and_rounding_again_changes_nothing(trained):
    torch.manual_seed(1)
    fake = copy.deepcopy(trained.fresh)
    preparation.set_training(fake, True)
    train(fake, range(5))
    preparation.set_training(fake, False)
    before = state(fake)
    conversion.round_biases(fake)
    once = state(fake)
    moved = {name for name in before if not torch.equal(before[name], once[name])}
    assert moved
    assert all(name.endswith("bias") for name in moved)
    assert max((before[name] - once[name]).abs().max() for name in moved) < 0.01
    conversion.round_biases(fake)
    for name, value in state(fake).items():
        torch.testing.assert_close(value, once[name], rtol=0, atol=1e-6)


def test_every_layer_and_sum_is_int8_and_normalization_is_float(trained):
    rows = conversion.operators(trained.int8)
    count = {
        kind: sum(row[1:] == (f"aten.{kind}", "int8") for row in rows) for kind in ("conv2d.default", "add.Tensor")
    }
    assert count == {"conv2d.default": 12, "add.Tensor": 3}
    assert ("linear", "aten.linear.default", "int8") in rows
    assert {operator for _, operator, dtype in rows if dtype == "float32"} == {
        f"aten.{name}" for name in ("mean.dim", "sub.Tensor", "mul.Tensor", "add.Tensor", "rsqrt.default")
    }
    statistics = [node for node in trained.int8.graph.nodes if node.target is torch.ops.aten.mean.dim]
    assert len(statistics) == 2
    for node in statistics:
        assert not any(user.target in scheme.QUANTIZE for user in node.users)


def test_bytes_are_one_a_weight_and_four_a_scale_zero_point_and_bias(trained):
    layers = [m for m in trained.float32.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    channels = sum(layer.weight.shape[0] for layer in layers)
    lambdas = 1
    assert conversion.bytes_by_dtype(trained.int8) == {
        "int8": weights,
        "float32": 4 * (2 * channels + lambdas),
        "int32": 4 * channels,
    }


def test_the_int8_model_made_again_from_its_weights_is_equal_to_the_bit(trained, tmp_path):
    """No file of torch's own is kept of it, for reading one executes what is in it."""
    artifact = Artifact(tmp_path, "int8", "student", "0" * 16, {}, {})
    fake = copy.deepcopy(trained.fake)
    conversion.round_biases(fake)
    save_file({name: value.clone() for name, value in state(fake).items()}, artifact.open_partial() / FAKE_QUANTIZED)
    artifact.finish({})
    recipe = Recipe(model=TINY, frontend=FrontendConfig(mels=SHAPE[1], hop=2133))
    loaded = load_int8(artifact.path, recipe, CLASSES)
    x, _ = labelled(3000, 33)
    for size in (1, 2, 33):
        assert torch.equal(loaded(x[:size]), trained.int8(x[:size]))
    assert conversion.bytes_by_dtype(loaded) == conversion.bytes_by_dtype(trained.int8)


def test_resumed_training_ends_with_the_same_bits(trained, tmp_path):
    whole, first = copy.deepcopy(trained.fresh), copy.deepcopy(trained.fresh)
    preparation.set_training(whole, True)
    train(whole, range(2))
    train(whole, range(2, 4))
    preparation.set_training(first, True)
    train(first, range(2))
    save_file({name: value.clone() for name, value in first.state_dict().items()}, tmp_path / "state.safetensors")
    second = preparation.prepare(build(TINY, CLASSES), torch.zeros(2, *SHAPE))
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    preparation.set_training(second, True)
    train(second, range(2, 4))
    expected, found = state(whole), state(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("mode", ["evaluation", "frozen"])
def test_statistics_and_ranges_rest(trained, mode):
    model = copy.deepcopy(trained.fresh)
    preparation.set_training(model, True)
    train(model, range(2))
    before = state(model)
    if mode == "evaluation":
        preparation.set_training(model, False)
        model(labelled(5)[0])
        moved = set()
    else:
        preparation.freeze(model)
        train(model, range(2, 4))
        moved = {name for name, _ in model.named_parameters()}
    after = state(model)
    switches = {name for name in before if name.endswith("observer_enabled")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == moved | switches


def test_evaluation_does_not_depend_on_the_batch_and_training_does(trained):
    model = copy.deepcopy(trained.fake)
    x, _ = labelled(6, 7)
    alone, together = model(x[:1]), model(x)[:1]
    torch.testing.assert_close(alone, together)
    preparation.set_training(model, True)
    assert not torch.allclose(model(x[:1]), model(x)[:1], atol=0.01)


def test_the_given_model_is_left_alone(trained):
    assert all(torch.equal(value, trained.before[name]) for name, value in trained.float32.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        DSFlexiNetConfig(size="sm1", normalization=NormalizationConfig(kind="bn", eps=0.01)),
        DSFlexiNetConfig(
            size="sm3", normalization=NormalizationConfig(kind="rn_frequency", places=("input", "stem", "last"))
        ),
        DSFlexiNetConfig(size="sm4", normalization=NormalizationConfig(kind="none")),
        CPMobileConfig(width=16),
        CPResNetConfig(width=8),
        BSConvConfig(channels=(8, 16)),
        TFSepNetConfig(width=16),
        DSFlexiNetConfig(size="sm1", normalization=NormalizationConfig(kind="bn", eps=0.01, places=("input", "stem"))),
    ],
    ids=lambda config: getattr(config, "size", config.name),
)
def test_networks_convert_to_what_they_trained(config, tmp_path):
    shape = (1, 64, 32) if config.name == "tf_sepnet" else SHAPE  # it halves the plane five times
    fake = preparation.prepare(build(config, CLASSES), torch.zeros(2, *shape))
    preparation.set_training(fake, True)
    train(fake, range(3), size=8, shape=shape)
    int8 = conversion.convert(fake)
    preparation.set_training(fake, False)
    x, _ = labelled(7, 64, shape)
    expected = fake(x).detach()
    # TF-SepNet normalizes each mel bin five times, which multiplies the steps of rounding where a bin hardly varies.
    assert (int8(x) - expected).abs().mean() < (0.1 if config.name == "tf_sepnet" else 0.05) * expected.std()
    export_onnx(int8, tmp_path / "model.onnx")
    assert (OnnxModel(tmp_path / "model.onnx")(x) - int8(x)).abs().mean() < 0.002 * expected.std()
    assert read_model((tmp_path / "model.onnx").read_bytes()).input == ("mel", shape)
    written = onnx.load(tmp_path / "model.onnx").graph.node
    groups = {onnx.helper.get_node_attr_value(node, "group") for node in written if node.op_type == "Conv"}
    assert "AveragePool" not in {node.op_type for node in written}  # CP-Mobile's are convolutions
    if config.name == "ds_flexinet":
        assert all(group == 1 or group % 16 == 0 for group in groups)  # sm3's are 64, 80 and 136


@pytest.mark.parametrize("value", [-0.5, 0.0, 0.5])
def test_residual_normalization_of_any_lambda(trained, value, tmp_path):
    """One operator, and of what lambda has multiplied unless that is next to nothing."""
    fake = copy.deepcopy(trained.fake)
    with torch.no_grad():
        dict(fake.named_parameters())["features.norm1.lambda_"].fill_(value)
    int8 = conversion.convert(fake)
    export_onnx(int8, tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx").graph.node
    made_by = {name: node.op_type for node in written for name in node.output}
    (norm,) = [node for node in written if node.op_type == "InstanceNormalization"]
    assert made_by[norm.input[0]] == ("Mul" if value else "DequantizeLinear")
    x, _ = labelled(10, 64)
    expected = int8(x)
    assert (OnnxModel(tmp_path / "model.onnx")(x) - expected).abs().mean() < 0.002 * expected.std()


def test_a_convolution_with_a_bias_folds_its_batch_norm():
    torch.manual_seed(0)
    model = build(DCASE22BaselineConfig(), CLASSES)
    for name, bias in model.named_parameters():
        if name.startswith("features") and name.endswith("bias"):
            nn.init.uniform_(bias, -1, 1)
    x = torch.randn(16, 1, 40, 51)
    fake = preparation.prepare(model, x[:2])
    preparation.set_training(fake, True)
    for _ in range(3):
        fake(x)
    int8 = conversion.convert(fake)
    preparation.set_training(fake, False)
    conversion.round_biases(fake)
    expected = fake(x).detach()
    assert (int8(x) - expected).abs().mean() < 0.002 * expected.std()


def test_biases_fit_into_int32(trained, tmp_path):
    """Behind a layer that died, whose zeros have the least step there is, the others' biases are all that is left."""
    fake = copy.deepcopy(trained.fresh)
    for name, value in fake.named_parameters():
        if name in ("features.stem.1.weight", "features.stem.1.bias"):
            value.data[:] = 0.01 if name.endswith("weight") else -1.0
        elif name == "features.stem.4.bias":
            value.data[:] = torch.linspace(1, 3, len(value))
    preparation.set_training(fake, True)
    x, _ = labelled(9, 64)
    for _ in range(3):
        fake(x)
    int8 = conversion.convert(fake)
    expected = int8(x)
    export_onnx(int8, tmp_path / "model.onnx")
    assert (OnnxModel(tmp_path / "model.onnx")(x) - expected).abs().mean() < 0.002 * expected.std()
    biases = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert max(abs(b.astype(np.int64)).max() for b in biases if b.dtype == np.int32) > 2**29


def test_a_batch_norm_that_cannot_be_folded_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.BatchNorm2d(4))
    fake = preparation.prepare(model, torch.zeros(2, *SHAPE))
    fake(torch.randn(4, *SHAPE))
    with pytest.raises(RuntimeError, match="no rule folds the batch norm"):
        conversion.convert(fake)


def test_onnxruntime_agrees(trained, tmp_path):
    """In 8-bit kernels: after the engine's own optimization no convolution in float is left."""
    export_onnx(trained.int8, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert {"QLinearConv", "QLinearAdd", "QGemm", "QLinearGlobalAveragePool", "InstanceNormalization"} <= kinds
    assert not {"Conv", "FusedConv", "Gemm", "ReduceMean", "GlobalAveragePool", "Slice"} & kinds
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    made_by = {name: node for node in optimized.node for name in node.output}
    for pool in [node for node in optimized.node if node.op_type == "MaxPool"]:
        assert made_by[pool.input[0]].op_type in {"Add", "ReorderInput"}  # a normalization's output, not yet rounded
    x, _ = labelled(8, 256)
    for size in (1, 256):
        found = torch.from_numpy(session.run(["logits"], {"mel": x[:size].numpy()})[0])
        expected = trained.int8(x[:size])
        assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.99
        assert (found - expected).abs().mean() < 0.002 * expected.std()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (scheme.FakeQuantizeActivation, scheme.ACTIVATION),
        (scheme.RangeFollower, scheme.WEIGHT),
    ],
)
def test_ranges_are_torchaos_to_the_bit(kind, settings):
    """What follows ranges without a look at values gives the same scales, zero points and roundings."""
    own = settings.observer_or_fake_quant_ctr.p.keywords
    about = {name: getattr(settings, name) for name in ("dtype", "quant_min", "quant_max", "qscheme")} | own
    if settings.ch_axis is not None:
        about["ch_axis"] = settings.ch_axis
    ours, theirs = kind(**about), FakeQuantize(**about)
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 3.0, 0.1, 0.0, 2.0):
        x = size * torch.randn(5, 3, 4, 4, generator=generator) + 0.2 * size
        expected, found = theirs(x), ours(x)
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.zero_point, theirs.zero_point)
        assert torch.equal(found.clamp(max=float(expected.max())), expected), "activations are cut off later"
    ours.enable_observer(False)
    scale = ours.scale.clone()
    ours(100 * x)
    assert torch.equal(ours.scale, scale)
