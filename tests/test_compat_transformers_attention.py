"""Tiny random models of transformers with attn_implementation="mmfast" against their own implementations."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

transformers = pytest.importorskip("transformers")

from mmfast.compat import transformers_attention as compat  # noqa: E402

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


MODELS = (llama, llama_without_padding, t5, whisper, blip2_qformer, mllama)


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


def test_generation():
    """With a cache: one query after the other."""
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=40, pad_token_id=0, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = []
    inputs = padded()
    for implementation in ("sdpa", "mmfast"):
        model.set_attn_implementation(implementation)
        tokens.append(model.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert tokens[0].shape == (2, 11) and torch.equal(*tokens)


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
