"""Mel and MFCC extraction: waveform → features in one pass, batched and ragged, differentiable."""

from __future__ import annotations

import math

import torch

from mmfast import _backend
from mmfast.mel import direct, op, reference
from mmfast.mel.config import MelConfig
from mmfast.mel.post import deltas, normalize, sliding_normalize
from mmfast.mel.reference import compute_dtype
from mmfast.mel.streaming import Streaming

__all__ = ["MelConfig", "Streaming", "deltas", "extract", "normalize", "sliding_normalize"]


def extract(
    waveform: torch.Tensor,
    config: MelConfig,
    *,
    lengths: torch.Tensor | None = None,
    window: torch.Tensor | None = None,
    filters: torch.Tensor | None = None,
    dct: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Features of a batch of waveforms, as `MelConfig` describes them.

    Shapes: waveform ``(..., T)``; features ``(..., C, frames)`` or, with ``layout="time_feature"``,
    ``(..., frames, C)``, where ``frames = config.frame_count(T)`` and ``C = config.n_features``. Nothing of the size of
    the spectrogram is allocated by the native backends.

    Args:
        waveform: samples, float32 or float64; float16, bfloat16 and int16 are computed in float32. Any strides.
        config: what to compute.
        lengths: integer tensor of the leading shape: the valid samples of each row, in ``[0, T]``. A row then gives
            exactly the features that its first ``lengths`` samples give alone; the frames beyond hold ``config.fill``.
            Rows shorter than ``config.min_length`` have no frames.
        window: ``(win_length,)`` values to use in place of ``config.window``.
        filters: ``(n_fft // 2 + 1, n_mels)`` values to use in place of the configured filter bank. May require a
            gradient.
        dct: ``(n_mels, n_mfcc)`` values to use in place of the DCT (lifter and order included).
        backend: ``"reference"``, or ``"cpu"`` or ``"cuda"`` for tensors there; by default the fastest that can run.

    Returns:
        The features, in the dtype of ``waveform`` (float32 for int16); with ``lengths`` a pair of them and the number
        of frames of each row, an int64 tensor of the leading shape.

    Differentiable, twice, with respect to ``waveform`` and ``filters``; with a ``window`` or ``dct`` that requires a
    gradient the reference computes. Values are those of the reference where they are NaN or infinite. With
    ``config.dither > 0`` the noise follows torch's global CPU generator.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> mel = extract(torch.randn(8, 16000), MelConfig(n_mels=80, log="log10", log_floor=1e-10))
        >>> mel.shape
        torch.Size([8, 80, 81])
    """
    if backend is None and window is None and filters is None and dct is None:
        features = direct.extract(waveform, config, lengths)
        if features is not None:
            return features
    if not isinstance(config, MelConfig):
        raise TypeError(f"config must be a MelConfig, got {type(config).__name__}")
    if not isinstance(waveform, torch.Tensor):
        raise TypeError(f"waveform must be a tensor, got {type(waveform).__name__}")
    if waveform.dtype not in _DTYPES:
        raise TypeError(f"waveform must be float32, float64, float16, bfloat16 or int16, got {waveform.dtype}")
    _backend.check_dense("waveform", waveform)
    if waveform.dim() == 0:
        raise ValueError("waveform must have at least one dimension, (..., T), got a scalar")
    shape = waveform.shape
    if lengths is None:
        if shape[-1] < config.min_length:
            raise ValueError(
                f"waveform must have at least {config.min_length} samples for framing={config.framing!r} with "
                f"pad_mode={config.pad_mode!r}, got {shape[-1]}"
            )
    else:
        lengths = _check_lengths(lengths, waveform)
    if window is not None:
        window = _given("window", window, waveform, (config.win_length,))
    if filters is not None:
        filters = _given("filters", filters, waveform, (config.n_freqs, config.n_mels) if config.filters else None)
    if dct is not None:
        dct = _given("dct", dct, waveform, (config.n_mels, config.n_mfcc) if config.n_mfcc else None)
    scope = config.top_db_scope
    group = 1 if scope == "item" else shape[-2] if scope == "channels" and len(shape) > 2 else 0  # 0 is all rows
    seed = _draw_seed() if config.dither else 0
    if len(shape) == 2:
        rows = waveform
    else:
        rows = waveform.unsqueeze(0) if len(shape) == 1 else waveform.reshape(math.prod(shape[:-1]), shape[-1])
    chosen = _backend.choose("mel", waveform.device, backend)[0]
    if chosen != "reference" and torch.is_grad_enabled() and (_has_gradient(window) or _has_gradient(dct)):
        # The kernels have no gradient for these.
        if backend is not None:
            raise ValueError(f"window and dct have gradients only on backend 'reference', got backend={backend!r}")
        chosen = "reference"
    run = reference.mel_reference if chosen == "reference" else op.mel
    features, counts = run(rows, window, filters, dct, lengths, group, seed, config)
    if len(shape) != 2:
        features = features[0] if len(shape) == 1 else features.view(shape[:-1] + features.shape[1:])
    return features if lengths is None else (features, counts.view(shape[:-1]))


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16)


def _draw_seed() -> int:
    seed = torch.randint(2**31 - 1, (), device="cpu")
    if torch._C._functorch.is_batchedtensor(seed):
        raise ValueError("dither has one noise for all samples under vmap: randomness must be 'same', got 'different'")
    return int(seed)


def _has_gradient(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad is True


def _given(name: str, table: torch.Tensor, waveform: torch.Tensor, shape: tuple | None) -> torch.Tensor:
    """The caller's table in the dtype of the computation."""
    if shape is None:
        raise ValueError(f"{name} does not fit a config without {name}")
    if not isinstance(table, torch.Tensor) or not table.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating point tensor, got {getattr(table, 'dtype', type(table).__name__)}")
    if table.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(table.shape)}")
    if table.device != waveform.device:
        raise ValueError(f"{name} must be on the waveform's device {waveform.device}, got {table.device}")
    return table.to(compute_dtype(waveform.dtype)).contiguous()


def _check_lengths(lengths: torch.Tensor, waveform: torch.Tensor) -> torch.Tensor:
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"lengths must be an int64 or int32 tensor, got {getattr(lengths, 'dtype', type(lengths).__name__)}"
        )
    if lengths.shape != waveform.shape[:-1]:
        raise ValueError(
            f"lengths must have the leading shape {tuple(waveform.shape[:-1])}, got {tuple(lengths.shape)}"
        )
    if lengths.device != waveform.device:
        raise ValueError(f"lengths must be on the waveform's device {waveform.device}, got {lengths.device}")
    lengths = lengths.reshape(-1).to(torch.int64).contiguous()
    _backend.check_within("lengths", lengths, waveform.shape[-1])  # the kernels clamp what cannot be seen here
    return lengths
