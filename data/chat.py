"""Conversations: JSON lines of messages, rendered by a chat template; only the assistant's tokens are trained on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from stoker.conf.records import parse_json
from stoker.conf.schema import DataConfig
from stoker.data.chat_limits import LimitReached, Limits
from stoker.data.chat_refusals import Conversation, Message, refuse_template
from stoker.data.chat_template import ChatTemplate, TemplateSettings
from stoker.data.documents import Source
from stoker.data.hub_tokenizer import HubTokenizer
from stoker.data.jsonl import field
from stoker.data.sources import specs_of
from stoker.data.text import json_documents, known_args
from stoker.data.tokenizer import Tokenizer
from stoker.data.tokenizer_files import named_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif not message['content'] %}{{ raise_exception('a message of ' + message['role'] + ' has no content') }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] != 'text' %}{{ raise_exception('a part of type ' + part['type']) }}{% endif %}"
    "{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TARGET = "stoker.data.chat:open_source"

# Further inputs of the template in a line, by key and type.
_BESIDE = {"tools": list, "documents": list, "chat_template_kwargs": dict}


def open_source(config: DataConfig) -> Source:
    """The conversations under `data.path`: files of JSON lines, in the key `data.args.messages` (default `messages`).

    A line may hold `tools`, `documents` and `chat_template_kwargs` beside them. `settings_of` reads the other
    `data.args`. Raises ValueError for a path without such files and for a template that cannot be used.
    """
    key, tokenizer = _args(config)["messages"], named_tokenizer(config)
    encoder = ChatEncoder(settings_of(config, tokenizer), tokenizer)
    what = f"{key}, {', '.join(_BESIDE)} as a conversation"
    collections = json_documents(
        config, "data=chat", _args(config)["pattern"], key, lambda values: text_of(values, key), what
    )
    return Source(collections, encoder)


def settings_of(config: DataConfig, tokenizer: Tokenizer | None) -> TemplateSettings:
    """The template settings in `data.args`; `tokenizer` is the one of `config`, or None before it is trained.

    `template`: its text, the path of a file with it, or the name of one of the tokenizer's; default: the tokenizer's,
    else ChatML. `variables`: further variables of the template. `date`: the result of `strftime_now`.
    `render_seconds`, `render_megabytes`: limits of one rendering. Raises ValueError for what cannot be used.
    """
    args = _args(config)
    variables = args["variables"]
    if not isinstance(variables, Mapping):
        raise ValueError(f"data.args.variables={variables}: expected the template's variables by name: {{name: value}}")
    _refuse_parameters(variables, "data.args.variables")
    date = None
    if args["date"] is not None:
        try:
            date = datetime.fromisoformat(str(args["date"]))
        except ValueError as error:
            raise ValueError(f"data.args.date={args['date']}: expected a day as 2026-01-31") from error
    limits = Limits(_positive(args, "render_seconds"), _positive(args, "render_megabytes"))
    return TemplateSettings(_template(args["template"], _own_templates(tokenizer)), dict(variables), date, limits)


def chat_prompt(
    config: DataConfig, tokenizer: Tokenizer, prompt: str, system: str | None = None
) -> tuple[list[int], frozenset[int]]:
    """The ids that a reply follows, and the ids that end one, by the template of `config`.

    `prompt` is a user's message, or JSON: a list of messages, or an object with `messages`, `tools` and the other keys
             of a
    line of data. Of a run on several sources the template is that of its chats. Raises ValueError for what the
    template refuses.
    """
    chats = [spec.config for spec in specs_of(config) if spec.config.target == _TARGET]
    settings = {repr(found): found for found in (settings_of(chat, tokenizer) for chat in chats)}
    if len(settings) > 1:
        raise ValueError("the run has chats of several templates: the template of the prompt is ambiguous")
    template = ChatTemplate(tokenizer, next(iter(settings.values()), None) or settings_of(DataConfig(), tokenizer))
    talk = _prompted(prompt)
    if system is not None:
        talk = replace(talk, messages=[{"role": "system", "content": system}, *talk.messages])
    try:
        return tokenizer.encode_template(template.text(talk, opening=True))[0], template.stop_ids()
    except (TemplateError, LimitReached) as error:
        raise ValueError(f"the chat template refuses the prompt: {error}") from error


def _prompted(prompt: str) -> Conversation:
    try:
        values = parse_json(prompt)
    except ValueError:
        values = None
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return conversation(values)
    if isinstance(values, dict) and isinstance(values.get("messages"), list):
        return conversation(values)
    return Conversation([{"role": "user", "content": prompt}])


class ChatEncoder:
    """See `stoker.data.documents.Encoder`."""

    def __init__(self, settings: TemplateSettings, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: its template is used where `settings` name none."""
        self.settings = settings
        own = ""
        if isinstance(tokenizer, HubTokenizer):
            own = f"{tokenizer.renderer.fingerprint} {sorted(_own_templates(tokenizer).items())}"
        said = (settings.template, sorted(settings.variables.items()), str(settings.date), own)
        # transformers' code passes the messages to the template: another version may do so in another way.
        release = ".".join(version("transformers").split(".")[:2])
        self.fingerprint = f"chat {hashlib.sha256(repr(said).encode()).hexdigest()[:16]} transformers {release}"
        self._bound: tuple[Tokenizer, ChatTemplate] | None = None

    def encode(self, tokenizer: Tokenizer, name: str, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the conversation `text` (JSON), and their loss mask. Raises ValueError naming it."""
        try:
            return self._template(tokenizer).encode(conversation(parse_json(text)))
        except TemplateError as error:
            raise ValueError(f"{name}: the chat template refuses it: {error}") from error
        except LimitReached as error:
            given = self.settings.template or "the tokenizer's"
            raise ValueError(
                f"{name}: the chat template ({given[:60]!r}) was stopped: {error} "
                "(data.args.render_seconds, data.args.render_megabytes)"
            ) from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _template(self, tokenizer: Tokenizer) -> ChatTemplate:
        if self._bound is None or self._bound[0] is not tokenizer:
            self._bound = tokenizer, ChatTemplate(tokenizer, self.settings)
        return self._bound[1]


def conversation(values: Any) -> Conversation:
    """The conversation in a line's text: a list of messages, or an object with `messages` and further keys.

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
        learned=[_is_learned(number, message) for number, message in enumerate(messages, 1)],
        tools=beside.get("tools"),
        documents=beside.get("documents"),
        variables=beside.get("chat_template_kwargs") or {},
    )


def text_of(values: dict[str, Any], key: str) -> str:
    """The text of a line's conversation. Raises ValueError for what is none."""
    messages = field(key, list)(values)
    beside = {}
    for name, kind in _BESIDE.items():
        if values.get(name) is not None:
            beside[name] = field(name, kind)(values)
    _refuse_parameters(beside.get("chat_template_kwargs", {}), "its 'chat_template_kwargs'")
    try:
        text = json.dumps({"messages": messages, **beside} if beside else messages, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    text.encode()  # an unpaired surrogate is no text: UnicodeEncodeError is a ValueError
    return text


def _is_learned(number: int, message: Message) -> bool:
    """By the role, and by `weight` and `train` where a message has them."""
    wanted = [message[key] for key in ("weight", "train") if message.get(key) is not None]
    for value in wanted:
        if value not in (0, 1):
            raise ValueError(f"message {number} has the weight {value!r}: 0, 1, true and false are supported")
    if message["role"] == "assistant":
        return all(wanted)
    if any(wanted):
        raise ValueError(f"message {number} is to be trained on, and its role is {message['role']!r}, not 'assistant'")
    return False


def _args(config: DataConfig) -> dict[str, Any]:
    return known_args(
        config,
        "data=chat",
        messages="messages",
        pattern="*",
        template=None,
        variables={},
        date=None,
        render_seconds=Limits.seconds,
        render_megabytes=Limits.megabytes,
    )


def _positive(args: Mapping[str, Any], name: str) -> float:
    value = args[name]
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"data.args.{name}={value}: must be above 0")
    return float(value)


def _refuse_parameters(variables: Mapping[str, Any], what: str) -> None:
    """Refuse names that transformers takes as its own parameters instead of passing them to the template."""
    if not variables:
        return
    from transformers import PreTrainedTokenizerBase  # takes seconds, only needed here

    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    taken = sorted(own & set(variables) | {name for name in variables if not isinstance(name, str)})
    if taken:
        raise ValueError(f"{what} names {', '.join(map(str, taken))}, which cannot be a variable of a template")


def _template(given: str | None, own: Mapping[str, str]) -> str | None:
    """The text of the template, or the name of one of the tokenizer's `own`; None for the tokenizer's default."""
    if given is None and own:
        for name, source in own.items():
            _check(source, f"the chat template {name!r} of data.tokenizer")
        return None
    if given is not None and given in own:
        _check(own[given], f"data.args.template={given}")
        return given
    source = CHATML if given is None else given if "{" in given else _read(Path(given).expanduser())
    _check(source, "data.args.template")
    return source


def _check(source: str, what: str) -> None:
    try:
        refuse_template(source)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _own_templates(tokenizer: Tokenizer | None) -> dict[str, str]:
    """The templates that come with a tokenizer, by name."""
    found = tokenizer.hub.chat_template if isinstance(tokenizer, HubTokenizer) else None
    return found if isinstance(found, dict) else {"default": found} if found else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read data.args.template={path}: {error}") from error
