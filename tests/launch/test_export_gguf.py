"""`stoker export --gguf`: what the file holds, read back by llama.cpp's own package and by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stoker.launch.cli import main
from stoker.launch.export_gguf import FILE, pre_tokenizer_of
from tests.extent import some
from tests.launch.test_export import unchanged_run
from tests.models.families import SCALED, write_family

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

CASES = ["llama", "tied qwen3", "qwen2", "mistral", "tied llama without groups", "tied qwen2", "qwen3"]


def exported(run: Path, out: Path, *more: str) -> Any:
    """The file, as the package reads it."""
    assert main(["export", str(run), str(out), "--gguf", *more]) == 0
    return gguf.GGUFReader(out / FILE)


@pytest.mark.long
@pytest.mark.parametrize("case", some(CASES, 3))
def test_transformers_reads_the_same_model_from_the_file(case: str, tmp_path: Path) -> None:
    import transformers

    head = {"head_dim": 128} if "qwen3" in case else {}  # transformers takes that of every Qwen3, whatever a file says
    write_family(tmp_path / "theirs", case, **head)
    run = unchanged_run(tmp_path, tmp_path / "theirs")
    reader = exported(run, tmp_path / "out")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert main(["export", str(run), str(tmp_path / "plain")]) == 0
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(tensors) == len(stored)
    assert np.array_equal(tensors["token_embd.weight"], stored["model.embed_tokens.weight"].numpy())
    assert np.array_equal(tensors["blk.1.attn_v.weight"], stored["model.layers.1.self_attn.v_proj.weight"].numpy())
    same = np.array_equal(tensors["blk.1.attn_q.weight"], stored["model.layers.1.self_attn.q_proj.weight"].numpy())
    assert same == ("qwen" in case)  # else its rows are in the order of neighbouring channels

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=FILE, dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tokens = torch.randint(0, 320, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = theirs.eval()(tokens).logits, ours(tokens).logits
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_scaled_rotary_dtypes_and_tokens(tmp_path: Path) -> None:
    import transformers

    write_family(tmp_path / "theirs", "llama", rope_parameters=SCALED)
    run = unchanged_run(tmp_path, tmp_path / "theirs")
    reader = exported(run, tmp_path / "out", "--dtype", "bf16")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert list(tensors["blk.0.ffn_up.weight"].shape) == [32, 48]  # llama.cpp's order
    raw = torch.from_numpy(np.array(tensors["blk.0.ffn_up.weight"].data)).view(torch.bfloat16)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(raw.view(48, 32), theirs.bfloat16())

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_config(config)
    head_dim = config.head_dim
    plain = 1 / 5000.0 ** (np.arange(0, head_dim, 2) / head_dim)
    factors = np.array(tensors["rope_freqs.weight"].data)
    assert factors.max() == pytest.approx(8.0) and factors.min() == pytest.approx(1.0)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)

    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["llama.block_count"] == 3
    assert fields["llama.rope.freq_base"] == 5000.0 and fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 320 and tokens[ord("a")] == "a" and tokens[319] == "[PAD319]"
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[256] == gguf.TokenType.CONTROL and kinds[319] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.eos_token_id"] == 256


def test_models_that_llama_cpp_has_no_name_for_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_family(tmp_path / "theirs", "olmo2")
    run = unchanged_run(tmp_path, tmp_path / "theirs")
    assert main(["export", str(run), str(tmp_path / "out"), "--gguf"]) == 1
    assert "model_type='olmo2': --format gguf writes llama, mistral, qwen2, qwen3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pre_tokenizers_have_llama_cpps_names() -> None:
    level, model = {"type": "ByteLevel", "use_regex": False}, {"merges": ["a b"]}
    ends = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits, name in (("{1,3}", "llama-bpe"), ("", "qwen2")):
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
        split = {"type": "Split", "pattern": {"Regex": f"{words}|{ends}"}, "behavior": "Isolated"}
        steps = {"type": "Sequence", "pretokenizers": [split, level]}
        assert pre_tokenizer_of({"model": model, "pre_tokenizer": steps}) == name
    assert pre_tokenizer_of({"model": model, "pre_tokenizer": {"type": "ByteLevel"}}) == "gpt-2"
    assert pre_tokenizer_of({"model": {"merges": []}, "pre_tokenizer": level}) == "gpt-2"
    other = {"type": "Split", "pattern": {"Regex": r"\d"}}
    with pytest.raises(ValueError, match="has no name for: it knows gpt-2, llama-bpe, qwen2"):
        pre_tokenizer_of({"model": model, "pre_tokenizer": {"pretokenizers": [other, level]}})
