"""`mmfast.compat.librosa` against librosa."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.fft
import scipy.signal
import torch
from numerics import assert_compiles_with_symbols

from mmfast.compat import librosa as ours

theirs = pytest.importorskip("librosa")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore:Empty filters"),
    pytest.mark.filterwarnings("ignore:n_fft=.* is too large"),
]

# librosa rounds its filters to float32 unless asked; with float64 ones nothing but the order of sums differs.
EXACT = {"dtype": np.float64}


def signal(*shape: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(shape)
    return x * np.geomspace(1e-3, 1.0, shape[-1])


def assert_close(actual, expected, rtol=1e-9):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


FRAMES = [
    {},
    {"n_fft": 512, "hop_length": 128},
    {"n_fft": 512, "hop_length": None},
    {"n_fft": 512, "win_length": 400, "hop_length": 160},
    {"n_fft": 512, "win_length": 401, "hop_length": None},
    {"n_fft": 401, "hop_length": 100},
    {"n_fft": 400, "hop_length": 399},
    {"n_fft": 400, "center": False},
    {"n_fft": 513, "win_length": 200, "center": False},
]
WINDOWS = [
    "hann", "hamming", "blackman", "boxcar", "ones", "blackmanharris", "nuttall", "bartlett", ("kaiser", 4.0),
    ("tukey", 0.3), 6.0, np.hanning(400), list(np.hamming(400)), scipy.signal.windows.parzen, np.blackman,
]  # fmt: skip
MELS = [
    {},
    {"n_mels": 40},
    {"n_mels": 20, "fmin": 100.0, "fmax": 6000.0},
    {"htk": True},
    {"norm": None},
    {"norm": 1},
    {"norm": 2.0, "htk": True},
    {"norm": np.inf},
    {"n_mels": 1},
    {"n_mels": 200},
]


@pytest.mark.parametrize("frame", FRAMES, ids=str)
@pytest.mark.parametrize("shape", [(9000,), (2, 3, 5001)])
def test_framing(shape, frame):
    y = signal(*shape)
    expected = theirs.feature.melspectrogram(y=y, **frame, **EXACT)
    assert_close(ours.melspectrogram(y=y, **frame, **EXACT), expected)


@pytest.mark.parametrize("pad_mode", ["constant", "reflect", "edge", "symmetric"])
@pytest.mark.parametrize("length", [1, 2, 100, 256, 257, 700, 5000])
@pytest.mark.parametrize("hop_length", [128, 200])
def test_padding(hop_length, length, pad_mode):
    options = {"n_fft": 512, "hop_length": hop_length, "pad_mode": pad_mode}
    y = signal(2, length) + 1
    expected = theirs.feature.melspectrogram(y=y, **options, **EXACT)
    assert_close(ours.melspectrogram(y=y, **options, **EXACT), expected)


@pytest.mark.parametrize("hop_length", [256, 480])
def test_last_frame_reflects_the_whole_signal(hop_length):
    """librosa 0.11 pads the end of only half a frame of samples, one short of what ``reflect`` needs."""
    y, options = signal(10 * hop_length) + 1, {"n_fft": 512, "hop_length": hop_length, "window": "boxcar"}
    whole = np.pad(y, 256, mode="reflect")
    expected = theirs.feature.melspectrogram(y=whole, center=False, **options, **EXACT)
    actual = ours.melspectrogram(y=y, pad_mode="reflect", **options, **EXACT)
    assert_close(actual, expected)
    direct = theirs.feature.melspectrogram(y=y, pad_mode="reflect", **options, **EXACT)
    assert_close(actual[:, :-1], direct[:, :-1])


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: getattr(w, "__name__", str(w)[:20]))
@pytest.mark.parametrize("n_fft", [400, 512])
def test_windows(n_fft, window):
    options = {"y": signal(3000), "n_fft": n_fft, "win_length": 400, "window": window}
    assert_close(ours.melspectrogram(**options, **EXACT), theirs.feature.melspectrogram(**options, **EXACT))


@pytest.mark.parametrize("mel", MELS, ids=str)
@pytest.mark.parametrize(("sr", "n_fft"), [(22050, 2048), (16000, 400), (44100, 513), (8000.0, 256)])
def test_filters(sr, n_fft, mel):
    if "fmax" in mel:
        mel = mel | {"fmax": min(mel["fmax"], sr / 2)}
    assert_close(
        ours.filters.mel(sr=sr, n_fft=n_fft, **mel, **EXACT), theirs.filters.mel(sr=sr, n_fft=n_fft, **mel, **EXACT)
    )
    single = ours.mel(sr=sr, n_fft=n_fft, **mel)
    assert_close(single, theirs.filters.mel(sr=sr, n_fft=n_fft, **mel), rtol=1e-6)
    y = signal(4000)
    assert_close(
        ours.melspectrogram(y=y, sr=sr, n_fft=n_fft, **mel, **EXACT),
        theirs.feature.melspectrogram(y=y, sr=sr, n_fft=n_fft, **mel, **EXACT),
    )


@pytest.mark.parametrize("power", [2.0, 1.0, 1.5, 0.5, 3.0])
def test_power(power):
    y = signal(6000)
    expected = theirs.feature.melspectrogram(y=y, power=power, **EXACT)
    assert_close(ours.melspectrogram(y=y, power=power, **EXACT), expected)


@pytest.mark.parametrize("n_fft", [2048, 512, None])
def test_from_spectrogram(n_fft):
    S = np.abs(theirs.stft(signal(2, 6000), n_fft=512)) ** 2
    expected = theirs.feature.melspectrogram(S=S, n_fft=n_fft, n_mels=30, **EXACT)
    assert_close(ours.melspectrogram(S=S, n_fft=n_fft, n_mels=30, **EXACT), expected)


@pytest.mark.parametrize("dct_type", [1, 2, 3])
@pytest.mark.parametrize("norm", ["ortho", None])
@pytest.mark.parametrize("lifter", [0, 22, 40.5])
@pytest.mark.parametrize("n_mfcc", [1, 13, 40])
def test_mfcc(n_mfcc, lifter, norm, dct_type):
    options = {"n_mfcc": n_mfcc, "lifter": lifter, "norm": norm, "dct_type": dct_type}
    y = signal(5000)
    others = {"n_mels": 64, "n_fft": 512, "mel_norm": None, "sr": 16000, "htk": True}
    expected = theirs.feature.mfcc(y=y, **options, **others, **EXACT)
    assert_close(ours.mfcc(y=y, **options, **others, **EXACT), expected, rtol=1e-8)
    S = theirs.power_to_db(theirs.feature.melspectrogram(y=y, n_mels=64))
    assert_close(ours.mfcc(S=S, **options), theirs.feature.mfcc(S=S, **options))


def test_mfcc_defaults():
    y = signal(20000)
    assert_close(ours.feature.mfcc(y=y), theirs.feature.mfcc(y=y), rtol=1e-5)
    assert_close(ours.mfcc(y=y, **EXACT), theirs.feature.mfcc(y=y, **EXACT), rtol=1e-8)


def test_mfcc_no_more_than_the_filters():
    y = signal(5000)
    expected = theirs.feature.mfcc(y=y, n_mels=16, n_mfcc=20, **EXACT)
    assert expected.shape[0] == 16
    assert_close(ours.mfcc(y=y, n_mels=16, n_mfcc=20, **EXACT), expected, rtol=1e-8)


def test_mfcc_maximum():
    """Over the whole array, as librosa 0.11; by item, as each channel alone."""
    y = np.stack([signal(5000), signal(5000, seed=1) * 1e-5])
    whole = theirs.feature.mfcc(y=y, **EXACT)
    assert_close(ours.mfcc(y=y, **EXACT), whole, rtol=1e-8)
    alone = np.stack([theirs.feature.mfcc(y=row, **EXACT) for row in y])
    assert np.abs(alone - whole).max() > 1
    assert_close(ours.mfcc(y=y, top_db_scope="item", **EXACT), alone, rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_default_precision(dtype):
    y = signal(2, 8000).astype(dtype)
    assert_close(ours.melspectrogram(y=y), theirs.feature.melspectrogram(y=y), rtol=2e-6)
    # In decibels; the quietest bands, 80 dB down, hold rounding noise of float32.
    np.testing.assert_allclose(ours.mfcc(y=y), theirs.feature.mfcc(y=y), rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", ["reversed", "strided", "read-only", "big-endian", "fortran"])
def test_arrays_of_any_kind(kind):
    y = signal(2, 8000)
    y = {
        "reversed": y[:, ::-1],
        "strided": y[:, ::2],
        "read-only": np.broadcast_to(y[:1], (2, 8000)),
        "big-endian": y.astype(">f8"),
        "fortran": np.asfortranarray(y),
    }[kind]
    expected = theirs.feature.melspectrogram(y=np.ascontiguousarray(y, dtype=np.float64), **EXACT)
    assert_close(ours.melspectrogram(y=y, **EXACT), expected)


REFERENCES = [1.0, 0.0, 2.5, -3.0, np.max, np.median, np.mean]


@pytest.mark.parametrize("ref", REFERENCES, ids=lambda ref: getattr(ref, "__name__", str(ref)))
@pytest.mark.parametrize(("amin", "top_db"), [(None, 80.0), (1e-3, None), (1e-7, 20.0), (1e-5, 0)])
@pytest.mark.parametrize("name", ["power_to_db", "amplitude_to_db"])
def test_decibels(name, amin, top_db, ref):
    options = {"ref": ref, "top_db": top_db} | ({} if amin is None else {"amin": amin})
    S = np.abs(signal(3, 40, 50)) ** 2
    S[0, :4] = 0
    expected = getattr(theirs, name)(S, **options)
    kept = S.copy()
    assert_close(getattr(ours, name)(S, **options), expected, rtol=1e-12)
    np.testing.assert_array_equal(S, kept)
    if ref is not np.median:
        tensor = getattr(ours, name)(torch.from_numpy(S), **options)
        assert_close(tensor.numpy(), expected, rtol=1e-12)


def test_decibels_of_other_types():
    for name in ("power_to_db", "amplitude_to_db"):
        a, t = getattr(ours, name), getattr(theirs, name)
        assert_close(a(0.25), t(0.25))
        assert np.ndim(a(0.25)) == 0 and isinstance(a(0.25), np.floating)
        assert_close(a([1.0, 2.0]), t([1.0, 2.0]))
        assert_close(a(np.arange(6).reshape(2, 3)), t(np.arange(6).reshape(2, 3)))
        z = signal(2, 30) + 1j * signal(2, 30, seed=1)
        with pytest.warns(UserWarning, match="phase"):
            expected = t(z)
        with pytest.warns(UserWarning, match="phase"):
            assert_close(a(z), expected)


def test_decibel_scopes():
    S = np.abs(signal(2, 3, 10, 20)) * np.geomspace(1e-6, 1, 6).reshape(2, 3, 1, 1)
    items = np.stack([[theirs.power_to_db(x, top_db=10) for x in row] for row in S])
    channels = np.stack([theirs.power_to_db(row, top_db=10) for row in S])
    assert_close(ours.power_to_db(S, top_db=10, top_db_scope="item"), items)
    assert_close(ours.power_to_db(S, top_db=10, top_db_scope="channels"), channels)
    assert_close(ours.power_to_db(S[0, 0], top_db=10, top_db_scope="channels"), items[0, 0])


def pipeline(y, n_mfcc=None, power=2.0, n_fft=512, hop=128, n_mels=40):
    """The same features by torch.stft and librosa's filters, in autograd."""
    window = torch.from_numpy(theirs.filters.get_window("hann", n_fft))
    stft = torch.stft(y, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    bank = torch.from_numpy(theirs.filters.mel(sr=22050, n_fft=n_fft, n_mels=n_mels, **EXACT))
    mel = bank @ stft.abs() ** power
    if n_mfcc is None:
        return mel
    db = 10 * mel.clamp(min=1e-10).log10()
    db = torch.maximum(db, db.max() - 80)
    dct = torch.from_numpy(scipy.fft.dct(np.eye(n_mels), norm="ortho", axis=0)[:n_mfcc])
    return dct @ db


@pytest.mark.parametrize(("n_mfcc", "power"), list(itertools.product([None, 13], [2.0, 1.0])))
def test_gradient(n_mfcc, power):
    options = {"n_fft": 512, "hop_length": 128, "n_mels": 40, "power": power}
    function = ours.melspectrogram if n_mfcc is None else ours.mfcc
    options |= {} if n_mfcc is None else {"n_mfcc": n_mfcc}
    y = torch.from_numpy(signal(2, 4000)).requires_grad_()
    expected, actual = pipeline(y, n_mfcc, power), function(y=y, **options)
    assert isinstance(actual, torch.Tensor)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(expected)
    (e,), (a,) = (torch.autograd.grad(v, y, cotangent) for v in (expected, actual))
    torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9 * float(e.abs().max()))


@pytest.mark.parametrize("name", ["power_to_db", "amplitude_to_db"])
@pytest.mark.parametrize("ref", [1.0, np.max, np.mean])
def test_decibel_gradients(name, ref):
    S = torch.from_numpy(signal(2, 3, 4)).abs().add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: getattr(ours, name)(s, ref=ref, top_db=15.0), S)


def test_gradients_from_spectrograms():
    S = torch.from_numpy(np.abs(signal(33, 5))).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ours.melspectrogram(S=s, n_mels=8), S)
    assert torch.autograd.gradcheck(lambda s: ours.mfcc(S=s, n_mfcc=8, lifter=5), S)


@pytest.mark.parametrize("window", [("tukey", 0.3), "hann"])
def test_short_tensors_reflect_with_gradients(window):
    y = torch.from_numpy(signal(20)).requires_grad_()
    options = {"n_fft": 64, "hop_length": 16, "pad_mode": "reflect", "n_mels": 8, "window": window}
    assert_close(
        ours.melspectrogram(y=y, **options).detach().numpy(), ours.melspectrogram(y=y.detach().numpy(), **options)
    )
    assert torch.autograd.gradcheck(lambda t: ours.melspectrogram(y=t, **options), y)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("melspectrogram", {}, "y, the samples"),
        ("melspectrogram", {"y": np.zeros(4000, dtype=np.int16)}, "y must be floating point"),
        ("melspectrogram", {"y": signal(4000), "pad_mode": "wrap"}, "pad_mode"),
        ("melspectrogram", {"y": signal(400), "center": False}, "too large"),
        ("melspectrogram", {"y": signal(4000), "window": np.ones(7)}, "window must have"),
        ("melspectrogram", {"y": signal(4000), "n_fft": 512, "win_length": 600}, "win_length"),
        ("melspectrogram", {"y": signal(4000), "hop_length": 0}, "hop_length"),
        ("melspectrogram", {"y": signal(4000), "fmax": 20000.0}, "f_max"),
        ("melspectrogram", {"y": signal(4000), "nmels": 3}, "nmels"),
        ("melspectrogram", {"y": "speech.wav"}, "y must be"),
        ("mfcc", {"y": signal(4000), "lifter": -1}, "lifter"),
        ("mfcc", {"y": signal(4000), "top_db_scope": "row"}, "top_db_scope"),
        ("mfcc", {"S": signal(40, 9), "norm": "slaney"}, "norm must be 'ortho' or None, got 'slaney'"),
        ("power_to_db", {"S": signal(5), "amin": 0}, "amin"),
        ("power_to_db", {"S": signal(5), "top_db": -1}, "top_db"),
        ("power_to_db", {"S": signal(5), "top_db_scope": "row"}, "top_db_scope"),
    ],
)
def test_rejects(function, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(ours, function)(**options)


@pytest.mark.parametrize("name", ["melspectrogram", "mfcc"])
def test_compile_with_numbers_as_symbols(name):
    assert_compiles_with_symbols(lambda y: getattr(ours, name)(y=y, n_fft=256), torch.randn(3000))


def test_compile_of_a_short_reflected_signal():
    assert_compiles_with_symbols(lambda y: ours.mfcc(y=y, n_fft=512, pad_mode="reflect"), torch.randn(100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["melspectrogram", "mfcc"])
def test_given_spectrograms_are_multiplied_in_float32(name, dtype):
    S = torch.rand(129, 7).to(dtype)
    expected = getattr(ours, name)(S=S.double()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(getattr(ours, name)(S=S), expected)
