from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.data import open_rows, prepare, read_rows
from stoker.data.chat import CHATML, ChatEncoder
from stoker.data.tokenizer import ByteTokenizer
from stoker.data.tokenizer_files import load_tokenizer
from stoker.parallel.batch import IGNORE_INDEX
from tests.data.counted import base, chat, conversations, write_lines
from tests.data.test_tokenizer_files import tokenizer_json

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }};{% endgeneration %}"
    "{% else %}{{ m['role'][0] | upper }}:{{ m['content'] }};{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "no"},
]


def said(encoder: ChatEncoder, messages: list[dict[str, str]]) -> list[str]:
    text, spoken = encoder.render(messages)
    return [text[begin:end] for begin, end in spoken]


def test_without_marks_the_assistant_says_what_a_reply_adds_after_its_opening():
    assert said(ChatEncoder(CHATML), TALK) == ["hi<|im_end|>\n", "no<|im_end|>\n"]


def test_with_marks_it_says_what_stands_between_them():
    encoder = ChatEncoder(MARKED)
    assert said(encoder, TALK) == ["hi;", "no;"]
    assert encoder.render(TALK)[0] == "S:be brief;U:hello;A:hi;U:more?;A:no;"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_learned_tokens_are_those_of_the_assistant(template):
    encoder, tokenizer = ChatEncoder(template), ByteTokenizer()
    ids, learned = encoder.encode(tokenizer, "a", json.dumps(TALK))
    assert tokenizer.decode(ids[learned == 1]) == "".join(said(encoder, TALK))
    assert ids[-1] == tokenizer.end_of_document and learned[-1] == 1
    assert encoder.encode(tokenizer, "a", json.dumps(TALK[:4]))[1][-1] == 0  # nobody taught it to stop there


letters = st.text(st.characters(codec="utf-8", exclude_characters="\ue000\ue001"), max_size=8)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), letters), min_size=1, max_size=6)


@given(turns, st.sampled_from([CHATML, MARKED]))
def test_any_conversation_is_there_whole_and_learned_where_the_assistant_speaks(turns, template):
    messages = [{"role": role, "content": content} for role, content in turns]
    encoder = ChatEncoder(template)
    ids, learned = encoder.encode(ByteTokenizer(), "a", json.dumps(messages))
    assert ByteTokenizer().decode(ids) == encoder.render(messages)[0]
    spoken = "".join(said(encoder, messages))
    assert bytes(ids[:-1][learned[:-1] == 1].tolist()).decode() == spoken
    for role, content in turns:
        assert role != "assistant" or content in spoken


def test_marks_agree_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tokenizer_json(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|end_of_document|>")
    theirs.chat_template = MARKED
    found = theirs.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    ids, learned = ChatEncoder(MARKED).encode(load_tokenizer(path), "a", json.dumps(TALK))
    assert ids[:-1].tolist() == found["input_ids"]
    assert learned[:-1].tolist() == found["assistant_masks"]


def test_special_tokens_of_the_template_are_single_tokens(tmp_path):
    tokenizer = load_tokenizer(tokenizer_json(tmp_path))
    template = "{% for m in messages %}{{ m['content'] }}<|end_of_document|>{% endfor %}"
    ids, _ = ChatEncoder(template).encode(tokenizer, "a", json.dumps(TALK[1:2]))
    assert ids.tolist() == [*tokenizer.encode("hello"), tokenizer.end_of_document, tokenizer.end_of_document]


def test_labels_of_rows_are_the_assistants_tokens_and_documents_are_apart(tmp_path):
    config = chat(tmp_path)
    plan = open_rows(config, "train")
    rows = read_rows(plan, range(plan.rows_per_epoch))
    learned = rows.labels != IGNORE_INDEX
    assert plan.document_mask and int(learned.sum()) == int(plan.tokens.learned.sum())
    assert 0.1 < learned.float().mean() < 0.9
    taught = ByteTokenizer().decode(rows.labels[learned].tolist())
    assert "user" not in taught and "<|im_end|>" in taught


def test_the_default_template_is_the_tokenizers(tmp_path):
    config = chat(tmp_path)
    folder = tmp_path / "hf"
    folder.mkdir()
    tokenizer_json(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end_of_document|>", "chat_template": "{{ eos_token }}{{ messages[0]['content'] }}"})
    )
    config.data.tokenizer = str(folder)
    tokens = open_rows(config, "train").tokens
    assert tokens.ids[0] == tokens.ids[tokens.starts[1]] == load_tokenizer(folder).end_of_document


def test_another_template_is_another_cache(tmp_path):
    config = chat(tmp_path)
    before = open_rows(config, "train").tokens.ids
    (tmp_path / "t.jinja").write_text(MARKED)
    config.data.args = {"template": str(tmp_path / "t.jinja")}
    assert len(open_rows(config, "train").tokens.ids) < len(before)


@pytest.mark.parametrize(
    ("line", "template", "message"),
    [
        ('{"messages": [{"content": "x"}]}', None, r"a.jsonl \(line at byte 0\): messages are objects with a 'role'"),
        ('{"messages": "x"}', None, r"a.jsonl \(line at byte 0\): its 'messages' is str, not list"),
        ('{"chat": []}', None, "it has no 'messages', only 'chat'"),
        ('{"messages": [{"role": "user"}]}', "{{ raise_exception('no content') }}", "refuses it: no content"),
        ('{"messages": []}', "{% if %}", "data.args.template is no Jinja template"),
        ('{"messages": []}', "{{ ''.__class__.__mro__ }}", "chat template refuses it: access to attribute"),
        ('{"messages": []}', "nowhere.jinja", "cannot read data.args.template=nowhere.jinja"),
    ],
)
def test_a_bad_conversation_or_template_is_one_clear_error(tmp_path, line, template, message):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    args = {} if template is None else {"template": template}
    path = str(tmp_path / "a.jsonl")
    config = base(tmp_path, 64, target="stoker.data.chat:open_source", path=path, args=args, validation=0.0)
    with pytest.raises(ValueError, match=message):
        prepare(config)


def test_a_template_whose_text_changes_as_messages_follow_is_refused_with_the_way_out(tmp_path):
    write_lines(tmp_path / "a.jsonl", conversations(3))
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = str(tmp_path / "a.jsonl")
    config = base(tmp_path, 64, target="stoker.data.chat:open_source", path=path, args={"template": template})
    with pytest.raises(ValueError, match=r"changes when more follow: mark what the assistant says with \{% generation"):
        prepare(config)


def test_what_is_learned_is_kept_beside_the_tokens(tmp_path):
    config = chat(tmp_path)
    open_rows(config, "train")
    (found,) = Path(config.data.cache).glob("*/train.learned")
    assert set(np.fromfile(found, np.uint8)) == {0, 1}
