"""`mmfast.swap` in models, losses and metrics of other libraries."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from test_swap import attributes
from torch import nn

import mmfast

pytestmark = pytest.mark.peer


def test_transformers():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = transformers.BertConfig(**small, vocab_size=40)
    image = transformers.ViTConfig(**small, image_size=8, patch_size=4)
    model = transformers.VisionTextDualEncoderModel(
        transformers.VisionTextDualEncoderConfig.from_vision_text_configs(image, text)
    )
    inputs = {"input_ids": torch.randint(0, 40, (2, 5)), "pixel_values": torch.randn(2, 3, 8, 8)}
    for m in model.modules():
        if hasattr(m, "config"):
            m.config._attn_implementation = "sdpa"
    report = mmfast.swap(model, check=inputs)
    assert {model.text_model.config._attn_implementation, model.vision_model.config._attn_implementation} == {"mmfast"}
    assert len(report.swapped) >= 2 and any("grad of text_model" in d.name for d in report.differences)
    report.undo()
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}
    report = mmfast.swap(model, skip="text_model")
    assert model.text_model.config._attn_implementation == "sdpa"
    assert model.vision_model.config._attn_implementation == "mmfast"
    model.text_model.config._attn_implementation = "flash_attention_2"
    assert any("flash_attention_2" in row.why for row in mmfast.swap(model).left_alone)


UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
SD3 = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 12,
    "caption_projection_dim": 8,
    "pooled_projection_dim": 6,
}


@pytest.mark.parametrize("shared", [False, True])
def test_diffusers_unet(shared):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(**UNET)
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(1, 5, 12),
    }
    if shared:
        model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    report = mmfast.swap(model, check=inputs)
    assert len(report.swapped) == (1 if shared else 8) and not report.undone
    assert all(type(p).__module__ == "mmfast.compat.diffusers" for p in model.attn_processors.values())
    assert any(".attn1." in d.name for d in report.differences)
    if shared:
        assert "and 7 more" in str(report)
    report.undo()
    assert all(type(p).__module__.startswith("diffusers") for p in model.attn_processors.values())


def test_diffusers_transformer():
    """The last block makes no use of the text's attention: diffusers gives its projection zeros for a gradient."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(**SD3)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 6),
        "timestep": torch.tensor([3]),
    }
    report = mmfast.swap(model, check=inputs, only="transformer_blocks.*")
    assert len(report.swapped) == 2 and not report.undone


def test_ip_adapter_keeps_its_parameters():
    processors = pytest.importorskip("diffusers.models.attention_processor")
    attention = processors.Attention(16, cross_attention_dim=12, heads=2, dim_head=8)
    attention.set_processor(processors.IPAdapterAttnProcessor2_0(16, 12, num_tokens=(4,), scale=0.6))
    parameters = list(attention.parameters())
    x, text, image = torch.randn(2, 6, 16), torch.randn(2, 5, 12), torch.randn(2, 1, 4, 12)
    report = mmfast.swap(attention, check=lambda m: m(x, (text, [image])))
    assert [row.path for row in report.swapped] == ["processor"] and not report.undone
    assert all(a is b for a, b in zip(parameters, attention.parameters(), strict=True))
    assert attention.processor.scale == [0.6] and any("to_k_ip" in d.name for d in report.differences)


def _installed(name, *attributes):
    module = pytest.importorskip(name)
    return [getattr(module, attribute) for attribute in attributes]


def _geomloss(loss="energy"):
    (cls,) = _installed("geomloss", "SamplesLoss")
    return cls(loss, blur=0.7)


def _pytorch_adapt(batched=False):
    loss, batch = _installed("pytorch_adapt.layers", "MMDLoss", "MMDBatchedLoss")
    return batch(batch_size=4, mmd_type="quadratic") if batched else loss(torch.tensor([0.5, 2.0]), "quadratic")


def _tllib():
    """tllib's classes as far as the swap looks at them; the definition is that of Long et al. 2015."""

    class GaussianKernel(nn.Module):
        def __init__(self, alpha):
            super().__init__()
            self.alpha, self.track_running_stats, self.sigma_square = alpha, True, None

        def forward(self, x):
            square = (x[:, None] - x[None]).square().sum(2)
            self.sigma_square = self.alpha * square.detach().mean()
            return torch.exp(-square / (2 * self.sigma_square))

    class MultipleKernelMaximumMeanDiscrepancy(nn.Module):
        def __init__(self, kernels, linear=False):
            super().__init__()
            self.kernels, self.index_matrix, self.linear = kernels, None, linear

        def forward(self, s, t):
            n = len(s)
            k = sum(kernel(torch.cat([s, t])) for kernel in self.kernels)
            k = k - torch.diag(k.diagonal())
            within = (k[:n, :n].sum() + k[n:, n:].sum()) / (n * (n - 1))
            return within - 2 * k[:n, n:].mean() + 2 / (n - 1)

    return GaussianKernel, MultipleKernelMaximumMeanDiscrepancy


def _deepda(scale=1.0):
    class MMDLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel_type, self.kernel_mul, self.kernel_num, self.fix_sigma = "rbf", 2.0, 5, None

        def forward(self, s, t):
            z, n = torch.cat([s, t]), len(s)
            square = (z[:, None] - z[None]).square().sum(2)
            width = square.detach().sum() / (len(z) ** 2 - len(z)) / self.kernel_mul ** (self.kernel_num // 2)
            k = sum(torch.exp(-square / (width * self.kernel_mul**i)) for i in range(self.kernel_num))
            return scale * (k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean())

    return MMDLoss


def _home(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("which", ["geomloss", "laplacian", "pytorch_adapt", "batched", "tllib", "deepda"])
def test_losses(which, monkeypatch):
    if which == "tllib":
        kernel, cls = _tllib()
        _home(monkeypatch, "tllib.alignment.dan", MultipleKernelMaximumMeanDiscrepancy=cls)
        loss = cls([kernel(0.5), kernel(2.0)])
    elif which == "deepda":
        cls = _deepda()
        _home(monkeypatch, "loss_funcs.mmd", MMDLoss=cls)
        loss = cls()
    else:
        loss = {
            "geomloss": _geomloss,
            "laplacian": lambda: _geomloss("laplacian"),
            "pytorch_adapt": _pytorch_adapt,
            "batched": lambda: _pytorch_adapt(True),
        }[which]()
    model = nn.ModuleDict({"loss": loss})
    x, y = torch.randn(6, 3), torch.randn(6, 3) + 0.5
    expected, keys, names = loss(x, y), list(model.state_dict()), attributes(model)
    report = mmfast.swap(model, check=lambda m: m["loss"](x, y))
    assert type(loss).__module__.startswith("mmfast.compat") and not report.undone
    assert [row.path for row in report.swapped] == ["loss"]
    torch.testing.assert_close(loss(x, y), expected, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == keys
    report.undo()
    assert type(loss).__module__.partition(".")[0] != "mmfast" and attributes(model) == names
    torch.testing.assert_close(loss(x, y), expected)


def test_losses_that_do_not_fit(monkeypatch):
    sinkhorn = _geomloss("sinkhorn")
    assert "sinkhorn" in mmfast.swap(sinkhorn).left_alone[0].why and type(sinkhorn).__module__.startswith("geomloss")
    cls = _deepda(scale=2.0)  # somebody changed the copy
    _home(monkeypatch, "loss_funcs.mmd", MMDLoss=cls)
    assert "something else than DeepDA's" in mmfast.swap(cls()).left_alone[0].why
    _, cls = _tllib()
    _home(monkeypatch, "tllib.alignment.dan", MultipleKernelMaximumMeanDiscrepancy=cls)
    assert "kernels must be" in mmfast.swap(cls([nn.Identity()])).left_alone[0].why


@pytest.mark.filterwarnings("ignore:Metric .*will save all extracted features")
def test_metrics():
    (kid,) = _installed("torchmetrics.image.kid", "KernelInceptionDistance")
    mmd, hsic = _installed("ignite.metrics", "MaximumMeanDiscrepancy", "HSIC")
    model = nn.Module()
    model.kid = kid(nn.Flatten(), subsets=3, subset_size=10)
    model.mmd, model.hsic = mmd(var=2.0), hsic()
    x, y = torch.randn(12, 3), torch.randn(12, 3) + 1

    def values():
        found = []
        for metric in (model.mmd, model.hsic):
            metric.reset()
            metric.update((x, y))
            found.append(float(metric.compute()))
        model.kid.reset()
        for real, data in ((True, x), (False, y)):
            model.kid.update(data, real=real)
        torch.manual_seed(0)
        return found + [float(v) for v in model.kid.compute()]

    expected = values()
    report = mmfast.swap(model)
    assert [row.path for row in report.swapped] == ["kid", "mmd", "hsic"]
    assert all(type(m).__module__.startswith("mmfast.compat") for m in (model.kid, model.mmd, model.hsic))
    assert model.kid.compute.__wrapped__.__func__.__module__ == "mmfast.compat.torchmetrics"
    assert values() == pytest.approx(expected, rel=1e-3)
    report.undo()
    assert (type(model.kid), type(model.mmd), type(model.hsic)) == (kid, mmd, hsic) and values() == expected
    assert mmfast.swap(model.mmd).swapped[0].path == ""


def test_torchdrift():
    module = pytest.importorskip("torchdrift.detectors.mmd", exc_type=ImportError)
    detector = module.KernelMMDDriftDetector(kernel=module.RationalQuadraticKernel(2.0, alpha=0.7), n_perm=50)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(15, 4, dtype=torch.float64) + 0.4
    detector.fit(x)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append((float(detector(y)), float(detector.compute_p_value(y))))
        report = mmfast.swap(detector)
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    report.undo()
