"""The `model` section of the config: the shape of a model, and where it comes from. Kinds: `stoker.conf.schema`."""

# ruff: noqa: RUF009 (free, maths and fixed return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stoker.conf.fields import fixed, free, maths


@dataclass
class RopeParameters:
    """Rotary position embedding, with the keys of transformers' `rope_parameters`; a null key is absent."""

    rope_type: str = fixed("default")  # default | linear | llama3 (model card) | yarn (Peng et al. 2023) | longrope
    rope_theta: float = fixed(10000.0)  # base of the rotary wavelengths, in tokens
    factor: float | None = fixed()  # linear, llama3, yarn: context extension
    low_freq_factor: float | None = fixed()  # llama3: original context / wavelength below which all is scaled
    high_freq_factor: float | None = fixed()  # llama3: and above which nothing is
    original_max_position_embeddings: int | None = fixed()  # llama3, yarn, longrope: tokens it was trained at
    beta_fast: float | None = fixed()  # yarn: turns in the original context from which a wave is kept; default: 32
    beta_slow: float | None = fixed()  # yarn: and up to which it is slowed down by the factor; default: 1
    mscale: float | None = fixed()  # yarn: with mscale_all_dim, of queries and keys by the log of the factor
    mscale_all_dim: float | None = fixed()  # yarn: the same of scores in latent attention, and a divisor of mscale
    short_factor: list[float] = fixed([])  # longrope (Phi-3): by how much each wave of a head is slowed down
    attention_factor: float | None = fixed()  # longrope: of queries and keys


@dataclass
class ModelConfig:
    target: str = fixed("stoker.models.decoder:build")  # import path pkg.mod:function of the builder
    name: str = free("model")  # for run names and tables
    family: str | None = free()  # of exports, such as mistral (see model.family in docs/refusals.md); default: by shape
    init_from: str | None = fixed()  # directory to take shape, weights and tokenizer from: Hugging Face's or a run's
    native: bool | None = fixed()  # with init_from: Stoker's own modules (true) or transformers'; default: where equal
    config: Any = fixed()  # for model=transformers: a config.json, its folder or its values; default: init_from's
    init_only: list[str] = fixed([])  # with init_from: take these parameters (`layers.*`) only; default: all
    upcycle_noise: float = fixed(0.0)  # experts begun as MLPs of init_from: share of usual initial values added to them
    vocab_size: int | None = fixed()  # tokens; default: the tokenizer's
    hidden_size: int = fixed(256)  # channels of the residual stream
    num_hidden_layers: int = fixed(6)  # transformer blocks
    num_attention_heads: int = fixed(8)  # query heads
    num_key_value_heads: int | None = fixed()  # key and value heads; default: num_attention_heads
    head_dim: int | None = fixed()  # channels per head; default: hidden_size / num_attention_heads
    intermediate_size: int = fixed(704)  # channels inside the gated MLP
    hidden_act: str = fixed("silu")  # silu | gelu_pytorch_tanh: the function of the MLP's gate (SwiGLU, GeGLU)
    num_experts: int = fixed(0)  # MLPs of a layer, of which each token uses a few; 0: one MLP for all tokens
    num_experts_per_tok: int = fixed(2)  # experts that a token uses
    moe_intermediate_size: int | None = fixed()  # channels inside an expert; default: intermediate_size
    num_shared_experts: int = fixed(0)  # experts that every token uses, as one MLP of so many times the channels
    first_dense_layers: int = fixed(0)  # layers before the first with experts
    router: str = fixed("softmax")  # softmax | sigmoid: how scores of experts are made of the router's logits
    router_bias: bool = fixed(False)  # a bias of each expert's score in the choice of experts, moved by their tokens
    router_bias_rate: float = maths(1e-3)  # router_bias: by how much a step moves it, towards equal counts of tokens
    router_aux_loss_coef: float = maths(0.0)  # factor of a loss that balances the experts of each sequence
    router_aux_loss_over: str = maths("sequence")  # sequence: what that loss counts the tokens of experts in
    router_z_loss_coef: float = maths(0.0)  # factor of the squared log of the sum of the exponents of router logits
    norm_topk_prob: bool = fixed(True)  # divide the weights of a token's experts by their sum
    n_group: int = fixed(1)  # groups of equally many experts, of which a token uses those of topk_group (DeepSeek-V3)
    topk_group: int = fixed(1)  # groups whose experts a token may use: those with the highest two scores together
    routed_scaling_factor: float = fixed(1.0)  # of the weights of a token's experts
    kv_lora_rank: int | None = fixed()  # multi-head latent attention: channels that keys and values are made of
    q_lora_rank: int | None = fixed()  # kv_lora_rank: channels that queries are made of; default: all
    qk_nope_head_dim: int = fixed(128)  # kv_lora_rank: channels of queries and keys per head without rotary embedding
    qk_rope_head_dim: int = fixed(64)  # kv_lora_rank: and with it, which the keys of all heads share
    v_head_dim: int = fixed(128)  # kv_lora_rank: channels of values per head
    rope_interleave: bool = fixed(True)  # kv_lora_rank: rotary embedding pairs neighbours; false: two halves
    rms_norm_eps: float = fixed(1e-5)  # added to the mean square in RMSNorm
    rope_parameters: RopeParameters = fixed(RopeParameters)
    partial_rotary_factor: float = fixed(1.0)  # share of a head's channels, the first, that rotary embedding turns
    nope_layers: list[int] = fixed([])  # numbers of the layers without rotary embedding (SmolLM3)
    sliding_window: int | None = fixed()  # keys that a token sees in layers with a window, its own among them
    full_attention_layers: list[int] = fixed([])  # sliding_window: numbers of the layers without a window (Gemma 3)
    sliding_rope_theta: float | None = fixed()  # sliding_window: rope_theta, unscaled, of the layers with a window
    qk_norm: bool = fixed(False)  # RMSNorm on queries and keys per head (Qwen3)
    qk_norm_over: str = fixed("head")  # head | projection: one mean square of all heads' channels (OLMo 2)
    norm_placement: str = fixed("before")  # before | after | both: RMSNorm of what a sublayer takes, gives (OLMo 2)
    zero_centered_norm: bool = fixed(False)  # weights of RMSNorm are added to 1 (Gemma)
    qkv_bias: bool = fixed(False)  # biases on the query, key and value projections (Qwen2)
    embedding_multiplier: float = fixed(1.0)  # of what the embedding gives (Granite, as the next three)
    attention_multiplier: float | None = fixed()  # of the scores of attention; default: 1 / sqrt(head_dim)
    residual_multiplier: float = fixed(1.0)  # of what attention and MLP add to the residual stream
    logits_scaling: float = fixed(1.0)  # logits are divided by it
    tie_word_embeddings: bool = fixed(False)  # one matrix for the embedding and the head
    initializer_range: float = fixed(0.02)  # standard deviation of initial weights
    loss_chunk: int | None = free()  # tokens whose logits exist at one time; default: 1024, on GPUs what fits, to 8192
    freeze: list[str] = fixed([])  # parameters, or modules with all of theirs, not to train: [embedding, layers.0.*]
    args: dict[str, Any] = fixed({})  # for a user's model.target; for model=transformers: changes of model.config
