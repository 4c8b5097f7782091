"""`mmfast.compat.cka` against double loops, and against ckatorch and torch_cka where they are installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mmfast
from mmfast.compat import cka as ours


@pytest.fixture
def ckatorch():
    return pytest.importorskip("ckatorch", exc_type=ImportError)


@pytest.fixture
def torch_cka():
    return pytest.importorskip("torch_cka", exc_type=ImportError)


def features(n: int = 12, j: int = 5, k: int = 7, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, j, dtype=torch.float64) + 0.5
    return x.to(dtype), torch.cat((x[:, :2].sin(), torch.randn(n, k - 2, dtype=torch.float64)), dim=1).to(dtype)


def gram(x, kernel: str = "linear", threshold: float = 1.0, sigma: float | None = None) -> list[list[float]]:
    rows = x.tolist()
    if kernel == "linear":
        return [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    squares = [[math.dist(p, q) ** 2 for q in rows] for p in rows]
    every = sorted(value for row in squares for value in row)
    square = threshold**2 * every[(len(every) - 1) // 2] if sigma is None else sigma**2
    return [[math.exp(-value / (2 * square)) for value in row] for row in squares]


def hsic(k, m, unbiased: bool) -> float:
    """tr(KHLH), or the unbiased estimate, one term after the other."""
    n = len(k)
    if unbiased:
        k, m = ([[v if i != j else 0.0 for j, v in enumerate(row)] for i, row in enumerate(g)] for g in (k, m))
    indices = range(n)
    trace = sum(k[i][j] * m[j][i] for i in indices for j in indices)
    total = sum(map(sum, k)) * sum(map(sum, m))
    chain = sum(k[i][j] * m[j][q] for i in indices for j in indices for q in indices)
    if not unbiased:
        return trace - 2 / n * chain + total / n**2
    return (trace + total / ((n - 1) * (n - 2)) - 2 / (n - 2) * chain) / (n * (n - 3))


def alignment(k, m, unbiased: bool, guard: float = 0.0) -> float:
    return hsic(k, m, unbiased) / (math.sqrt(hsic(k, k, unbiased) * hsic(m, m, unbiased)) + guard)


# ---- Against the definition


@pytest.mark.parametrize("method", ["fro_norm", "hsic"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", [{}, {"kernel": "rbf"}, {"kernel": "rbf", "threshold": 0.5}], ids=str)
def test_cka_base(kernel, unbiased, method):
    x, y = features()
    expected = alignment(gram(x, **kernel), gram(y, **kernel), unbiased)
    assert ours.cka_base(x, y, unbiased=unbiased, method=method, **kernel).item() == pytest.approx(expected, rel=1e-9)
    single = ours.cka_base(x.float(), y.float(), unbiased=unbiased, method=method, **kernel)
    assert single.dtype == torch.float64
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_gradients():
    x, y = (t.requires_grad_() for t in features(6, 3, 4))
    for options in ({}, {"kernel": "rbf"}, {"kernel": "rbf", "unbiased": True}):
        torch.autograd.gradcheck(lambda a, b, o=options: ours.cka_base(a, b, **o), (x, y))
    torch.autograd.gradcheck(lambda a, b: ours.cka_batch(a.view(1, 6, 3), b.view(1, 6, 4)), (x, y))
    grams = [torch.randn(2, 5, 5, dtype=torch.float64).requires_grad_() for _ in range(2)]
    torch.autograd.gradcheck(ours.hsic1, grams)


def test_cka_batch():
    x, y = (torch.stack(many) for many in zip(*(features() for _ in range(3)), strict=True))
    grams = [(gram(a), gram(b)) for a, b in zip(x, y, strict=True)]
    sums = [sum(hsic(pair[i], pair[j], True) for pair in grams) for i, j in ((0, 1), (0, 0), (1, 1))]
    assert ours.cka_batch(x, y).item() == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]), rel=1e-10)


def test_hsic_of_grams():
    x, y = features()
    k, m = gram(x, "rbf"), gram(y)
    matrices = torch.tensor(k, dtype=torch.float64), torch.tensor(m, dtype=torch.float64)
    torch.testing.assert_close(ours.rbf_kernel(x), matrices[0])
    torch.testing.assert_close(ours.linear_kernel(y), matrices[1])
    assert ours.hsic0(*matrices).item() == pytest.approx(hsic(k, m, False) / 11**2, rel=1e-10)
    assert ours.hsic_biased(*matrices).item() == pytest.approx(hsic(k, m, False), rel=1e-10)
    assert ours.hsic_unbiased(*matrices).item() == pytest.approx(hsic(k, m, True), rel=1e-10)
    both = ours.hsic1(torch.stack(matrices), torch.stack(matrices[::-1]))
    assert both.tolist() == pytest.approx([hsic(k, m, True), hsic(m, k, True)], rel=1e-10)
    torch.testing.assert_close(torch.func.vmap(ours.hsic0)(*(m[None] for m in matrices)), ours.hsic0(*matrices)[None])
    # The unbiased one is defined for matrices that are not symmetric too.
    a, b = torch.randn(6, 6).double(), torch.randn(6, 6).double()
    assert ours.hsic_unbiased(a, b).item() == pytest.approx(hsic(a.tolist(), b.tolist(), True), rel=1e-10)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("options", [{}, {"kernel_metric": "rbf"}, {"kernel_metric": "rbf", "rbf_sigma": 2.5}], ids=str)
def test_alignment_metrics(options, unbiased):
    x, y = (t / t.norm(dim=1, keepdim=True) for t in features())
    kernel = {} if not options else {"kernel": "rbf", "sigma": options.get("rbf_sigma", 1.0)}
    expected = alignment(gram(x, **kernel), gram(y, **kernel), unbiased, 1e-6)
    found = ours.AlignmentMetrics.cka(x, y, **options, unbiased=unbiased)
    assert isinstance(found, float)
    assert found == pytest.approx(expected, rel=1e-9)
    name = "unbiased_cka" if unbiased else "cka"
    assert ours.AlignmentMetrics.measure(name, x, y, **options) == found
    with pytest.raises(ValueError, match="metric must be one of cka, unbiased_cka, got 'mutual_knn'"):
        ours.AlignmentMetrics.measure("mutual_knn", x, y, topk=3)


# ---- Models


class Net(nn.Module):
    """Two layers in a container, and a third one; in place or not."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=inplace))
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Unused(nn.Module):
    """Has a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return x


def loader(n: int = 30, batch_size: int = 12, **options) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(n, 1, 6, 6), torch.zeros(n)), batch_size=batch_size, **options)


def expected_matrix(first: Net, second: Net, batches) -> list[list[float]]:
    def outputs(net, x):
        conv = net.body[0](x)
        relu = conv.relu()
        return [net(x), relu, conv, relu, net.head(relu.flatten(1))]  # the order of named_modules()

    sums = torch.zeros(3, 5, 5, dtype=torch.float64)
    for x in batches:
        with torch.no_grad():
            a, b = ([gram(t.double().flatten(1)) for t in outputs(net, x)] for net in (first, second))
        for i, j in ((i, j) for i in range(5) for j in range(5)):
            sums[:, i, j] += torch.tensor([hsic(a[i], b[j], True), hsic(a[i], a[i], True), hsic(b[j], b[j], True)])
    return (sums[0] / (sums[1].sqrt() * sums[2].sqrt())).tolist()


@pytest.mark.parametrize("inplace", [False, True])
def test_models(inplace):
    first, second, data = Net(inplace), Net(), loader(20, 10)
    plain = Net()
    plain.load_state_dict(first.state_dict())
    comparison = ours.CKA(first, second, model1_name="first")
    comparison.compare(data)
    found = comparison.export()
    names = ["", "body", "body.0", "body.1", "head"]
    assert (found["model1_name"], found["model2_name"]) == ("first", "Net")
    assert found["model1_layers"] == found["model2_layers"] == names
    expected = torch.tensor(expected_matrix(plain, second, [x for x, _ in data]))
    torch.testing.assert_close(found["CKA"], expected, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in (*first.modules(), *second.modules()))


def test_models_see_the_same_batches():
    net = Net()
    comparison = ours.CKA(net, net, model1_layers=["head"], model2_layers=["head"])
    comparison.compare(loader(60, 6, shuffle=True))
    assert comparison.hsic_matrix.item() == pytest.approx(1.0, abs=1e-6)
    comparison.compare(loader(60, 6), loader(60, 6))
    assert comparison.hsic_matrix.item() < 0.9


def test_rejects():
    x, y = features()
    with pytest.raises(ValueError, match="kernel must be 'linear' or 'rbf', got 'poly'"):
        ours.cka_base(x, y, kernel="poly")
    with pytest.raises(ValueError, match="method must be"):
        ours.cka_base(x, y, method="trace")
    with pytest.raises(ValueError, match="kernel_metric must be"):
        ours.AlignmentMetrics.cka(x, y, kernel_metric="cos")
    with pytest.raises(ValueError, match="features of the same points"):
        ours.cka_base(x, y[:-1])
    with pytest.raises(ValueError, match="gram_y must be symmetric"):
        ours.hsic0(torch.eye(4), torch.arange(16.0).view(4, 4))
    with pytest.raises(ValueError, match="must both be"):
        ours.hsic1(torch.eye(4), torch.eye(4))
    with pytest.raises(ValueError, match="at least 4 points, got 3"):
        ours.hsic_unbiased(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"model1_layers must be names of layers, got \['tail'\]"):
        ours.CKA(Net(), Net(), model1_layers=["head", "tail"])
    with pytest.raises(ValueError, match="at least 4 points, got 2"):
        ours.CKA(Net(), Net()).compare(loader(4, 2))
    constant = Net().requires_grad_(False)
    for parameter in constant.parameters():
        parameter.zero_()
    with pytest.raises(ValueError, match="does not vary"):
        ours.CKA(Net(), constant).compare(loader())
    with pytest.raises(TypeError, match="layer '' must return a tensor, got tuple"):
        ours.CKA(nn.LSTM(3, 3), nn.Sequential()).compare([(torch.zeros(6, 3),)])
    with pytest.raises(ValueError, match="never called cannot be compared: 'spare'"):
        ours.CKA(nn.Linear(3, 3), Unused()).compare([(torch.randn(6, 3),)])


# ---- Against the libraries


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_in_ckatorch(dtype, ckatorch):
    x, y = features(40, dtype=dtype)
    for kernel in ({}, {"kernel": "rbf"}, {"kernel": "rbf", "threshold": 0.4}):
        for options in ({}, {"unbiased": True}, {"method": "hsic"}):
            found, expected = (library.cka_base(x, y, **kernel, **options) for library in (ours, ckatorch))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        gradients = []
        for library in (ours, ckatorch):
            a, b = (t.double().requires_grad_() for t in (x, y))
            gradients.append(torch.autograd.grad(library.cka_base(a, b, method="hsic", **kernel), (a, b)))
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    x, y = x.view(4, 10, 5), y.view(4, 10, 7)
    torch.testing.assert_close(ours.cka_batch(x, y), ckatorch.cka_batch(x, y), rtol=1e-9, atol=1e-12)
    grams = [torch.stack([library_kernel(t) for t in z.double()]) for z, library_kernel in (
        (x, ckatorch.linear_kernel), (y, ckatorch.rbf_kernel))]  # fmt: skip
    torch.testing.assert_close(ours.hsic1(*grams), ckatorch.hsic1(*grams), rtol=1e-9, atol=1e-12)
    first = [g[0] for g in grams]
    torch.testing.assert_close(ours.hsic0(*first), ckatorch.hsic0(*first), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.linear_kernel(x[0].double()), first[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.rbf_kernel(y[0].double()), first[1], rtol=1e-9, atol=1e-12)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:Both model have identical names", "ignore:Dataloader for Model 2")
def test_drop_in_torch_cka(torch_cka):
    """Leaves only: their order is the same in both."""
    first, second, data = Net(), Net(), loader(24, 12)
    for layers in (["body.0", "body.1", "head"], ["body.1"]):
        results = []
        for library in (ours, torch_cka):
            comparison = library.CKA(first, second, "a", "b", layers, ["body.0", "head"])
            comparison.compare(data)
            results.append(comparison.export())
        found, expected = results
        torch.testing.assert_close(found.pop("CKA"), expected.pop("CKA"), rtol=1e-4, atol=1e-5)
        assert found == expected


def test_documented_names_are_of_the_core():
    """cka_base is `mmfast.cka`."""
    x, y = features()
    assert torch.equal(ours.cka_base(x, y), mmfast.cka(x, y))
