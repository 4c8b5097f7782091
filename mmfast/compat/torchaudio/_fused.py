"""torchaudio's options as one `MelConfig`, and the one call that computes them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from mmfast import _backend
from mmfast.mel import MelConfig, extract

LOG_OFFSET = 1e-6  # torchaudio's, under log_mels and log_lf


@lru_cache(maxsize=1024)
def describe(
    n_fft: int,
    win_length: int | None,
    hop_length: int | None,
    pad: int,
    power: float | None,
    normalized: bool | str,
    center: bool,
    pad_mode: str,
    n_filters: int | None = None,
    decibel: tuple | None = None,
    log_offset: float | None = None,
    n_cepstra: int | None = None,
) -> tuple[MelConfig, int]:
    """Configuration of the chain, and the fewest samples it can take.

    Window, filters and DCT are the modules' buffers, so their fields keep neutral values. ``decibel`` is (multiplier,
    amin, reference, top_db). Cached: building and validating a configuration takes longer than a short clip.
    """
    if power is None:
        raise ValueError("power must be a positive number, got None: complex spectra are torch.stft's business")
    if isinstance(normalized, str) and normalized not in ("window", "frame_length"):
        raise ValueError(f"normalized must be a bool, 'window' or 'frame_length', got {normalized!r}")
    scale = {}
    if log_offset is not None:
        scale = {"log": "ln", "log_offset": log_offset}
    elif decibel is not None:
        multiplier, amin, reference, top_db = decibel
        scale = {"log": "db", "db_multiplier": multiplier, "log_floor": amin, "db_reference": reference}
        scale |= {"top_db": top_db, "top_db_scope": "channels"}
    config = MelConfig(
        n_fft=n_fft,
        win_length=win_length,
        hop_length=n_fft // 4 if hop_length is None else hop_length,  # torch.stft's default
        framing="center" if center else "valid",
        pad=pad,
        pad_mode=pad_mode if center else "reflect",
        window="rectangular",
        normalized=normalized if isinstance(normalized, str) else bool(normalized),
        power=power,
        filters=None if n_filters is None else "mel",
        n_mels=128 if n_filters is None else n_filters,
        n_mfcc=n_cepstra,
        **scale,
    )
    return config, max(config.min_length, n_fft - 2 * (pad + config.center_pad))


def run(
    waveform: Tensor,
    described: tuple[MelConfig, int],
    window: Tensor | None,
    filters: Tensor | None = None,
    dct: Tensor | None = None,
) -> Tensor:
    """`extract` with the modules' buffers, refusing what torch.stft refuses."""
    config, least = described
    if not isinstance(waveform, Tensor):
        raise TypeError(f"waveform must be a tensor, got {type(waveform).__name__}")
    if waveform.dim() and waveform.shape[-1] < least:
        raise ValueError(
            f"waveform must have at least {least} samples for n_fft={config.n_fft}, framing={config.framing!r}, "
            f"pad_mode={config.pad_mode!r}, pad={config.pad}, got {waveform.shape[-1]}"
        )
    backend = None
    if window is not None:
        if window.dtype is torch.float64 and waveform.dtype is torch.float32:
            waveform = waveform.double()  # a module moved to double computes, and answers, in double
        # Only the reference differentiates with respect to the window and the DCT.
        if window.requires_grad or (dct is not None and dct.requires_grad):
            backend = "reference"
    return extract(waveform, config, window=window, filters=filters, dct=dct, backend=backend)


def child(module: nn.Module, name: str) -> nn.Module:
    """``module.name`` by its dictionary: a module's attribute lookup is slow, a short clip's features quick."""
    found = module._modules.get(name)
    return getattr(module, name) if found is None else found


def table(module: nn.Module, name: str) -> Tensor:
    """``module.name``, a buffer, or the parameter that took its place."""
    found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


def untouched(module: nn.Module, kind: type) -> bool:
    """Whether calling ``module`` does what ``kind`` does and no more, so that a fused chain may stand in for it."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def project(x: Tensor, matrix: Tensor) -> Tensor:
    """``(..., n, time)`` → ``(..., m, time)`` by a matrix (n, m), in at least float32, in the dtype of ``x``."""
    if not x.is_floating_point():
        raise TypeError(f"specgram must be floating point, got {x.dtype}")
    if x.dim() < 2 or x.shape[-2] != matrix.shape[0]:
        raise ValueError(f"specgram must be (..., {matrix.shape[0]}, time), got {tuple(x.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, matrix.dtype), torch.float32)
    with _backend.without_autocast(x.device.type):
        result = matrix.to(dtype).transpose(0, 1) @ x.to(dtype)
    return result.to(x.dtype)


def log(x: Tensor) -> Tensor:
    """``ln(x + 1e-6)``, in at least float32, in the dtype of ``x``."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) + LOG_OFFSET).log().to(x.dtype)
