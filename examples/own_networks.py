"""Teachers of your own code for `asc-ray pipeline`: functions from the number of scenes to a torch.nn.Module.

PYTHONPATH=$PWD/examples asc-ray pipeline --config examples/own_networks.yaml
"""

import torch
from torch import Tensor, nn


class WaveNetwork(nn.Module):
    """Strided convolutions on the wave, (B, samples) in +-1."""

    def __init__(self, scenes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in ((1, width, 80, 16), (width, 2 * width, 9, 4), (2 * width, 64, 9, 4)):
            layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(64, scenes)

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(self.layers(wave[:, None]).mean(dim=2))


class Transformer(nn.Module):
    """torch's own encoder over the frames of a log-mel or of Kaldi's log filter bank, (B, 1, mels, frames)."""

    def __init__(self, scenes: int, mels: int = 128, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(mels, width)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, scenes)

    def forward(self, fbank: Tensor) -> Tensor:
        frames = fbank[:, 0].transpose(1, 2)  # (B, frames, mels)
        return self.head(self.encoder(self.embed(frames)).mean(dim=1))


class Conformer(nn.Module):
    """torchaudio's Conformer over the same frames."""

    def __init__(self, scenes: int, mels: int = 128) -> None:
        from torchaudio.models import Conformer

        super().__init__()
        self.encoder = Conformer(mels, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=15)
        self.head = nn.Linear(mels, scenes)

    def forward(self, fbank: Tensor) -> Tensor:
        frames = fbank[:, 0].transpose(1, 2)
        lengths = torch.full((len(frames),), frames.shape[1], device=frames.device)
        return self.head(self.encoder(frames, lengths)[0].mean(dim=1))
