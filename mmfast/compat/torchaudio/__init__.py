"""torchaudio's mel and MFCC transforms, computed in one pass: change the import and keep the program.

    >>> import mmfast.compat.torchaudio.transforms as T  # was: import torchaudio.transforms as T
    >>> mfcc = T.MFCC(sample_rate=16000, n_mfcc=40, melkwargs={"n_fft": 400, "hop_length": 160, "n_mels": 80})
    >>> mfcc(torch.randn(1, 16000)).shape
    torch.Size([1, 40, 101])

Names, signatures, defaults, attributes, buffers and ``state_dict`` keys are those of torchaudio 2.11, so that a
checkpoint loads both ways; torchaudio itself is not needed. What differs is written at each function, and is of four
kinds: half precision and autocast are computed in float32 and returned in the input's dtype, where torchaudio fails or
rounds to half precision in between; arguments that do not fit raise ``ValueError`` or ``TypeError`` naming the
argument, where torchaudio passes on ``RuntimeError`` or ``AssertionError``; complex spectra (``power=None``) are not
offered; ``torch.jit.script`` does not take the modules, ``torch.jit.trace``, ``torch.export`` and ``torch.compile`` do.
"""

from mmfast.compat.torchaudio import compliance, functional, transforms

__all__ = ["compliance", "functional", "transforms"]
