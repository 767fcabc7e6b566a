"""Conversations: JSON lines, rendered by a chat template; only the assistant's tokens are trained on."""

from __future__ import annotations

import hashlib
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
from stoker.data.chat_refusals import Conversation, refuse_template
from stoker.data.chat_shapes import (
    AUTO,
    BESIDE,
    PREFERENCE,
    SHAPES,
    UNPAIRED,
    conversation,
    conversations,
    keys_of,
    refuse_parameters,
    text_of,
)
from stoker.data.chat_template import ChatTemplate, TemplateSettings
from stoker.data.documents import Source
from stoker.data.hub_tokenizer import HubTokenizer
from stoker.data.rated import rate, rated_conversations, with_mismatched
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


def open_source(config: DataConfig) -> Source:
    """The conversations under `data.path`: files of JSON lines.

    `data.args.shape` is the shape of the lines (`stoker.data.chat_shapes`), by default of each line on its own;
    `data.args.messages` (default `messages`) the key of the messages in the shape of that name. A line may hold
    `tools`, `documents` and `chat_template_kwargs` beside them. Pairs of answers that are longer than a row are an
    error, or left out by `data.args.long_pairs=drop`. `settings_of` reads the other `data.args`. Raises
    ValueError for a path without such files and for a template that cannot be used.
    """
    args = _args(config)
    key, shape, tokenizer = args["messages"], args["shape"], named_tokenizer(config)
    if shape not in SHAPES:
        raise ValueError(f"data.args.shape={shape}: choose from {', '.join(SHAPES)}")
    if args["long_pairs"] not in ("error", "drop"):
        raise ValueError(f"data.args.long_pairs={args['long_pairs']}: choose from error, drop")
    settings = settings_of(config, tokenizer)
    encoder = ChatEncoder(settings, tokenizer, pairs=shape == PREFERENCE, rated=shape == UNPAIRED)
    what = f"{key}, {', '.join(BESIDE)} as a conversation"
    if shape != "messages":
        what = f"{shape}: {what}"
    keys = keys_of(shape, key)
    found = json_documents(config, "data=chat", args["pattern"], keys, lambda values: text_of(values, key, shape), what)
    return Source(with_mismatched(found) if shape == UNPAIRED else found, encoder)


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
    refuse_parameters(variables, "data.args.variables")
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

    def __init__(
        self,
        settings: TemplateSettings,
        tokenizer: Tokenizer | None = None,
        pairs: bool = False,
        rated: bool = False,
    ) -> None:
        """`tokenizer`: its template is used where `settings` name none. `pairs`: texts are preferences. `rated`: they
        are of `stoker.data.rated`."""
        self.settings, self._rated = settings, rated
        self.documents_together = 2 if pairs or rated else 1
        own = ""
        if isinstance(tokenizer, HubTokenizer):
            own = f"{tokenizer.renderer.fingerprint} {sorted(_own_templates(tokenizer).items())}"
        said = (settings.template, sorted(settings.variables.items()), str(settings.date), own)
        # transformers' code passes the messages to the template: another version may do so in another way.
        release = ".".join(version("transformers").split(".")[:2])
        kind = "preferences" if pairs else "rated answers" if rated else "chat"
        self.fingerprint = f"{kind} {hashlib.sha256(repr(said).encode()).hexdigest()[:16]} transformers {release}"
        self._bound: tuple[Tokenizer, ChatTemplate] | None = None

    def encode(self, tokenizer: Tokenizer, name: str, text: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and weights of the conversation `text` (JSON), or of the two of a preference; of rated answers, ids and
        ratings.

        Raises ValueError naming it, also for an answer of a preference without a token that is trained on.
        """
        try:
            template = self._template(tokenizer)
            values = parse_json(text)
            if self._rated:
                rated = [(*template.encode(chat), rating) for chat, rating in rated_conversations(values)]
                found = [(ids, rate(weights, rating)) for ids, weights, rating in rated]
            else:
                found = [template.encode(chat) for chat in conversations(values)]
            if len(found) > 1 and not all(weights.any() for _, weights in found):
                raise ValueError("an answer of a preference has no token that is trained on")
            return found
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


def _args(config: DataConfig) -> dict[str, Any]:
    return known_args(
        config,
        "data=chat",
        shape=AUTO,
        messages="messages",
        long_pairs="error",
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
