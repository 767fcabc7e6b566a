"""Rendering a chat template by transformers, with the loss mask of its output.

Where a template marks the assistant's text (`{% generation %}`), the mask is that of transformers'
`apply_chat_template`. Any other template is rendered message by message: the text that a message of the assistant
adds, without the opening of a reply (`add_generation_prompt`), is trained on. A template that renders an earlier
message differently when more follow is refused, because no part of its text belongs to one message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError

from stoker.data.chat_limits import LimitReached, Limits, dated, limited, timed
from stoker.data.chat_refusals import Conversation, Message, refuse_what_is_left_out, refuse_what_is_misread
from stoker.data.tokenizer import Renderer, Span, Tokenizer

_MARK = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
_PROBE = "stoker 0123456789"  # a reply that occurs in no template


@dataclass(frozen=True)
class TemplateSettings:
    """The config's settings of a template."""

    template: str | None = None  # text, or the name of one of the tokenizer's; None: the tokenizer's
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: datetime | None = None
    limits: Limits = field(default_factory=Limits)


class ChatTemplate:
    """The template of `settings`, or the tokenizer's own, for chats in the ids of `tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, settings: TemplateSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._renderer: Renderer = tokenizer.renderer

    def encode(self, chat: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, uint32, and the weight of each in the loss, float32.

        The token that closes a document is appended where the template does not end the text with a special token.
        Raises TemplateError for a conversation that the template refuses or would write only in part, and for one whose
        assistant text cannot be determined; and LimitReached.
        """
        template = self._source(chat)
        refuse_what_is_left_out(template, chat)
        texts = _Texts(self, chat)
        whole = texts.whole
        refuse_what_is_misread(whole, chat)
        if chat.tools == [] and whole != self.text(replace(chat, tools=None)):
            raise TemplateError("the template renders an empty list of tools differently from no list: leave it out")
        marked = _MARK.search(template) is not None
        if marked:
            ids, spans, mask = self._marked(chat, whole)
            mask &= ~_overlaps(spans, list(texts.not_learned()))
        else:
            ids, spans = self._tokenizer.encode_template(whole)
            replies = list(texts.learned())
            mask = _overlaps(spans, replies)
            self._learn_stops(ids, spans, mask, whole, replies)
        weights = mask.astype(np.float32)
        if set(chat.weights) - {0, 1}:
            weights *= _of_replies(spans, texts.weighted(marked))
        last = texts.last_reply()
        if not self._closed(ids, spans, whole, last):
            ids = [*ids, self._tokenizer.end_of_document]
            weights = np.append(weights, np.float32(chat.weights[-1]))
        return np.array(ids, np.uint32), weights

    def text(self, chat: Conversation, messages: Sequence[Message] | None = None, opening: bool = False) -> str:
        """The text of the conversation, or of `messages` in its place; with the `opening` of a reply."""
        limits = self._settings.limits
        with limited(limits), dated(self._settings.date):
            text = self._apply(chat, messages or chat.messages, tokenize=False, add_generation_prompt=opening)
        if len(text) > limits.characters:
            raise LimitReached(f"it writes more than {limits.megabytes:g} MB")
        return text

    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply: those that the template writes after one, and the end of a document."""
        found = {self._tokenizer.end_of_document}
        user = {"role": "user", "content": _PROBE[::-1]}
        talk = [user, {"role": "assistant", "content": _PROBE}]
        for messages in (talk, [*talk, user]):
            try:
                text = self.text(Conversation(messages))
            except TemplateError:  # it refuses such a conversation
                continue
            ids, spans = self._tokenizer.encode_template(text)
            place = text.rfind(_PROBE) + len(_PROBE)
            behind = [number for number, (begin, _) in zip(ids, spans, strict=True) if begin >= place]
            found.update([number for number in behind if number in self._tokenizer.special_ids][:1])
        return frozenset(found)

    def _source(self, chat: Conversation) -> str:
        return self._renderer.backend.get_chat_template(self._settings.template, chat.tools)

    def _apply(self, chat: Conversation, messages: Sequence[Message], **how: Any) -> Any:
        names = {**self._renderer.names, **self._settings.variables, **chat.variables}
        try:
            return self._renderer.backend.apply_chat_template(
                list(messages),
                tools=chat.tools,
                documents=chat.documents,
                chat_template=self._settings.template,
                **how,
                **names,
            )
        except (TemplateError, LimitReached, MemoryError):
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def _marked(self, chat: Conversation, text: str) -> tuple[list[int], list[Span], np.ndarray]:
        """Ids, the characters of each, and transformers' mask of them, bool."""
        with timed(self._settings.limits), dated(self._settings.date):
            found = self._apply(
                chat,
                chat.messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
            )
        mask = np.array(found["assistant_masks"], bool)
        if self._renderer.same_ids:
            return found["input_ids"], found["offset_mapping"], mask
        characters = [span for span, learned in zip(found["offset_mapping"], mask, strict=True) if learned]
        ids, spans = self._tokenizer.encode_template(text)
        return ids, spans, _overlaps(spans, characters)

    def _learn_stops(
        self, ids: Sequence[int], spans: Sequence[Span], mask: np.ndarray, text: str, replies: Sequence[Span]
    ) -> None:
        """Add to the mask the special token after a reply where the template ends the reply without one."""
        for reply in replies:
            following = next((place for place, (begin, _) in enumerate(spans) if begin >= reply[1]), None)
            if following is None or self._closed(ids, spans, text, reply):
                continue
            mask[following] |= ids[following] in self._tokenizer.special_ids

    def _closed(self, ids: Sequence[int], spans: Sequence[Span], text: str, reply: Span) -> bool:
        """Whether the last of the `ids` that begin in a `reply` is a special token, spaces left aside."""
        for number, (begin, end) in zip(reversed(ids), reversed(spans), strict=True):
            if begin < reply[0]:
                return False
            if begin < reply[1] and number in self._tokenizer.special_ids:
                return True
            if begin < reply[1] and text[begin:end].strip():
                return False
        return False


class _Texts:
    """A conversation, rendered with a growing number of its messages."""

    def __init__(self, template: ChatTemplate, chat: Conversation) -> None:
        self._template, self._chat = template, chat
        self._known: dict[tuple[int, bool], str] = {}
        self.whole = self._text(len(chat.messages))

    def learned(self) -> Iterator[Span]:
        """Positions of the trained replies in the text, each without its opening."""
        for number, weight in enumerate(self._chat.weights):
            if not weight:
                continue
            if not number:
                raise TemplateError(
                    "the assistant begins, and the template does not mark the assistant's text: put a message of the "
                    f"system or the user before it, or {_ADVICE}"
                )
            after, before = self._up_to(number + 1), self._opening(number)
            if not after.startswith(before):
                raise _rewritten(number)
            yield len(before), len(after)

    def not_learned(self) -> Iterator[Span]:
        """Positions of the replies in the text that are not trained on."""
        for number, message in enumerate(self._chat.messages):
            if message["role"] == "assistant" and not self._chat.weights[number]:
                yield len(self._up_to(number)) if number else 0, len(self._up_to(number + 1))

    def weighted(self, marked: bool) -> list[tuple[int, float]]:
        """Where each trained reply begins, with its opening if the template marks the text, and its weight."""
        weights = [(number, weight) for number, weight in enumerate(self._chat.weights) if weight]
        if not marked:
            return [(begin, weight) for (begin, _), (_, weight) in zip(self.learned(), weights, strict=True)]
        return [(len(self._up_to(number)) if number else 0, weight) for number, weight in weights]

    def last_reply(self) -> Span:
        """Position of the last message in the text, if it is the assistant's and can be found; else all of the text."""
        number, begin = len(self._chat.messages) - 1, 0
        if number and self._chat.messages[number]["role"] == "assistant":
            try:
                opened = self._text(number, opening=True)
            except TemplateError:  # the template refuses the messages before it
                opened = ""
            begin = len(opened) if self.whole.startswith(opened) else 0
        return begin, len(self.whole)

    def _up_to(self, count: int) -> str:
        """The text of the first messages, which is the beginning of that of all."""
        text = self._text(count)
        if not self.whole.startswith(text):
            raise _rewritten(count - 1)
        return text

    def _opening(self, number: int) -> str:
        """The text up to where the reply `number` begins."""
        opened = self._text(number, opening=True)
        if opened != self._text(number):
            return opened
        # The template opens no reply: check for a heading before the assistant's text, which must not be trained on.
        messages = [*self._chat.messages[:number], {"role": "assistant", "content": _PROBE}]
        reply = self._template.text(self._chat, messages)
        if not reply.startswith(opened):
            raise _rewritten(number - 1)
        if not reply[len(opened) :].lstrip().startswith(_PROBE):
            raise TemplateError(
                "it writes a heading before a reply, and does not write the heading for add_generation_prompt: the "
                f"assistant's part of the text is not known. {_ADVICE[0].upper()}{_ADVICE[1:]}"
            )
        return opened

    def _text(self, count: int, opening: bool = False) -> str:
        if (count, opening) not in self._known:
            self._known[count, opening] = self._template.text(self._chat, self._chat.messages[:count], opening)
        return self._known[count, opening]


def _of_replies(spans: Sequence[Span], replies: Sequence[tuple[int, float]]) -> np.ndarray:
    """The weight of the last of `replies` (begin, weight) that each of `spans` reaches, 1 before the first: float32."""
    before = np.searchsorted([begin for begin, _ in replies], [end for _, end in spans], side="left")
    return np.array([1.0, *(weight for _, weight in replies)], np.float32)[before]


def _rewritten(number: int) -> TemplateError:
    return TemplateError(f"its text for message {number + 1} changes when more follow: {_ADVICE}")


_ADVICE = "mark the assistant's text with {% generation %} ... {% endgeneration %}"


def _overlaps(spans: Sequence[Span], wanted: Sequence[Span]) -> np.ndarray:
    """Which of `spans` share a character with one of `wanted`, both in order: bool. As in apply_chat_template."""
    found = np.zeros(len(spans), bool)
    current = 0
    for place, (begin, end) in enumerate(spans):
        while current < len(wanted) and begin >= wanted[current][1]:
            current += 1
        if current == len(wanted):
            break
        found[place] = end > wanted[current][0]
    return found
