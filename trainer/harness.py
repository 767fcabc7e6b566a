"""A model of Stoker's as lm-eval asks models: the interface `LM` of its harness (https://github.com/EleutherAI)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import AutoTokenizer

from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.trainer.predictions import Predictions

_RESAMPLES = 200  # for standard errors of what is no mean
_LIMIT = 256  # tokens that a generation has at most, where its task does not say


@dataclass(frozen=True)
class Asked:
    """Tasks by name, and how they are asked."""

    tasks: list[str]
    include: str | None  # folder of further task files
    fewshot: int | None
    limit: float | None  # questions of each task

    def open(self, how: str) -> TaskManager:
        """Where lm-eval finds the tasks. Raises ValueError for one that is not known; `how` names the folder's key."""
        manager = TaskManager(include_path=self.include)
        known = set(manager.all_tasks)
        if unknown := [name for name in self.tasks if name not in known]:
            raise ValueError(f"there is no task {unknown[0]!r}: {how} takes a folder of task files")
        return manager


def refuse_tasks(asked: Asked) -> None:
    """Load the tasks and their questions once. Raises ValueError for one that cannot be loaded or that samples."""
    manager = asked.open("eval.include")
    for name in asked.tasks:
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as error:  # of any task's own code, or of the library of its data
            first = (str(error).strip() or "without a message").splitlines()[0]
            raise ValueError(f"eval.tasks={name} cannot be loaded: {type(error).__name__}: {first}") from error
        for task in loaded.values():
            if task.get_config("output_type") == "generate_until":
                refuse_sampling(task.get_config("generation_kwargs") or {})


def refuse_sampling(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a generation that is not greedy."""
    if settings.get("do_sample") or settings.get("temperature", 0) or settings.get("num_beams", 1) != 1:
        raise ValueError(f"a task samples its answers ({dict(settings)}): they are generated greedily here")


def results_of(asked: Asked, folder: str, ranks: Predictions, manager: TaskManager) -> dict[str, Any]:
    """The results of the tasks, as lm-eval gives them, and a table of them. `folder` has the tokenizer.

    Raises ValueError for a task that asks what the model here does not do.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork this process, which has threads and groups
    model = HarnessModel(folder, ranks)
    found = simple_evaluate(
        model,
        tasks=list(asked.tasks),
        num_fewshot=asked.fewshot,
        limit=asked.limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=_RESAMPLES,
    )
    assert found is not None
    kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
    return {**kept, "table": utils.make_table(found)}


@dataclass
class _Span:
    """A piece of text in a row: tokens that are read, of which the last `scored` labels are asked for."""

    number: int  # of the request
    tokens: list[int]  # those that are read, and one more
    scored: int
    row: int = 0
    start: int = 0
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.tokens) - 1


class HarnessModel(TemplateLM):
    """The model of a folder, as the ranks compute it. Its tokenizer encodes texts as in lm-eval's own model `hf`."""

    def __init__(self, folder: str, ranks: Predictions) -> None:
        super().__init__()
        self.tokenizer, self._ranks = AutoTokenizer.from_pretrained(folder), ranks
        self.max_length = ranks.seq_len

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        spans = []
        for number, (_text, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens, and seq_len={self.max_length}")
            tokens = (context + continuation)[-(self.max_length + 1) :]
            spans.append(_Span(number, tokens, len(continuation)))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(spans)
        for span, values in self._predicted(spans):
            scored = values[span.length - span.scored :]
            wanted = torch.tensor(span.tokens[span.length + 1 - span.scored :])
            found[span.number] = float(scored[:, 0].sum()), bool((scored[:, 1] == wanted).all())
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for number, request in enumerate(requests):
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(number, *utils.make_disjoint_window(window)) for window in rolled]
        sums = [0.0] * len(requests)
        for (number, *_), (value, _greedy) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, by a forward pass for each token: it needs no cache, and so runs on any layout."""
        writings = [_Writing.of(self, *request.args) for request in requests]
        for start in range(0, len(writings), self._ranks.rows):
            turn = writings[start : start + self._ranks.rows]
            while active := [writing for writing in turn if not writing.done]:
                spans = [_Span(number, [*writing.tokens, 0], 1) for number, writing in enumerate(active)]
                for span, values in self._predicted(spans, packed=False):
                    active[span.number].add(int(values[-1, 1]), self)
        return [writing.text for writing in writings]

    def _predicted(self, spans: Sequence[_Span], packed: bool = True) -> Iterator[tuple[_Span, Tensor]]:
        """Each span with what the ranks predict for its labels, fp64 `[length, 3]`."""
        room, packed = self.max_length, packed and self._ranks.packed
        ends: list[int] = []  # of each row
        for span in sorted(spans, key=lambda span: -span.length):
            fitting = [row for row, end in enumerate(ends) if end + span.length <= room] if packed else []
            if not fitting:
                ends.append(0)
            span.row = fitting[0] if fitting else len(ends) - 1
            span.start = ends[span.row]
            ends[span.row] += span.length
        rows = self._ranks.rows
        for first in range(0, len(ends), rows):
            chosen = [span for span in spans if first <= span.row < first + rows]
            found = self._ranks.of(_batch(chosen, first, rows, room))
            for span in chosen:
                yield span, found[span.row - first, span.start : span.start + span.length]


def _batch(spans: Sequence[_Span], first: int, rows: int, length: int) -> Batch:
    """Rows from `first` on: each span a document, what is left over one without a label."""
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    labels, positions = torch.full_like(tokens, IGNORE_INDEX), torch.arange(length).repeat(rows, 1)
    documents = torch.zeros(rows, length, dtype=torch.int32)
    for span in sorted(spans, key=lambda span: (span.row, span.start)):
        row, place = span.row - first, slice(span.start, span.start + span.length)
        tokens[row, place] = torch.tensor(span.tokens[:-1])
        labels[row, place] = torch.tensor(span.tokens[1:])
        positions[row, place] = torch.arange(span.length)
        rest = length - span.start - span.length
        documents[row, place.stop :] = documents[row, span.start] + 1
        positions[row, place.stop :] = torch.arange(rest)
    return Batch(tokens, labels, positions, documents)


@dataclass
class _Writing:
    """One text that is being generated."""

    tokens: list[int]  # the prompt, and what was added
    until: list[str]
    left: int
    prompt: int  # tokens
    room: int
    text: str = ""
    done: bool = False

    @classmethod
    def of(cls, model: HarnessModel, context: str, settings: dict[str, Any]) -> _Writing:
        """Raises ValueError for a generation that is not greedy."""
        refuse_sampling(settings)
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        limit = min(int(settings.get("max_gen_toks", _LIMIT)), model.max_length - 1)
        tokens = model.tok_encode(context)[-(model.max_length - limit) :]
        end = model.tokenizer.decode([model.eot_token_id])
        return cls(tokens, [*until, end], limit, len(tokens), model.max_length)

    def add(self, token: int, model: HarnessModel) -> None:
        self.tokens.append(token)
        self.left -= 1
        text = model.tokenizer.decode(self.tokens[self.prompt :])
        places = [text.find(stop) for stop in self.until if stop and stop in text]
        self.text = text[: min(places)] if places else text
        self.done = bool(places) or token == model.eot_token_id or not self.left or len(self.tokens) >= self.room
