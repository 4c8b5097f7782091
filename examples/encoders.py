"""Small encoders of the examples: each makes tokens ``(B, T, C)`` of one modality."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.mel import MelConfig
from mmfast.nn import MelFrontend, MultiheadAttention

LOG_MEL = MelConfig(
    sample_rate=8000, n_fft=256, win_length=200, hop_length=80, n_mels=40, f_min=60.0, log="ln", log_offset=1e-6
)


class DigitTokens(nn.Module):
    """A written digit ``(B, 1, 8, 8)`` → 16 tokens, one for each 2 × 2 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        self.place = nn.Parameter(0.1 * torch.randn(1, 16, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).mT + self.place


def thirds(count: Tensor, length: int) -> Tensor:
    """``(B, length, 3)``: how much each of ``count`` tokens belongs to the beginning, middle and end; they sum to 1."""
    place = 2 * torch.arange(length) / (count[:, None] - 1).clamp(min=1)
    return (1 - (place[..., None] - torch.arange(3)).abs()).clamp(min=0)


class VoiceTokens(nn.Module):
    """Waveforms ``(B, T)`` of ``lengths`` ``(B,)`` → features of ``config`` → a token each 40 ms, and how many.

    Each feature of a clip is taken relative to its mean over the clip, which leaves out level and channel. Tokens say
    which third of the word they come from: new speakers keep the order of its sounds, not their pace.
    """

    def __init__(self, dim: int, config: MelConfig = LOG_MEL, trainable_filters: bool = False) -> None:
        super().__init__()
        self.frontend = MelFrontend(config, trainable_filters)
        self.norm = nn.BatchNorm1d(config.n_features)
        self.layers = nn.Sequential(
            nn.Conv1d(config.n_features, dim, 5, stride=2, padding=2),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv1d(dim, dim, 5, stride=2, padding=2),
            nn.BatchNorm1d(dim),
        )
        self.place = nn.Linear(3, dim, bias=False)

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, frames = self.frontend(waves, lengths)  # (B, C, F)
        there = torch.arange(features.shape[2]) < frames[:, None]
        mean = (features * there[:, None]).sum(2, keepdim=True) / frames[:, None, None]
        features = self.norm((features - mean) * there[:, None])
        tokens, count = self.layers(features).mT, (frames + 3) // 4
        return tokens + self.place(thirds(count, tokens.shape[1])), count


class WaveTokens(nn.Module):
    """Waveforms ``(B, T)`` → tokens each 40 ms by filters that are learned from nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 32, 80, stride=20, padding=40),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, dim, 8, stride=4, padding=4),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Conv1d(dim, dim, 8, stride=4, padding=4),
            nn.BatchNorm1d(dim),
        )
        self.place = nn.Linear(3, dim, bias=False)

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        scaled = waves / (waves.abs().amax(1, keepdim=True) + 1e-6)
        tokens, count = self.layers(scaled[:, None]).mT, (lengths + 319) // 320
        return tokens + self.place(thirds(count, tokens.shape[1])), count


class PictureTokens(nn.Module):
    """A picture ``(B, 3, 32, 32)`` → 64 tokens, one for each 4 × 4 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        blocks = []
        for before, after in ((3, 24), (24, 48)):
            blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(48, dim, 3, padding=1), nn.BatchNorm2d(dim))
        self.place = nn.Parameter(0.1 * torch.randn(1, 64, dim))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures).flatten(2).mT + self.place


class WordTokens(nn.Module):
    """Words by their parts ``(B, W, G)`` (`data.as_words`) → a token each; 0 is no part. They attend to each other."""

    def __init__(self, dim: int, buckets: int = 8192) -> None:
        super().__init__()
        self.parts = nn.Embedding(buckets, dim, padding_idx=0)
        self.place = nn.Parameter(0.1 * torch.randn(1, 8, dim))
        self.attention = MultiheadAttention(dim, 4, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(0.3)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        counts = (words > 0).sum(2, keepdim=True).clamp(min=1)
        x = self.drop(self.parts(words).sum(2) / counts.sqrt()) + self.place[:, : words.shape[1]]
        missing = torch.arange(words.shape[1]) >= lengths[:, None]
        attended, _ = self.attention(x, x, x, key_padding_mask=missing, need_weights=False)
        return self.norm(x + attended)


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures moved by up to 3 pixels, some of them mirrored."""
    dy, dx = torch.randint(-3, 4, (2, len(pictures)), generator=generator)
    rows = (torch.arange(32) + dy[:, None]).clamp(0, 31)
    columns = (torch.arange(32) + dx[:, None]).clamp(0, 31)
    mirrored = torch.rand(len(pictures), generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(len(pictures))[:, None, None]
    return pictures[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
