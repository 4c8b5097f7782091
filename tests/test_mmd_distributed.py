"""The MMD over several processes is that of one process, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mmfast
from mmfast import kernels as k

# Rows of each rank: unequal, and a rank without any of y, or without any at all.
SHARDS = {2: [(9, 3), (4, 11)], 4: [(3, 6), (6, 0), (0, 0), (4, 8)]}


def kernels(sigma: torch.Tensor):
    return {
        "learned": k.Gaussian(sigma),
        "dan": k.MultiGaussian(),
        "tllib": k.MultiGaussian(bandwidth="tllib"),
        "cross": k.Gaussian(k.MeanDistance("cross")),
        "own": k.Gaussian(k.MeanDistance("x", scale=2.0)),
        "matern": k.Matern(1.5),
        "laplacian_l1": k.Laplacian(2.0, p=1),
        "poly": k.Polynomial(),
        "sum_of_metrics": sigma * k.Gaussian(1.1) + 0.3 * k.Laplacian(2.0, p=1) + k.Cosine(),
    }


def cases():
    """Every kernel with both estimators; what computes them from tuples of layers and sigma."""
    made = {}
    for name in kernels(torch.tensor(1.0)):
        for estimator in ("biased", "unbiased"):
            made[name, estimator] = lambda mmd2, x, y, sigma, name=name, estimator=estimator: mmd2(
                x[0], y[0], kernels(sigma)[name], estimator
            )
    made["product", "biased"] = lambda mmd2, x, y, sigma: mmd2(
        x, y, k.Product([k.MultiGaussian(), k.Laplacian(sigma)]), "biased"
    )
    return made


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    n, m = 13, 14
    x = [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) + 2 for d in (5, 3)]
    y = [torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype) + 2.5 for d in (5, 3)]
    return x, y


def expected(dtype=torch.float64):
    results = {}
    for name, compute in cases().items():
        x, y = data(dtype)
        sigma = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        value = compute(mmfast.mmd2, *(tuple(t.requires_grad_() for t in layers) for layers in (x, y)), sigma)
        (3 * value).backward()
        results[name] = value.detach(), [t.grad for t in (*x, *y, sigma)]
    return results


def shard(layers, which: int, rank: int, counts):
    start = sum(rows[which] for rows in counts[:rank])
    return tuple(t[start : start + counts[rank][which]].clone().requires_grad_() for t in layers)


def close(found, wanted, dtype, what):
    if wanted is None or (found is None and not wanted.numel()):
        assert found is None or not found.abs().sum(), what
        return
    scale = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, wanted, rtol=scale, atol=scale, msg=lambda text: f"{what}: {text}")


def check(rank: int, counts, group) -> None:
    for dtype in (torch.float64, torch.float32):
        for name, (value, gradients) in expected(dtype).items():
            x, y = data(dtype)
            x, y = shard(x, 0, rank, counts), shard(y, 1, rank, counts)
            sigma = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

            def mmd2(*given):
                return mmfast.distributed.mmd2(*given, group=group)

            found = cases()[name](mmd2, x, y, sigma)
            close(found.detach(), value, dtype, f"{name} on {rank}")
            (3 * found).backward()
            offsets = [sum(rows[which] for rows in counts[:rank]) for which in (0, 0, 1, 1)]
            for i, t in enumerate((*x, *y)):
                wanted = gradients[i]
                wanted = None if wanted is None else wanted[offsets[i] : offsets[i] + t.shape[0]]
                close(t.grad, wanted, dtype, f"{name} on {rank}: gradient {i}")
            close(sigma.grad, gradients[4], dtype, f"{name} on {rank}: gradient of sigma")


def check_errors(rank: int, group) -> None:
    x, y = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    value = mmfast.distributed.mmd2(x, y, group=group)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.sum().backward()
    with pytest.raises(ValueError, match=r"MedianDistance.* needs all points in one place"):
        mmfast.distributed.mmd2(x, y, k.Gaussian("median"), group=group)
    with pytest.raises(ValueError, match="estimator must be one of 'biased', 'unbiased', got 'linear'"):
        mmfast.distributed.mmd2(x, y, estimator="linear", group=group)
    with pytest.raises(ValueError, match=r"x must be \(n, d\)"):
        mmfast.distributed.mmd2(x[None], y[None], group=group)
    with pytest.raises(ValueError, match="x must have the same dtype and features on every rank"):
        width = 2 + (rank == 0)
        mmfast.distributed.mmd2(x[:, :width], y[:, :width], group=group)
    with pytest.raises(ValueError, match="at least 2 rows over all ranks"):
        mmfast.distributed.mmd2(x[: int(rank == 0)], y, group=group)


def worker(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        check(rank, SHARDS[size], None)
        check_errors(rank, None)
        if size == 4:  # two groups at once, whose ranks are not the global ones
            halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
            check(rank // 2, SHARDS[2], halves[rank % 2])
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without Gloo")
@pytest.mark.parametrize("size", [2, 4])
def test_matches_single_process(size, tmp_path):
    mp.spawn(worker, (size, str(tmp_path / "store")), nprocs=size)


def test_needs_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        mmfast.distributed.mmd2(torch.ones(3, 2), torch.ones(3, 2))
