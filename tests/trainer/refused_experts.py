"""Configs of models with experts that are refused, by the entry of the table that refuses them."""

OF_EXPERTS: dict[str, list[tuple[list[str], int, int, str]]] = {
    "settings of no experts": [
        (["model.router=sigmoid", "model.num_shared_experts=1"], 1, 0, "model.num_experts=8 has experts"),
    ],
    "experts of a token": [
        (["model.num_experts=4", "model.num_experts_per_tok=5"], 1, 0, "model.num_experts_per_tok=4 works"),
    ],
    "layers with experts": [
        (
            ["model.num_experts=4", "model.num_hidden_layers=2", "model.first_dense_layers=2"],
            1,
            0,
            "model.first_dense_layers=1 works",
        ),
    ],
    "float8 experts": [
        (["model.num_experts=4", "precision=fp8"], 1, 0, "which compute in bf16: precision=bf16 works"),
    ],
}
