"""`Streaming` gives the frames of `extract`, whatever the chunks, and holds little."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.mel import MelConfig, Streaming, extract

CONFIGS = {
    "center_reflect": MelConfig(n_fft=64, hop_length=20, n_mels=12, log="ln", log_floor=1e-10),
    "center_odd": MelConfig(n_fft=25, win_length=20, hop_length=7, n_mels=6),
    "center_constant": MelConfig(n_fft=64, hop_length=20, n_mels=12, pad_mode="constant", log="db", log_floor=1e-10),
    "center_replicate": MelConfig(n_fft=32, hop_length=10, n_mels=8, pad_mode="replicate"),
    "center_mirror": MelConfig(n_fft=32, hop_length=10, n_mels=8, pad_mode="mirror"),
    "center_zero_pad": MelConfig(n_fft=32, hop_length=10, n_mels=8, pad=13),
    "center_more_zeros_than_reflected": MelConfig(n_fft=32, hop_length=10, n_mels=8, pad=40),
    "center_wide_pad": MelConfig(n_fft=16, hop_length=5, n_mels=5, center_pad=37),
    "center_no_pad": MelConfig(n_fft=32, win_length=24, hop_length=10, n_mels=8, center_pad=0, pad_mode="circular"),
    "start_window": MelConfig(n_fft=64, win_length=40, hop_length=16, n_mels=12, window_position="start"),
    "whisper_framing": MelConfig(n_fft=64, hop_length=16, n_mels=12, drop_last=True, log="log10", log_floor=1e-10),
    "valid": MelConfig(n_fft=32, hop_length=10, n_mels=8, framing="valid"),
    "valid_padded_drop_last": MelConfig(n_fft=32, hop_length=10, n_mels=8, framing="valid", pad=9, drop_last=True),
    "hop_beyond_frame": MelConfig(n_fft=16, hop_length=45, n_mels=5),
    "hop_beyond_frame_valid": MelConfig(n_fft=16, hop_length=45, n_mels=5, framing="valid", layout="time_feature"),
    "hop_one": MelConfig(n_fft=8, hop_length=1, n_mels=3),
    "kaldi_mirror": MelConfig(
        n_fft=64, win_length=50, hop_length=20, n_mels=12, framing="kaldi", pad_mode="mirror", window="povey",
        window_periodic=False, window_position="start", remove_dc=True, preemphasis=0.97, mel_scale="kaldi", f_min=20,
        energy="prepend", energy_floor=1.0, log="ln", log_floor=2.0**-23, n_mfcc=9, lifter=22, layout="time_feature",
    ),
    "kaldi_reflect": MelConfig(n_fft=32, win_length=30, hop_length=11, n_mels=8, framing="kaldi"),
    "kaldi_replicate_pad": MelConfig(
        n_fft=32, win_length=30, hop_length=11, n_mels=8, framing="kaldi", pad_mode="replicate", pad=17, drop_last=True
    ),
    "kaldi_constant": MelConfig(n_fft=32, hop_length=10, n_mels=8, framing="kaldi", pad_mode="constant"),
    "kaldi_hop_beyond_frame": MelConfig(n_fft=16, hop_length=45, n_mels=5, framing="kaldi", pad_mode="mirror"),
    "signal_preemphasis": MelConfig(
        n_fft=32, hop_length=10, n_mels=8, preemphasis=0.97, preemphasis_scope="signal", pad_mode="constant",
        log="ln", log_offset=2.0**-24,
    ),
    "signal_preemphasis_reflect": MelConfig(
        n_fft=32, hop_length=10, n_mels=8, preemphasis=0.9, preemphasis_scope="signal", pad=5, energy="append"
    ),
    "mfcc": MelConfig(
        n_fft=64, hop_length=20, n_mels=12, n_mfcc=7, log="db", log_floor=1e-10, energy="replace_first",
        raw_energy=False,
    ),
    "spectrogram": MelConfig(n_fft=24, hop_length=9, filters=None, power=1.0, normalized=True),
}  # fmt: skip


def time_dim(config):
    return -1 if config.layout == "feature_time" else -2


def stream(config, signal, sizes, **options):
    """All features of ``signal`` pushed in chunks of ``sizes`` (the rest in one)."""
    streaming = Streaming(config, signal.shape[:-1], dtype=signal.dtype, **options)
    parts, at = [], 0
    for size in [*sizes, signal.shape[-1]]:
        parts.append(streaming.push(signal[..., at : at + size]))
        at += size
    parts.append(streaming.flush())
    return torch.cat(parts, dim=time_dim(config))


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(actual, expected):
    """Equal but for the order in which a matrix product of another number of frames may add."""
    assert actual.shape == expected.shape
    tight = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tight, atol=tight)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(length=st.integers(0, 260), sizes=st.lists(st.integers(0, 60), max_size=30), seed=st.integers(0, 9))
def test_any_chunks_give_the_offline_frames(name, length, sizes, seed):
    config = CONFIGS[name]
    signal = noise(length, seed=seed)
    if length < config.min_length:
        with pytest.raises(ValueError, match=f"at least {config.min_length} samples"):
            stream(config, signal, sizes)
    else:
        assert_same(stream(config, signal, sizes), extract(signal, config))


@pytest.mark.parametrize("name", CONFIGS)
def test_short_signals_sample_by_sample(name):
    config = CONFIGS[name]
    for extra in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55):
        length = config.min_length + extra
        signal = noise(length, seed=length)
        assert_same(stream(config, signal, [1] * length), extract(signal, config))


@pytest.mark.parametrize("name", ["center_reflect", "kaldi_mirror", "whisper_framing", "signal_preemphasis"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), (1, 1)])
def test_leading_shapes(name, shape):
    signal = noise(*shape, 300)
    assert_same(stream(CONFIGS[name], signal, [0, 1, 57, 0, 100]), extract(signal, CONFIGS[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("name", ["center_reflect", "kaldi_mirror", "signal_preemphasis_reflect"])
def test_dtypes_follow_extract(name, dtype):
    signal = (noise(2, 400) * 1000).round().to(dtype)
    expected = extract(signal, CONFIGS[name])
    actual = stream(CONFIGS[name], signal, [33, 1, 90])
    assert actual.dtype == expected.dtype
    assert_same(actual, expected)


def test_frames_come_as_soon_as_they_are_complete():
    config = CONFIGS["valid"]  # 32 samples, every 10
    streaming = Streaming(config, dtype=torch.float64)
    given_frames = [streaming.push(noise(1)).shape[-1] for _ in range(62)]
    assert [i + 1 for i, n in enumerate(given_frames) if n] == [32, 42, 52, 62]
    assert set(given_frames) == {0, 1}
    centred = Streaming(CONFIGS["center_constant"], dtype=torch.float64)  # frame f ends at sample 20 f + 32
    assert [centred.push(noise(n)).shape[-1] for n in (31, 1, 19, 1, 40)] == [0, 1, 0, 1, 2]
    last = Streaming(CONFIGS["whisper_framing"], dtype=torch.float64)  # frame f is sure once 16 (f + 1) have arrived
    assert [last.push(noise(n)).shape[-1] for n in (32, 1, 15, 16)] == [0, 1, 1, 1]


def test_flush_makes_it_new():
    config = CONFIGS["signal_preemphasis_reflect"]
    first, second = noise(200, seed=1), noise(150, seed=2)
    streaming = Streaming(config, dtype=torch.float64)
    for signal in (first, second):
        parts = [streaming.push(chunk) for chunk in signal.split(17)] + [streaming.flush()]
        assert_same(torch.cat(parts, dim=-1), extract(signal, config))
    streaming.push(first)
    streaming.reset()
    assert_same(torch.cat([streaming.push(second), streaming.flush()], dim=-1), extract(second, config))


def test_failed_flush_makes_it_new():
    config = CONFIGS["center_reflect"]
    streaming = Streaming(config, dtype=torch.float64)
    streaming.push(noise(10))
    with pytest.raises(ValueError, match="at least 33 samples"):
        streaming.flush()
    signal = noise(100)
    assert_same(torch.cat([streaming.push(signal), streaming.flush()], dim=-1), extract(signal, config))


def test_given_tables_are_used():
    config = CONFIGS["mfcc"]
    tables = {
        "window": noise(64, seed=3).abs(),
        "filters": noise(33, 12, seed=4).abs(),
        "dct": noise(12, 7, seed=5),
    }
    signal = noise(2, 300)
    assert_same(stream(config, signal, [50] * 4, backend="reference", **tables), extract(signal, config, **tables))
    assert not torch.allclose(stream(config, signal, [], **tables), extract(signal, config))


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_bounded(name):
    config = CONFIGS[name]
    context = config.center_pad + config.pad + config.win_length  # at most what either padding reads
    limit = config.frame_length + context + max(config.min_length, context) + 2
    streaming = Streaming(config, dtype=torch.float64)
    held = []
    for _ in range(80):
        streaming.push(noise(37))
        held.append(streaming.buffered)
        # What is reachable is what is held: no view into a larger storage.
        assert streaming._buffer.untyped_storage().nbytes() == 8 * streaming.buffered
    assert max(held) <= limit
    assert max(held[40:]) <= max(held[:40])


def test_chunks_may_be_overwritten_after_push():
    config = CONFIGS["center_reflect"]
    signal = noise(400)
    streaming = Streaming(config, dtype=torch.float64)
    parts = []
    for chunk in signal.split(23):
        buffer = chunk.clone()
        parts.append(streaming.push(buffer))
        buffer.fill_(float("nan"))
    assert_same(torch.cat([*parts, streaming.flush()], dim=-1), extract(signal, config))


def test_no_graph_is_kept():
    streaming = Streaming(CONFIGS["center_reflect"])
    features = streaming.push(torch.randn(500, requires_grad=True))
    assert not features.requires_grad
    assert not streaming._buffer.requires_grad


@pytest.mark.parametrize("name", [n for n in CONFIGS if "signal" not in n])
def test_native_frames_are_the_same_bit_for_bit(name, native):
    signal = noise(3, 700, dtype=torch.float32)
    expected = extract(signal, CONFIGS[name], backend=native)
    assert torch.equal(stream(CONFIGS[name], signal, [1, 30, 100, 0, 77], backend=native), expected)


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"top_db": 80.0, "log": "db"}, "top_db=80"),
        ({"pad_mode": "circular"}, "pad_mode='circular'"),
        ({"pad_mode": "circular", "framing": "kaldi"}, "pad_mode='circular'"),
        ({"dither": 1.0}, "dither=1"),
    ],
)
def test_rejects_configurations_that_need_the_whole_signal(changes, what):
    with pytest.raises(ValueError, match=f"{what} cannot stream"):
        Streaming(MelConfig(n_fft=32, n_mels=8, **changes))


def test_rejects_wrong_arguments():
    with pytest.raises(TypeError, match="config must be a MelConfig"):
        Streaming({"n_fft": 400})
    with pytest.raises(TypeError, match="dtype must be"):
        Streaming(MelConfig(), dtype=torch.int32)
    streaming = Streaming(MelConfig(), (2,))
    with pytest.raises(TypeError, match="chunk must be a tensor, got list"):
        streaming.push([0.0])
    with pytest.raises(TypeError, match=r"chunk must be torch.float32 .* got torch.float64"):
        streaming.push(torch.zeros(2, 5, dtype=torch.float64))
    for shape in ((), (5,), (3, 5), (1, 2, 5)):
        with pytest.raises(ValueError, match=r"chunk must have shape \(2, t\)"):
            streaming.push(torch.zeros(shape))
    with pytest.raises(ValueError, match="chunk must be on cpu"):
        streaming.push(torch.zeros(2, 5, device="meta"))
