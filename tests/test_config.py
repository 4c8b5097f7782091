"""`MelConfig` as a value: equal, hashed, copied, sent to other processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmfast.mel import MelConfig

CONFIG = MelConfig(hop_length=160, n_mels=80, log="ln", log_offset=1e-6)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(make):
    made = make(CONFIG)
    assert made == CONFIG and hash(made) == hash(CONFIG) and {CONFIG: 1}[made] == 1


def test_unpickled_in_another_process():
    """A text has another hash there."""
    program = (
        "import pickle, sys; from mmfast.mel import MelConfig; sent = pickle.loads(sys.stdin.buffer.read());"
        "own = MelConfig(hop_length=160, n_mels=80, log='ln', log_offset=1e-6);"
        "assert sent == own; assert hash(sent) == hash(own); print({own: 'found'}[sent])"
    )
    run = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(CONFIG), capture_output=True, check=False)
    assert run.stdout.strip() == b"found", run.stderr.decode()


def test_numbers_of_other_libraries():
    """They become Python's, whose text JSON knows, also in fields that are without effect."""
    config = MelConfig(
        n_fft=np.int64(64), n_mels=torch.tensor(10), f_max=np.float32(8000), mel_norm=np.float64(2), power=np.float32(1)
    )
    assert config == MelConfig(n_fft=64, n_mels=10, f_max=8000, mel_norm=2, power=1)
    spectrum = MelConfig(filters=None, n_mels=np.int64(80), f_max=np.float64(8000), mel_norm=np.float32(1))
    for made in (config, spectrum):
        assert MelConfig.from_key(made.key) == made


def test_fill_of_nan_is_equal_to_itself():
    assert MelConfig(fill=float("nan")) == MelConfig(fill=float("nan")) != MelConfig()
    assert MelConfig() != object()
