"""Settings that are refused together: for each entry of the table, cases at its edge."""

from __future__ import annotations

from tests.parallel.optimizers import OF_OPTIMIZERS
from tests.trainer.refused_adapters import OF_ADAPTERS
from tests.trainer.refused_experts import OF_EXPERTS
from tests.trainer.refused_moments import OF_MOMENTS
from tests.trainer.refused_ramps import OF_RAMPS
from tests.trainer.refused_rope import OF_ROPE
from tests.trainer.refused_streaming import OF_STREAMS
from tests.trainer.refused_windows import OF_WINDOWS

DEEPSPEED = ["parallel.engine=deepspeed"]

# entry -> (overrides, world, gpus, a part of the message), each at the edge of what is refused
TOGETHER = {
    "axes": [
        (["parallel.tp=2"], 3, 0, "3 ranks do not divide into tp 2 x pp 1: launch.nproc=2 or 4 does"),
        (["parallel.tp=2", "parallel.pp=2"], 1, 0, "launch.nproc=4 does"),
        ([], 0, 0, "0 ranks: launch.nproc=1 is the least"),
        (["parallel.cp=2"], 3, 0, "3 ranks do not divide into tp 1 x pp 1 x cp 2: launch.nproc=2 or 4 does"),
    ],
    "tokens over ranks": [
        (["parallel.cp=2", "seq_len=511"], 2, 0, "seq_len=510 or 512 does, or parallel.cp=1"),
    ],
    "objectives of whole answers": [
        (
            ["parallel.cp=2", "objective.name=simpo", "data.packing=padded"],
            2,
            0,
            "objective=simpo with parallel.cp=2: answers are compared by the sum over all their tokens",
        ),
    ],
    "context parallelism by heads": [
        (
            ["parallel.cp=3", "parallel.context=ulysses", "seq_len=513", "batch.size=32"],
            3,
            0,
            "8 query heads and 8 kv heads of a rank do not divide: parallel.context=gather works",
        ),
    ],
    "replicas of ZeRO 0": [
        (["parallel.zero=0", "parallel.dp_replicate=2"], 4, 0, "ZeRO 0 keeps a replica on each of the 4"),
    ],
    "replicas": [
        (
            ["parallel.dp_replicate=3"],
            4,
            0,
            "parallel.dp_replicate=3 does not divide 4 data-parallel ranks: parallel.dp_replicate=2 or 4 does",
        ),
    ],
    "rows over ranks": [
        (["batch.size=10"], 4, 0, "batch.size=8 or 12 does, or launch.nproc=2 or 5"),
        (["batch.size=10", "parallel.tp=2"], 8, 0, "batch.size=8 or 12 does, or launch.nproc=4 or 10"),
        (["batch.size=2"], 3, 0, "batch.size=3 does, or launch.nproc=2"),
    ],
    "micro-batches": [
        (
            ["batch.micro_size=5"],
            2,
            0,
            "batch.micro_size=5 does not divide the 16 rows of a rank (batch.size=32 over 2): batch.micro_size=4 or 8",
        ),
        (["batch.micro_size=33"], 1, 0, ": batch.micro_size=32 does"),
    ],
    "tensor parallelism": [
        (
            ["parallel.tp=3", "seq_len=513"],
            3,
            0,
            "model.intermediate_size=704: parallel.tp=2 with launch.nproc=2, or parallel.tp=4 with launch.nproc=4 does",
        ),
        (
            ["parallel.tp=16", "batch.micro_size=8"],
            16,
            0,
            "does not go with model.num_attention_heads=8: parallel.tp=8 does",
        ),
        (
            [
                "parallel.tp=4",
                "seq_len=516",
                "model.num_attention_heads=12",
                "model.num_key_value_heads=6",
                "model.hidden_size=384",
                "model.intermediate_size=720",
            ],
            4,
            0,
            "parallel.tp=4 does not go with model.num_key_value_heads=6: parallel.tp=3 with launch.nproc=3, or ",
        ),
    ],
    "settings of other objectives": [
        (
            ["objective.beta=0.2"],
            1,
            0,
            "which does not use it: objective.beta=0.1 works, or another objective (dpo, ipo, simpo, orpo, kto, apo_",
        ),
        (
            ["objective.name=orpo", "objective.gamma=1.0", "objective.label_smoothing=0.1", "data.packing=padded"],
            1,
            0,
            "which does not use it: objective.label_smoothing=0.0 and objective.gamma=0.0 works",
        ),
    ],
    "the reference of an objective": [
        (
            ["objective.name=dpo", "data.packing=best_fit"],
            1,
            0,
            "and adapter=none: adapter=lora works, or objective.teacher=FOLDER of `stoker teach`, or an objective",
        ),
        (
            ["objective.name=ipo", "data.packing=padded", "adapter.name=lora", "adapter.modules_to_save=[norm]"],
            1,
            0,
            "adapter.modules_to_save=['norm'] changes the model itself: adapter.modules_to_save=[] works",
        ),
        (["objective.name=kto", "data.packing=best_fit"], 1, 0, "objective=kto compares with the model without its"),
    ],
    "distillation without a teacher": [
        (["objective.name=distill"], 1, 0, "and objective.teacher names none: objective=next_token works, or"),
    ],
    "predictions of a teacher for a stream": [
        (
            ["objective.name=distill", "objective.teacher=lessons", "data.mode=streaming", "data.splits=mine:splits"],
            1,
            0,
            "predictions are stored by the numbers of rows: data.mode=indexed works",
        ),
    ],
    "pairs of answers": [
        (
            ["objective.name=orpo", "data.document_mask=false"],
            1,
            0,
            "need data.packing=best_fit and data.document_mask=true",
        ),
        (
            ["objective.name=simpo", "data.packing=padded", "data.validation_by=position"],
            1,
            0,
            "validation_by=documents",
        ),
        (
            [
                "objective.name=simpo",
                "data.packing=padded",
                "data.mode=streaming",
                "data.splits=mine:splits",
            ],
            1,
            0,
            "objective=simpo with data.mode=streaming: pairs of answers need data.mode=indexed",
        ),
    ],
    "sequence parallelism": [
        (
            ["parallel.tp=2", "parallel.cp=2", "seq_len=6", "batch.size=3"],
            4,
            0,
            "micro-batches of 3 x seq_len=6 tokens do not divide over parallel.tp=2 and parallel.cp=2: seq_len=4 or 8",
        ),
        (
            ["parallel.tp=8", "seq_len=250", "batch.micro_size=2"],
            8,
            0,
            "micro-batches of 2 x seq_len=250 tokens do not divide over parallel.tp=8: batch.micro_size=4 does, "
            "or seq_len=248 or 252, or parallel.sequence_parallel=false",
        ),
        (["parallel.tp=2", "seq_len=5", "batch.size=3"], 2, 0, "over parallel.tp=2: seq_len=4 or 6, or parallel.sequ"),
    ],
    **OF_ADAPTERS,
    **OF_MOMENTS,
    **OF_WINDOWS,
    "span of no norm": [
        (["model.qk_norm_over=projection"], 1, 0, "model.qk_norm=true works"),
    ],
    "stages": [
        (
            ["parallel.pp=7", "batch.micro_size=1"],
            7,
            0,
            "are 7 stages for model.num_hidden_layers=6: parallel.pp=6 with launch.nproc=6 does",
        ),
        (
            [
                "parallel.pp=4",
                "parallel.stages_per_rank=2",
                "parallel.schedule=interleaved",
                "batch.micro_size=1",
                "batch.size=36",
            ],
            4,
            0,
            "are 8 stages for model.num_hidden_layers=6: parallel.pp=3 with launch.nproc=3 does",
        ),
    ],
    "interleaving": [
        (["parallel.pp=2", "parallel.stages_per_rank=2"], 2, 0, "need parallel.schedule=interleaved"),
        (["parallel.pp=2", "parallel.schedule=interleaved"], 2, 0, "needs parallel.stages_per_rank=2 or more"),
        (
            ["parallel.schedule=interleaved", "parallel.stages_per_rank=2"],
            1,
            0,
            "and a pipeline is parallel.pp=2 with launch.nproc=2",
        ),
    ],
    "zero bubble": [
        (["parallel.schedule=zbv", "parallel.pp=2"], 2, 0, "parallel.schedule=zbv: the split backward of zero-bubble"),
        (["parallel.schedule=zero_bubble"], 1, 0, "parallel.schedule=1f1b works, as parallel.pp=1 is no pipeline"),
    ],
    "full pipeline": [
        (
            ["parallel.pp=4", "batch.micro_size=16"],
            4,
            0,
            "2 micro-batches do not fill 4 pipeline stages: batch.micro_size=8",
        ),
        (
            ["parallel.pp=4", "batch.size=3"],
            4,
            0,
            "1 micro-batches do not fill 4 pipeline stages: batch.size=12 with batch.micro_size=3",
        ),
        *OF_RAMPS["full pipeline"],
    ],
    "interleaved rounds": [
        (
            [
                "parallel.pp=2",
                "parallel.stages_per_rank=2",
                "parallel.schedule=interleaved",
                "batch.size=30",
                "batch.micro_size=6",
            ],
            2,
            0,
            "5 micro-batches do not split into rounds over parallel.pp=2: batch.micro_size=10 or 5 does",
        ),
        *OF_RAMPS["interleaved rounds"],
    ],
    "NCCL on CPUs": [(["launch.backend=nccl"], 2, 0, "launch.backend=nccl on CPUs: leave launch.backend out")],
    "pipelines over gloo on GPUs": [
        (["launch.backend=gloo", "parallel.pp=2"], 2, 2, "with launch.backend=gloo on GPUs: parallel.pp=1 works"),
    ],
    "pipelines on older torch": [
        (["parallel.pp=2"], 2, 0, "parallel.pp=2 on torch 2.12.1: parallel.pp=1 works, or torch 2.13"),
    ],
    "GPUs": [
        ([], 4, 1, "4 ranks on 1 GPU: launch.nproc=1 works, or launch.device=cpu"),
        (["launch.device=cuda"], 2, 0, "launch.device=cuda: there is no GPU here"),
    ],
    "several machines": [
        (["launch.nodes=2"], 2, 0, "launch.nodes=2 with launch=local"),
    ],
    "fp16 on CPUs": [
        (["precision=fp16"], 1, 0, "precision=fp16 on CPUs: precision=bf16 works"),
        (["precision=fp16", "launch.device=cpu"], 1, 1, "precision=fp16 on CPUs"),
    ],
    "query groups": [
        (
            ["model.num_key_value_heads=3"],
            1,
            0,
            "=3 does not divide model.num_attention_heads=8: model.num_key_value_heads=2 or 4 does",
        )
    ],
    "width of a head": [
        (["model.hidden_size=250"], 1, 0, "model.hidden_size=240 or 256 does, or set model.head_dim"),
        (["model.hidden_size=248"], 1, 0, "does not split into num_attention_heads=8 of an even width"),
    ],
    "warmup": [
        (["schedule.warmup_steps=201"], 1, 0, "do not fit into 200 steps: schedule.warmup_steps=200 does"),
        (["schedule.warmup_steps=51", "schedule.total_steps=50"], 1, 0, "do not fit into 50 steps"),
        (["schedule.name=wsd", "schedule.warmup_steps=161"], 1, 0, "and a decay of 40 steps do not fit"),
    ],
    "batch ramp": OF_RAMPS["batch ramp"],
    "settings of other schedules": [
        (["schedule.decays=[[10,20]]"], 1, 0, "schedule.decays with schedule=cosine: schedule=wsd has decays"),
        (["schedule.name=linear", "schedule.decay_shape=sqrt"], 1, 0, "schedule.decay_shape with schedule=linear"),
        (["schedule.name=wsd", "schedule.cycle_steps=20"], 1, 0, "schedule=cosine has cycles"),
        (["schedule.cycle_growth=2"], 1, 0, "schedule.cycle_growth=1 works"),
        (["schedule.name=wsd", "schedule.decays=[[150,170]]"], 1, 0, "by step 160, where the final decay begins"),
    ],
    "evaluation": [
        (
            ["eval.every=10", "eval.sequences=0"],
            1,
            0,
            "eval.every=10 with eval.sequences=0 evaluates nothing: set eval.sequences=32",
        ),
        (["eval.sequences=8", "data.validation=0"], 1, 0, "no document is kept for validation"),
    ],
    "tasks": [
        (["eval.limit=5"], 1, 0, "eval.limit=5 without eval.tasks: eval.tasks=[NAME] runs some, eval.limit=null none"),
        (["eval.tasks=[mine]", "parallel.cp=2"], 2, 0, "parallel.cp=2: ranks would share a text; parallel.cp=1 works"),
    ],
    "best checkpoints": [
        (["checkpoint.keep_best=1", "checkpoint.every=20"], 1, 0, "eval.every=20 measures every checkpoint"),
        (
            ["checkpoint.keep_best=1", "checkpoint.every=20", "eval.every=15", "eval.sequences=8"],
            1,
            0,
            "and eval.every=15",
        ),
    ],
    "traced steps": [
        (["profile.steps=[201,205]"], 1, 0, "no such step is taken; profile.steps=[196,200] works"),
        (["profile.steps=[9,99]", "steps=8"], 1, 0, "profile.steps=[1,8] works"),
    ],
    "faults": [
        (["faults=[{at: 7, do: kil}]"], 1, 0, "{at: 7, do: kil}: do must be one of kill, "),
        (["faults=[{at: 7, do: kill, rank: 2}]"], 2, 0, "is for rank 2 of 2: rank 0 to 1 work"),
        (["faults=[{at: 201, do: oom}]"], 1, 0, "is for step 201 of 200: steps=201 has it"),
    ],
    "DeepSpeed and pipelines": [
        ([*DEEPSPEED, "parallel.pp=2", "parallel.zero=2"], 2, 0, "parallel.zero=1 works, or parallel.engine=fsdp"),
    ],
    "DeepSpeed and fp32 modules": [
        ([*DEEPSPEED, "fp32_modules=[head]"], 2, 0, "parallel.engine=fsdp works, or fp32_modules=[]"),
    ],
    "DeepSpeed ZeRO 3 and compile": [
        ([*DEEPSPEED, "parallel.zero=3", "compile=true"], 2, 0, "parallel.zero=2 works"),
    ],
    "DeepSpeed ZeRO 3 and selective checkpointing": [
        (
            [*DEEPSPEED, "parallel.zero=3", "activation_checkpointing=selective"],
            2,
            0,
            "activation_checkpointing=full works",
        ),
    ],
    "NVMe": [
        (
            ["parallel.offload=nvme"],
            2,
            0,
            "with parallel.engine=fsdp: parallel.engine=deepspeed with parallel.nvme_path=DIRECTORY",
        ),
        ([*DEEPSPEED, "parallel.offload=nvme"], 2, 0, "needs parallel.nvme_path=DIRECTORY on a local disk"),
    ],
    "DeepSpeed settings": [
        (["parallel.deepspeed={dump_state: true}"], 2, 0, "these settings are for parallel.engine=deepspeed"),
        ([*DEEPSPEED, "parallel.deepspeed={train_batch_size: 8}"], 2, 0, "batch.size"),
    ],
    "credentials": [
        (
            ["model.args={from: 'https://me:hunter2@host/a'}"],
            1,
            0,
            "model.args.from=https://me:***@host/a: a credential",
        ),
        (["launch.setup='export WANDB_API_KEY=0123abc'"], 1, 0, "launch.setup=export WANDB_API_KEY=***"),
        (["model.args={token: abc}"], 1, 0, "model.args.token=***"),
    ],
    **OF_STREAMS,
    **OF_ROPE,
    **OF_EXPERTS,
    **OF_OPTIMIZERS,
    "containers": [
        (
            ["launch.name=kubernetes", "launch.volume=runs"],
            1,
            0,
            "launch=kubernetes needs launch.image=IMAGE, a container image with Stoker",
        ),
        (
            ["launch.name=skypilot", "launch.image=stoker", "launch.nodes=2", "launch.device=cpu"],
            2,
            0,
            "launch.nodes=2 with launch=skypilot needs launch.volume=VOLUME, a volume that all pods mount",
        ),
        (
            ["launch.name=kubernetes", "launch.image=stoker"],
            1,
            0,
            "launch=kubernetes needs launch.volume=VOLUME or checkpoint.remote=URL: the run directory",
        ),
    ],
}
