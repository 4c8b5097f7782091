"""`Streaming`: the frames of `extract`, from chunks of any size, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmfast.mel.config import MelConfig

_REASONS = {
    "top_db": "its maximum is known only at the end of the signal; extract the whole signal instead",
    "circular": "circular padding begins the signal with its end; choose another pad_mode",
    "dither": "the noise of dither cannot be drawn as extract draws it for the whole signal; set dither=0",
}


class Streaming:
    r"""Features of a signal that arrives in chunks: frame for frame those of `extract` on the whole signal.

    `push` takes the next samples and returns the frames that they complete; `flush` ends the signal, returns the frames
    that only the end decides (those that reach into the padding on the right) and makes the object ready for the next
    signal. The results of all the pushes and the flush, concatenated in time, are ``extract(signal, config)``. A frame
    passes through the same operations as offline; where the backend computes each frame by itself, the result is the
    same bit for bit.

    Frame ``f`` is complete when ``f * hop_length + first_sample + win_length`` samples have arrived (with
    ``window_position="center"`` counted to the end of its ``n_fft`` samples). With ``framing="center"`` or ``"kaldi"``
    nothing comes out before the padding on the left is known, with ``drop_last`` no frame that may still be the last.

    Memory: between calls at most one frame, the context that the padding mirrors and, in signals so short that the
    padding is not yet defined, the samples so far.

    Args:
        config: any `MelConfig` except those with ``top_db``, ``dither`` or circular padding.
        shape: leading shape of the chunks, ``(*shape, t)``; ``()`` is a single signal.
        dtype: of the chunks: float32, float64, float16, bfloat16 or int16; the features are as for `extract`.
        device: of the chunks.
        window, filters, dct, backend: as for `extract`.

    No gradient flows: chunks are taken as constants.

    Raises:
        ValueError: the configuration cannot stream.

    Example:
        >>> stream = Streaming(MelConfig(hop_length=160, n_mels=80, log="log10", log_floor=1e-10))
        >>> parts = [stream.push(chunk) for chunk in torch.randn(16000).split(1000)] + [stream.flush()]
        >>> torch.cat(parts, dim=-1).shape
        torch.Size([80, 101])
    """

    def __init__(
        self,
        config: MelConfig,
        shape: Sequence[int] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        window: torch.Tensor | None = None,
        filters: torch.Tensor | None = None,
        dct: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(config, MelConfig):
            raise TypeError(f"config must be a MelConfig, got {type(config).__name__}")
        pads = config.framing == "kaldi" or (config.framing == "center" and config.center_pad > 0)
        if config.top_db is not None:
            raise ValueError(f"config with top_db={config.top_db:g} cannot stream: {_REASONS['top_db']}")
        if config.dither:
            raise ValueError(f"config with dither={config.dither:g} cannot stream: {_REASONS['dither']}")
        if pads and config.pad_mode == "circular":
            raise ValueError(f"config with pad_mode='circular' cannot stream: {_REASONS['circular']}")
        if dtype not in _COMPUTE:
            raise TypeError(f"dtype must be float32, float64, float16, bfloat16 or int16, got {dtype}")
        self.config = config
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._compute = _COMPUTE[dtype]
        self._returned = dtype if dtype.is_floating_point else self._compute
        self._options = {"window": window, "filters": filters, "dct": dct, "backend": backend}
        # Pre-emphasis of the signal comes before the padding: it is done on arrival; the last sample is carried.
        self._emphasis = config.preemphasis if config.preemphasis_scope == "signal" else 0.0
        self._offline = config.replace(preemphasis=0.0, preemphasis_scope="frame") if self._emphasis else config
        inner = {"framing": "valid", "center_pad": 0, "pad": 0, "drop_last": False}
        if config.framing == "kaldi":  # its frames are the window's samples alone
            inner["window_position"] = "start"
        self._inner = self._offline.replace(**inner)
        self._frame = self._inner.frame_length
        # Positions are counted on the signal with its `pad` zeros. Frame 0 begins at `_begin`.
        self._begin = -config.center_pad
        if config.framing == "kaldi":
            self._begin = config.hop_length // 2 - config.win_length // 2
        self._left = max(0, -self._begin)
        right = config.win_length - config.win_length // 2 if config.framing == "kaldi" else config.center_pad
        mode = config.pad_mode if pads else "constant"
        # Last samples that the padding on the right may read; first samples before the padding on the left is known and
        # neither has to reflect twice.
        self._context = {"constant": 0, "replicate": 1, "reflect": right + 1, "mirror": right}[mode]
        most = max(self._left, right)
        needed = {"constant": 0, "replicate": 1, "reflect": most + 1, "mirror": most}[mode]
        self._needed = max(needed, config.min_length + config.pad)
        self._mode = mode
        self._empty = torch.empty(*self.shape, 0, dtype=self._compute, device=device)
        self.device = self._empty.device
        self.reset()

    def reset(self) -> None:
        """Forget the signal so far."""
        self._samples = 0  # received
        self._next = 0  # index of the next frame to return
        self._last = None  # the sample before the next chunk, for pre-emphasis
        self._started = False  # whether the padding on the left is in the buffer
        self._buffer = self._zeros(self.config.pad)
        self._offset = 0  # position of the buffer's first sample

    @property
    def buffered(self) -> int:
        """Samples held for each signal, padding included."""
        return self._buffer.shape[-1]

    @torch.no_grad()
    def push(self, chunk: torch.Tensor) -> torch.Tensor:
        """Features of the frames, if any, that ``chunk`` completes: ``(*shape, C, frames)`` or ``(*shape, frames, C)``.

        Args:
            chunk: the next samples, ``(*shape, t)`` with any ``t >= 0``, of the dtype and device given at construction.
        """
        self._check(chunk)
        chunk = self._emphasise(chunk.to(self._compute))
        self._samples += chunk.shape[-1]
        self._buffer = torch.cat((self._buffer, chunk), dim=-1)
        if not self._started:
            if self._buffer.shape[-1] < self._needed:
                return self._features(0, 0)
            self._start()
        arrived = self._offset + self._buffer.shape[-1]
        whole = (arrived - self._begin - self._frame) // self.config.hop_length + 1
        features = self._features(self._next, min(whole, self.config.frame_count(self._samples)))
        self._forget(arrived)
        return features

    @torch.no_grad()
    def flush(self) -> torch.Tensor:
        """End of the signal: the features of its remaining frames, in the layout of `push`. Then as new.

        Raises:
            ValueError: the signal had fewer than ``config.min_length`` samples (as `extract` does).
        """
        try:
            if not self._started:  # so short that its padding had to wait for the end: nothing has been returned
                return self._run(self._buffer[..., self.config.pad :], self._offline)
            frames = self.config.frame_count(self._samples)
            length = self._samples + 2 * self.config.pad
            end = (frames - 1) * self.config.hop_length + self._begin + self._frame
            tail = torch.cat((self._buffer, self._zeros(self.config.pad)), dim=-1)
            if end > length:
                tail = torch.cat((tail, self._beyond(tail, end - length)), dim=-1)
            self._buffer = tail
            return self._features(self._next, frames)
        finally:
            self.reset()

    def _check(self, chunk: torch.Tensor) -> None:
        if not isinstance(chunk, torch.Tensor):
            raise TypeError(f"chunk must be a tensor, got {type(chunk).__name__}")
        if chunk.dtype != self.dtype:
            raise TypeError(f"chunk must be {self.dtype} as this stream was made for, got {chunk.dtype}")
        if chunk.dim() == 0 or chunk.shape[:-1] != self.shape:
            want = ", ".join([*map(str, self.shape), "t"])
            raise ValueError(f"chunk must have shape ({want}), got {tuple(chunk.shape)}")
        if chunk.device != self.device:
            raise ValueError(f"chunk must be on {self.device} as this stream was made for, got {chunk.device}")

    def _zeros(self, count: int) -> torch.Tensor:
        return self._empty.new_zeros((*self.shape, count))

    def _emphasise(self, chunk: torch.Tensor) -> torch.Tensor:
        """``x[t] - c x[t-1]`` over the chunks; the first sample of the signal stays."""
        if not self._emphasis or chunk.shape[-1] == 0:
            return chunk
        first = chunk[..., :1] if self._last is None else chunk[..., :1] - self._emphasis * self._last
        self._last = chunk[..., -1:].clone()
        return torch.cat((first, chunk[..., 1:] - self._emphasis * chunk[..., :-1]), dim=-1)

    def _start(self) -> None:
        """Put the padding on the left before the samples, now that all it reads is there."""
        n = self._left
        if n:
            if self._mode == "constant":
                head = self._zeros(n)
            elif self._mode == "replicate":
                head = self._buffer[..., :1].expand(*self.shape, n)
            else:
                edge = 1 if self._mode == "reflect" else 0
                head = self._buffer[..., edge : n + edge].flip(-1)
            self._buffer = torch.cat((head, self._buffer), dim=-1)
            self._offset = -n
        self._started = True

    def _beyond(self, tail: torch.Tensor, count: int) -> torch.Tensor:
        """``count`` samples of padding on the right of a signal that ends with ``tail``."""
        if self._mode == "constant":
            return self._zeros(count)
        if self._mode == "replicate":
            return tail[..., -1:].expand(*self.shape, count)
        last = tail.shape[-1] - (1 if self._mode == "reflect" else 0)
        return tail[..., last - count : last].flip(-1)

    def _features(self, first: int, stop: int) -> torch.Tensor:
        """Frames ``first`` to ``stop`` (excluded), whose samples are all in the buffer."""
        if stop <= first:
            size = (self.config.n_features, 0) if self.config.layout == "feature_time" else (0, self.config.n_features)
            return self._empty.new_empty((*self.shape, *size), dtype=self._returned)
        at = first * self.config.hop_length + self._begin - self._offset
        span = (stop - first - 1) * self.config.hop_length + self._frame
        self._next = stop
        return self._run(self._buffer[..., at : at + span], self._inner)

    def _run(self, samples: torch.Tensor, config: MelConfig) -> torch.Tensor:
        from mmfast.mel import extract  # the package imports this module

        return extract(samples, config, **self._options).to(self._returned)

    def _forget(self, arrived: int) -> None:
        """Drop what neither a later frame nor the padding on the right reads."""
        keep = min(self._next * self.config.hop_length + self._begin, arrived - self._context)
        drop = max(0, keep - self._offset)
        if drop:
            drop = min(drop, self._buffer.shape[-1])
            self._buffer = self._buffer[..., drop:].clone()  # a view would keep the dropped samples alive
            self._offset += drop


_COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.int16: torch.float32,
}
