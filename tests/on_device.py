"""`extract` for tests that hold their tensors on the CPU, whatever device the backend is for."""

from __future__ import annotations

import torch

from mmfast import mel


def extract(waveform, config, *, backend=None, **given):
    """`mmfast.mel.extract`; with ``backend="cuda"`` the tensors go to the GPU and the results come back."""
    if backend != "cuda":
        return mel.extract(waveform, config, backend=backend, **given)
    there = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    out = mel.extract(waveform.cuda(), config, backend=backend, **there)
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()
