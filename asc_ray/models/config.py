"""The sections of the networks, by their `name`."""

import re
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from asc_ray.errors import UserError
from asc_ray.section import Section, absolute

Channels = Annotated[int, Field(ge=1, le=2048)]
Step = Annotated[int, Field(ge=1, le=4)]
_FUNCTION = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class PasstConfig(Section):
    """The defaults are the published network (85,358,612 parameters with 10 scenes) and its patchout for scenes."""

    name: Literal["passt"] = "passt"
    width: int = Field(768, ge=8, le=2048, description="numbers in a token")
    depth: int = Field(12, ge=1, le=48, description="transformer blocks")
    heads: int = Field(12, ge=1, le=32, description="attention heads of a block; they divide `width`")
    patch: int = Field(16, ge=1, le=64, description="side of a patch, in mel bins and frames")
    stride: int = Field(10, ge=1, le=64, description="step between patches; below `patch` they overlap")
    mels: int = Field(128, ge=1, le=1024, description="mel bins of the input, as the front end makes them")
    frames: int = Field(998, ge=1, le=100_000, description="longest input; shorter ones use a part of the time grid")
    patchout_freq: int = Field(6, ge=0, description="rows of patches left out of a training batch")
    patchout_time: int = Field(0, ge=0, description="columns of patches left out of a training batch")
    patchout: int = Field(0, ge=0, description="patches left out of a training batch, wherever they are")
    pretrained: Path | None = Field(None, description="a checkpoint to start from, such as AudioSet's")

    @field_validator("pretrained")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value and absolute(value)  # because workers run in a folder of their own

    @property
    def grid(self) -> tuple[int, int]:
        """The rows (frequency) and columns (time) of the positional embedding: 12 x 99 as published."""
        return (self.mels - self.patch) // self.stride + 1, (self.frames - self.patch) // self.stride + 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        if self.patch > min(self.mels, self.frames):
            raise ValueError(
                f"patch = {self.patch} is larger than the input of {self.mels} mels x {self.frames} frames"
            )
        for key, value, size in zip(
            ("patchout_freq", "patchout_time"), (self.patchout_freq, self.patchout_time), self.grid, strict=True
        ):
            if value >= size:
                raise ValueError(f"{key} = {value} leaves none of the {size} patches; allowed: 0 to {size - 1}")
        return self


class CPResNetConfig(Section):
    """The defaults are the published network: 32, 64 and 128 - 36 channels, 127,684 parameters with 10 scenes."""

    name: Literal["cp_resnet"] = "cp_resnet"
    width: int = Field(
        32, ge=4, le=512, multiple_of=2, description="channels of the stem; stages have 1, 2, 4 times it"
    )
    rho: int = Field(8, ge=1, le=9, description="receptive field: convolution k (the stem is 1) is 3x3 while k <= rho")
    cut_channels_s3: int = Field(
        36, ge=0, le=120, description="how many of 128 channels the last stage lacks; scales with the width"
    )

    @property
    def channels(self) -> tuple[int, int, int]:
        return self.width, 2 * self.width, 4 * self.width - round(self.cut_channels_s3 * self.width / 32)


class CPMobileConfig(Section):
    """The defaults are the published network: 32, 72 and 168 channels, 126,952 parameters with 10 scenes."""

    name: Literal["cp_mobile"] = "cp_mobile"
    width: int = Field(32, ge=8, le=256, multiple_of=8, description="channels of the first stage")
    multiplier: float = Field(2.3, ge=1, le=4, description="growth of the channels per stage; they are rounded to 8")
    expansion: int = Field(3, ge=1, le=8, description="hidden channels of a block per input channel")

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(8 * max(1, round(self.width * self.multiplier**stage / 8)) for stage in range(3))


class NormalizationConfig(Section):
    """Which normalization the network has, and where.

    `rn`: eq. 2 with the statistics of eq. 1. `rn_frequency`: the same by frequency bin. `in`: eq. 1. `bn`: batch norm.

    `places`: `input` is the log-mel, `stem` is behind the two stem convolutions, `stages` between the stages (the
    paper's), `last` behind the last stage.
    """

    kind: Literal["rn", "rn_frequency", "in", "bn", "none"] = Field("rn", description="kind of normalization")
    lambda_start: float = Field(0.5, ge=0, le=10, description="lambda of eq. 2 before the training")
    eps: float = Field(1e-5, gt=0, le=1, description="added to the variance")
    places: Annotated[tuple[Literal["input", "stem", "stages", "last"], ...], Field(min_length=1)] = Field(
        ("stages",), description="where the network normalizes"
    )


class Stage(Section):
    """A max pool of `pool` (frequency, time) positions, then `blocks` blocks of `channels` output channels."""

    channels: Channels = Field(description="output channels of its blocks")
    blocks: int = Field(ge=1, le=16, description="number of blocks")
    pool: tuple[Step, Step] = Field((1, 1), description="size of the max pool, in mel bins and frames")
    expansion: float = Field(2, ge=1, le=8, description="hidden channels of a block per input channel")


class ChannelPlan(Section):
    """Output channels of the two stem convolutions, and the stages."""

    stem: tuple[Channels, Channels] = Field(description="output channels of the first two convolutions")
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=8, description="the stages, in their order")


def _plan(stem: tuple[int, int], channels: tuple[int, int, int]) -> ChannelPlan:
    """Return the structure that all four sizes share: one block a stage, on 64 x 16, 32 x 8 and 16 x 4 positions."""
    pools = ((1, 1), (2, 2), (2, 2))
    stages = (Stage(channels=c, blocks=1, pool=pool) for c, pool in zip(channels, pools, strict=True))
    return ChannelPlan(stem=stem, stages=tuple(stages))


# Found by bench/channel_plans.py, within 0.3 % of Table II's parameters and 0.5 % of its MACs. The structure was chosen
# on corpora whose recordings and devices are not those that results are reported on (docs/journal.md).
PLANS = {
    "sm1": _plan((8, 16), (16, 32, 50)),
    "sm2": _plan((8, 20), (36, 48, 68)),
    "sm3": _plan((8, 32), (40, 68, 100)),
    "sm4": _plan((8, 32), (56, 112, 172)),
}


class DSFlexiNetConfig(Section):
    """A size of Table II, or with `size: null` a plan of one's own."""

    name: Literal["ds_flexinet"] = "ds_flexinet"
    size: Literal["sm1", "sm2", "sm3", "sm4"] | None = Field("sm2", description="a size of Table II")
    plan: ChannelPlan | None = Field(None, description="channels and stages in place of a size")
    normalization: NormalizationConfig = NormalizationConfig()

    @model_validator(mode="after")
    def _one_plan(self) -> Self:
        if (self.size is None) == (self.plan is None):
            raise ValueError(f"size = {self.size} and a plan exclude each other: give a size, or size: null and a plan")
        return self

    @property
    def channel_plan(self) -> ChannelPlan:
        return self.plan or PLANS[self.size or ""]


class DCASE22BaselineConfig(Section):
    """It takes only 40 mels x 51 frames: `frontend: {n_fft: 2048, window: 1280, hop: 639, mels: 40}`.

    The 46,512 parameters of the challenge's table are exactly the bytes of its int8 form: 45,816 weights of one byte
    and 174 biases of four, batch norms folded. MACs: 29.23 M. The original's dropout of 0.3 is left out, because every
    random draw of a training here comes from its step's generator.
    """

    mels: ClassVar[int] = 40
    frames: ClassVar[int] = 51

    name: Literal["dcase22_baseline"] = "dcase22_baseline"


class BSConvConfig(Section):
    """The defaults meet Table III's 73.39 K parameters and 13.18 M MACs; the channels are ours, the paper has none."""

    name: Literal["bsconv_cnn"] = "bsconv_cnn"
    stem: int = Field(16, ge=1, le=256, description="channels of the first convolution")
    channels: tuple[Annotated[int, Field(ge=1, le=2048)], ...] = Field(
        (40, 80, 112, 176, 184), min_length=1, max_length=8, description="output channels of the blocks"
    )


class TFSepNetConfig(Section):
    """The default is the published network: 126,858 parameters, and 29.42 M MACs on 512 mels x 64 frames.

    The original's dropout of 0.1 is left out, because every random draw of a training here comes from its step's
    generator.
    """

    name: Literal["tf_sepnet"] = "tf_sepnet"
    width: int = Field(64, ge=8, le=256, multiple_of=8, description="channels of the first stage")


class CNNGRUConfig(Section):
    """It takes 256 mels. 58,171 parameters (116,342 bytes as float16), and 10.90 M MACs on 33 frames, as published.

    The original's dropout is left out, because every random draw of a training here comes from its step's generator.
    """

    mels: ClassVar[int] = 256

    name: Literal["cnn_gru"] = "cnn_gru"


class ModuleConfig(Section):
    """A network of your own code: a function from the number of scenes to an `nn.Module`."""

    name: Literal["module"] = "module"
    function: str = Field(
        pattern=_FUNCTION,
        description="package.module:function, which is found on Python's path, here and on every node",
    )
    source: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description="SHA-256 of the module's file; it is found where it is not given, and another file is refused",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_source(cls, raw: Any) -> Any:
        function = str(raw.get("function")) if isinstance(raw, Mapping) else ""
        if re.match(_FUNCTION, function) and not raw.get("source"):
            try:
                return {**raw, "source": source_of(function)}
            except UserError as error:
                raise ValueError(str(error)) from None
        return raw

    @property
    def module(self) -> str:
        return self.function.partition(":")[0]


def source_of(function: str) -> str:
    """Return the SHA-256 of the file of a function's module, without importing anything.

    Raises UserError where Python's path has no such module, or where it is no file.
    """
    module, file, places = function.partition(":")[0], None, None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        specs = (finder.find_spec(name, places) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or (count < len(parts) and spec.submodule_search_locations is None):
            raise UserError(
                f"{function}: Python's path has no module {name}; put the folder that holds it into PYTHONPATH, here "
                "and on every node, or install it"
            )
        file, places = spec.origin if spec.has_location else None, spec.submodule_search_locations
    if file is None:
        raise UserError(f"{function}: {module} is no file; name a module of Python's that is one")
    try:
        return sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{function}: {file}: {error.strerror}") from None


ModelConfig = Annotated[
    PasstConfig
    | CPResNetConfig
    | CPMobileConfig
    | DSFlexiNetConfig
    | DCASE22BaselineConfig
    | BSConvConfig
    | TFSepNetConfig
    | CNNGRUConfig,
    Field(discriminator="name"),
]


AnyModelConfig = Annotated[ModelConfig | ModuleConfig, Field(discriminator="name")]
NETWORK_NAMES = tuple(own.model_fields["name"].default for own in (*get_args(get_args(ModelConfig)[0]), ModuleConfig))
