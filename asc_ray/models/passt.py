"""PaSST: the transformer teacher of CP-JKU's DCASE 2023 system, with its state-dict names."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from asc_ray.models.config import PasstConfig


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
