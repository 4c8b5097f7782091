"""The benchmark cases of the fusion slice: attention to one or several sources, and the modules around it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

import mmfast
from mmfast.fusion import Source
from mmfast.fusion.attention import choose_engine
from mmfast.nn import CrossAttentionFusion, MultiheadAttention

MODES = ("forward", "backward")


@dataclass(frozen=True)
class _Attention:
    """What the cases of attention have in common: ``batch`` items, ``heads``, ``rows`` queries, ``keys`` each source.

    Args:
        peers: names of the providers, besides mmfast's own, that compute the same numbers; the tests check it.
        modes: of `MODES`, those that say something.
        default: part of a run that names no case.
        gpu: of a GPU's size: part of such a run on one, and only there.
        reference: small enough for the reference.
    """

    name: str
    batch: int
    heads: int
    dim: int
    rows: int
    keys: tuple[int, ...]
    peers: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    modes: tuple[str, ...] = MODES
    default: bool = True
    gpu: bool = False
    reference: bool = True
    same_shapes_as: str | None = None
    slice = "fusion"

    @property
    def shape(self) -> str:
        """What a table prints."""
        keys = " + ".join(map(str, self.keys))
        kind = "" if self.dtype == torch.float32 else f", {self.dtype_name}"
        return f"{self.batch} × {self.heads} × {self.dim}, {self.rows} × {keys}{kind}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def pairs(self) -> int:
        """Queries times keys that they may attend to, in all heads."""
        return self.batch * self.heads * self.rows * sum(self.keys)

    def facts(self) -> dict[str, object]:
        """What a row says of the size and of the least work: see `work`, and one exponential a pair."""
        return {
            "batch": self.batch,
            "heads": self.heads,
            "head_dim": self.dim,
            "rows": self.rows,
            "keys": list(self.keys),
            "dtype": self.dtype_name,
            "pairs": self.pairs,
            "work": {mode: dict(zip(("operations", "bytes"), self.work(mode), strict=True)) for mode in self.modes},
        }

    def fused(self, device: str) -> bool:
        """Whether mmfast has more than the reference for it: native kernels, or torch's flash attention merged."""
        engine = choose_engine(torch.device(device), None)
        return torch.device(device).type == "cpu" if engine == "torch" else engine != "reference"

    def small(self):
        """The same on few rows and keys, for tests."""
        keys = tuple(min(n, 19 - 5 * i) for i, n in enumerate(self.keys))
        return replace(self, batch=min(self.batch, 2), rows=min(self.rows, 23), keys=keys)

    def with_dtype(self, dtype: torch.dtype, **changes):
        """The same in another dtype, whose name ends with it."""
        return replace(self, name=f"{self.name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **changes)

    def _random(self, seed: int, what: str = ""):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{seed}/{what}".encode()))
        return lambda *shape: torch.randn(shape, generator=generator)

    def _exact(self, inputs, upstream, compute):
        x = tuple(t.detach().double() for t in inputs)
        if upstream is None:
            return compute(x)
        x = tuple(t.requires_grad_() for t in x)
        return torch.autograd.grad(compute(x), x, upstream.double())


@dataclass(frozen=True)
class AttentionCase(_Attention):
    """Attention alone, of queries, keys and values as projections leave them: heads inside, ``(B, L, H, D)`` in memory.

    Args:
        fusion: as in `mmfast.cross_attention`.
        gates: of each source of decoupled fusion: a number, ``"head"`` (learned, one a head), ``"query"`` (learned, one
            a query and head) or None.
        kv_heads: heads of keys and values, if fewer.
        value_dim: features of the values, if others.
        shared_query: all items have the same queries, of batch 1.
        mask: ``"lengths"``: items of different lengths in the first source. ``"images"``: a query sees one of the
            sources, or none (Flamingo). ``"tiles"``: a floating point mask that hides a third of the keys, other ones
            from each half of the queries (Mllama).
    """

    fusion: str = "joint"
    gates: tuple[float | str | None, ...] = ()
    kv_heads: int | None = None
    value_dim: int | None = None
    shared_query: bool = False
    mask: str | None = None

    @property
    def pairs(self) -> int:
        return self.heads * sum(
            int(mask.expand(self.batch, 1, self.rows, n).count_nonzero()) if mask is not None else
            self.batch * self.rows * n
            for n, mask in zip(self.keys, allowed(self, "cpu"), strict=True)
        )  # fmt: skip

    def inputs(self, seed: int, device: str = "cpu") -> tuple[Tensor, ...]:
        """The query, key and value of each source, and the learned gates."""
        randn, kv_heads = self._random(seed), self.kv_heads or self.heads
        query = randn(1 if self.shared_query else self.batch, self.rows, self.heads, self.dim)
        tensors = [query]
        for n in self.keys:
            tensors += [randn(self.batch, n, kv_heads, dim) for dim in (self.dim, self.value_dim or self.dim)]
        tensors = [x.transpose(1, 2) for x in tensors]
        for gate in self.gates:
            if isinstance(gate, str):
                learned = randn(self.batch, self.rows, self.heads, 1) if gate == "query" else randn(1, 1, self.heads, 1)
                tensors.append(2 * learned.sigmoid().transpose(1, 2))
        return tuple(x.to(device, self.dtype) for x in tensors)

    def upstream(self, seed: int, device: str = "cpu") -> Tensor:
        """The gradient that arrives at the output."""
        randn = self._random(seed, "upstream")
        grad = randn(self.batch, self.rows, self.heads, self.value_dim or self.dim).transpose(1, 2)
        return grad.to(device, self.dtype)

    def parts(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list]:
        """The query, keys and values by source, and their gates."""
        count = len(self.keys)
        pairs = [(inputs[1 + 2 * j], inputs[2 + 2 * j]) for j in range(count)]
        learned = iter(inputs[1 + 2 * count :])
        gates = [next(learned) if isinstance(gate, str) else gate for gate in self.gates] or [None] * count
        return inputs[0], pairs, gates

    def compute(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        """The output of mmfast."""
        return self.attend(inputs, source_masks(self, inputs[0].device.type), backend)

    def computation(self, device: str):
        """``inputs`` → the output of mmfast, with the masks made before."""
        masks = source_masks(self, device)
        return lambda inputs: self.attend(inputs, masks, None)

    def attend(self, inputs: Sequence[Tensor], masks: tuple, backend: str | None) -> Tensor:
        """`compute` with the ``masks`` of `source_masks`."""
        query, pairs, gates = self.parts(inputs)
        sources = [  # a pair where there are but keys and values, as one would write it
            kv if g is mask[0] is mask[1] is None else Source(*kv, *mask, gate=g)
            for kv, mask, g in zip(pairs, masks, gates, strict=True)
        ]
        return mmfast.cross_attention(query, sources, fusion=self.fusion, backend=backend)

    def gold(self, inputs: tuple[Tensor, ...], upstream: Tensor | None = None):
        """The float64 output, or with ``upstream`` the float64 gradients of the inputs."""
        return self._exact(inputs, upstream, self._definition)

    def _definition(self, inputs: Sequence[Tensor]) -> Tensor:
        query, pairs, gates = self.parts(inputs)
        groups = self.heads // (self.kv_heads or self.heads)
        scores = []
        for (key, _), mask in zip(pairs, allowed(self, query.device.type), strict=True):
            s = query @ key.repeat_interleave(groups, 1).transpose(2, 3) / self.dim**0.5
            scores.append(s if mask is None else s.masked_fill(~mask, -1e300))
        if self.fusion == "joint":
            weights = torch.cat(scores, 3).softmax(3).split(self.keys, 3)
        else:
            weights = [s.softmax(3) for s in scores]
        out = 0
        for w, (_, value), gate, mask in zip(weights, pairs, gates, allowed(self, query.device.type), strict=True):
            w = w if mask is None else torch.where(mask, w, 0.0)
            out = out + (w @ value.repeat_interleave(groups, 1)) * (1.0 if gate is None else gate)
        return out

    def work(self, mode: str) -> tuple[float, float]:
        """Floating point operations and bytes that the fused op needs for one call.

        A query and a key that it may attend to take ``2 D`` operations for the score and ``2 D_v`` for the output; the
        backward recomputes the score and takes ``2 D`` for either of dQ and dK and ``2 D_v`` for either of dP and dV.
        Exponentials, one a pair and pass, are not counted. Queries, keys, values and learned gates are read and the
        output written; the backward reads those and the output's gradient, and writes theirs.
        """
        kv_heads, value_dim = self.kv_heads or self.heads, self.value_dim or self.dim
        read = (1 if self.shared_query else self.batch) * self.rows * self.heads * self.dim
        read += self.batch * sum(self.keys) * kv_heads * (self.dim + value_dim)
        read += sum(self.batch * self.rows * self.heads for gate in self.gates if gate == "query")
        out = self.batch * self.rows * self.heads * value_dim
        flops, moved = 2 * (self.dim + value_dim), read + out
        if mode == "backward":
            flops += 2 * (3 * self.dim + 2 * value_dim)
            moved += 2 * read + 2 * out
        return float(flops * self.pairs), float(moved * self.dtype.itemsize)


@lru_cache(maxsize=64)
def source_masks(case: AttentionCase, device: str) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
    """``mask`` and ``lengths`` of each `Source`."""
    boolean = allowed(case, device)
    if case.mask == "lengths":
        return ((None, _lengths(case).to(device)), *[(None, None)] * (len(case.keys) - 1))
    if case.mask == "images":
        return tuple((of_rows[..., :1], None) for of_rows in boolean)
    if case.mask == "tiles":
        least = torch.finfo(case.dtype).min  # as transformers writes it
        zeros = [torch.zeros(m.shape, dtype=case.dtype, device=device) for m in boolean]
        return tuple((zero.masked_fill(~m, least), None) for zero, m in zip(zeros, boolean, strict=True))
    return ((None, None),) * len(case.keys)


@lru_cache(maxsize=64)
def allowed(case: AttentionCase, device: str) -> tuple[Tensor | None, ...]:
    """Boolean masks ``(B or 1, 1, L or 1, S)`` of each source: where a query may attend; None where it always may."""
    masks: list[Tensor | None] = [None] * len(case.keys)
    if case.mask == "lengths":
        masks[0] = torch.arange(case.keys[0]) < _lengths(case)[:, None, None, None]
    elif case.mask == "images":
        # As text with images in it: the first rows come before any image.
        image = torch.arange(case.rows) * (len(case.keys) + 1) // case.rows
        for j, n in enumerate(case.keys):
            masks[j] = (image == j + 1)[None, None, :, None].expand(1, 1, case.rows, n)
    elif case.mask == "tiles":
        (n,) = case.keys
        tile = torch.arange(n) * 3 // n
        masks[0] = (tile != 2 * (torch.arange(case.rows)[:, None] * 2 // case.rows))[None, None]
    return tuple(m if m is None else m.to(device) for m in masks)


def _lengths(case: AttentionCase) -> Tensor:
    n = case.keys[0]
    return n - torch.arange(case.batch) * (3 * n // 4) // max(case.batch - 1, 1)


@dataclass(frozen=True)
class ModuleCase(_Attention):
    """A module around attention, as the peers have it too; the gradients of its parameters are wanted with the inputs'.

    Args:
        kind: ``"mha"``: torch.nn.MultiheadAttention with its defaults, which return the weights. ``"block"``: a
            sequence attends to several modalities, each with its own softmax and tanh gate, with a norm before and a
            residual around it.
        source_dims: features of each source; by default those of the sequence.
    """

    kind: str = "mha"
    source_dims: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Features of the sequence that attends."""
        return self.heads * self.dim

    @property
    def dims(self) -> tuple[int, ...]:
        return self.source_dims or (self.width,) * len(self.keys)

    @property
    def shape(self) -> str:
        return f"{self.kind}, {super().shape}"

    def module(self, device: str = "cpu") -> torch.nn.Module:
        """mmfast's, without parameters of its own: `inputs` has them."""
        if self.kind == "mha":
            return MultiheadAttention(self.width, self.heads, batch_first=True, device=device, dtype=self.dtype)
        options = {"fusion": "decoupled", "gate": "tanh", "device": device, "dtype": self.dtype}
        return CrossAttentionFusion(self.width, self.heads, self.dims, **options)

    def inputs(self, seed: int, device: str = "cpu") -> tuple[Tensor, ...]:
        """The sequence, the sources, and the parameters of `module` in the order of their names."""
        randn = self._random(seed)
        tensors = [randn(self.batch, self.rows, self.width)]
        tensors += [randn(self.batch, n, dim) for n, dim in zip(self.keys, self.dims, strict=True)]
        for name, parameter in sorted(self.module("meta").named_parameters()):
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 4
            tensors.append(randn(*parameter.shape) * fan_in**-0.5 + (1.0 if name == "pre_norm.weight" else 0.0))
        return tuple(x.to(device, self.dtype) for x in tensors)

    def upstream(self, seed: int, device: str = "cpu") -> Tensor:
        """The gradient that arrives at the output."""
        return self._random(seed, "upstream")(self.batch, self.rows, self.width).to(device, self.dtype)

    def runner(self, module: torch.nn.Module):
        """``inputs`` → the output of ``module`` with the parameters that they hold."""
        owners = [(module.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2])
                  for n, _ in sorted(module.named_parameters())]  # fmt: skip
        count = 1 + len(self.keys)

        def forward(inputs: Sequence[Tensor]) -> Tensor:
            for (owner, name), parameter in zip(owners, inputs[count:], strict=True):
                owner._parameters[name] = parameter  # without a check of its kind, and without the cost of one
            if self.kind == "mha":
                return module(inputs[0], inputs[1], inputs[1])[0]
            return module(inputs[0], list(inputs[1:count]))

        return forward

    def compute(self, inputs: Sequence[Tensor], backend: str | None = None) -> Tensor:
        """The output of mmfast's module."""
        forward = _module_runner(self, str(inputs[0].device.type), backend)
        return forward(inputs)

    def gold(self, inputs: tuple[Tensor, ...], upstream: Tensor | None = None):
        """The float64 output, or with ``upstream`` the float64 gradients of the inputs and parameters."""
        return self._exact(inputs, upstream, self._definition)

    def _definition(self, inputs: Sequence[Tensor]) -> Tensor:
        count = 1 + len(self.keys)
        names = [name for name, _ in sorted(self.module("meta").named_parameters())]
        p = dict(zip(names, inputs[count:], strict=True))
        x, sources = inputs[0], inputs[1:count]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.unflatten(2, (self.heads, self.dim)).transpose(1, 2) for t in (q, k, v))
            weights = (q @ k.transpose(2, 3) / self.dim**0.5).softmax(3)
            return (weights @ v).transpose(1, 2).flatten(2)

        if self.kind == "mha":
            weights, biases = p["in_proj_weight"].chunk(3), p["in_proj_bias"].chunk(3)
            q, k, v = (t @ w.T + b for t, w, b in zip((x, *sources * 2), weights, biases, strict=True))
            out = attend(q, k, v)
            return out @ p["out_proj.weight"].T + p["out_proj.bias"]
        n = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        q = (n * p["pre_norm.weight"] + p["pre_norm.bias"]) @ p["q_proj.weight"].T + p["q_proj.bias"]
        out = 0
        for j, z in enumerate(sources):
            k, v = (z @ p[f"kv_proj.{j}.weight"].T + p[f"kv_proj.{j}.bias"]).chunk(2, 2)
            out = out + p["gate"][j].tanh() * attend(q, k, v)
        return x + out @ p["out_proj.weight"].T + p["out_proj.bias"]

    def work(self, mode: str) -> tuple[float, float]:
        """Floating point operations and bytes that one call needs: attention as in `AttentionCase`, and projections.

        A row of ``n`` features projected to ``m`` takes ``2 n m`` operations, thrice with the backward. The sequence,
        the sources and the parameters are read, the output written, and with ``need_weights`` the mean weights; the
        backward reads them and the output's gradient again and writes their gradients.
        """
        sequence, sources = self.rows * self.width, sum(n * d for n, d in zip(self.keys, self.dims, strict=True))
        projections = 4 * self.batch * self.width * (sequence + sources)
        parameters = 2 * self.width**2 + sum(2 * dim * self.width for dim in self.dims)
        weights = self.batch * self.rows * sum(self.keys) if self.kind == "mha" else 0
        read, out = self.batch * (sequence + sources) + parameters, self.batch * sequence
        flops, moved = projections + 4 * self.dim * self.pairs, read + out + weights
        if mode == "backward":
            flops += 2 * projections + 10 * self.dim * self.pairs
            moved += 2 * read + out
        return float(flops), float(moved * self.dtype.itemsize)


@lru_cache(maxsize=8)
def _module_runner(case: ModuleCase, device: str, backend: str | None):
    module = case.module("meta")
    module.backend = backend
    return case.runner(module)


_NO_FLEX = (
    "sdpa",
    "plain",
    "plain-compile",
    "attention-reference-compile",
    "sdpa-cudnn",
    "sdpa-flash",
    "sdpa-efficient",
)
_ATTENTION = (*_NO_FLEX, "flex")
_MHA = ("torch-mha", "torch-mha-compile", "torch-mha-no-weights")
_BLOCK = ("block-sdpa", "block-compile")

# What the slice is measured by: short keys, several sources, few queries, small heads, the module that is used most.
_TABLE = (
    AttentionCase("fusion-sd-77", 2, 8, 40, 4096, (77,), _ATTENTION),
    AttentionCase("fusion-ip-77-16", 2, 8, 64, 4096, (77, 16), _ATTENTION, fusion="decoupled", gates=(None, 0.6)),
    AttentionCase("fusion-ip-77-4", 2, 8, 64, 4096, (77, 4), _ATTENTION, fusion="decoupled", gates=(None, 0.6)),
    AttentionCase("fusion-joint-77-257-1500", 4, 8, 64, 256, (77, 257, 1500), _ATTENTION),
    AttentionCase("fusion-qformer-257", 32, 12, 64, 32, (257,), _ATTENTION, shared_query=True),
    AttentionCase("fusion-pool-16384", 4, 8, 64, 1, (16384,), _ATTENTION),
    AttentionCase("fusion-latents-65536", 1, 8, 64, 64, (65536,), _ATTENTION),
    AttentionCase("fusion-mult-375", 24, 5, 6, 375, (375,), _ATTENTION),
    ModuleCase("fusion-mha-448x1500", 4, 8, 64, 448, (1500,), _MHA),
)
# Shapes of models, of a batch and a length that two cores can run.
_MODELS = (
    # Stable Diffusion 1.5, the deeper levels; SDXL with IP-Adapter Plus
    AttentionCase("fusion-sd-1024x77", 2, 8, 80, 1024, (77,), _ATTENTION),
    AttentionCase("fusion-sd-256x77-4", 2, 8, 160, 256, (77, 4), _NO_FLEX, fusion="decoupled", gates=(None, 1.0)),
    AttentionCase("fusion-sdxl-1024x77-16", 2, 20, 64, 1024, (77, 16), _NO_FLEX, fusion="decoupled", gates=(None, 1.0)),
    # Wan 2.1: image to video, eight of its heads, a sixteenth of its length
    AttentionCase("fusion-wan-512-257", 1, 8, 128, 2048, (512, 257), _NO_FLEX, fusion="decoupled"),
    # LTX-2: video to sound and back, with a gate for each query and head
    AttentionCase("fusion-ltx-6144x126", 1, 8, 64, 6144, (126,), _NO_FLEX, fusion="decoupled", gates=("query",)),
    AttentionCase("fusion-ltx-126x6144", 1, 8, 64, 126, (6144,), _NO_FLEX, fusion="decoupled", gates=("query",)),
    # Stable Diffusion 3, joint
    AttentionCase("fusion-sd3-1024-333", 1, 8, 64, 1357, (1024, 333), _NO_FLEX),
    # Llama 3.2 Vision: grouped heads, a floating point mask
    AttentionCase("fusion-mllama-1601", 1, 32, 128, 128, (1601,), _NO_FLEX, kv_heads=8, mask="tiles"),
    # Flamingo: the resampler's images and latents; each token sees one image
    AttentionCase("fusion-resampler-256-64", 8, 8, 64, 64, (256, 64), _NO_FLEX),
    AttentionCase("fusion-flamingo-3x64", 4, 8, 64, 256, (64, 64, 64), _NO_FLEX, mask="images"),
    # Idefics2: grouped heads, images of different sizes
    AttentionCase("fusion-idefics2-4900", 2, 16, 96, 64, (4900, 64), _NO_FLEX, kv_heads=4, mask="lengths"),
    # Whisper: one step of five beams, as rows of one query; a whole transcript
    AttentionCase("fusion-whisper-5x1500", 8, 6, 64, 5, (1500,), _NO_FLEX),
    AttentionCase("fusion-whisper-448x1500", 2, 6, 64, 448, (1500,), _NO_FLEX),
    # Audio-visual bottleneck transformer: its own tokens and four others
    AttentionCase("fusion-mbt-401-4", 4, 12, 64, 405, (401, 4), _NO_FLEX),
    # Perceiver IO: batch-1 learned latents, values of another width
    AttentionCase(
        "fusion-perceiver-2048", 2, 8, 32, 256, (2048,), _NO_FLEX, value_dim=96, shared_query=True
    ),
    # SigLIP's pooling head, and a block with its own norm, gates and residual
    ModuleCase("fusion-siglip-196", 16, 12, 64, 1, (196,), _MHA),
    ModuleCase("fusion-block-77-750", 4, 8, 64, 64, (77, 750), _BLOCK, kind="block", source_dims=(768, 80)),
)  # fmt: skip

_LONG = AttentionCase("fusion-sd-16384x77", 1, 8, 40, 16384, (77,), _NO_FLEX).with_dtype(torch.bfloat16)
# The same at the sizes that models have on a GPU, most of them in bfloat16.
_ADAPTER = {"fusion": "decoupled", "gates": (None, 0.6)}
_LTX = {"fusion": "decoupled", "gates": ("query",)}
_GPU = tuple(
    replace(case, dtype=torch.float32 if case.name in ("gpu-qformer", "gpu-mult") else torch.bfloat16, gpu=True)
    for case in (
        AttentionCase("gpu-sd15", 16, 8, 40, 4096, (77,), _ATTENTION),
        AttentionCase("gpu-sd15-ip", 16, 8, 40, 4096, (77, 4), _ATTENTION, **_ADAPTER),
        AttentionCase("gpu-sdxl-ip-plus", 16, 10, 64, 4096, (77, 16), _ATTENTION, **_ADAPTER),
        AttentionCase("gpu-ltx-a2v", 1, 32, 64, 6144, (126,), _ATTENTION, **_LTX),
        AttentionCase("gpu-ltx-v2a", 1, 32, 64, 126, (6144,), _ATTENTION, **_LTX),
        AttentionCase("gpu-qformer", 64, 12, 64, 32, (257,), _ATTENTION, shared_query=True),
        AttentionCase("gpu-mult", 24, 5, 6, 500, (500,), _ATTENTION),
        AttentionCase("gpu-whisper-decoder", 8, 20, 64, 1, (1500,), _ATTENTION),
        AttentionCase("gpu-siglip-pool", 256, 12, 64, 1, (729,), _ATTENTION),
        AttentionCase("gpu-mllama", 4, 32, 128, 1024, (6404,), _NO_FLEX, kv_heads=8, mask="tiles"),
        AttentionCase("gpu-joint-2048", 4, 16, 64, 2048, (4096, 1024), _ATTENTION),
        AttentionCase("gpu-long-4096", 4, 16, 64, 4096, (4096,), _ATTENTION),
    )
)
_SMOKE = AttentionCase(
    "fusion-smoke", 2, 2, 8, 20, (7, 5), _NO_FLEX, fusion="decoupled", gates=(None, "head"), default=False
)

FUSION_CASES = (
    *_TABLE,
    *(case.with_dtype(torch.bfloat16) for case in _TABLE),
    _LONG,
    *_MODELS,
    *(case.with_dtype(torch.bfloat16, default=False) for case in _MODELS),
    *_GPU,
    _SMOKE,
)
