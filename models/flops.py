"""The arithmetic of a token."""

from __future__ import annotations

from stoker.conf.schema import ModelConfig
from stoker.models.attention import query_channels, value_channels, window_of
from stoker.models.feed_forward import idle_parameters


def flops_per_token(config: ModelConfig, seq_len: int, parameters: int) -> int:
    """Floating-point operations of training on one token, forward and backward.

    As published utilisations count them (Chowdhery et al. 2022, PaLM, appendix B): 6 for each of the `parameters` of
    the whole model that multiplies, which a looked-up embedding and the experts of other tokens do not, and attention
    as if it were not causal: of a layer with a window, to as many keys as that.
    """
    looked_up = 0 if config.tie_word_embeddings else (config.vocab_size or 0) * config.hidden_size
    of_heads = config.num_attention_heads * (query_channels(config) + value_channels(config))
    windows = [window_of(config, layer) or seq_len for layer in range(config.num_hidden_layers)]
    attention = 6 * of_heads * sum(min(window, seq_len) for window in windows)
    return 6 * (parameters - looked_up - idle_parameters(config)) + attention
