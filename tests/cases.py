"""Named configurations with a waveform shape each: the shapes that are tuned, then one case for every way to differ."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from mmfast.mel import MelConfig

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A configuration and the waveform shape it is tested with."""

    name: str
    config: MelConfig
    shape: tuple[int, ...] = (2, 3000)

    def waveform(self, dtype: torch.dtype = torch.float32, draw: int = 0) -> torch.Tensor:
        """Noise at speech level with a loud part, a part 120 dB below it and, where the logarithm has a floor, silence.

        The same values in every dtype, as far as it holds them; others for another ``draw``.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + draw)
        x = 0.1 * torch.randn(self.shape, generator=generator)
        n = self.shape[-1]
        if self.config.log is None or self.config.log_floor or self.config.log_offset:
            x[..., n // 2 : n // 2 + n // 8] = 0
            x[..., n // 2 + n // 4 :] *= 1e-6
        x[..., : n // 8] *= 5
        return x.to(dtype)


_LN = {"log": "ln", "log_floor": 2.0**-23}
_KALDI = {
    "n_fft": 512,
    "win_length": 400,
    "hop_length": 160,
    "framing": "valid",
    "window": "povey",
    "window_periodic": False,
    "window_position": "start",
    "remove_dc": True,
    "preemphasis": 0.97,
    "mel_scale": "kaldi",
    "f_min": 20.0,
    "layout": "time_feature",
    **_LN,
}
_WHISPER = {
    "n_fft": 400,
    "hop_length": 160,
    "n_mels": 80,
    "mel_scale": "slaney",
    "mel_norm": "slaney",
    "drop_last": True,
    "log": "log10",
    "log_floor": 1e-10,
    "top_db": 8.0,
    "output_offset": 4.0,
    "output_scale": 0.25,
}
_DB = {"log": "db", "log_floor": 1e-10}


def _small(**changes) -> MelConfig:
    return MelConfig(**{"n_fft": 64, "hop_length": 20, "n_mels": 10, **changes})


TUNED = (
    Case("whisper", MelConfig(**_WHISPER, top_db_scope="batch"), (2, 16000)),
    Case("whisper_item", MelConfig(**_WHISPER), (2, 16000)),
    Case("mfcc_db", MelConfig(n_mfcc=40, top_db=80.0, top_db_scope="channels", **_DB), (2, 2, 8000)),
    Case("mfcc_log", MelConfig(n_mfcc=40, log="ln", log_offset=1e-6), (2, 8000)),
    Case(
        "mel_2048",
        MelConfig(sample_rate=22050, n_fft=2048, hop_length=512, mel_scale="slaney", mel_norm="slaney"),
        (2, 22050),
    ),
    Case("kaldi_fbank", MelConfig(n_mels=80, **_KALDI), (2, 8000)),
    Case("kaldi_mfcc", MelConfig(n_mels=23, n_mfcc=13, lifter=22.0, **_KALDI), (2, 8000)),
    Case("log_mel_short", MelConfig(hop_length=160, n_mels=80, log="ln", log_offset=1e-6), (5, 1600)),
    Case("mel_1024", MelConfig(n_fft=1024, hop_length=256, n_mels=80, log="ln", log_offset=1e-6), (2, 8000)),
    Case("mel_4096", MelConfig(n_fft=4096, hop_length=1024, log="ln", log_offset=1e-6), (2, 16000)),
)

_SIZES = tuple(
    Case(
        f"n_fft_{n}",
        MelConfig(n_fft=n, filters="mel" if n > 30 else None, n_mels=min(20, n), **_LN),
        (2, max(40, 3 * n + 7)),
    )
    for n in (1, 2, 3, 7, 31, 101, 225, 256, 401, 600, 882, 1009, 1536)
)

_FRAMINGS = tuple(
    Case(
        f"{framing}_{mode}{'_padded' * (pad > 0)}",
        _small(framing=framing, pad_mode=mode, win_length=win, pad=pad, **_LN),
        (2, 1001),
    )
    for framing, win, pad in (("center", 64, 0), ("kaldi", 50, 0), ("kaldi", 31, 13))
    for mode in ("reflect", "constant", "replicate", "circular", "mirror")
    if pad == 0 or mode != "constant"
)

_ODD = (
    Case("one_frame", _small(framing="valid", **_LN), (3, 64)),
    Case("valid_padded", _small(framing="valid", pad=9, drop_last=True, **_LN)),
    Case("center_padded", _small(pad=17, **_LN)),
    Case("wide_center_pad", _small(center_pad=100, **_LN)),
    Case("no_center_pad", _small(center_pad=0, **_LN)),
    Case("hop_beyond_frame", _small(hop_length=150, **_LN)),
    Case("hop_one", _small(n_fft=16, hop_length=1, n_mels=3, **_LN), (2, 100)),
    Case("kaldi_hop_beyond_frame", _small(win_length=15, hop_length=40, framing="kaldi", pad_mode="mirror")),
    Case("window_center", _small(win_length=41, **_LN)),
    Case("window_start", _small(win_length=41, window_position="start", **_LN)),
    Case("window_values", _small(win_length=3, window=(0.5, -1.0, 0.25))),
    Case("blackman", _small(window="blackman", blackman_coeff=0.4, window_periodic=False)),
    Case("rectangular", _small(window="rectangular")),
    Case("normalized_window", _small(normalized="window", window="hamming", win_length=50)),
    Case("normalized_length", _small(normalized="frame_length")),
    Case("power_1", _small(power=1.0, **_LN)),
    Case("power_half", _small(power=0.5)),
    Case("power_3", _small(power=3.0, **_DB)),
    Case("power_offset", _small(power=1.0, power_offset=1e-5, log="ln", log_offset=2.0**-24)),
    Case("spectrum", _small(filters=None)),
    Case("spectrum_magnitude_db", _small(filters=None, power=1.0, db_multiplier=20.0, log="db", log_floor=1e-5)),
    Case("spectrum_energy", _small(filters=None, energy="replace_first", **_LN)),
    Case("linear_filters", _small(filters="linear", f_min=100.0, f_max=7000.0, **_LN)),
    Case("linear_mfcc", _small(filters="linear", n_mels=20, n_mfcc=8, top_db=80.0, **_DB)),
    Case("lp_norm", _small(mel_norm=2.0, mel_scale="slaney")),
    Case("empty_filters", _small(n_fft=32, n_mels=40, **_LN)),
    Case("log_without_floor", _small(log="log10")),
    Case("db_reference", _small(log="db", log_floor=1e-5, db_reference=0.02, top_db=30.0)),
    Case("top_db_batch", _small(top_db=25.0, top_db_scope="batch", **_DB), (2, 2, 1500)),
    Case("top_db_channels", _small(top_db=25.0, top_db_scope="channels", **_DB), (2, 3, 1500)),
    Case("top_db_0", _small(top_db=0.0, **_DB)),
    Case("affine", _small(output_offset=-0.3, output_scale=2.5, layout="time_feature")),
    Case("energy_prepend", MelConfig(n_mels=23, energy="prepend", energy_floor=1e-4, **_KALDI)),
    Case("energy_append", MelConfig(n_mels=23, energy="append", raw_energy=False, **_KALDI)),
    Case("energy_replace_first", MelConfig(n_mels=23, n_mfcc=13, energy="replace_first", **_KALDI)),
    Case(
        "energy_htk",
        MelConfig(n_mels=23, n_mfcc=13, energy="replace_last", cepstra_order="htk", lifter=22.0, **_KALDI),
    ),
    Case("htk_order", MelConfig(n_mels=23, n_mfcc=13, cepstra_order="htk", **_KALDI)),
    Case("kaldi_padded", MelConfig(n_mels=23, **{**_KALDI, "framing": "kaldi", "pad_mode": "mirror"})),
    Case("vtln", MelConfig(n_mels=23, vtln_warp=1.1, **_KALDI)),
    Case("dct_unscaled", _small(n_mfcc=10, dct_norm=None, lifter=7.0, lifter_kind="librosa", **_DB)),
    Case(
        "signal_preemphasis",
        MelConfig(
            n_fft=512,
            win_length=400,
            hop_length=160,
            pad_mode="constant",
            window_periodic=False,
            preemphasis=0.97,
            preemphasis_scope="signal",
            mel_scale="slaney",
            mel_norm="slaney",
            n_mels=64,
            log="ln",
            log_offset=2.0**-24,
        ),
    ),
    Case("frame_preemphasis", _small(window="hamming", preemphasis=0.9, input_scale=3.0, remove_dc=True, **_LN)),
)

CASES = {case.name: case for case in (*TUNED, *_SIZES, *_FRAMINGS, *_ODD)}
assert len(CASES) == len(TUNED) + len(_SIZES) + len(_FRAMINGS) + len(_ODD), "a name is used twice"
