"""Ten steps on answers here, and by TRL's own trainers around transformers' model with peft's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import Config
from stoker.models.adapters import Names, plan_of
from stoker.models.family import build_on_meta
from stoker.models.peft_folder import config_json, tensor_names
from stoker.parallel.batch import DESIRABLE, IGNORE_INDEX, MISMATCHED, UNDESIRABLE, Batch
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.mesh import start_mesh, stop_mesh
from stoker.parallel.model import whole_model
from stoker.parallel.shards import PARAMETER
from stoker.trainer.parallelize import build_engine
from stoker.trainer.pretrained import load_pretrained
from tests.models.families import VOCABULARY, write_family
from tests.trainer.test_against_peft import config_of

pytest.importorskip("trl", reason="trl is not installed")

STEPS, PAIRS, LENGTH = 10, 4, 24
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
OBJECTIVES = {  # TRL's trainer, and its settings
    "dpo": ("DPO", {"loss_type": ["sigmoid"]}),
    "ipo": ("DPO", {"loss_type": ["ipo"]}),
    "kto": ("KTO", {"loss_type": "kto", **WEIGHTS}),
    "apo_zero_unpaired": ("KTO", {"loss_type": "apo_zero_unpaired", **WEIGHTS}),
}
BETA = 0.7
Sample = dict[str, Any]  # prompt, answer and another one, as tokens; whether the answer is desirable


def samples_of(step: int) -> list[Sample]:
    """Of unequal lengths; the other answer is the rejected one of a pair, or one to another prompt."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for number in range(PAIRS):
        prompt, answer, other = (
            torch.randint(VOCABULARY, (size,), generator=generator).tolist()
            for size in (1 + number, 7 - number, 3 + number)
        )
        found.append({"prompt": prompt, "answer": answer, "other": other, "desirable": number % 3 > 0})
    return found


def rows_of(config: Config, step: int) -> Batch:
    """A row for each sample: its prompt with the answer, its prompt with the other one, and padding."""
    samples = samples_of(step)
    tokens, positions = torch.zeros(2, PAIRS, LENGTH, dtype=torch.int64)
    labels, weights = torch.full((PAIRS, LENGTH), IGNORE_INDEX), torch.zeros(PAIRS, LENGTH)
    documents = torch.full((PAIRS, LENGTH), 2, dtype=torch.int32)
    for row, sample in enumerate(samples):
        at = 0
        for number, answer in enumerate((sample["answer"], sample["other"])):
            whole, skipped = torch.tensor([*sample["prompt"], *answer]), len(sample["prompt"])
            end = at + len(whole)
            tokens[row, at:end], positions[row, at:end] = whole, torch.arange(len(whole))
            documents[row, at:end] = number
            labels[row, at + skipped - 1 : end - 1] = whole[skipped:]
            weights[row, at:end] = MISMATCHED if number else DESIRABLE if sample["desirable"] else UNDESIRABLE
            at = end
    return Batch(
        tokens, labels, positions, documents, weights if OBJECTIVES[config.objective.name][0] == "KTO" else None
    )


def ours(config: Config) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], dict[str, torch.Tensor]]:
    """What is trained, before and after, and the loss, norm and rewards of each step."""
    layout = layout_of(config, 1)
    mesh = start_mesh(layout, torch.device("cpu"), dist.HashStore(), 0, 60.0, "gloo")
    try:
        engine, initialise = build_engine(config, mesh, batch_plan(config, layout))
        initialise()
        load_pretrained(config, engine.shards())
        held = {each.name: each.data for each in engine.shards() if each.kind == PARAMETER and ".lora." in each.name}
        for number, value in enumerate(held.values()):
            value.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(number))
        engine.shards_written()
        before = {name: value.clone() for name, value in held.items()}
        steps = []
        for step in range(1, STEPS + 1):
            engine.forward_backward(rows_of(config, step))
            done = engine.update(config.optim.lr).read()
            steps.append({"loss": done.loss, "grad_norm": done.grad_norm, **done.scalars})
        return before, steps, {name: value.clone() for name, value in held.items()}
    finally:
        stop_mesh()


def theirs(config: Config, settings: dict[str, Any], first: dict[str, torch.Tensor], out: Path) -> tuple[Any, ...]:
    """The same of a trainer of TRL's, whose data are tokens already. The reference is a second model."""
    import peft
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    kind, more = OBJECTIVES[config.objective.name]

    class InOrder(getattr(trl, f"{kind}Trainer")):  # type: ignore[misc]
        losses: list[float] = []  # noqa: RUF012

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **named: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **named)
            self.losses.append(loss.item())
            return loss

    samples = [sample for step in range(1, STEPS + 1) for sample in samples_of(step)]
    columns = {"prompt_ids": [sample["prompt"] for sample in samples]}
    answers, others = ([sample[key] for sample in samples] for key in ("answer", "other"))
    if kind == "DPO":
        columns |= {"chosen_ids": answers, "rejected_ids": others}
    else:
        columns |= {"completion_ids": answers, "KL_completion_ids": others}
        columns |= {"label": [sample["desirable"] for sample in samples]}
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", padding_side="left")
    base, reference = (AutoModelForCausalLM.from_pretrained(config.model.init_from, dtype=torch.float32) for _ in "ab")
    model = peft.get_peft_model(base, peft.LoraConfig(**(settings | {"inference_mode": False})))
    assert not peft.set_peft_model_state_dict(model, first).unexpected_keys
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(out), per_device_train_batch_size=PAIRS, max_steps=STEPS, beta=BETA,
        lr_scheduler_type="constant", learning_rate=config.optim.lr, max_grad_norm=config.grad_clip_norm, use_cpu=True,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, max_length=None, disable_dropout=True, **more,
    )  # fmt: skip
    trainer = InOrder(
        model, ref_model=reference, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer.optimizer = torch.optim.SGD(trained, lr=config.optim.lr, momentum=config.optim.momentum)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return trainer.losses, logged, peft.get_peft_model_state_dict(trainer.model)


@pytest.mark.long
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ten_steps_train_what_trl_trains(name: str, tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama", initializer_range=0.1)
    config = config_of(
        tmp_path / "base", "adapter.rank=4", f"objective={name}", f"objective.beta={BETA}", f"seq_len={LENGTH}",
        f"batch.size={PAIRS}", "optim=sgd", "optim.lr=0.05", "optim.momentum=0.9", "optim.weight_decay=0",
        "data.document_mask=true",
        *(f"objective.{key}={value}" for key, value in WEIGHTS.items() if OBJECTIVES[name][0] == "KTO"),
    )  # fmt: skip
    whole = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    names, plan = Names(whole, config), plan_of(whole, config)
    assert plan is not None
    known = tensor_names(plan, names)
    before, steps, after = ours(config)
    first = {known[key]: value for key, value in before.items()}
    losses, logged, trained = theirs(config, config_json(config, plan, names), first, tmp_path / "out")
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)
    for step, entry in zip(steps, logged, strict=True):
        assert step["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-5)
        # Differences of sums of about 30. Of `ipo` TRL shows sums, and Stoker the means that the loss is made of.
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins") if name != "ipo" else ():
            assert step[key] == pytest.approx(entry[key], rel=1e-5, abs=1e-5), key
    assert trained.keys() == set(known.values())
    for key, value in after.items():
        wanted = trained[known[key]]
        assert (value - wanted).norm() / wanted.norm() < 2e-5, key
