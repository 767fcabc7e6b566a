"""Settings of experts that are refused together: see `tests.trainer.refused_together`."""

SPARSE = "model.target=tests.parallel.experts.sparse:build"  # a user's model with experts

OF_EXPERTS = {
    "experts over ranks": [
        (
            ["parallel.ep=3", SPARSE],
            4,
            0,
            "parallel.ep=3 does not divide the 4 ranks that shard one copy of the parameters: parallel.ep=2 or 4 does",
        ),
        (["parallel.ep=4", "parallel.dp_replicate=2", SPARSE], 4, 0, "the 2 ranks that shard one copy"),
        (["parallel.ep=4", "parallel.cp=2", "parallel.tp=2", "parallel.zero=0", SPARSE], 4, 0, "the 2 ranks that read"),
    ],
    "experts of a rank": [
        (["parallel.ep=2"], 2, 0, "parallel.ep=2 with model.num_experts=0: parallel.ep=1 works"),
        (["parallel.ep=4", "model.num_experts=6"], 4, 0, "parallel.ep=2 works"),
    ],
    "channels of experts": [
        (
            ["model.num_experts=4", "model.moe_intermediate_size=33", "parallel.tp=2", "parallel.expert_tp=true"],
            2,
            0,
            "the 33 channels of an expert do not divide; parallel.expert_tp=false works",
        ),
    ],
    "DeepSpeed and expert parallelism": [
        (["parallel.ep=2", SPARSE, "parallel.engine=deepspeed"], 2, 0, "parallel.ep=2 with parallel.engine=deepspeed"),
    ],
    "settings of no experts": [
        (["model.router=sigmoid", "model.num_shared_experts=1"], 1, 0, "model.num_experts=8 has experts"),
    ],
    "noise of no copies": [
        (["model.num_experts=4", "model.upcycle_noise=0.1"], 1, 0, "model.init_from=null: model.upcycle_noise=0.0"),
    ],
    "groups of experts": [
        (["model.num_experts=8", "model.n_group=3"], 1, 0, "model.n_group=2 or 4 does"),
        (["model.num_experts=8", "model.topk_group=2"], 1, 0, "more than model.n_group=1: model.topk_group=1 works"),
        (
            ["model.num_experts=8", "model.n_group=4", "model.num_experts_per_tok=3"],
            1,
            0,
            "the 2 experts of model.topk_group=1 of model.n_group=4 groups: model.topk_group=2 works",
        ),
    ],
    "settings of no latent attention": [
        (["model.q_lora_rank=8", "model.v_head_dim=8"], 1, 0, "model.kv_lora_rank=512 has latent attention"),
    ],
    "latent attention": [
        (
            ["model.kv_lora_rank=8", "model.qk_norm=true", "model.num_key_value_heads=2"],
            1,
            0,
            "model.num_key_value_heads=2: model.qk_norm=false model.num_key_value_heads=null works",
        ),
        (["model.kv_lora_rank=8", "model.head_dim=16"], 1, 0, "model.head_dim=null works"),
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
    "balance of micro-batches": [
        (
            ["model.num_experts=4", "model.router_aux_loss_over=micro_batch", "model.router_aux_loss_coef=0.01"],
            1,
            0,
            "1.069 over two ranks, 1.102 over four): model.router_aux_loss_over=sequence works",
        ),
    ],
    "losses of routers": [
        (
            ["model.num_experts=4", "model.router_z_loss_coef=0.001", "objective.target=tests.toy:objective"],
            1,
            0,
            "with the objective tests.toy:objective: model.router_z_loss_coef=0.0 works",
        ),
    ],
    "float8 experts": [
        (["model.num_experts=4", "precision=fp8"], 1, 0, "which compute in bf16: precision=bf16 works"),
    ],
}
