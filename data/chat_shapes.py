"""The shapes of a line of conversations, and what a template is given of each.

    messages             {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
    sharegpt             {"conversations": [{"from": "human", "value": "..."}, ...]}; may have system
    alpaca               {"instruction": "...", "input": "...", "output": "..."}; may have system, history
    prompt_completion    {"prompt": "..." or messages, "completion": "..." or messages}
    preference           {"prompt": "..." or messages, "chosen": "..." or messages, "rejected": "..." or messages}
    unpaired_preference  {"prompt": "..." or messages, "completion": "..." or messages, "label": true or false}, or a
                         line of preference, whose answers are rated true and false

Each becomes messages, whose JSON is the text of the document; a preference becomes two conversations, and an answer of
unpaired_preference two as well (`stoker.data.rated`). A text in the place of messages is one message, of the user in a
prompt and of the assistant in an answer. What comes after the prompt is trained on; in the other shapes what the
assistant writes.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from stoker.data.chat_refusals import Conversation, Message
from stoker.data.jsonl import field

AUTO, PREFERENCE, UNPAIRED = "auto", "preference", "unpaired_preference"
PAIR = ("chosen", "rejected")

# Further inputs of the template in a line, by key and type.
BESIDE = {"tools": list, "documents": list, "chat_template_kwargs": dict}

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_DISTINCT = {  # keys that only lines of the shape have together
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    PREFERENCE: PAIR,
    UNPAIRED: ("prompt", "completion", "label"),
}
SHAPES = (AUTO, "messages", *_DISTINCT)


def keys_of(shape: str, key: str) -> tuple[str, ...]:
    """The keys of a line that are used, and which it may hold once."""
    named = {"messages": (key,), AUTO: (key, *(name for names in _DISTINCT.values() for name in names))}
    pair = PAIR if shape == UNPAIRED else ()
    return named.get(shape) or (*_DISTINCT[shape], *pair, "prompt", "system", "history", "input")


def text_of(values: dict[str, Any], key: str, shape: str = AUTO) -> str:
    """The text of a line's conversation. `key` is that of the messages in the shape of this name.

    Raises ValueError for what is no conversation of the shape.
    """
    found = _READ[_shape_of(values, key) if shape == AUTO else shape](values, key)
    beside = {}
    for name, kind in BESIDE.items():
        if values.get(name) is not None:
            beside[name] = field(name, kind)(values)
    refuse_parameters(beside.get("chat_template_kwargs", {}), "its 'chat_template_kwargs'")
    only_messages = not beside and list(found) == ["messages"]
    try:
        text = json.dumps(found["messages"] if only_messages else {**found, **beside}, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    text.encode()  # an unpaired surrogate is no text: UnicodeEncodeError is a ValueError
    return text


def conversations(values: Any) -> list[Conversation]:
    """The conversation, or the two of a preference, in the text of a line: see `text_of`.

    Raises ValueError for what is no conversation.
    """
    if not (isinstance(values, dict) and set(PAIR) <= set(values)):
        return [conversation(values)]
    found = []
    for name in PAIR:
        found.append(answered({**values, "messages": values[name]}, name))
    return found


def answered(values: Mapping[str, Any], what: str) -> Conversation:
    """The conversation of an answer. Raises ValueError, naming `what` it is, for one that is trained on in part."""
    talk = conversation(values)
    if set(talk.weights) - {0, 1}:
        raise ValueError(f"{what}: a message of a preference has the weight 0 or 1, not {max(talk.weights):g}")
    return talk


def conversation(values: Any) -> Conversation:
    """The conversation in a text: a list of messages, or an object with `messages` and further keys.

    Raises ValueError for what is no conversation.
    """
    beside = values if isinstance(values, dict) else {"messages": values}
    messages = beside["messages"]
    if not messages:
        raise ValueError("a conversation has at least one message")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise ValueError("messages are objects with a 'role' and a 'content'")
    return Conversation(
        messages=messages,
        weights=[_weight(number, message) for number, message in enumerate(messages, 1)],
        tools=beside.get("tools"),
        documents=beside.get("documents"),
        variables=beside.get("chat_template_kwargs") or {},
    )


def refuse_parameters(variables: Mapping[str, Any], what: str) -> None:
    """Refuse names that transformers takes as its own parameters instead of passing them to the template."""
    if not variables:
        return
    from transformers import PreTrainedTokenizerBase  # takes seconds, only needed here

    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    taken = sorted(own & set(variables) | {name for name in variables if not isinstance(name, str)})
    if taken:
        raise ValueError(f"{what} names {', '.join(map(str, taken))}, which cannot be a variable of a template")


def _weight(number: int, message: Message) -> float:
    """By the role, and by `weight` and `train` where a message has them."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and not (isinstance(weight, int | float) and 0 <= weight < math.inf):
        raise ValueError(f"message {number} has the weight {weight!r}: expected a number from 0 on")
    if train not in (None, 0, 1):
        raise ValueError(f"message {number} has 'train' {train!r}: expected true or false")
    asked = weight if train is None else train if weight is None else weight * train
    if message["role"] == "assistant":
        return 1.0 if asked is None else float(asked)
    if asked:
        raise ValueError(f"message {number} is to be trained on, and its role is {message['role']!r}, not 'assistant'")
    return 0.0


def _shape_of(values: dict[str, Any], key: str) -> str:
    if key in values:
        return "messages"
    found = [shape for shape, keys in _DISTINCT.items() if set(keys) <= set(values)]
    if len(found) == 1 and found[0] != PREFERENCE:
        return found[0]
    if UNPAIRED in found:
        raise ValueError(
            "its completion has a 'label': set data.args.shape=unpaired_preference, or prompt_completion to learn from "
            "it whatever the label"
        )
    if found == [PREFERENCE]:
        raise ValueError("it has a chosen and a rejected answer: set data.args.shape=preference")
    known = "; ".join(f"{shape}: {' and '.join(map(repr, keys))}" for shape, keys in _DISTINCT.items())
    if found:
        raise ValueError(f"it fits the shapes {' and '.join(found)} ({known}): set data.args.shape")
    held = ", ".join(map(repr, values)) or "nothing"
    raise ValueError(f"it has no {key!r}, only {held}; the other shapes of a conversation have {known}")


def _messages(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {"messages": field(key, list)(values)}


def _sharegpt(values: dict[str, Any], key: str) -> dict[str, Any]:
    messages = _system(values)
    for number, turn in enumerate(field("conversations", list)(values), 1):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            raise ValueError(
                f"message {number} has no 'from' and 'value'; messages with 'role' and 'content' are read by "
                "data.args.shape=messages data.args.messages=conversations"
            )
        if turn["from"] not in _SPEAKERS:
            raise ValueError(f"message {number} is from {turn['from']!r}: expected one of {', '.join(_SPEAKERS)}")
        weights = {name: turn[name] for name in ("weight", "train") if name in turn}
        messages.append({"role": _SPEAKERS[turn["from"]], "content": turn["value"], **weights})
    return {"messages": messages}


def _alpaca(values: dict[str, Any], key: str) -> dict[str, Any]:
    messages = _system(values)
    for pair in values.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError("its 'history' is no list of [instruction, answer]")
        messages += [_message("user", pair[0]), _message("assistant", pair[1])]
    asked = [field("instruction", str)(values)]
    if values.get("input"):
        asked.append(field("input", str)(values))
    messages += [_message("user", "\n".join(asked)), _message("assistant", field("output", str)(values))]
    return {"messages": messages}


def _prompt_completion(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {"messages": [*_prompt(values), *_answer(values, "completion")]}


def _preference(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Both conversations whole."""
    prompt, answers = _pair(values)
    return {name: [*prompt, *answer] for name, answer in answers.items()}


def _unpaired(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The prompt, and each answer with its label."""
    if set(PAIR) <= set(values):
        if "label" in values or "completion" in values:
            raise ValueError("it has a chosen and a rejected answer, and a 'completion' or a 'label' beside them")
        prompt, pair = _pair(values)
        return {"prompt": prompt, "rated": [[True, pair["chosen"]], [False, pair["rejected"]]]}
    label = field("label", object)(values)
    if not isinstance(label, bool):
        raise ValueError(f"its 'label' is {label!r}: expected true for a desirable completion, or false")
    prompt = _prompt(values)
    answer = _without(prompt, _answer(values, "completion"))
    _refuse_no_answer(answer, "completion")
    return {"prompt": prompt, "rated": [[label, answer]]}


def _pair(values: dict[str, Any]) -> tuple[list[Message], dict[str, list[Message]]]:
    """The prompt and both answers. The common beginning of these is the prompt, where the line has none."""
    answers = {name: _answer(values, name) for name in PAIR}
    if values.get("prompt") is not None:
        prompt = _prompt(values)
        answers = {name: _without(prompt, answer) for name, answer in answers.items()}
    else:
        first, second = answers.values()
        alike = 0
        while alike < min(len(first), len(second)) and first[alike] == second[alike]:
            alike += 1
        if not alike:
            raise ValueError("it has no 'prompt', and its answers have no message in common to be one")
        prompt = [_not_trained(number, message) for number, message in enumerate(first[:alike], 1)]
        answers = {name: answer[alike:] for name, answer in answers.items()}
    for name, answer in answers.items():
        _refuse_no_answer(answer, name)
    return prompt, answers


def _without(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The answer without the prompt, which some data repeat there."""
    repeated = [_bare(message) for message in answer[: len(prompt)]] == [_bare(message) for message in prompt]
    return answer[len(prompt) :] if repeated else answer


def _refuse_no_answer(answer: list[Message], name: str) -> None:
    if not answer or answer[0].get("role") != "assistant":
        found = f"a message of {answer[0].get('role')!r}" if answer else "nothing"
        raise ValueError(f"its {name!r} goes on after the prompt with {found}, not with one of 'assistant'")


_READ: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    PREFERENCE: _preference,
    UNPAIRED: _unpaired,
}


def _prompt(values: dict[str, Any]) -> list[Message]:
    return [_not_trained(number, message) for number, message in enumerate(_said(values, "prompt", "user"), 1)]


def _answer(values: dict[str, Any], name: str) -> list[Message]:
    return _said(values, name, "assistant")


def _said(values: dict[str, Any], name: str, role: str) -> list[Message]:
    found = field(name, object)(values)
    if isinstance(found, str):
        return [_message(role, found)]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise ValueError(f"its {name!r} is neither a text nor a list of messages")
    return found


def _not_trained(number: int, message: Message) -> Message:
    """A message of a prompt."""
    if message.get("weight") or message.get("train"):
        raise ValueError(f"message {number} of the prompt is to be trained on: only what comes after a prompt is")
    return message | {"weight": 0} if message.get("role") == "assistant" else message


def _bare(message: Message) -> Message:
    return {name: value for name, value in message.items() if name not in ("weight", "train")}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _system(values: dict[str, Any]) -> list[Message]:
    return [_message("system", field("system", str)(values))] if values.get("system") else []
