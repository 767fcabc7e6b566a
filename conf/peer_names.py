"""Settings by the names that other training programs give them, answered with ours.

From transformers' TrainingArguments and its configs, nanoGPT, litgpt, torchtitan, Megatron-LM, DeepSpeed, Accelerate,
axolotl and torchrun. A name is looked up whole and by its last part, with `-` taken for `_`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What to write instead. `{}` in `ours` is the value that was typed; `example` is one where that does not fit."""

    ours: str  # KEY=VALUE words
    example: str = ""
    note: str = ""


_OF_ALL_RANKS = "of all ranks and accumulation steps together"
_ON_A_RANK = "sequences of one pass on a rank; batch.size counts those of all ranks"
_DERIVED = "the data-parallel degree is what tp, pp and cp leave of the ranks"
_STARTS = "`stoker train` starts the ranks of a machine itself"
_BETAS = "both in one list"

_NAMES: tuple[tuple[str, Answer], ...] = (
    ("learning_rate base_lr max_lr optimizer.lr train.learning_rate", Answer("optim.lr={}", "3e-4")),
    ("batch_size train_batch_size global_batch_size total_batch_size", Answer("batch.size={}", "32", _OF_ALL_RANKS)),
    ("per_device_train_batch_size micro_batch_size local_batch_size train_micro_batch_size_per_gpu device_batch_size"
     " per_gpu_batch_size mbs", Answer("batch.micro_size={}", "8", _ON_A_RANK)),
    ("gradient_accumulation_steps accumulate_grad_batches grad_accum_steps gradient_accumulation_iters",
     Answer("batch.size=32 batch.micro_size=8", note="the accumulation steps follow from them and the ranks")),
    ("max_steps max_iters train_iters num_steps num_train_steps training.steps max_train_steps total_iters",
     Answer("steps={}", "1000")),
    ("max_tokens train_tokens total_tokens num_tokens token_budget", Answer("tokens={}", "1e9")),
    ("num_train_epochs num_epochs max_epochs epoch train.epochs", Answer("data.epochs={}", "1")),
    ("seed random_seed manual_seed data_seed", Answer("run.seed={}", "0")),
    ("block_size max_seq_length max_seq_len sequence_length seq_length sequence_len context_length max_length n_ctx"
     " max_position_embeddings cutoff_len", Answer("seq_len={}", "512")),
    ("warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps", Answer("schedule.warmup_steps={}", "100")),
    ("warmup_ratio warmup_fraction lr_warmup_fraction", Answer("schedule.warmup_steps=100", note="counted in steps")),
    ("lr_scheduler_type lr_decay_style lr_scheduler scheduler decay_lr",
     Answer("schedule=cosine", note="or constant, wsd")),
    ("lr_decay_iters lr_decay_steps decay_steps", Answer("schedule.total_steps={}", "1000")),
    ("min_lr lr_min min_lr_ratio min_lr_factor", Answer("schedule.final=0.1", note="a share of optim.lr")),
    ("weight_decay wd decay", Answer("optim.weight_decay={}", "0.1")),
    ("adam_beta1 adam_beta2 beta1 beta2", Answer("optim.betas=[0.9,0.95]", note=_BETAS)),
    ("adam_epsilon adam_eps epsilon", Answer("optim.eps={}", "1e-8")),
    ("optimizer optim_type optimizer_name optimizer.name", Answer("optim={}", "adamw")),
    ("max_grad_norm grad_clip gradient_clipping clip_grad max_norm gradient_clip_val clip_grad_norm",
     Answer("grad_clip_norm={}", "1.0")),
    ("bf16 bfloat16 bf16.enabled", Answer("precision=bf16")),
    ("fp16 float16 fp16.enabled half", Answer("precision=fp16")),
    ("mixed_precision dtype torch_dtype mixed_precision_param", Answer("precision=bf16", note="or fp32, fp16")),
    ("gradient_checkpointing activation_checkpoint activation_checkpoint.mode recompute_activations"
     " recompute_granularity use_recompute", Answer("activation_checkpointing=full", note="or selective")),
    ("torch_compile use_compile", Answer("compile=true")),
    ("logging_steps log_interval log_freq log_every", Answer("log.every={}", "10")),
    ("save_steps save_interval ckpt_interval checkpoint.interval save_every checkpoint_interval save_freq",
     Answer("checkpoint.every={}", "200")),
    ("save_total_limit keep_latest_k", Answer("checkpoint.keep={}", "3")),
    ("eval_steps eval_interval eval_every val_check_interval", Answer("eval.every={}", "100")),
    ("eval_iters eval_batches limit_val_batches", Answer("eval.sequences={}", "64", "sequences, not batches")),
    ("output_dir out_dir save save_dir dump_folder load", Answer("run.dir={}", "runs/a")),
    ("run_name wandb_run_name experiment_name", Answer("run.name={}", "first")),
    ("resume resume_from_checkpoint resume_from auto_resume", Answer("run.dir=runs/a", note="that of the run: a start "
     "on a run directory that holds checkpoints goes on from the newest")),
    ("report_to logger_name tracker.name", Answer("tracker={}", "wandb")),
    ("wandb_log use_wandb enable_wandb wandb", Answer("tracker=wandb")),
    ("wandb_project project_name", Answer("tracker.project={}", "stoker")),
    ("model_name_or_path base_model checkpoint_dir pretrained_model_name_or_path initial_checkpoint_dir hf_path",
     Answer("model.init_from={}", "models/base")),
    ("tokenizer_name tokenizer_path tokenizer_model tokenizer_dir tokenizer_name_or_path",
     Answer("data.tokenizer={}", "byte")),
    ("train_file data_dir train_data train_data_dir dataset_path data_path data_prefix",
     Answer("data=text data.path={}", "books")),
    ("dataset_name dataset hf_dataset", Answer("data=hf data.args.dataset={}", "NAME", "streamed by `datasets`")),
    ("validation_file val_data_path valid_data_path val_data_dir eval_file",
     Answer("data.validation_path={}", "held.txt")),
    ("val_set_size val_split_fraction validation_split_percentage test_size split",
     Answer("data.validation=0.02", note="a share, such as 0.02")),
    ("num_workers dataloader_num_workers", Answer("data.workers={}", "1")),
    ("zero_stage stage zero_optimization.stage sharding_strategy fsdp", Answer("parallel.zero={}", "3")),
    ("use_distributed_optimizer", Answer("parallel.zero=1")),
    ("deepspeed deepspeed_config ds_config deepspeed_config_file",
     Answer("parallel.deepspeed={}", "ds.json", "a file of DeepSpeed's settings")),
    ("offload_optimizer cpu_offload offload_param enable_cpu_offload", Answer("parallel.offload=cpu")),
    ("tensor_parallel_degree tensor_model_parallel_size tp_size tensor_parallel_size tensor_parallel",
     Answer("parallel.tp={}", "2")),
    ("pipeline_parallel_degree pipeline_model_parallel_size pp_size pipeline_parallel_size pipeline_parallel",
     Answer("parallel.pp={}", "2")),
    ("context_parallel_degree context_parallel_size cp_size sequence_parallel_size ulysses_degree",
     Answer("parallel.cp={}", "2")),
    ("expert_parallel_degree expert_model_parallel_size ep_size expert_parallel_size moe_expert_parallel_size",
     Answer("parallel.ep={}", "2")),
    ("moe_token_dispatcher_type", Answer("parallel.token_dispatcher={}", "alltoall", "alltoall or allgather")),
    ("expert_tensor_parallel_size expert_tensor_parallel_degree", Answer("parallel.expert_tp=true")),
    ("data_parallel_shard_degree dp_shard data_parallel_size dp_size dp", Answer("parallel.zero=3", note=_DERIVED)),
    ("data_parallel_replicate_degree", Answer("parallel.dp_replicate={}", "2")),
    ("ddp_backend distributed_backend dist_backend process_group_backend", Answer("launch.backend={}", "nccl")),
    ("ddp_timeout distributed_timeout nccl_timeout", Answer("parallel.timeout_seconds={}", "600")),
    ("nproc_per_node num_processes devices n_gpu gpus num_gpus n_gpus",
     Answer("launch.nproc={}", "2", "ranks on each machine")),
    ("nnodes num_nodes num_machines", Answer("launch.nodes={}", "2", "with launch=slurm; torchrun has its own")),
    ("local_rank node_rank master_addr master_port", Answer("launch.nproc=2", note=_STARTS)),
    ("n_layer n_layers num_layers", Answer("model.num_hidden_layers={}", "6")),
    ("n_head n_heads num_heads", Answer("model.num_attention_heads={}", "8")),
    ("n_kv_heads n_query_groups num_query_groups num_kv_heads", Answer("model.num_key_value_heads={}", "4")),
    ("n_embd dim d_model embed_dim hidden_dim", Answer("model.hidden_size={}", "256")),
    ("ffn_hidden_size d_ff ffn_dim n_inner", Answer("model.intermediate_size={}", "704")),
    ("padded_vocab_size n_vocab", Answer("model.vocab_size={}", "50304")),
)  # fmt: skip
ANSWERS: dict[str, Answer] = {name: answer for names, answer in _NAMES for name in names.split()}


def answer_to(word: str, accepted: Callable[[str], bool]) -> str | None:
    """One line on what to write for `word` (`lr=3e-4`, `--max-steps=5`, `-m`), without its dashes; None if unknown.

    `accepted` tells whether KEY=VALUE is a setting of ours.
    """
    key, _, value = word.lstrip("-+").partition("=")
    name = key.replace("-", "_").lower()
    if word.startswith("-") and accepted(f"{key}={value}"):
        return f"settings have no dashes: {key}={value}"
    found = ANSWERS.get(name) or ANSWERS.get(name.rpartition(".")[2])
    if found is None:
        return None
    given = found.ours.replace("{}", value or found.example)
    ours = given if all(map(accepted, given.split())) else found.ours.replace("{}", found.example)
    return f"Stoker's is {ours}" + (f" ({found.note})" if found.note else "")
