"""Windows, rotary channels, activations and norms that do not go together: entries for the table of `test_refusals`."""

from __future__ import annotations

from tests.trainer.refused_rope import LONGROPE

OF_WINDOWS: dict[str, list[tuple[list[str], int, int, str]]] = {
    "layers without rotary embedding": [
        (["model.num_hidden_layers=4", "model.nope_layers=[1,4]"], 1, 0, "there is no layer 4, layers are 0 to 3"),
    ],
    "windows of attention": [
        (["model.full_attention_layers=[1]"], 1, 0, "model.sliding_window=1024 has windows"),
        (["model.sliding_rope_theta=100"], 1, 0, "model.sliding_rope_theta=100 with model.sliding_window=null"),
        (
            ["model.sliding_window=8", "model.num_hidden_layers=4", "model.full_attention_layers=[3,5]"],
            1,
            0,
            "there is no layer 5, layers are 0 to 3: model.full_attention_layers=[3] works",
        ),
    ],
    "rotary channels": [
        (["model.head_dim=8", "model.partial_rotary_factor=0.4"], 1, 0, "are 3: model.partial_rotary_factor=0.5 makes"),
        (["model.head_dim=8", "model.partial_rotary_factor=0.1"], 1, 0, "model.partial_rotary_factor=0.25 makes"),
    ],
    "factors of longrope": [
        (["model.rope_parameters.short_factor=[1.0]"], 1, 0, "model.rope_parameters.short_factor=[] works"),
        ([*LONGROPE, "seq_len=64"], 1, 0, "short_factor has 2 values for 16 pairs of rotary channels"),
        ([*LONGROPE, "model.head_dim=4", "seq_len=512"], 1, 0, "seq_len=64 works"),
    ],
    "activation of experts": [
        (["model.hidden_act=gelu_pytorch_tanh", "model.num_experts=4"], 1, 0, "model.hidden_act=silu works"),
    ],
    "norms of projections around zero": [
        (
            ["model.zero_centered_norm=true", "model.qk_norm=true", "model.qk_norm_over=projection"],
            1,
            0,
            "model.qk_norm_over=head works",
        ),
    ],
    "adapters of fused projections": [
        (["model.family=phi3", "adapter.name=lora"], 1, 0, "adapter=none works"),
    ],
}
