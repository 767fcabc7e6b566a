"""Tasks of lm-eval of each output type, made here, and a run whose model they ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.counted import write_lines

SETTINGS = ["seq_len=64", "batch.size=4", "launch.device=cpu", "launch.threads=1", "precision=fp32"]
QUESTIONS = [
    {"q": f"How many are {n} and {m}? ", "choices": [f"{n + m}", f"{n}", "none of them at all"], "gold": m % 3}
    for n in range(4)
    for m in range(2, 5)
]
TASKS: dict[str, dict[str, Any]] = {
    "made_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "made_loglikelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "made_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q * 6}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "made_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def small_run(home: Path) -> list[str]:
    """The settings of a small run on a text in `home`, but for its directory."""
    (home / "text").mkdir(exist_ok=True)
    (home / "text" / "a.txt").write_text("How many are 1 and 2? 3 and none of them at all. " * 40)
    small = ["model=tiny", "model.num_hidden_layers=2", "model.hidden_size=64", "model.intermediate_size=96"]
    data = ["data=text", f"data.path={home / 'text'}", f"data.cache={home / 'cache'}", "data.workers=0"]
    return [*SETTINGS, *small, *data, "optim.lr=1e-2", "log.progress=none"]


def write_tasks(home: Path) -> Path:
    """Write the tasks and their questions; returns the folder for `eval.include`."""
    write_lines(home / "questions.jsonl", QUESTIONS)
    (home / "tasks").mkdir()
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(home / "questions.jsonl")}}}
        (home / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **data, "test_split": "test", **task}))
    return home / "tasks"


def of_hugging_face(home: Path, model: Path) -> dict[str, dict[str, Any]]:
    """What lm-eval's own model finds."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", max_length=64, batch_size=2)
    manager = TaskManager(include_path=str(home / "tasks"))
    found = simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, log_samples=False, bootstrap_iters=100)
    results: dict[str, dict[str, Any]] = found["results"]
    return results
