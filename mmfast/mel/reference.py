"""The mel slice in plain PyTorch: fallback, oracle and baseline in one.

The forward pass is written so that autograd's first and second derivatives are right and finite everywhere: the
gradient of ``|X| ** p`` and of the logarithm at exactly 0 is taken as 0. Other ties follow PyTorch: ``clamp`` passes
the gradient at equality, ``maximum`` halves it, ``amax`` shares it among equal maxima.
"""

from __future__ import annotations

import math

import torch

from mmfast import _backend
from mmfast.mel import tables
from mmfast.mel.config import MelConfig

_ENERGY_FLOOR = 2.0**-23  # Kaldi: the float32 epsilon


def mel_reference(
    rows: torch.Tensor,
    window: torch.Tensor,
    filters: torch.Tensor | None,
    dct: torch.Tensor | None,
    lengths: torch.Tensor | None,
    group: int,
    seed: int,
    config: MelConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Features of ``rows`` and the number of frames of each, as `MelConfig` describes them.

    Args:
        rows: ``(B, T)``, float32 or float64; float16, bfloat16 and int16 are computed in float32.
        window, filters, dct: ``(win_length,)``, ``(n_freqs, n_mels)``, ``(n_mels, n_mfcc)``, in `compute_dtype`;
            ``None`` for those of ``config``.
        lengths: ``(B,)`` int64, clamped to ``[0, T]``, or ``None``.
        group: number of consecutive rows that share the maximum of ``top_db``; 0 is all of them.
        seed: of the dither noise, see `dither_noise`.

    Returns:
        features ``(B, C, config.frame_count(T))`` (or transposed, by ``config.layout``), contiguous, in the dtype of
        ``rows`` (float32 for int16), and the ``(B,)`` int64 counts.
    """
    # Under autocast the matrix products would drop to half precision, which a logarithm does not forgive.
    with _backend.without_autocast(rows.device.type):
        window, filters, dct = tables.resolve(config, compute_dtype(rows.dtype), rows.device, window, filters, dct)
        return _features(rows, window, filters, dct, lengths, group, seed, config)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What features of a waveform of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _features(rows, window, filters, dct, lengths, group, seed, config) -> tuple[torch.Tensor, torch.Tensor]:
    x = rows.to(compute_dtype(rows.dtype))
    count = config.frame_count(rows.shape[1])
    if lengths is None:
        valid = None
        counts = torch.full((rows.shape[0],), count, dtype=torch.int64, device=rows.device)
    else:
        lengths = lengths.clamp(0, rows.shape[1])
        counts = _frame_counts(lengths, config)
        valid = (torch.arange(count, device=rows.device) < counts[:, None])[:, :, None]

    if config.preemphasis and config.preemphasis_scope == "signal":
        x = torch.cat((x[:, :1], x[:, 1:] - config.preemphasis * x[:, :-1]), dim=1)
    frames = _frames(x, lengths, count, config)
    if valid is not None:
        frames = frames.masked_fill(~valid, 0)
    frames, energy = _prepare(frames, window, seed, config)
    v = _filtered(_power(frames, config), window, filters, config)
    v = _compress(v, valid, group, config)
    if dct is not None:
        v = v @ dct
    v = _with_energy(v, energy, config)
    if valid is not None:
        v = torch.where(valid, v, config.fill)
    if config.layout == "feature_time":
        v = v.transpose(1, 2)
    return v.to(torch.float32 if rows.dtype == torch.int16 else rows.dtype).contiguous(), counts


def _frame_counts(lengths: torch.Tensor, config: MelConfig) -> torch.Tensor:
    counts = torch.div(lengths + config.count_offset, config.hop_length, rounding_mode="floor").clamp(min=0)
    return torch.where(lengths < config.min_length, 0, counts)


def _frames(x: torch.Tensor, lengths: torch.Tensor | None, count: int, config: MelConfig) -> torch.Tensor:
    """``(B, count, win_length)``: the samples under the window, from the signal and what stands outside it."""
    if count == 0 or x.shape[0] == 0:
        return _nothing(x)[:, None, None].expand(-1, count, config.win_length)
    start = config.first_sample
    end = start + (count - 1) * config.hop_length + config.win_length
    spread = _spread if lengths is None else _spread_ragged
    return spread(x, lengths, start, end, config).unfold(1, config.win_length, config.hop_length)


def _nothing(x: torch.Tensor) -> torch.Tensor:
    """A zero for each row that does not depend on ``x`` and yet gives it a gradient, of zeros."""
    return x[:, :0].sum(dim=1)


def _spread(x: torch.Tensor, _: None, start: int, end: int, config: MelConfig) -> torch.Tensor:
    """Samples ``start`` to ``end`` of every row, those outside the signal by the padding rules."""
    if start >= 0 and end <= x.shape[1]:
        return x[:, start:end]
    if config.pad_mode == "constant" or config.framing == "valid":
        first, last = max(0, start), min(end, x.shape[1])
        if first >= last:
            return _nothing(x)[:, None].expand(-1, end - start)
        return torch.nn.functional.pad(x[:, first:last], (first - start, end - last))
    if config.pad:
        x = torch.nn.functional.pad(x, (config.pad, config.pad))
        start, end = start + config.pad, end + config.pad
    length = x.shape[1]
    parts = [x[:, max(0, start) : min(length, end)]]
    if start < 0:
        before = torch.arange(start, min(0, end), device=x.device)
        parts.insert(0, x[:, outside_index(before, length, config.pad_mode)])
    if end > length:
        after = torch.arange(max(length, start), end, device=x.device)
        parts.append(x[:, outside_index(after, length, config.pad_mode)])
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _spread_ragged(x: torch.Tensor, lengths: torch.Tensor, start: int, end: int, config: MelConfig) -> torch.Tensor:
    """As `_spread`, every row ending at its own length: one gather, nothing read past a row's end."""
    if x.shape[1] == 0:
        return _nothing(x)[:, None].expand(-1, end - start)
    position = torch.arange(start, end, device=x.device) + config.pad
    ends = lengths[:, None] + 2 * config.pad
    mode = "constant" if config.framing == "valid" else config.pad_mode
    index = outside_index(position, ends, mode) - config.pad
    inside = (index >= 0) & (index < lengths[:, None])
    return torch.where(inside, x.gather(1, index.clamp(0, x.shape[1] - 1)), 0)


def outside_index(position: torch.Tensor, length: int | torch.Tensor, mode: str) -> torch.Tensor:
    r"""Where ``mode`` finds the sample for each ``position`` of a signal of ``length`` samples.

    Positions inside stay as they are. ``"reflect"`` (edge not repeated), ``"mirror"`` (edge repeated) and
    ``"circular"`` go on for as long as it takes, as Kaldi does for signals shorter than a frame; ``"constant"`` leaves
    the position outside.
    """
    if not isinstance(length, torch.Tensor):
        length = position.new_full((), length)
    if mode == "constant":
        return position.expand(torch.broadcast_shapes(position.shape, length.shape))
    if mode == "replicate":
        return torch.minimum(position.clamp(min=0), length - 1)
    if mode == "circular":
        return position.remainder(length.clamp(min=1))
    if mode == "reflect":
        period = (2 * length - 2).clamp(min=1)
        position = position.remainder(period)
        return torch.minimum(position, period - position)
    position = position.remainder((2 * length).clamp(min=1))
    return torch.minimum(position, 2 * length - 1 - position)


def _prepare(
    frames: torch.Tensor, window: torch.Tensor, seed: int, config: MelConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale, dither, DC removal, energy, pre-emphasis and window: windowed frames and log energy."""
    if config.input_scale != 1:
        frames = frames * config.input_scale
    if config.dither:
        frames = frames + config.dither * dither_noise(seed, *frames.shape, frames.dtype, frames.device)
    if config.remove_dc:
        frames = frames - frames.mean(dim=2, keepdim=True)
    energy = _log_energy(frames, config) if config.energy and config.raw_energy else None
    if config.preemphasis and config.preemphasis_scope == "frame":
        frames = frames - config.preemphasis * torch.cat((frames[..., :1], frames[..., :-1]), dim=2)
    frames = frames * window
    if config.energy and not config.raw_energy:
        energy = _log_energy(frames, config)
    return frames, energy


def _log_energy(frames: torch.Tensor, config: MelConfig) -> torch.Tensor:
    energy = frames.square().sum(dim=2, keepdim=True).clamp(min=_ENERGY_FLOOR).log()
    return energy.clamp(min=math.log(config.energy_floor)) if config.energy_floor else energy


def _power(frames: torch.Tensor, config: MelConfig) -> torch.Tensor:
    """``|X|²``, ``(B, frames, n_freqs)``. Where the window stands in the transform changes only phases."""
    if not frames.numel():  # MKL refuses empty batches
        return frames.sum(dim=2, keepdim=True).expand(-1, -1, config.n_freqs)
    spectrum = torch.fft.rfft(frames, config.n_fft)
    return spectrum.real.square() + spectrum.imag.square()


def _filtered(
    power: torch.Tensor, window: torch.Tensor, filters: torch.Tensor | None, config: MelConfig
) -> torch.Tensor:
    if config.normalized == "window":
        power = power / window.square().sum()
    elif config.normalized == "frame_length":
        power = power / config.n_fft
    if config.power_offset:
        power = power + config.power_offset
    if config.power != 2:
        zero = power == 0  # not > 0, so that NaN stays NaN
        root = power.masked_fill(zero, 1)
        root = root.sqrt() if config.power == 1 else root ** (config.power / 2)
        power = root.masked_fill(zero, 0)
    return power if filters is None else power @ filters


def _compress(v: torch.Tensor, valid: torch.Tensor | None, group: int, config: MelConfig) -> torch.Tensor:
    """Logarithm, dynamic range and affine map of ``(B, frames, bins)``."""
    if config.log:
        v = v.clamp(min=config.log_floor)
        if config.log_offset:
            v = v + config.log_offset
        if not config.log_floor and not config.log_offset:
            zero = v == 0
            v = v.masked_fill(zero, 1).log() if config.log == "ln" else v.masked_fill(zero, 1).log10()
            v = v.masked_fill(zero, -math.inf)
        else:
            v = v.log() if config.log == "ln" else v.log10()
        if config.log == "db":
            v = config.db_multiplier * v
            reference = max(config.log_floor, config.db_reference)
            if reference != 1:
                v = v - config.db_multiplier * math.log10(reference)
    if config.top_db is not None and v.numel():
        seen = v if valid is None else v.masked_fill(~valid, -math.inf)
        top = seen.reshape(-1, (group or v.shape[0]) * v.shape[1] * v.shape[2]).amax(dim=1) - config.top_db
        v = torch.maximum(v, top.repeat_interleave(group or v.shape[0])[:, None, None])
    if config.output_offset:
        v = v + config.output_offset
    return v * config.output_scale if config.output_scale != 1 else v


def _with_energy(v: torch.Tensor, energy: torch.Tensor | None, config: MelConfig) -> torch.Tensor:
    if energy is None:
        return v
    parts = {
        "prepend": (energy, v),
        "append": (v, energy),
        "replace_first": (energy, v[..., 1:]),
        "replace_last": (v[..., :-1], energy),
    }
    return torch.cat(parts[config.energy], dim=2)


def dither_noise(
    seed: int,
    rows: int,
    frames: int,
    n: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    r"""Standard normal noise ``(rows, frames, n)`` that depends on nothing but the seed and the three indices.

    All integers are unsigned 32-bit and wrap. With ``mix`` the finaliser ``x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15;
    x *= 0x846ca68b; x ^= x >> 16`` (lowbias32, https://github.com/skeeto/hash-prospector)::

        key = mix(mix(mix(seed) + row) + frame)
        a, b = mix(key + 2 * sample), mix(key + 2 * sample + 1)
        u, w = ((a >> 8) + 1) * 2**-24, (b >> 8) * 2**-24          in (0, 1] and [0, 1)
        noise = sqrt(-2 ln u) * cos(2 pi w)                        Box-Muller

    ``u`` and ``w`` are exact in float32, so implementations differ by the rounding of ``sqrt``, ``ln`` and ``cos``
    only.
    """

    def mix(x: torch.Tensor) -> torch.Tensor:
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        # 0x846ca68b as a negative number keeps the 64-bit product from overflowing; the low 32 bits are the same.
        x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & 0xFFFFFFFF
        return x ^ (x >> 16)

    def count(size: int) -> torch.Tensor:
        return torch.arange(size, device=device)

    key = mix(mix(torch.full((1, 1, 1), seed, device=device)) + count(rows)[:, None, None])
    key = mix(key + count(frames)[:, None])
    a, b = mix(key + 2 * count(n)), mix(key + 2 * count(n) + 1)
    u, w = ((a >> 8) + 1).to(dtype) * 2.0**-24, (b >> 8).to(dtype) * 2.0**-24
    return (-2 * u.log()).sqrt() * torch.cos(2 * math.pi * w)
