"""What follows the features: regression deltas and mean and variance normalisation, ragged batches included.

Features are ``(..., C, frames)`` with ``dim=-1`` or ``(..., frames, C)`` with ``dim=-2``: ``dim`` is the time axis.
``lengths`` has the leading shape (without ``C`` and frames) and counts valid frames, as `extract` returns them; an item
then gives what its valid frames give alone, and the frames beyond hold 0. All functions are differentiable, run on any
device, and compute float16 and bfloat16 in float32.
"""

from __future__ import annotations

import torch

from mmfast.mel.reference import outside_index

_MODES = ("replicate", "reflect", "constant", "circular")


def deltas(
    features: torch.Tensor,
    win_length: int = 5,
    mode: str = "replicate",
    *,
    lengths: torch.Tensor | None = None,
    dim: int = -1,
) -> torch.Tensor:
    r"""Regression deltas ``d[t] = sum_n n (c[t + n] - c[t - n]) / (2 sum_n n²)``, ``n`` from 1 to ``(win_length - 1) //
    2``.

    HTK's formula, with torchaudio's names (``torchaudio.functional.compute_deltas``). Twice applied it gives ΔΔ.

    Args:
        features: floating point, see above.
        win_length: frames of the regression, ≥ 3; an even one counts as the odd one below it.
        mode: frames outside, before the first and after the last valid one: ``"replicate"``, ``"reflect"``,
            ``"constant"`` (zeros) or ``"circular"``.
        lengths, dim: see above.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
    win_length = _count("win_length", win_length, 3)
    x, ends, valid = _by_time(features, lengths, dim)
    n, time = (win_length - 1) // 2, x.shape[-1]
    if time == 0:
        return torch.zeros_like(features)
    position = torch.arange(-n, time + n, device=x.device)
    index = outside_index(position, time if ends is None else ends, mode)
    inside = (index >= 0) & (index < (time if ends is None else ends))
    index = index.clamp(0, time - 1)
    if ends is None:
        padded = torch.where(inside, x[..., index], 0)
    else:
        padded = torch.where(inside, x.gather(-1, index.expand(*x.shape[:-1], -1)), 0)
    total = sum(k * (padded[..., n + k : n + k + time] - padded[..., n - k : n - k + time]) for k in range(1, n + 1))
    out = total / (n * (n + 1) * (2 * n + 1) / 3)
    if valid is not None:
        out = out.masked_fill(~valid, 0)
    return out.to(features.dtype).movedim(-1, dim)


def normalize(
    features: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    mean: bool = True,
    variance: bool = True,
    eps: float = 1e-5,
    eps_on: str = "std",
    ddof: int = 0,
    dim: int = -1,
) -> torch.Tensor:
    r"""Mean and variance normalisation of every feature over the frames of its utterance (CMVN).

    ``(c - mean) / (std + eps)`` with ``eps_on="std"`` (NeMo: ``eps=1e-5, ddof=1``), ``(c - mean) / sqrt(var + eps)``
    with ``eps_on="variance"`` (transformers' SeamlessM4T: ``eps=1e-7, ddof=1``); the variance is
    ``sum (c - mean)² / (n - ddof)``, and 0 where ``n <= ddof``. Without variance and ``eps`` there is no division.

    Args:
        features, lengths, dim: see above.
        mean, variance: what to normalise; the variance is about the mean in any case.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    if eps_on not in ("std", "variance"):
        raise ValueError(f"eps_on must be 'std' or 'variance', got {eps_on!r}")
    if eps < 0 or ddof < 0:
        raise ValueError(f"eps and ddof must not be negative, got eps={eps}, ddof={ddof}")
    x, ends, valid = _by_time(features, lengths, dim)
    n = x.new_tensor(x.shape[-1]) if ends is None else ends.to(x.dtype)
    kept = x if valid is None else x.masked_fill(~valid, 0)
    average = kept.sum(-1, keepdim=True) / n.clamp(min=1)
    centred = kept - average if valid is None else (kept - average).masked_fill(~valid, 0)
    out = centred if mean else kept
    if variance:
        var = centred.square().sum(-1, keepdim=True) / (n - ddof).clamp(min=1)
        var = torch.where(n > ddof, var, 0)
        scale = _safe_sqrt(var) + eps if eps_on == "std" else _safe_sqrt(var + eps)
        out = out / torch.where(scale == 0, 1, scale)
    return out.to(features.dtype).movedim(-1, dim)


def sliding_normalize(
    features: torch.Tensor,
    cmn_window: int = 600,
    min_cmn_window: int = 100,
    center: bool = False,
    norm_vars: bool = False,
    *,
    lengths: torch.Tensor | None = None,
    dim: int = -1,
) -> torch.Tensor:
    r"""Mean (and variance) normalisation over a sliding window of frames: Kaldi's ``apply-cmvn-sliding``.

    With ``center`` the window of frame ``t`` is the ``cmn_window`` frames from ``t - cmn_window // 2``, else the
    ``cmn_window`` frames before ``t`` and ``t`` itself, and at least the first ``min_cmn_window`` frames of the
    utterance; at the ends it is shifted inside. The values are those of ``torchaudio.functional.sliding_window_cmn``,
    from differences of cumulative sums in float64 rather than a loop over frames. A window without variance gives 0
    (there: NaN).

    Args:
        features, lengths, dim: see above (torchaudio's layout is ``dim=-2``).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    cmn_window = _count("cmn_window", cmn_window, 1)
    min_cmn_window = _count("min_cmn_window", min_cmn_window, 0)
    x, ends, valid = _by_time(features, lengths, dim)
    time = x.shape[-1]
    if time == 0:
        return torch.zeros_like(features)
    wide = x.double() if valid is None else x.double().masked_fill(~valid, 0)
    # Less the utterance's mean: the same result, and squares that cancel less.
    wide = wide - wide.sum(-1, keepdim=True) / (time if ends is None else ends.clamp(min=1))
    first, last = _windows(time, ends, cmn_window, min_cmn_window, center, x.device)
    n = (last - first).clamp(min=1)
    average = _window_sum(wide, first, last) / n
    out = wide - average
    if norm_vars:
        squares = wide.square()
        var = _window_sum(squares, first, last) / n - average.square()
        # What the rounding of sums over the utterance can leave is no variance.
        flat = (n == 1) | (var * n <= 64 * torch.finfo(torch.float64).eps * squares.sum(-1, keepdim=True))
        out = (out / var.masked_fill(flat, 1).sqrt()).masked_fill(flat, 0)
    if valid is not None:
        out = out.masked_fill(~valid, 0)
    return out.to(features.dtype).movedim(-1, dim)


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _by_time(
    features: torch.Tensor, lengths: torch.Tensor | None, dim: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Features with time last, lengths to broadcast against them, and which frames are valid."""
    if not isinstance(features, torch.Tensor) or not features.dtype.is_floating_point:
        found = getattr(features, "dtype", type(features).__name__)
        raise TypeError(f"features must be a floating point tensor, got {found}")
    if not features.dim() or not -features.dim() <= dim < features.dim():
        raise ValueError(f"dim must be an axis of features of shape {tuple(features.shape)}, got {dim}")
    x = features.movedim(dim, -1)
    if features.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if lengths is None:
        return x, None, None
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        found = getattr(lengths, "dtype", type(lengths).__name__)
        raise TypeError(f"lengths must be an int64 or int32 tensor, got {found}")
    if x.dim() < 2 or lengths.shape != x.shape[:-2]:
        raise ValueError(f"lengths must have the leading shape {tuple(x.shape[:-2])}, got {tuple(lengths.shape)}")
    if lengths.device != features.device:
        raise ValueError(f"lengths must be on the features' device {features.device}, got {lengths.device}")
    ends = lengths.to(torch.int64).clamp(0, x.shape[-1])[..., None, None]
    return x, ends, torch.arange(x.shape[-1], device=x.device) < ends


def _safe_sqrt(x: torch.Tensor) -> torch.Tensor:
    """Square root with gradient 0 at 0."""
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _windows(
    time: int, ends: torch.Tensor | None, width: int, least: int, center: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """First frame of each frame's window, and one past its last."""
    t = torch.arange(time, device=device)
    end = torch.tensor(time, device=device) if ends is None else ends
    first = t - width // 2 if center else t - width
    last = first.clamp(min=0) + width if center else (t + 1).clamp(min=least)
    over = (last - end).clamp(min=0)
    return (first.clamp(min=0) - over).clamp(min=0), last - over


def _window_sum(x: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    total = torch.nn.functional.pad(x.cumsum(-1), (1, 0))
    if first.dim() == 1:
        return total[..., last] - total[..., first]
    last, first = (i.expand(*x.shape[:-1], -1) for i in (last, first))
    return total.gather(-1, last) - total.gather(-1, first)
