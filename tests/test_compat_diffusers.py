"""Tiny random models of diffusers with mmfast's attention processors against diffusers' own."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers.models import attention_processor as theirs  # noqa: E402

from mmfast.compat import diffusers as compat  # noqa: E402
from mmfast.compat.diffusers import replace_processors  # noqa: E402

pytestmark = pytest.mark.peer

TEXT, IMAGE = 10, 12  # features of the text encoder and of the image encoder


def unet(**options):
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT, attention_head_dim=4, norm_num_groups=4, **options,
    ).eval()  # fmt: skip


def adapter(model):
    """The weights of an IP-Adapter with four tokens an image."""
    layers, key = {}, 1
    for name in model.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        blocks = model.config.block_out_channels
        width = (
            blocks[-1]
            if name.startswith("mid")
            else (blocks[::-1] if name[:2] == "up" else blocks)[int(name.split(".")[1])]
        )
        for side in "kv":
            layers[f"{key}.to_{side}_ip.weight"] = torch.randn(width, TEXT) / 3
        key += 2
    projection = {"proj.weight": torch.randn(4 * TEXT, IMAGE), "proj.bias": torch.randn(4 * TEXT)}
    norm = {"norm.weight": torch.ones(TEXT), "norm.bias": torch.zeros(TEXT)}
    return {"image_proj": projection | norm, "ip_adapter": layers}


def with_adapters(count=1):
    model = unet()
    model._load_ip_adapter_weights([adapter(model) for _ in range(count)], low_cpu_mem_usage=False)
    return model


def arguments(images=()):
    """Of a UNet's call; ``images``: how many each adapter gets."""
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": 5, "encoder_hidden_states": torch.randn(2, 7, TEXT)}
    if images:
        call["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, n, IMAGE) for n in images]}
    return call


def set_scales(model, scales):
    for processor in model.attn_processors.values():
        if isinstance(processor, theirs.IPAdapterAttnProcessor2_0):
            processor.scale = list(scales)


def run(model, call, dtype=torch.float64):
    """Output, and the gradients of inputs and parameters."""

    def cast(x):
        if isinstance(x, torch.Tensor):
            return x.to(dtype) if x.is_floating_point() else x
        if isinstance(x, dict):
            return {k: cast(v) for k, v in x.items()}
        return [cast(v) for v in x] if isinstance(x, list) else x

    call = cast(call)
    for name in ("sample", "encoder_hidden_states"):
        call[name] = call[name].detach().clone().requires_grad_()
    model.zero_grad()
    out = model(**call).sample
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
    inputs = [call[name].grad for name in ("sample", "encoder_hidden_states")]
    return out, inputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, call, monkeypatch, layers):
    """Values and gradients, in float64; and it is mmfast that computes."""
    model = model.double()
    expected = run(model, call)
    calls = []
    attend = compat.cross_attention
    monkeypatch.setattr(compat, "cross_attention", lambda *a, **k: calls.append(len(a[1])) or attend(*a, **k))
    changed = replace_processors(model)
    got = run(model, call)
    assert len(changed) == layers == len(calls) and replace_processors(model) == []
    torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-8, atol=1e-9)
    return calls, got


LAYERS = 8  # self-attention and cross-attention, of one layer down, one in the middle and two up


def test_drop_in_unet(monkeypatch):
    assert_same(unet(), arguments(), monkeypatch, LAYERS)


def test_drop_in_unet_masked(monkeypatch):
    """Padded text; the mask is added to the scores."""
    call = arguments() | {"encoder_attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4]).bool()}
    assert_same(unet(), call, monkeypatch, LAYERS)
    call["encoder_hidden_states"] = call["encoder_hidden_states"].clone()
    call["encoder_hidden_states"][1, 3:] = 7
    model = unet().double()
    replace_processors(model)
    masked = [run(model, call)[0]]
    call["encoder_hidden_states"][1, 3:] = -7
    masked.append(run(model, call)[0])
    torch.testing.assert_close(*masked)


@pytest.mark.parametrize(
    "scales, images, sources", [((0.6,), (1,), 2), ((1.0, 0.3), (1, 2), 3), ((0.0, 0.3), (1, 2), 2)]
)
def test_drop_in_ip_adapter(scales, images, sources, monkeypatch):
    """One or two adapters, of one or two images; a scale of zero leaves its adapter out."""
    model = with_adapters(len(scales))
    set_scales(model, scales)
    calls, (_, _, gradients) = assert_same(model, arguments(images), monkeypatch, LAYERS)
    assert sorted(calls) == [1] * (LAYERS // 2) + [sources] * (LAYERS // 2)
    learned = {name for name, g in gradients.items() if "_ip." in name and g.any()}
    assert len(learned) == LAYERS // 2 * 2 * (sources - 1)


def test_drop_in_ip_adapter_masks(monkeypatch):
    """A mask for each image, a scale for each or one for all, an adapter without a mask."""
    model = with_adapters(3)
    set_scales(model, [[0.6, 0.9], 0.5, 0.7])
    call = arguments((2, 1, 2))
    masks = [torch.rand(1, 2, 16, 16).round(), torch.rand(1, 1, 16, 16), None]
    call["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    calls, _ = assert_same(model, call, monkeypatch, LAYERS)
    assert max(calls) == 1 + 2 + 1 + 1


@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask")
def test_drop_in_ip_adapter_masks_of_another_shape(monkeypatch):
    """A mask of another aspect ratio than the sample, and masks in one tensor, as old code passes them."""
    model = with_adapters(1)
    call = arguments((1,))
    call["cross_attention_kwargs"] = {"ip_adapter_masks": torch.rand(1, 1, 16, 24)}
    assert_same(model, call, monkeypatch, LAYERS)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_drop_in_tokens_after_the_text():
    """What diffusers still takes: one tensor, whose last tokens are the image's."""
    expected, got = [], []
    attn = theirs.Attention(12, TEXT, heads=3, dim_head=4)
    processor = theirs.IPAdapterAttnProcessor2_0(12, TEXT, num_tokens=(4,), scale=0.4)
    attn.set_processor(processor)
    x, context = torch.randn(2, 9, 12), torch.randn(2, 11, TEXT)
    for results in (expected, got):
        results.append(attn(x, context))
        replace_processors(attn)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options", [
    {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7},
    {"qk_norm": "rms_norm", "cross_attention_norm": "layer_norm", "dropout": 0.5},
    {"qk_norm": "layer_norm", "bias": True, "spatial_norm_dim": 5}], ids=str)  # fmt: skip
def test_drop_in_layer(options):
    """Everything around attention, for sequences and images."""
    attn = theirs.Attention(32, cross_attention_dim=TEXT, heads=3, dim_head=4, **options).double()
    image, temb = torch.randn(2, 32, 4, 6).double(), torch.randn(2, 5, 4, 6).double()
    context, mask = torch.randn(2, 7, TEXT).double(), torch.randn(2, 1, 7).double()
    calls = [(image, context, mask), (image, context, None)]
    if "spatial_norm_dim" not in options:
        calls.append((image.flatten(2).transpose(1, 2), context, mask))
    for call in calls:
        results = []
        for processor in (theirs.AttnProcessor2_0(), compat.AttnProcessor2_0()):
            attn.set_processor(processor)
            torch.manual_seed(3)
            results.append(attn(call[0], call[1], call[2], temb=temb))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("context_pre_only", [False, True])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_drop_in_joint(qk_norm, context_pre_only):
    attn = theirs.Attention(
        12, added_kv_proj_dim=12, heads=3, dim_head=4, context_pre_only=context_pre_only, qk_norm=qk_norm,
        processor=theirs.JointAttnProcessor2_0(),
    ).double()  # fmt: skip
    results = []
    for _ in range(2):
        x, context = (torch.linspace(-2, 3, 2 * n * 12, dtype=torch.float64).cos().view(2, n, 12) for n in (9, 5))
        x, context = x.requires_grad_(), context.requires_grad_()
        pair, alone = attn(x, context), attn(x)
        attn.zero_grad()
        (pair[0].square().sum() + pair[1].sin().sum() + alone.cos().sum()).backward()
        results.append([*pair, alone, x.grad, context.grad, *(p.grad for p in attn.parameters() if p.grad is not None)])
        replace_processors(attn)
    assert isinstance(attn.processor, compat.JointAttnProcessor2_0) and len(results[0]) > 15
    torch.testing.assert_close(results[1], results[0])


def test_drop_in_sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=3,
        joint_attention_dim=TEXT, caption_projection_dim=12, pooled_projection_dim=6, out_channels=4,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, TEXT),
        "pooled_projections": torch.randn(2, 6),
        "timestep": torch.tensor([3, 3]),
    }
    expected = model(**call).sample
    assert len(replace_processors(model)) == 2
    torch.testing.assert_close(model(**call).sample, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_is_no_worse():
    model, call = with_adapters(2), arguments((1, 1))
    gold = run(copy.deepcopy(model).double(), call)[0]
    model = model.bfloat16()
    errors = []
    for _ in range(2):
        out = run(model, call, torch.bfloat16)[0]
        assert out.dtype == torch.bfloat16
        errors.append(float(((out.double() - gold).norm() / gold.norm()).detach()))
        replace_processors(model)
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_parameters_stay():
    """An optimizer, a state dict and a pipeline find what they found before."""
    model = with_adapters(1)
    before, state = list(model.parameters()), set(model.state_dict())
    replace_processors(model)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True)) and set(model.state_dict()) == state
    kinds = [type(p) for p in model.attn_processors.values()]
    assert kinds.count(compat.IPAdapterAttnProcessor2_0) == kinds.count(compat.AttnProcessor2_0) == LAYERS // 2
    pipeline = diffusers.loaders.IPAdapterMixin()
    pipeline.unet, pipeline.unet_name = model, "unet"
    pipeline.set_ip_adapter_scale(0.25)
    scales = [p.scale for p in model.attn_processors.values() if isinstance(p, compat.IPAdapterAttnProcessor2_0)]
    assert scales == [[0.25]] * (LAYERS // 2)


def test_learned_scale():
    attn = theirs.Attention(12, TEXT, heads=3, dim_head=4).double()
    processor = compat.IPAdapterAttnProcessor2_0(12, TEXT).double()
    attn.set_processor(processor)
    x, context = (
        torch.randn(2, 9, 12).double(),
        (torch.randn(2, 5, TEXT).double(), [torch.randn(2, 1, 4, TEXT).double()]),
    )

    def of(scale):
        processor.scale = [scale]
        return attn(x, context)

    scale = torch.tensor(0.0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.grad(of(scale).square().sum(), scale)[0] != 0
    assert torch.autograd.gradcheck(of, scale)


def test_compile_fullgraph():
    attn = theirs.Attention(12, TEXT, heads=3, dim_head=4)
    attn.set_processor(compat.IPAdapterAttnProcessor2_0(12, TEXT, scale=0.5))
    x, text, image = torch.randn(2, 9, 12), torch.randn(2, 5, TEXT), torch.randn(2, 1, 4, TEXT)
    function = lambda x, text, image: attn.processor(attn, x, (text, [image]))  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, text, image), function(x, text, image))


def test_rejects():
    attn = theirs.Attention(12, TEXT, heads=3, dim_head=4)
    processor = compat.IPAdapterAttnProcessor2_0(12, TEXT, scale=0.5)
    attn.set_processor(processor)
    x, text, image = torch.randn(2, 9, 12), torch.randn(2, 5, TEXT), torch.randn(2, 1, 4, TEXT)
    mask = torch.ones(1, 1, 6, 6)
    for message, context, masks in (
        ("encoder_hidden_states must be a pair", None, None),
        ("ip_adapter_masks must be 1, .* got 2 masks and 1 adapters", (text, [image]), [mask, mask]),
        (r"ip_adapter_masks\[0\] must be \(1, images, height, width\)", (text, [image]), [mask[0]]),
        (r"ip_adapter_masks\[0\] must have 1 masks", (text, [image]), [mask.expand(1, 2, 6, 6)]),
    ):
        with pytest.raises(ValueError, match=message):
            attn(x, context, ip_adapter_masks=masks)
    processor.scale = [[0.5, 0.5]]
    with pytest.raises(ValueError, match=r"scale\[0\] must be a number without ip_adapter_masks"):
        attn(x, (text, [image]))
