"""Ten steps of an adapter here, and of the same adapter by peft itself around transformers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stoker.conf.compose import compose
from stoker.conf.schema import Config
from stoker.models.adapters import Names, plan_of
from stoker.models.family import TRANSFORMERS, build_on_meta
from stoker.models.peft_folder import config_json, tensor_names
from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.mesh import start_mesh, stop_mesh
from stoker.parallel.model import whole_model
from stoker.parallel.shards import PARAMETER
from stoker.parallel.tensor.dropout import Dropout, TokenNumbers
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.magnitudes import set_magnitudes
from stoker.trainer.parallelize import build_engine
from stoker.trainer.pretrained import adopt_shape, load_pretrained
from tests.models.families import VOCABULARY, write_family

STEPS, ROWS, LENGTH = 10, 4, 24
CASES = {
    "lora": ["adapter.rank=4"],
    "rslora": ["adapter.rank=4", "adapter.rslora=true", "adapter.alpha=3"],
    "patterns": [
        "adapter.rank=4",
        "adapter.target_modules=[k_proj,'*.mlp.*']",
        "adapter.layers_to_transform=[1,2]",
        "adapter.rank_pattern={down_proj: 6}",
        "adapter.modules_to_save=[norm]",
    ],
    "dropout": ["adapter.rank=4", "adapter.dropout=0.25"],
    "dora": ["adapter=dora", "adapter.rank=4", "adapter.rank_pattern={down_proj: 6}"],
}
ATTENTION = ["adapter.rank=4", "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"]
CASES |= {  # of models with experts, which have no adapters
    "lora of attention": ATTENTION,
    "dora of attention": ["adapter=dora", *ATTENTION],
    "rslora of attention": [*ATTENTION, "adapter.rslora=true", "adapter.alpha=3"],
}
THEIRS = "model.native=false"  # transformers' own modules


class OurMasks(torch.nn.Module):
    """In the place of a dropout of peft's: what ours drops of the tokens of a step."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x) * self.dropout.scale


def config_of(folder: Path, *more: str) -> Config:
    words = [
        f"model.init_from={folder}", f"batch.size={ROWS}", f"seq_len={LENGTH}", "precision=fp32", "adapter=lora",
        "optim.eps=1e-6", "optim.lr=1e-3", "optim.decay_all=true", *more,
    ]  # fmt: skip
    words = list({word.partition("=")[0]: word for word in words}.values())
    return with_vocabulary(adopt_shape(compose(words), words))


def rows_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens, labels = (torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(2))
    for row in range(ROWS):
        labels[row, LENGTH - 5 * row :] = IGNORE_INDEX
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous()
    return Batch(tokens, labels, positions, torch.zeros(ROWS, LENGTH, dtype=torch.int32))


def ours(config: Config) -> tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]:
    """Trained tensors by our names, before and after, and the losses."""
    layout = layout_of(config, 1)
    mesh = start_mesh(layout, torch.device("cpu"), dist.HashStore(), 0, 60.0, "gloo")
    try:
        engine, initialise = build_engine(config, mesh, batch_plan(config, layout))
        initialise()
        load_pretrained(config, engine.shards())
        set_magnitudes(config, engine.shards())
        for number, shard in enumerate(engine.shards()):
            if shard.kind == PARAMETER and shard.name.endswith(
                "lora.B"
            ):  # from zeros AdamW would divide rounding by rounding
                shard.data.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(number))
        engine.shards_written()
        held = {shard.name: shard.data for shard in engine.shards() if shard.kind == PARAMETER}
        before = {name: value.clone() for name, value in held.items()}
        losses = []
        for step in range(1, STEPS + 1):
            engine.forward_backward(rows_of(step), (step - 1) * ROWS)
            losses.append(engine.update(config.optim.lr).read().loss)
        return before, losses, {name: value.clone() for name, value in held.items()}
    finally:
        stop_mesh()


def theirs(
    folder: Path, settings: dict[str, Any], first: dict[str, torch.Tensor], config: Config, names: dict[str, str]
) -> tuple[list, dict]:
    """`names` are ours of their modules with adapters."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(**(settings | {"inference_mode": False})))
    loaded = peft.set_peft_model_state_dict(model, first)
    assert not loaded.unexpected_keys
    model.train()
    tokens = TokenNumbers()
    for path, name in names.items() if settings["lora_dropout"] else ():
        layer = model.get_submodule(f"base_model.model.{path}")
        assert type(layer.lora_dropout["default"]) is torch.nn.Dropout
        dropout = Dropout(config.adapter.dropout, config.run.seed, name, tokens, range(layer.in_features))
        layer.lora_dropout["default"] = OurMasks(dropout)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    beta1, beta2 = config.optim.betas
    optimizer = torch.optim.AdamW(
        trained, lr=config.optim.lr, betas=(beta1, beta2), eps=config.optim.eps,
        weight_decay=config.optim.weight_decay, foreach=False,
    )  # fmt: skip
    losses = []
    for step in range(1, STEPS + 1):
        rows = rows_of(step)
        with tokens.of(rows.numbered((step - 1) * ROWS, 0, 1).numbers):
            logits = model(input_ids=rows.tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, rows.labels.flatten(), ignore_index=IGNORE_INDEX)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    ("family", "case", "more"),
    [
        ("llama", "lora", ()),
        ("tied qwen2", "rslora", ()),
        ("qwen2", "patterns", ()),
        ("qwen3", "dropout", ()),
        ("qwen2", "dora", ()),
        ("gemma3", "lora", ()),
        pytest.param("gemma3", "dora", (THEIRS,), marks=pytest.mark.long),
        pytest.param("gemma3", "rslora", (THEIRS,), marks=pytest.mark.long),
        ("mixtral", "lora of attention", (THEIRS,)),
        pytest.param("mixtral", "dora of attention", (THEIRS,), marks=pytest.mark.long),
        pytest.param("qwen3_moe", "rslora of attention", (THEIRS,), marks=pytest.mark.long),
        pytest.param("qwen3_moe", "lora of attention", (), marks=pytest.mark.long),
    ],
)
def test_ten_steps_train_the_adapter_that_peft_trains(
    family: str, case: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    write_family(tmp_path, family, initializer_range=0.1)
    config = config_of(tmp_path, *CASES[case], *more)
    assert (config.model.target == TRANSFORMERS) == (THEIRS in more)
    whole = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    names, plan = Names(whole, config), plan_of(whole, config)
    assert plan is not None
    known = tensor_names(plan, names)
    before, losses, after = ours(config)
    settings = config_json(config, plan, names)
    first = {known[name]: value for name, value in before.items() if name in known}
    modules = {names.of(module)[1]: module for module in plan.ranks}
    expected, trained = theirs(tmp_path, settings, first, config, modules)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert trained.keys() == set(known.values())
    for name, value in after.items():
        if name in known:
            wanted = trained[known[name]]
            assert (value - wanted).norm() / wanted.norm() < 2e-5, name
        else:
            assert torch.equal(value, before[name]), name
