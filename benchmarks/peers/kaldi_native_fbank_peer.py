"""kaldi-native-fbank: one extractor a clip, as its documentation shows, on one thread. Lists are its fastest way in."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.providers import Provider, Runner


class KaldiNativeFbank(Provider):
    name, package, module = "kaldi-native-fbank", "kaldi_native_fbank", "kaldi_native_fbank"
    differentiable = False
    devices = ("cpu",)

    def build(self, case, device):
        import kaldi_native_fbank as knf

        c = case.config
        options = knf.MfccOptions() if c.n_mfcc else knf.FbankOptions()
        options.frame_opts.samp_freq = c.sample_rate
        options.frame_opts.dither = 0.0
        options.mel_opts.num_bins = c.n_mels
        options.mel_opts.low_freq = c.f_min
        options.use_energy = False
        if c.n_mfcc:
            options.num_ceps = c.n_mfcc
            options.cepstral_lifter = c.lifter
        extractor = knf.OnlineMfcc if c.n_mfcc else knf.OnlineFbank

        def one(samples):
            online = extractor(options)
            online.accept_waveform(c.sample_rate, samples)
            online.input_finished()
            return np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])

        def forward(clips):
            return torch.from_numpy(np.stack([one(samples) for samples in clips]))

        return Runner(forward, prepare=lambda x: x.tolist(), differentiable=False)


PROVIDERS = [KaldiNativeFbank()]
