"""PaSST: the transformer teacher of CP-JKU's DCASE 2023 system, with its state-dict names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import nn

from asc_ray.section import Section, absolute


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


class PatchEmbed(nn.Module):
    def __init__(self, config: PasstConfig):
        super().__init__()
        self.proj = nn.Conv2d(1, config.width, config.patch, config.stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, tokens, width / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Passt(nn.Module):
    """Maps a log-mel (B, 1, mels, T) to logits (B, scenes), for patch <= T <= frames.

    Training takes what `choices` drew, once for the whole batch: structured and unstructured patchout, and the random
    offset into the time grid. Evaluation is deterministic.
    """

    def __init__(self, config: PasstConfig, scenes: int):
        super().__init__()
        self.config = config
        width, (rows, columns) = config.width, config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, rows, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, columns))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.Sequential(*(Block(width, config.heads) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, scenes))
        # Published checkpoints have it, and nothing uses it: without a gradient DDP and the optimizer ignore it.
        self.head_dist = nn.Linear(width, scenes).requires_grad_(False)
        self._initialize()

    def _initialize(self) -> None:
        for parameter in self.parameters(recurse=False):  # the two tokens and the positions
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def choices(self, frames: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Draw, on the host, where the columns of patches of a training batch of so many frames stand in the time
        grid, and which columns, rows and single patches are kept; int64 each. Raises ValueError if none is kept."""
        config, (rows, columns) = self.config, self.config.grid
        taken = (frames - config.patch) // config.stride + 1
        if taken <= config.patchout_time:
            raise ValueError(
                f"patchout_time = {config.patchout_time} leaves none of the {taken} columns of patches of this input; "
                f"allowed: 0 to {taken - 1}"
            )
        offset = int(torch.randint(columns - taken + 1, (), generator=generator)) if taken < columns else 0
        kept_columns = _kept(taken, config.patchout_time, generator)
        kept_rows = _kept(rows, config.patchout_freq, generator)
        patches = len(kept_columns) * len(kept_rows)
        if patches <= config.patchout:
            raise ValueError(
                f"patchout = {config.patchout} leaves none of the {patches} patches that are left of this input"
            )
        return torch.arange(taken) + offset, kept_columns, kept_rows, _kept(patches, config.patchout, generator)

    def tokens(self, x: torch.Tensor, choices: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Turn (B, 1, mels, T) into the patches that enter the transformer, with positions: (B, patches, width)."""
        config = self.config
        if x.shape[2] != config.mels or not config.patch <= x.shape[3] <= config.frames:
            raise ValueError(
                f"PaSST got {x.shape[2]} mels x {x.shape[3]} frames; its configuration takes {config.mels} mels and "
                f"{config.patch} to {config.frames} frames: set model.mels and model.frames to the front end's"
            )
        x = self.patch_embed(x)  # (B, width, rows, columns)
        if not self.training:
            x = x + self.time_new_pos_embed[..., : x.shape[3]] + self.freq_new_pos_embed
            return x.flatten(2).transpose(1, 2)
        if len(choices) != 4:
            raise ValueError(
                "PaSST in training draws patchout and position: model(x, *model.choices(frames, generator))"
            )
        positions, kept_columns, kept_rows, kept = choices
        x = x + self.time_new_pos_embed.index_select(3, positions) + self.freq_new_pos_embed
        if config.patchout_time:
            x = x.index_select(3, kept_columns)
        if config.patchout_freq:
            x = x.index_select(2, kept_rows)
        x = x.flatten(2).transpose(1, 2)
        return x.index_select(1, kept) if config.patchout else x

    def forward(self, x: torch.Tensor, *choices: torch.Tensor) -> torch.Tensor:
        patches = self.tokens(x, choices)
        extra = torch.cat([self.cls_token, self.dist_token], 1) + self.new_pos_embed
        x = self.norm(self.blocks(torch.cat([extra.expand(len(x), -1, -1), patches], 1)))
        return self.head((x[:, 0] + x[:, 1]) / 2)


def _kept(size: int, left_out: int, generator: torch.Generator) -> torch.Tensor:
    """Return range(size), sorted, without `left_out` random numbers; nothing is drawn where none is left out."""
    if not left_out:
        return torch.arange(size)
    return torch.randperm(size, generator=generator)[: size - left_out].sort().values
