"""`mmfast.swap` of NeMo's front end: NeMo is not installed, a class with its steps and its names stands for it."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import types

import pytest
import torch
from torch import nn

import mmfast
from mmfast.compat import nemo

HOME = "nemo.collections.asr.parts.preprocessing.features"
SMALL = {"sample_rate": 4000, "n_window_size": 64, "n_window_stride": 32, "nfilt": 8}


def make_class(extra_frames: int = 0):
    """The class, with the attributes, buffers and instance-wise ``no_grad`` of NeMo 2."""

    class FilterbankFeatures(nn.Module):
        def __init__(self, **options):
            super().__init__()
            like = nemo.FilterbankFeatures(**(SMALL | options))
            kept = (
                "sample_rate win_length hop_length n_fft exact_pad stft_pad_amount normalize log log_zero_guard_type "
                "log_zero_guard_value dither frame_splicing nfilt preemph pad_to pad_value mag_power use_grads "
                "nb_augmentation_prob _rng max_length"
            )
            for name in kept.split():
                setattr(self, name, getattr(like, name))
            if self.nb_augmentation_prob > 0:
                self._nb_max_fft_bin = like._nb_max_fft_bin
            self.register_buffer("window", None if options.get("window") == "none" else like.window)
            self.register_buffer("fb", like.fb)
            if not self.use_grads:
                self.forward = torch.no_grad()(self.forward)
                self.forward_packed = torch.no_grad()(self.forward_packed)

        def get_seq_len(self, seq_len):
            around = self.n_fft // 2 * 2 if self.stft_pad_amount is None else 2 * self.stft_pad_amount
            return ((seq_len + around - self.n_fft) // self.hop_length).long() + extra_frames

        def stft(self, x):
            spectrum = torch.stft(
                x,
                self.n_fft,
                self.hop_length,
                self.win_length,
                self.window.float(),
                center=not self.exact_pad,
                pad_mode="constant",
                return_complex=True,
            )
            return torch.view_as_real(spectrum)

        def forward_packed(self, x):
            return self.stft(x[None])[0]

        def forward(self, x, seq_len, linear_spec=False):
            frames = self.get_seq_len(seq_len)
            if self.exact_pad:
                x = nn.functional.pad(x, (self.stft_pad_amount,) * 2)
            if self.training and self.dither > 0:
                x = x + self.dither * torch.randn_like(x)
            if self.preemph is not None:
                emphasised = torch.cat([x[:, :1], x[:, 1:] - self.preemph * x[:, :-1]], 1)
                x = emphasised.masked_fill(torch.arange(x.shape[1]) >= seq_len[:, None], 0)
            v = (self.stft(x).square().sum(-1) + (1e-5 if self.use_grads else 0)).sqrt()
            if self.training and self.nb_augmentation_prob > 0:
                for row in v:
                    if self._rng.random() < self.nb_augmentation_prob:
                        row[self._nb_max_fft_bin :] = 0
            v = v**self.mag_power
            if linear_spec:
                return v, frames
            v = self.fb.to(v.dtype) @ v
            if self.log:
                v = (v + self.log_zero_guard_value).log()
            v = torch.cat([v] * self.frame_splicing, 1)
            valid = (torch.arange(v.shape[2]) < frames[:, None])[:, None]
            if self.normalize == "per_feature":
                count = frames[:, None, None]
                centred = v - torch.where(valid, v, 0).sum(2, keepdim=True) / count
                v = centred / (
                    (torch.where(valid, centred, 0).square().sum(2, keepdim=True) / (count - 1)).sqrt() + 1e-5
                )
            elif self.normalize and "fixed_mean" in self.normalize:
                mean, std = (
                    torch.tensor(self.normalize[key]).view(v.shape[0], -1, 1) for key in ("fixed_mean", "fixed_std")
                )
                v = (v - mean) / std
            v = v.masked_fill(~valid, self.pad_value)
            return nn.functional.pad(
                v, (0, -v.shape[2] % self.pad_to if self.pad_to else 0), value=self.pad_value
            ), frames

    return FilterbankFeatures


class Recogniser(nn.Module):
    """The class where NeMo's ``AudioToMelSpectrogramPreprocessor`` has it, and a layer."""

    def __init__(self, featurizer):
        super().__init__()
        self.preprocessor = nn.Module()
        self.preprocessor.featurizer = featurizer
        self.head = nn.Linear(featurizer.nfilt * featurizer.frame_splicing, 3)

    def forward(self, wave, length):
        features, frames = self.preprocessor.featurizer(wave.float(), length)
        return self.head(features.to(self.head.weight.dtype).mT), frames


@pytest.fixture(params=[0])
def theirs(request, monkeypatch):
    cls = make_class(request.param)
    parts = HOME.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    cls.__module__, cls.__qualname__ = HOME, "FilterbankFeatures"
    sys.modules[HOME].FilterbankFeatures = cls
    return cls


def batch():
    return torch.randn(3, 1000), torch.tensor([1000, 700, 300])


OPTIONS = [
    {},
    {"use_grads": True, "normalize": None, "frame_splicing": 2},
    {"nb_augmentation_prob": 0.5, "nb_max_freq": 1000, "pad_to": 0, "dither": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_swapped(theirs, options):
    model, (wave, length) = Recogniser(theirs(**options, rng=random.Random(1))), batch()
    featurizer = model.preprocessor.featurizer
    before = dict(vars(featurizer))
    wave.requires_grad_()

    def run():
        torch.manual_seed(0)
        featurizer._rng.seed(1)
        features, frames = featurizer(wave, length)
        grad = torch.autograd.grad(features.square().sum(), wave)[0] if features.requires_grad else None
        return (
            features,
            frames,
            grad,
            featurizer(wave, length, linear_spec=True)[0][:, :, :9],
            featurizer.forward_packed(wave[0]),
        )

    expected = run()
    report = mmfast.swap(model, check=batch())
    (row,) = report.swapped
    assert (row.path, row.new) == ("preprocessor.featurizer", "mmfast.compat.nemo.FilterbankFeatures"), report
    assert isinstance(featurizer, theirs) and isinstance(featurizer, nemo.FilterbankFeatures)
    assert type(featurizer).forward is nemo.FilterbankFeatures.forward and "forward" not in vars(featurizer)
    assert expected[0].requires_grad == bool(options.get("use_grads"))
    for found, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    copied = copy.deepcopy(model)  # NeMo's own would go on with the module that was copied
    copied.preprocessor.featurizer.fb.zero_()
    assert copied(*batch())[0].isfinite().all() and featurizer.fb.any()
    report.undo()
    assert type(featurizer) is theirs and vars(featurizer) == before


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickled(theirs, protocol):
    """As torch.save and spawned processes do with a whole model. Without gradients NeMo's own cannot be pickled."""
    featurizer = theirs(use_grads=True).eval()
    pickle.dumps(featurizer, protocol)
    mmfast.swap(featurizer)
    loaded = pickle.loads(pickle.dumps(featurizer, protocol))
    assert type(loaded) is type(featurizer) and isinstance(loaded, theirs)
    for found, wanted in zip(loaded(*batch()), featurizer(*batch()), strict=True):
        assert found.shape == wanted.shape
    wave, length = batch()
    torch.testing.assert_close(loaded(wave, length)[0], featurizer(wave, length)[0])


def test_half(theirs):
    """Converted after the swap, as trainers do: features are computed in float32 from the waveform."""
    inputs = batch()
    expected, _ = theirs().eval().half()(*inputs)
    model = Recogniser(theirs()).eval()
    assert mmfast.swap(model).swapped
    found, _ = model.half().preprocessor.featurizer(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"exact_pad": True}, "exact_pad=True"),
        ({"preemph": None}, "preemph=None"),
        ({"window": "none"}, "window='none'"),
        ({"normalize": {"fixed_mean": [0.0] * 24, "fixed_std": [1.0] * 24}}, "it does not run like NeMo's"),
    ],
)
def test_left_alone(theirs, options, why):
    (row,) = mmfast.swap(Recogniser(theirs(**options))).left_alone
    assert row.why.startswith(why)


def test_instances_left_alone(theirs):
    replaced, copied = theirs(), copy.deepcopy(theirs())
    plain = replaced.forward
    replaced.forward = lambda *inputs: plain(*inputs)

    class Derived(theirs):
        pass

    for featurizer, why in (
        (replaced, "its forward was replaced"),
        (copied, "its forward was replaced"),
        (Derived(), "a subclass of"),
    ):
        report = mmfast.swap(Recogniser(featurizer))
        assert not report.swapped and report.left_alone[0].why.startswith(why)


@pytest.mark.parametrize("theirs", [1], indirect=True)
def test_other_version(theirs):
    (row,) = mmfast.swap(Recogniser(theirs())).left_alone
    assert row.why == "this version of NeMo counts frames otherwise"
