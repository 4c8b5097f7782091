"""The mel slice as modules."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from mmfast.mel import MelConfig, extract, tables


class MelFrontend(nn.Module):
    r"""`extract` as the first layer of a model: waveform → features, by a `MelConfig`.

    Args:
        config: what to compute.
        trainable_filters: make ``filters`` a parameter, with the configured bank as its first value.
        device, dtype: of the tables; the dtype is float32 by default.

    ``window``, ``filters`` and ``dct`` are buffers and part of the ``state_dict``; what a table does not exist for
    (``config.filters=None``, ``config.n_mfcc=None``) is ``None``. Their current values are what is computed with,
    rounded by ``.half()`` or ``.to(dtype)`` like any other buffer.

    Shapes: ``(..., T)`` → ``(..., C, frames)``, or as ``config.layout`` says; with ``lengths`` of the leading shape a
    pair with the numbers of frames. The features have the waveform's dtype and are computed in float32 or float64 also
    under autocast.

    Raises:
        TypeError, ValueError: ``trainable_filters`` without filters; otherwise as `extract`.

    Example:
        >>> frontend = MelFrontend(MelConfig(n_mels=80, log="ln", log_offset=1e-6), trainable_filters=True)
        >>> frontend(torch.randn(4, 16000)).shape
        torch.Size([4, 80, 81])
    """

    window: Tensor
    filters: Tensor | None
    dct: Tensor | None

    def __init__(
        self,
        config: MelConfig,
        trainable_filters: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, MelConfig):
            raise TypeError(f"config must be a MelConfig, got {type(config).__name__}")
        if trainable_filters and config.filters is None:
            raise ValueError("trainable_filters needs filters, got config.filters=None")
        self.config = config
        self.trainable_filters = trainable_filters

        def table(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, dtype or torch.float32).contiguous()

        self.register_buffer("window", table(tables.window(config)))
        filters = table(tables.filters(config))
        if trainable_filters:
            self.filters = nn.Parameter(filters)
        else:
            self.register_buffer("filters", filters)
        self.register_buffer("dct", table(tables.dct(config)))

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Features, and with ``lengths`` the pair of them and the numbers of frames."""
        return extract(waveform, self.config, lengths=lengths, window=self.window, filters=self.filters, dct=self.dct)

    def extra_repr(self) -> str:
        """What differs from `MelConfig`'s defaults."""
        default = MelConfig()
        changed = [
            f"{field.name}={getattr(self.config, field.name)!r}"
            for field in dataclasses.fields(MelConfig)
            if getattr(self.config, field.name) != getattr(default, field.name)
        ]
        return ", ".join(changed + ["trainable_filters=True"] * self.trainable_filters)
