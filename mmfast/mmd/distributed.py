"""The exact MMD² of samples that are spread over the ranks of a torch.distributed group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast import _backend
from mmfast.mmd._inputs import check_choice, check_kernel, two_samples
from mmfast.mmd._primitives import primitives
from mmfast.mmd.bandwidth import MeanDistance, Rule, mean_of_pairs
from mmfast.mmd.estimators import constant
from mmfast.mmd.kernels import Kernel, apply
from mmfast.mmd.reference import compute_dtype, diagonal
from mmfast.mmd.terms import Terms

Layers = Sequence[Tensor]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def mmd2(
    x: Tensor | tuple[Tensor, ...],
    y: Tensor | tuple[Tensor, ...],
    kernel: Kernel | None = None,
    estimator: str = "unbiased",
    *,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""`mmfast.mmd2` of the union of all ranks' samples, not a mean of the ranks' own values.

    Each rank passes its shard and gets the same value. The shards go around a ring, while the one at hand is computed
    with: O(n_local + m_local) memory beside the largest shard, and no communication in the backward pass.

    Gradients: of features, each rank gets the derivative of the global value with respect to its own rows; of kernel
    parameters, which are the same everywhere, the whole derivative. Every rank must use the value in the same way.
    Under ``DistributedDataParallel``, which takes the mean of the ranks' gradients where the chain rule wants their
    sum, multiply the loss by the number of ranks. Differentiable once; a second time raises a RuntimeError.

    Args:
        x, y: this rank's rows, ``(n_local, d)`` and ``(m_local, d)``, or tuples of layers; any number of rows, none
            too. As many features and the same dtype on every rank.
        kernel: as in `mmfast.mmd2`, the same on every rank. Of the rules, those about the mean (``"dan"``, ``"mean"``,
            ``"tllib"``) find the bandwidth in the union.
        estimator: ``"biased"`` or ``"unbiased"``.
        group: of `torch.distributed`; all ranks by default.

    Returns:
        A tensor without dimensions, float64 for float64 features, else float32.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("mmfast.distributed.mmd2 needs torch.distributed.init_process_group to be called first")
    kernel = check_kernel(kernel)
    check_choice("estimator", estimator, ("biased", "unbiased"))
    xs, ys, single = two_samples(x, y, kernel.n_layers)
    if not single:
        raise ValueError(f"x must be (n, d) for mmfast.distributed.mmd2, got {tuple(xs[0].shape)}")
    ring = _Ring(xs, ys, group)
    n, m = ring.total
    least = 2 if estimator == "unbiased" else 1
    if min(n, m) < least:
        raise ValueError(
            f"x and y must have at least {least} rows over all ranks for estimator={estimator!r}, got {n}, {m}"
        )
    off = int(estimator == "unbiased")
    coefs = (1 / (n * (n - off)), 1 / (m * (m - off)), -2 / (n * m))
    chosen, _ = _backend.choose("mmd", xs[0].device, backend)

    def resolve(rule: Rule, of_x: Layers, of_y: Layers | None) -> Tensor:
        return _mean_rule(rule, of_x[0][0].detach(), of_y[0][0].detach(), ring)

    total = None
    for transform, terms in kernel.parts(xs, ys, resolve):
        features = [*apply(transform, xs), *apply(transform, ys)]
        if len({t.dtype for t in features}) > 1:
            features = [t.to(compute_dtype(t.dtype)) for t in features]
        value = _Global.apply(ring, terms.families, terms.layers, coefs, not off, chosen, terms.params, *features)
        total = value if total is None else total + value
    return total.to(compute_dtype(xs[0].dtype))


class _Ring:
    """Who is in the group, how many rows each has, and the shards' way around."""

    def __init__(self, xs: Layers, ys: Layers, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        everyone = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.peers = [everyone[(self.rank + step) % self.size] for step in (1, -1)]  # P2POp takes global ranks
        mine = [xs[0].shape[1], ys[0].shape[1], _DTYPES.index(xs[0].dtype), *(layer.shape[2] for layer in xs)]
        mine = torch.tensor(mine, dtype=torch.int64, device=xs[0].device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group)
        table = torch.stack(gathered).tolist()
        for rank, row in enumerate(table):
            if row[2:] != table[self.rank][2:]:
                raise ValueError(
                    f"x must have the same dtype and features on every rank, got {_DTYPES[row[2]]}, {row[3:]} on rank "
                    f"{rank} and {xs[0].dtype}, {table[self.rank][3:]} on rank {self.rank}"
                )
        self.rows = [(row[0], row[1]) for row in table]
        self.total = tuple(map(sum, zip(*self.rows, strict=True)))

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def shards(self, xs: Layers, ys: Layers) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """All ranks' layers, this rank's first; while one shard is used the next is on its way."""
        widths = [layer.shape[2] for layer in xs]
        current = torch.cat([layer.reshape(-1) for layer in (*xs, *ys)])
        for step in range(self.size):
            more = step + 1 < self.size
            if more:
                incoming, requests = self._pass_on(current, step + 1, sum(widths))
            yield self._unpack(current, self.rows[(self.rank - step) % self.size], widths)
            if more:
                for request in requests:
                    request.wait()
                current = incoming

    def _pass_on(self, current: Tensor, step: int, width: int) -> tuple[Tensor, list]:
        n, m = self.rows[(self.rank - step) % self.size]
        incoming = current.new_empty((n + m) * width)
        operations = []
        if current.numel():
            operations.append(dist.P2POp(dist.isend, current, self.peers[0], self.group))
        if incoming.numel():
            operations.append(dist.P2POp(dist.irecv, incoming, self.peers[1], self.group))
        return incoming, dist.batch_isend_irecv(operations) if operations else []

    @staticmethod
    def _unpack(flat: Tensor, rows: tuple[int, int], widths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        sizes = [count * width for count in rows for width in widths]
        layers = [
            piece.view(1, count, width)
            for piece, (count, width) in zip(
                flat.split(sizes), [(count, width) for count in rows for width in widths], strict=True
            )
        ]
        return layers[: len(widths)], layers[len(widths) :]


def _mean_rule(rule: Rule, x: Tensor, y: Tensor, ring: _Ring) -> Tensor:
    """A rule about the mean, of the union of all ranks' rows ``(n, d)`` and ``(m, d)``."""
    if not isinstance(rule, MeanDistance) or not rule.detach:
        raise ValueError(f"{rule} needs all points in one place: give mmfast.distributed.mmd2 its result as a number")
    samples = {"x": [(x, 0)], "y": [(y, 1)]}.get(rule.points, [(x, 0), (y, 1)])
    counts = [ring.total[i] for _, i in samples]
    sums = ring.reduce(torch.stack([t.sum(0, dtype=torch.float64) for t, _ in samples]))
    if rule.points == "cross":
        means = [total / count for total, count in zip(sums, counts, strict=True)]
    else:
        means = [sums.sum(0) / sum(counts)] * len(samples)
    squares = [(t.double() - mean).square().sum() for (t, _), mean in zip(samples, means, strict=True)]
    squares = ring.reduce(torch.stack(squares))
    if rule.points == "cross":
        found = (squares[0] / counts[0] + squares[1] / counts[1]) + (means[0] - means[1]).square().sum()
    else:
        found = mean_of_pairs(sum(counts), squares.sum(), rule.diagonal)
    return rule.finish(found, x)


class _Global(torch.autograd.Function):
    """Value and gradients in one sweep over the shards; the backward pass only scales what was found."""

    @staticmethod
    def forward(ctx, ring: _Ring, families, layers, coefs, with_diagonal: bool, chosen: str, params, *features):
        wanted = ctx.needs_input_grad[6:]
        leaves = [t.detach().requires_grad_(want) for t, want in zip((params, *features), wanted, strict=True)]
        count = len(features) // 2
        terms, xs, ys = Terms(families, layers, leaves[0]), leaves[1 : 1 + count], leaves[1 + count :]
        gradients = [torch.zeros_like(leaf) if want else None for leaf, want in zip(leaves, wanted, strict=True)]
        value = torch.zeros((), dtype=torch.float64, device=params.device)
        for step, (other_x, other_y) in enumerate(ring.shards([t.detach() for t in xs], [t.detach() for t in ys])):
            with torch.set_grad_enabled(any(wanted)):
                if step == 0:
                    block = _own_block(xs, ys, coefs, terms, with_diagonal, chosen)
                else:
                    block = _other_block(xs, ys, other_x, other_y, coefs, terms, chosen)
            if block is None:
                continue
            # Pairs of shards are met on both ranks: half of the value, but the whole derivative by the own rows.
            share = 1.0 if step == 0 else 0.5
            value += share * block.detach()
            if block.requires_grad:
                inputs = [i for i, want in enumerate(wanted) if want]
                found = torch.autograd.grad(block, [leaves[i] for i in inputs], allow_unused=True)
                for i, gradient in zip(inputs, found, strict=True):
                    if gradient is not None:
                        gradients[i].add_(gradient, alpha=share if i == 0 else 1.0)
        shared = torch.zeros_like(params) if gradients[0] is None else gradients[0]
        reduced = ring.reduce(torch.cat((value[None], shared.reshape(-1))))
        if gradients[0] is not None:
            gradients[0] = reduced[1:].view_as(params)
        ctx.kept = [i for i, gradient in enumerate(gradients) if gradient is not None]
        inputs = (params, *features)
        ctx.save_for_backward(*(gradients[i] for i in ctx.kept), *(inputs[i] for i in ctx.kept))
        return reduced[0]

    @staticmethod
    def backward(ctx, upstream):
        found, inputs = ctx.saved_tensors[: len(ctx.kept)], ctx.saved_tensors[len(ctx.kept) :]
        scaled = [None] * (len(ctx.needs_input_grad) - 6)
        for i, gradient, given in zip(ctx.kept, found, inputs, strict=True):
            gradient = gradient * upstream.to(gradient.dtype)
            scaled[i] = _Once.apply(gradient, given) if torch.is_grad_enabled() else gradient
        return (None,) * 6 + tuple(scaled)


class _Once(torch.autograd.Function):
    """A gradient that is a function of its input, which autograd is told in order to say that it has no derivative."""

    @staticmethod
    def forward(ctx, gradient, given):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("mmfast.distributed.mmd2 can be differentiated once: other ranks' rows are constants here")


def _form(x: Layers, y: Layers, coefs: tuple[float, float, float], terms: Terms, chosen: str) -> Tensor:
    return primitives(chosen).quadratic(x, y, None, None, constant(coefs, x[0].device), terms)[0][0]


def _total(values: list[Tensor]) -> Tensor | None:
    return torch.stack(values).sum() if values else None


def _own_block(xs, ys, coefs, terms: Terms, with_diagonal: bool, chosen: str) -> Tensor | None:
    n, m = xs[0].shape[1], ys[0].shape[1]
    values = []
    if n and m:
        values.append(_form(xs, ys, coefs, terms, chosen))
    elif n:
        values.append(_form(xs, ys, (coefs[0], 0.0, 0.0), terms, chosen))
    elif m:
        values.append(_form(ys, xs, (coefs[1], 0.0, 0.0), terms, chosen))
    if with_diagonal:
        values += [diagonal(t, terms).sum() * c for t, c in ((xs, coefs[0]), (ys, coefs[1])) if t[0].shape[1]]
    return _total(values)


def _other_block(xs, ys, other_x, other_y, coefs, terms: Terms, chosen: str) -> Tensor | None:
    """All that stands between the rows here and those of another rank."""
    pairs = ((xs, other_x, 2 * coefs[0]), (ys, other_y, 2 * coefs[1]), (xs, other_y, coefs[2]), (ys, other_x, coefs[2]))
    return _total([_form(a, b, (0.0, 0.0, c), terms, chosen) for a, b, c in pairs if a[0].shape[1] and b[0].shape[1]])
