"""Windows, filter banks and DCT matrices against the libraries that defined them."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from mmfast.mel import MelConfig, tables


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 400, 401])
@pytest.mark.parametrize("name", ["hann", "hamming", "blackman"])
def test_window_is_torchs(name, n, periodic):
    expected = getattr(torch, f"{name}_window")(n, periodic=periodic, dtype=torch.float64)
    ours = tables.window(MelConfig(n_fft=n, window=name, window_periodic=periodic))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-15)


def test_other_windows():
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    for name, coefficient in (("povey", 0.42), ("blackman", 0.3), ("rectangular", 0.42)):
        config = MelConfig(n_fft=25, window=name, window_periodic=False, blackman_coeff=coefficient)
        expected = kaldi._feature_window_function(name, 25, coefficient, torch.device("cpu"), torch.float64)
        torch.testing.assert_close(tables.window(config), expected, rtol=0, atol=1e-12)
    values = (0.5, -1.0, 2.0)
    assert tables.window(MelConfig(n_fft=3, window=values)).tolist() == list(values)


@pytest.mark.parametrize("sample_rate", [16000, 11025, 22050])
@pytest.mark.parametrize("norm", [None, "slaney"])
@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_filters_are_torchaudios(sample_rate, norm, scale):
    """Bit for bit in float32: checkpoints hold these numbers."""
    functional = pytest.importorskip("torchaudio.functional")
    warnings.simplefilter("ignore")  # of empty filters
    for n_freqs, n_filters, (low, high) in itertools.product(
        (1, 2, 33, 201, 1025), (1, 23, 128), ((0, None), (20, 4000))
    ):
        args = n_freqs, float(low), float(high or sample_rate // 2), n_filters, sample_rate
        ours = tables.mel_filters(*args, norm, scale)
        assert ours.dtype == torch.float32 and torch.equal(ours, functional.melscale_fbanks(*args, norm, scale)), args
        assert torch.equal(tables.linear_filters(*args), functional.linear_fbanks(*args)), args


@pytest.mark.parametrize("htk", [True, False])
@pytest.mark.parametrize("norm", [None, "slaney", 1, 2.5, math.inf])
def test_filters_are_librosas(norm, htk):
    """In float64, where the rate is even or odd."""
    warnings.simplefilter("ignore")  # of empty filters
    filters = pytest.importorskip("librosa.filters")
    for sample_rate, n_fft, f_max in ((22050, 2048, None), (11025, 512, 4000.0), (16000, 64, None)):
        expected = filters.mel(sr=sample_rate, n_fft=n_fft, fmax=f_max, htk=htk, norm=norm, dtype=np.float64)
        config = MelConfig(
            sample_rate=sample_rate, n_fft=n_fft, f_max=f_max, mel_scale="htk" if htk else "slaney", mel_norm=norm
        )
        np.testing.assert_allclose(tables.filters(config).numpy(), expected.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("warp", [1.0, 0.9, 1.1, 1.2])
def test_filters_are_kaldis(warp):
    """Bit for bit what torchaudio computes in float32; the float64 ones are the same to float32's precision."""
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    for n_fft, n_mels, sample_rate, high in itertools.product(
        (64, 400, 512), (4, 23, 80), (8000, 16000), (0.0, -400.0)
    ):
        bank, _ = kaldi.get_mel_banks(n_mels, n_fft, sample_rate, 20.0, high, 100.0, -500.0, warp)
        expected = torch.nn.functional.pad(bank, (0, 1)).T
        f_max = high + sample_rate / 2
        assert torch.equal(tables.kaldi_filters(n_fft, 20.0, f_max, n_mels, sample_rate, warp), expected)
        config = MelConfig(
            sample_rate=sample_rate,
            n_fft=n_fft,
            n_mels=n_mels,
            f_min=20.0,
            f_max=f_max,
            mel_scale="kaldi",
            vtln_warp=warp,
        )
        torch.testing.assert_close(tables.filters(config), expected.double(), rtol=1e-4, atol=1e-4)


def test_empty_filters_stay():
    """128 filters on 201 bins leave some without a bin: columns of zeros, not NaN and not gone."""
    bank = tables.filters(MelConfig(n_mels=128))
    assert bank.shape == (201, 128)
    assert (bank.amax(0) == 0).sum() == 4 and bank.isfinite().all()
    coincident = tables.filters(MelConfig(n_fft=8, n_mels=3, f_max=1e-300))
    assert coincident.isfinite().all()


@pytest.mark.parametrize("norm", ["ortho", None])
def test_dct(norm):
    functional = pytest.importorskip("torchaudio.functional")
    fft = pytest.importorskip("scipy.fft")
    for n_mfcc, n_mels in ((40, 128), (13, 23), (20, 20), (1, 1)):
        assert torch.equal(tables.dct_matrix(n_mfcc, n_mels, norm), functional.create_dct(n_mfcc, n_mels, norm))
        expected = fft.dct(np.eye(n_mels), type=2, norm=norm)[:, :n_mfcc]
        ours = tables.dct(MelConfig(n_mels=n_mels, n_mfcc=n_mfcc, dct_norm=norm))
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-13)


def test_lifter_and_order():
    """Both are columns of the matrix: factors, and C0 at the end times the square root of two."""
    plain = tables.dct(MelConfig(n_mels=23, n_mfcc=13))
    i = torch.arange(13, dtype=torch.float64)
    for kind, shift in (("kaldi", 0), ("librosa", 1)):
        lifted = tables.dct(MelConfig(n_mels=23, n_mfcc=13, lifter=22.0, lifter_kind=kind))
        torch.testing.assert_close(lifted, plain * (1 + 11 * torch.sin(math.pi * (i + shift) / 22)), rtol=1e-13, atol=0)
    htk = tables.dct(MelConfig(n_mels=23, n_mfcc=13, cepstra_order="htk"))
    torch.testing.assert_close(htk, torch.cat((plain[:, 1:], plain[:, :1] * math.sqrt(2)), 1), rtol=1e-14, atol=0)
