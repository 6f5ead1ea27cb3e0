"""The networks against CP-JKU's outputs, state dicts and counts, Table II, and their invariants."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from reference import (
    FRONT_ENDS,
    NETWORKS,
    RENEW,
    SOUNDS,
    filled,
    golden,
    logits_digest,
    names_digest,
    needs_reference,
    own_outputs,
    published,
    published_outputs,
    published_shapes,
    waves,
)

from asc_ray.audio.frontend import LogMel
from asc_ray.config.composition import PRESETS, network_preset
from asc_ray.models.complexity import complexity, peak_activations
from asc_ray.models.config import (
    PLANS,
    BSConvConfig,
    ChannelPlan,
    CNNGRUConfig,
    CPMobileConfig,
    CPResNetConfig,
    DCASE22BaselineConfig,
    DSFlexiNetConfig,
    ModelConfig,
    NormalizationConfig,
    PasstConfig,
    Stage,
    TFSepNetConfig,
)
from asc_ray.models.ds_flexinet import DSFlexiNet
from asc_ray.models.passt import Passt
from asc_ray.models.registry import build, folded
from asc_ray.students.config import Limits
from asc_ray.students.cost import exceeded, input_shape
from asc_ray.training.config import Recipe

SMALL_PASST = PasstConfig(width=24, depth=2, heads=3, frames=220)
# Parameters and MACs of the paper's Table II.
TABLE_II = {"sm1": (13_760, 3.88e6), "sm2": (30_690, 8.27e6), "sm3": (54_980, 14.34e6), "sm4": (126_120, 23.03e6)}


def mel(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_has_the_published_names_and_shapes(name):
    shapes = {key: list(value.shape) for key, value in published(name).state_dict().items()}
    assert names_digest(shapes) == golden("published")[name]["names"], RENEW


@needs_reference
@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_has_the_published_names_and_shapes_one_by_one(name):
    assert {key: list(value.shape) for key, value in published(name).state_dict().items()} == published_shapes(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_log_mel_and_network_together_agree_with_the_published_code(name):
    model, expected = filled(published(name).to_empty(device="cpu")), golden("published")[name]["logits"]
    assert expected.keys() == SOUNDS.keys()
    for sound, digests in expected.items():
        with torch.no_grad():
            logits = model(LogMel(FRONT_ENDS[name])(waves(*SOUNDS[sound])[:, None]))
        tolerance = 1e-4 * np.abs(digests).max()
        np.testing.assert_allclose(logits_digest(logits), digests, rtol=0, atol=tolerance, err_msg=RENEW)


@needs_reference
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_agree_with_the_published_code(name):
    model, mels = filled(published(name).to_empty(device="cpu")), dict(published_outputs(name, "mel"))
    for sound, expected in published_outputs(name, "logits"):
        with torch.no_grad():
            logits = model(torch.from_numpy(mels.pop(sound))[:, None]).numpy()
        assert abs(logits - expected).max() <= 1e-4 * abs(expected).max()
    assert not mels


def test_our_own_networks_answer_as_they_did():
    """With every weight of a formula, on the log-mel of a formula's sound; so do the built-in impulse responses."""
    found, expected = own_outputs(), golden("own")
    np.testing.assert_allclose(found["responses"], expected["responses"], rtol=0, atol=1e-5, err_msg=RENEW)
    assert found["logits"].keys() == expected["logits"].keys(), RENEW
    for name, logits in expected["logits"].items():
        tolerance = 1e-4 * np.abs(logits).max()
        np.testing.assert_allclose(found["logits"][name], logits, rtol=0, atol=tolerance, err_msg=f"{name}: {RENEW}")


@pytest.mark.parametrize(("name", "count"), [("passt", 85_358_612), ("cp_resnet", 127_684), ("cp_mobile", 126_952)])
def test_published_parameter_counts(name, count):
    assert sum(parameter.numel() for parameter in published(name).parameters()) == count


@pytest.mark.parametrize("size", TABLE_II)
def test_table_ii(size):
    parameters, macs = TABLE_II[size]
    counted = complexity(DSFlexiNet(DSFlexiNetConfig(size=size), scenes=10))
    assert counted.parameters == pytest.approx(parameters, rel=0.005)
    assert counted.macs == pytest.approx(macs, rel=0.01)
    assert counted.bytes == {"float32": 4 * counted.parameters, "int8": counted.parameters}


def test_the_students_that_won_have_the_published_sizes():
    """TF-SepNet-64 of DCASE 2024 and the CNN-GRU of DCASE 2025, as their authors' public code has them."""
    published = {"tf_sepnet": (126_858, 29_419_648), "cnn_gru": (58_171, 10_902_300)}
    for name, sizes in published.items():
        recipe = Recipe.model_validate(network_preset(name))
        counted = complexity(build(recipe.model, scenes=10), input_shape(recipe))
        assert (counted.parameters, counted.macs) == sizes
    with pytest.raises(ValidationError, match="frontend makes 128 mels of a clip, cnn_gru takes 256"):
        Recipe.model_validate({"model": {"name": "cnn_gru"}, "frontend": {"mels": 128}})


TABLE_III = {"cp_resnet_64k": (63_500, 19.5e6), "bsconv_cnn": (73_390, 13.18e6)}


@pytest.mark.parametrize("name", TABLE_III)
def test_the_rivals_of_table_iii(name):
    parameters, macs = TABLE_III[name]
    recipe = Recipe.model_validate(network_preset(name))
    counted = complexity(build(recipe.model, scenes=10), input_shape(recipe))
    assert counted.parameters == pytest.approx(parameters, rel=0.01)
    assert counted.macs == pytest.approx(macs, rel=0.01)


def test_the_dcase22_baseline_has_the_published_numbers():
    """46,512 are the bytes of its int8 form: weights of one, biases of four, and no batch norm is left."""
    recipe = Recipe.model_validate(network_preset("dcase22_baseline"))
    model, shape = build(recipe.model, scenes=10), input_shape(recipe)
    assert shape == (1, 1, 40, 51)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert sum(layer.weight.numel() + 4 * layer.bias.numel() for layer in layers) == 46_512
    assert complexity(model, shape).macs == pytest.approx(29.23e6, rel=0.002)
    with pytest.raises(ValidationError, match="makes 256 mels x 64 frames of a clip, dcase22_baseline takes 40 x 51"):
        Recipe.model_validate({"model": {"name": "dcase22_baseline"}})


@pytest.mark.parametrize("name", sorted(file.stem for file in (PRESETS / "students").glob("*.yaml")))
def test_every_student_s_preset_is_within_the_limits_of_the_challenge(name):
    recipe = Recipe.model_validate(network_preset(name))
    counted = complexity(build(recipe.model, scenes=10), input_shape(recipe))
    assert exceeded(Limits(), counted) == []
    assert exceeded(Limits(bytes=counted.parameters - 1, macs=counted.macs - 1), counted) == [
        f"limits.bytes: {counted.parameters:,}, allowed {counted.parameters - 1:,}",
        f"limits.macs: {counted.macs:,}, allowed {counted.macs - 1:,}",
    ]


def test_complexity_of_a_network_counted_by_hand():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Linear(8, 5)
    ).train()
    counted = complexity(model, (1, 1, 6, 16))  # the convolution gives (1, 4, 3, 8); 12 rows of 8 enter the Linear
    by_layer = [(layer.name, layer.kind, layer.output_shape, layer.parameters, layer.macs) for layer in counted.layers]
    assert by_layer == [
        ("0", "Conv2d", (1, 4, 3, 8), 36, 36 * 24),
        ("1", "BatchNorm2d", (1, 4, 3, 8), 8, 8),
        ("2", "Linear", (1, 4, 3, 5), 45, 45 * 12),
    ]
    assert (counted.parameters, counted.macs) == (36 + 8 + 45, 36 * 24 + 8 + 45 * 12)
    assert model.training
    most = 6 * 16 + 4 * 3 * 8  # into the convolution and out of it; the batch norm works in place
    assert peak_activations(model, (1, 1, 6, 16)) == {"float32": 4 * most, "int8": most}


def test_what_a_shortcut_keeps_is_in_the_peak_of_activations():
    """Of sm4's first block: what the shortcut has projected, what the other convolutions have, and the sum."""
    model = build(DSFlexiNetConfig(size="sm4", normalization=NormalizationConfig(kind="none")), 10)
    assert peak_activations(model)["int8"] == 3 * 56 * 64 * 16
    plan = ChannelPlan(stem=(2, 4), stages=(Stage(channels=4, blocks=1, expansion=1),))
    small = build(DSFlexiNetConfig(size=None, plan=plan), 10)
    assert peak_activations(small, (1, 1, 8, 8))["int8"] == 8 * 8 + 2 * 4 * 4  # into the first convolution, out of it


SHRUNKEN: dict[str, tuple[Any, tuple[int, int]]] = {
    "passt": (SMALL_PASST, (128, 100)),
    "passt, other grid": (PasstConfig(width=16, depth=1, heads=2, mels=64, frames=60, patch=8, stride=8), (64, 50)),
    "cp_resnet": (CPResNetConfig(width=8), (256, 43)),
    "cp_resnet, small field": (CPResNetConfig(width=16, rho=4, cut_channels_s3=0), (256, 43)),
    "cp_mobile": (CPMobileConfig(width=8), (256, 64)),
    "bsconv_cnn": (BSConvConfig(stem=4, channels=(8, 12)), (256, 64)),
    "dcase22_baseline": (DCASE22BaselineConfig(), (40, 51)),
    "tf_sepnet": (TFSepNetConfig(width=8), (64, 32)),
    "cnn_gru": (CNNGRUConfig(), (256, 33)),
    "ds_flexinet": (DSFlexiNetConfig(size="sm1"), (256, 64)),
    "ds_flexinet, own plan": (
        DSFlexiNetConfig(
            size=None, plan=ChannelPlan(stem=(4, 8), stages=(Stage(channels=8, blocks=2), Stage(channels=12, blocks=1)))
        ),
        (128, 50),
    ),
}


@pytest.mark.parametrize("case", SHRUNKEN)
def test_small_networks_train_and_evaluate_clip_by_clip(case):
    """Logits of the wanted shape, a gradient for everything that asks for one, and no clip that sees another."""
    config, (mels, frames) = SHRUNKEN[case]
    model = build(config, scenes=7, seed=3)
    x = mel(4, 1, mels, frames)
    choices = model.choices(frames, torch.Generator().manual_seed(0)) if isinstance(model, Passt) else ()
    logits = model(x, *choices)
    assert logits.shape == (4, 7)
    logits.square().add(logits).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.eval()
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(clip[None]) for clip in x])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert torch.equal(together, model(x))


@pytest.mark.parametrize("case", SHRUNKEN)
def test_build_is_a_function_of_the_seed(case):
    config, _ = SHRUNKEN[case]
    before = torch.get_rng_state()
    first, again, other = (build(config, scenes=5, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_cp_resnet_starts_with_identity_blocks_and_a_zero_head():
    model = build(CPResNetConfig(), scenes=10)
    state = model.state_dict()
    assert not state["feed_forward.0.weight"].any()
    seconds = [value for key, value in state.items() if key.endswith("conv2.weight")]
    assert [bool(value.any()) for value in seconds] == [False] * 4
    weight = state["stage3.block1.conv1.weight"]  # He with fan-out 92 * 9, times 4 blocks ** -0.5
    assert weight.std().item() == pytest.approx((2 / (92 * 9)) ** 0.5 / 2, rel=0.02)


@pytest.mark.parametrize(
    ("freq", "time", "anywhere", "tokens"),
    [(0, 0, 0, 12 * 9), (6, 0, 0, 6 * 9), (6, 2, 0, 6 * 7), (11, 8, 0, 1), (0, 0, 40, 68), (6, 2, 41, 1)],
)
def test_patchout_keeps_the_right_number_of_patches(freq, time, anywhere, tokens):
    left_out = {"patchout_freq": freq, "patchout_time": time, "patchout": anywhere}
    model = Passt(SMALL_PASST.model_copy(update=left_out), scenes=10)
    x = mel(2, 1, 128, 100)
    assert model.tokens(x, model.choices(100, torch.Generator().manual_seed(0))).shape == (2, tokens, 24)
    assert model.eval().tokens(x).shape == (2, 12 * 9, 24)


def test_patchout_leaves_out_whole_rows_and_keeps_their_order():
    model = Passt(SMALL_PASST.model_copy(update={"patchout_freq": 5}), scenes=10)
    columns = 9
    with torch.no_grad():  # a token's value is then the row it comes from
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.time_new_pos_embed.zero_()
        model.freq_new_pos_embed.copy_(torch.arange(12.0).view(1, 1, 12, 1).expand(1, 24, 12, 1))
    kept = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tokens = model.tokens(mel(2, 1, 128, 100), model.choices(100, generator))
        rows = tokens[0, ::columns, 0].tolist()
        assert rows == sorted(set(rows))
        assert torch.equal(tokens, torch.tensor(rows).repeat_interleave(columns).view(1, -1, 1).expand(2, -1, 24))
        kept.add(tuple(rows))
    assert len(kept) > 10


def test_unstructured_patchout_leaves_out_any_patches_and_keeps_their_order():
    model = Passt(SMALL_PASST.model_copy(update={"patchout_freq": 0, "patchout": 50}), scenes=10)
    with torch.no_grad():  # a token's value is then the patch it comes from
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.time_new_pos_embed.copy_(torch.arange(float(SMALL_PASST.grid[1])).view(1, 1, 1, -1).expand(1, 24, 1, -1))
        model.freq_new_pos_embed.copy_(100 * torch.arange(12.0).view(1, 1, 12, 1).expand(1, 24, 12, 1))
    kept = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        offset, *kinds = model.choices(100, generator)
        found = model.tokens(mel(1, 1, 128, 100), (offset - offset[0], *kinds))[0, :, 0].tolist()
        assert len(found) == 12 * 9 - 50
        assert found == sorted(set(found))
        kept.update(found)
    assert len(kept) > 80
    model.config = model.config.model_copy(update={"patchout": 108})
    with pytest.raises(ValueError, match="patchout = 108 leaves none of the 108 patches"):
        model.choices(100, generator)


def test_time_offset_is_random_in_training_and_zero_in_evaluation():
    model = Passt(SMALL_PASST.model_copy(update={"patchout_freq": 0}), scenes=10)
    columns = SMALL_PASST.grid[1]
    with torch.no_grad():  # a token's value is then the time position it was given
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.freq_new_pos_embed.zero_()
        model.time_new_pos_embed.copy_(torch.arange(float(columns)).expand(1, 24, 1, columns))
    generator = torch.Generator().manual_seed(0)
    x = mel(1, 1, 128, 100)
    offsets = {int(model.tokens(x, model.choices(100, generator))[0, 0, 0]) for _ in range(200)}
    assert offsets == set(range(columns - 9 + 1))
    assert model.eval().tokens(x)[0, :9, 0].tolist() == list(range(9))


def test_passt_training_repeats_with_the_generator():
    model = build(SMALL_PASST, scenes=10)
    x = mel(2, 1, 128, 100)
    first, again, other = (model(x, *model.choices(100, torch.Generator().manual_seed(seed))) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="generator"):
        model(x)


def test_passt_refuses_an_input_off_its_grid():
    model = build(SMALL_PASST, scenes=10).eval()
    for shape in [(1, 1, 128, 230), (1, 1, 128, 8), (1, 1, 256, 100)]:
        with pytest.raises(ValueError, match="takes 128 mels and 16 to 220 frames"):
            model(mel(*shape))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "passt", "heads": 7}, "does not divide"),
        ({"name": "passt", "patchout_freq": 12}, "allowed: 0 to 11"),
        ({"name": "passt", "mels": 8}, "larger than the input"),
        ({"name": "cp_resnet", "width": 33}, "multiple of 2"),
        ({"name": "ds_flexinet", "size": None}, "give a size"),
        ({"name": "ds_flexinet", "size": "sm9"}, "sm1"),
        ({"name": "resnet"}, "cp_resnet"),
    ],
)
def test_a_bad_model_section_says_what_is_allowed(config, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ModelConfig).validate_python(config)


def test_normalization_stands_where_it_is_asked_for():
    def names(*places: str) -> list[str]:
        config = DSFlexiNetConfig(size="sm1", normalization=NormalizationConfig.model_validate({"places": places}))
        return [
            name.removeprefix("features.") for name, _ in build(config, scenes=10).named_modules() if "norm" in name
        ]

    assert names("stages") == ["norm1", "norm2"]
    assert names("last", "stages", "stem", "input") == ["norm_input", "norm_stem", "norm1", "norm2", "norm3"]
    gain = build(
        DSFlexiNetConfig(size="sm1", normalization=NormalizationConfig(kind="in", eps=1e-12, places=("input",))), 10
    ).eval()
    x = mel(2, 1, 256, 64)
    torch.testing.assert_close(gain(3 * x + 1), gain(x))  # a level makes no difference to it


@pytest.mark.parametrize("kind", ["rn", "rn_frequency", "in", "bn", "none"])
def test_export_has_a_dynamic_batch_and_no_normalization_operator_of_its_own(kind):
    """RN exports as mean, mul and rsqrt, which quantization leaves in float."""
    model = build(DSFlexiNetConfig(size="sm1", normalization=NormalizationConfig(kind=kind)), scenes=10).eval()
    batch = torch.export.Dim("batch", min=2, max=256)
    program = torch.export.export(model, (mel(3, 1, 256, 64),), dynamic_shapes=({0: batch},))
    x = mel(5, 1, 256, 64, seed=1)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("instance_norm" in target for target in targets)
    assert any("rsqrt" in target for target in targets) == (kind not in {"bn", "none"})


@pytest.mark.parametrize("size", PLANS)
def test_no_stage_of_a_plan_has_fewer_channels_than_the_one_before(size):
    plan = PLANS[size]
    channels = [*plan.stem, *(stage.channels for stage in plan.stages)]
    assert channels == sorted(channels)


@pytest.mark.parametrize(
    "config",
    [CPResNetConfig(), CPMobileConfig(), BSConvConfig(), DSFlexiNetConfig(size="sm1")],
    ids=lambda config: config.name,
)
def test_no_pointwise_convolution_has_a_stride(config):
    """oneDNN's weight gradient of one is wrong below 16 channels (its issue 6035)."""
    convolutions = [module for module in build(config, 10).modules() if isinstance(module, torch.nn.Conv2d)]
    assert {module.stride for module in convolutions if module.kernel_size == (1, 1)} == {(1, 1)}


@pytest.mark.parametrize("size", ["sm1", "sm2", "sm3", "sm4"])
@pytest.mark.parametrize("batch", [3, 4])
def test_weight_gradients_of_every_convolution_agree_with_float64(size, batch):
    """As they are computed in training: channels last, two threads."""
    model = build(DSFlexiNetConfig(size=size), 10, seed=0).to(memory_format=torch.channels_last)
    seen = []
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [
        module.register_forward_hook(lambda m, inputs, output: seen.append((m, inputs[0].detach(), output.detach())))
        for module in convolutions
    ]
    model(mel(batch, 1, 256, 64).contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for module, x, output in seen:
            direction = torch.sign(output - output.mean())
            (module(x) * direction).sum().backward()
            weight = module.weight.detach().double().requires_grad_()
            exact = torch.nn.functional.conv2d(
                x.double(), weight, None, module.stride, module.padding, 1, module.groups
            )
            (exact * direction).sum().backward()
            scale = float(weight.grad.abs().max())
            torch.testing.assert_close(module.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-4 * scale)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("config", [CPResNetConfig(width=8), CPMobileConfig(width=8), DSFlexiNetConfig(size="sm1")])
def test_folding_batch_norms_changes_nothing_but_the_last_bits(config):
    model = build(config, 10, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(noise + 0.5 if name.endswith("running_var") else value + 0.1 * (noise - 0.5))
    x = mel(4, 1, 256, 64)
    with torch.no_grad():
        expected = model.eval()(x)
        quick = folded(model)
        torch.testing.assert_close(quick(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in quick.modules())
