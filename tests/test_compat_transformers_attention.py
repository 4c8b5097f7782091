"""Tiny random models of transformers with attn_implementation="mmfast" against their own implementations."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

transformers = pytest.importorskip("transformers")

from mmfast.compat import transformers_attention as compat  # noqa: E402
from mmfast.nn import MultiheadAttention  # noqa: E402

pytestmark = pytest.mark.peer

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}


def padded(batch=2, length=6, vocabulary=40):
    """Tokens, the second item of which begins with padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, :2] = 0
    return {"input_ids": torch.randint(3, vocabulary, (batch, length)), "attention_mask": mask}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=40, head_dim=6)
    return transformers.LlamaModel(config), padded(), "last_hidden_state"


def llama_without_padding():
    model, inputs, name = llama()
    return model, {"input_ids": inputs["input_ids"]}, name


def t5():
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=40)
    inputs = {**padded(), "decoder_input_ids": torch.randint(3, 40, (2, 4))}
    return transformers.T5Model(config), inputs, "last_hidden_state"


def whisper():
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40, num_mel_bins=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(3, 40, (2, 5))}
    return transformers.WhisperModel(config), inputs, "last_hidden_state"


def blip2_qformer():
    """Learned queries of batch 1 that attend to image features."""
    config = transformers.Blip2QFormerConfig(
        **SMALL, vocab_size=40, encoder_hidden_size=10, cross_attention_frequency=1
    )
    inputs = {
        "query_embeds": torch.randn(1, 4, 16).expand(2, -1, -1),
        "encoder_hidden_states": torch.randn(2, 9, 10),
        "encoder_attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
    }
    return transformers.Blip2QFormerModel(config), inputs, "last_hidden_state"


def mllama():
    """Gated cross-attention of text to images."""
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **SMALL, num_key_value_heads=2, vocab_size=40, cross_attention_layers=[1], pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    inputs = {
        **padded(),
        "cross_attention_states": torch.randn(2, 7, 16),
        "cross_attention_mask": torch.zeros(2, 1, 6, 7).masked_fill(
            torch.rand(2, 1, 6, 7) < 0.3, torch.finfo(torch.float32).min
        ),
        "full_text_row_masked_out_mask": torch.ones(2, 1, 6, 1),
    }
    return transformers.MllamaTextModel(config), inputs, "last_hidden_state"


def blip2():
    """Image features through the Q-Former into a language model."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1}
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 4, "num_hidden_layers": 1,
            "vocab_size": 40, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 8, "patch_size": 4},
        qformer_config={**small, "encoder_hidden_size": 16, "cross_attention_frequency": 1, "vocab_size": 40},
        text_config=text, num_query_tokens=3, image_token_index=39,
    )  # fmt: skip
    tokens = torch.cat([torch.full((2, 3), 39), torch.randint(3, 38, (2, 4))], 1)
    inputs = {
        "pixel_values": torch.randn(2, 3, 8, 8),
        "input_ids": tokens,
        "attention_mask": torch.tensor([[1] * 7, [1] * 6 + [0]]),
    }
    return transformers.Blip2ForConditionalGeneration(config), inputs, "logits"


def mllama_with_images():
    """Two tiles of one image, of which the second item has but one."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.MllamaConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "attention_heads": 4, "num_hidden_layers": 2,
            "num_global_layers": 1, "image_size": 8, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 48,
            "intermediate_layers_indices": [0, 1], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={
            **SMALL, "num_key_value_heads": 2, "vocab_size": 40, "cross_attention_layers": [1], "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": None, "rope_parameters": rope, "max_position_embeddings": 32,
        },
    )  # fmt: skip
    inputs = {
        **padded(),
        "pixel_values": torch.randn(2, 1, 2, 3, 8, 8),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
        "cross_attention_mask": torch.tensor([[[[1, 1]]] * 6, [[[1, 0]]] * 6]),
    }
    return transformers.MllamaForConditionalGeneration(config), inputs, "logits"


MODELS = (llama, llama_without_padding, t5, whisper, blip2_qformer, blip2, mllama, mllama_with_images)


def build(make):
    model, inputs, name = make()
    with torch.no_grad():  # gates that start at 0 would hide the attention behind them
        for parameter_name, p in model.named_parameters():
            if "gate" in parameter_name and p.dim() <= 1:
                p.fill_(0.7)
    return model, inputs, name


@pytest.mark.parametrize("make", MODELS)
def test_drop_in(make, monkeypatch):
    model, inputs, name = build(make)
    model.eval()
    if make is blip2:  # gradients up to 1e5, which float32 leaves a sum of 1e-3 or so
        model.double()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    calls = []
    attend = compat.cross_attention
    monkeypatch.setattr(compat, "cross_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    results = []
    for implementation in ("sdpa", "mmfast"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = getattr(model(**inputs), name)
        if "attention_mask" in inputs and not model.config.is_encoder_decoder:
            out = out * inputs["attention_mask"][..., None]  # what padding gives is nobody's
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert bool(calls) == (implementation == "mmfast")
    assert len(results[1]) > 10
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_softcap():
    config = transformers.Gemma2Config(
        **SMALL, num_key_value_heads=2, vocab_size=40, head_dim=6, attn_logit_softcapping=0.5, query_pre_attn_scalar=6
    )
    model, inputs = transformers.Gemma2Model(config).eval(), padded()
    results = []
    for implementation in ("eager", "mmfast"):
        model.set_attn_implementation(implementation)
        results.append(model(**inputs).last_hidden_state[inputs["attention_mask"].bool()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_weights():
    model, inputs, _ = whisper()
    model.eval()
    results = []
    for implementation in ("eager", "mmfast"):
        model.set_attn_implementation(implementation)
        out = model(**inputs, output_attentions=True)
        results.append([*out.cross_attentions, *out.decoder_attentions])
    assert len(results[0]) == 4
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def llama_lm():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=40, pad_token_id=0, eos_token_id=None)
    return transformers.LlamaForCausalLM(config), padded()


def llama_lm_unpadded():
    """Without a mask: a static cache is longer than what has been read."""
    model, inputs = llama_lm()
    return model, {"input_ids": inputs["input_ids"]}


def whisper_lm():
    model, inputs, _ = whisper()
    model = transformers.WhisperForConditionalGeneration(model.config)
    model.generation_config.eos_token_id, model.generation_config.begin_suppress_tokens = None, None
    return model, {"input_features": inputs["input_features"], "decoder_input_ids": torch.tensor([[1, 5], [1, 7]])}


def mllama_lm():
    model, inputs, _ = mllama_with_images()
    return model, inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("make", [llama_lm, llama_lm_unpadded, whisper_lm, mllama_lm])
def test_generation(make, options):
    """With a cache: the prompt, then one query after the other, of which only its own scores decide."""
    model, inputs = make()
    model.eval()
    with torch.no_grad():  # scores far enough from each other that rounding does not choose
        for name, p in model.named_parameters():
            p.mul_(8) if p.dim() == 2 else p.fill_(0.7) if "gate" in name and p.dim() <= 1 else None
    found = []
    for implementation in ("sdpa", "mmfast"):
        model.set_attn_implementation(implementation)
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True, **options
        )
        found.append((out.sequences, torch.stack(out.scores)))
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][1]) == 5
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-3)


def test_static_cache_is_read_as_far_as_it_is_filled():
    """What lies behind the prompt in a cache is not seen, whatever it holds."""
    q, cache = torch.randn(1, 4, 3, 6), torch.randn(2, 1, 2, 8, 6)
    bias = torch.randn(1, 4, 3, 8)
    module = torch.nn.Identity()
    expected, _ = compat.attention_forward(module, q, *cache[:, :, :, :3], None, position_bias=bias[..., :3])
    cache[:, :, :, 3:] = torch.nan
    got, _ = compat.attention_forward(module, q, *cache, None, position_bias=bias)
    torch.testing.assert_close(got, expected)


def perceiver(**options):
    config = transformers.PerceiverConfig(
        num_latents=5, d_latents=12, d_model=10, num_blocks=2, num_self_attends_per_block=2, num_self_attention_heads=3,
        num_cross_attention_heads=2, qk_channels=24, v_channels=12, **options,
    )  # fmt: skip
    model = transformers.PerceiverModel(config)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    return model, {"inputs": torch.randn(2, 9, 10), "attention_mask": mask}


def test_drop_in_perceiver():
    """Latents of batch 1, values of another width; layers that never ask for an implementation."""
    model, inputs = perceiver()
    model.eval()
    state, results = set(model.state_dict()), []
    for _ in range(2):
        model.zero_grad()
        x = inputs["inputs"].clone().requires_grad_()
        out = model(x, inputs["attention_mask"], output_attentions=True)
        weights = [*out.attentions, *out.cross_attentions]
        sum((t.square() * torch.linspace(1, 2, t.numel()).view(t.shape)).sum()
            for t in (out.last_hidden_state, *weights)).backward()  # fmt: skip
        parameters = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.last_hidden_state, *weights, x.grad, *parameters])
        assert not x.grad[1, 4:].any() and x.grad[0].any()
        changed = compat.replace_perceiver_attention(model)
        assert len(changed) == (3 if not results[1:] else 0)
    assert len(results[0]) > 30 and set(model.state_dict()) == state
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_perceiver_dropout():
    model, inputs = perceiver(attention_probs_dropout_prob=0.5)
    compat.replace_perceiver_attention(model)
    assert not torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    model.eval()
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_pooling_head_with_torchs_module():
    """SigLIP's head holds torch's own, which has the same parameters as mmfast's."""
    config = transformers.SiglipVisionConfig(**SMALL, image_size=8, patch_size=4)
    model, pixels = transformers.SiglipVisionModel(config).eval(), torch.randn(2, 3, 8, 8)
    expected = model(pixels).pooler_output
    head = next(m for m in model.modules() if type(m).__name__ == "SiglipMultiheadAttentionPoolingHead")
    ours = MultiheadAttention(16, 4, batch_first=True).eval()
    ours.load_state_dict(head.attention.state_dict())
    head.attention = ours
    torch.testing.assert_close(model(pixels).pooler_output, expected)


def test_from_config():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=40)
    model = transformers.AutoModel.from_config(config, attn_implementation="mmfast")
    assert model.config._attn_implementation == "mmfast"


def test_rejects():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="s_aux must be None"):
        compat.attention_forward(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="cache must be None"):
        compat.attention_forward(torch.nn.Identity(), q, q, q, None, cache=object())
