"""Several threads may call at once, and worker processes forked after the first call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmfast.mel import MelConfig, extract


def _config(n: int) -> MelConfig:
    return MelConfig(n_fft=64 + 2 * n, hop_length=30, n_mels=12, log="db", log_floor=1e-10, top_db=40.0)


def test_threads(backend):
    """Eight threads, configurations of their own that no one has prepared, forward and backward."""

    def work(n: int) -> list[torch.Tensor]:
        waveform = torch.randn(3, 2000, generator=torch.Generator().manual_seed(n), requires_grad=True)
        out = extract(waveform, _config(n % 5 + n // 40 * 5), backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), waveform)]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(80)))
    for n, results in enumerate(together):
        for ours, alone in zip(results, work(n), strict=True):
            assert torch.equal(ours, alone)


class _Clips(Dataset):
    def __init__(self, clips: torch.Tensor, backend: str) -> None:
        self.clips, self.backend = clips, backend

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> torch.Tensor:
        return extract(self.clips[index], _config(0), backend=self.backend)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_fork(backend):
    """`DataLoader` workers compute what their parent does, which has called before them and has threads."""
    clips = torch.randn(12, 4000)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = extract(clips, _config(0), backend=backend)
        loader = DataLoader(
            _Clips(clips, backend), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
