"""Feature extraction that follows other toolkits."""

from mmfast.compat.torchaudio.compliance import kaldi

__all__ = ["kaldi"]
