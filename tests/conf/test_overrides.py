from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stoker.conf.compose import compose
from stoker.conf.overrides import GROUPS_FOLDER, choices, parse, quote
from stoker.conf.schema import GROUPS, to_dict
from stoker.conf.values import ConfigError

TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")))
HYDRA_LETTERS = st.text("ab01.,:=?&#~+-*/\\'\"[]{}() $@%^|<>!;_éж", max_size=12)

LOOKS_TYPED = re.compile(r"\s*([-+]?(\d|\.\d|inf|nan)|true|false|null|\[|\{)", re.IGNORECASE)

ODD = [
    "shard-{000..099}.tar",
    "https://h/x?a=1&b=2#c",
    "~/x",
    "24:00:00",
    "a,b",
    "two words",
    " leading and trailing ",
    "int(3)",
    "range(1,3)",
    "glob(*)",
    "choice(a)",
    "it's",
    'say "x"',
    "back\\slash",
    "ends in \\",
    "\\'",
    "=",
    "été",
    "@x",
]


def is_plain_text(value: str) -> bool:
    stripped = value.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
    return "${" not in value and not quoted


@settings(deadline=None)  # the first example imports Hydra
@given(st.one_of(TEXT, HYDRA_LETTERS, st.sampled_from(ODD)))
@example("1e5")
@example("007")
@example("true")
@example("[1,2]")
@example("{a:1}")
def test_a_text_key_takes_any_text_as_it_is(text):
    if text and is_plain_text(text) and text.strip().lower() != "null":
        assert parse(f"run.name={text}").value == text


@settings(deadline=None)  # the first example imports Hydra
@given(st.one_of(TEXT, HYDRA_LETTERS, st.sampled_from(ODD)))
def test_an_untyped_key_takes_text_as_it_is_unless_it_looks_typed(text):
    if not is_plain_text(text):
        return
    value = parse(f"data.args.x={text}").value
    assert value == text or (not isinstance(value, str) and LOOKS_TYPED.match(text))


@pytest.mark.parametrize("text", ODD)
def test_odd_text_arrives_in_the_composed_config(text):
    config = compose([f"data.path={text}", f"data.args.url={text}", f"run.name={text}"])
    assert (config.data.path, config.data.args, config.run.name) == (text, {"url": text}, text)


@pytest.mark.parametrize(
    "override",
    [
        "data.args.x=3",
        "data.args.x=1e-3",
        "data.args.x=-1.5",
        "data.args.x=true",
        "data.args.x=null",
        "data.args.x=[1,2]",
        "data.args.x=[a,[b,c]]",
        "data.args.x={a:1,b:[2,3]}",
        "data.args.x='a,b'",
        'data.args.x="a b"',
        "data.args.x=plain-text.1",
        "optim.lr=3e-4",
        "run.name=null",
        "run.name='a,b'",
    ],
)
def test_typed_and_quoted_values_pass_unchanged(override):
    assert quote(override) == override


def test_items_of_a_list_are_quoted_one_by_one():
    value = parse("data.args.urls=[s-{000..099}.tar,https://h/x?a=1, 3 ,'a,b',[~/x,null]]").value
    assert value == ["s-{000..099}.tar", "https://h/x?a=1", 3, "a,b", ["~/x", None]]


def test_own_keys_go_below_args_without_plus_signs():
    config = compose(["model.args.depth=3", "data.args={a: 1}", "optim.args.inner.x=0.5", "+data.args.b=2"])
    assert config.model.args == {"depth": 3}
    assert config.data.args == {"a": 1, "b": 2}
    assert config.optim.args == {"inner": {"x": 0.5}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.zeros=3", "unknown key 'parallel.zeros': did you mean 'parallel.zero'?"),
        ("zero=3", "did you mean 'parallel.zero'?"),
        ("lr=1e-3", "did you mean 'optim.lr'?"),
        ("model.lr=1e-3", "did you mean 'optim.lr'?"),
        ("batch.micro_batch=4", "did you mean 'batch.micro_size'?"),
        ("micro_batch=4", "did you mean 'batch.micro_size'?"),
        ("name=x", "did you mean 'run.name' or 'model.name' or 'adapter.name'?"),
        ("step=3", "did you mean 'steps'?"),
        ("modle=tiny", "did you mean 'model'?"),
        ("factor=2", "did you mean 'model.rope_parameters.factor'?"),
        ("model.rope_theta=5e5", "did you mean 'model.rope_parameters.rope_theta'?"),
        ("model.rope_scaling.low_frequency_factor=1", "did you mean 'model.rope_parameters.low_freq_factor'?"),
        ("every=5", "did you mean 'checkpoint.every' or 'eval.every' or 'log.every'?"),
        ("qqq=5", "unknown key 'qqq': `stoker config` prints every key"),
        ("+parallel.zeros=3", "did you mean 'parallel.zero'? (+ adds keys only below adapter.rank_pattern, data.args"),
        ("hydra.run.dir=x", "unknown key 'hydra.run.dir'"),
        ("a b=1", "unknown key 'a b'"),
        ("model.args.a b=1", "model.args.a b=1: a key is made of names with dots between them"),
        ("model.args.=1", "model.args.=1: a key is made of names"),
        ("=1", "unknown key ''"),
        ("~optim", "keys cannot be removed"),
        ("~optim=sgd", "keys cannot be removed"),
        ("steps", "'steps' is not an override: expected KEY=VALUE"),
        ("parallel={tp:2}", "'parallel' is a section: set its keys one by one, such as parallel.tp=..."),
        ("model.rope_parameters=3", "'model.rope_parameters' is a section"),
        ("data.path=", "data.path= is empty: give a value, or leave data.path out"),
        ("run.dir=''", "run.dir= is empty"),
        ("data.urls=", "data.urls= is empty"),
        ("data.urls=[a,'']", "data.urls= is empty"),
        ("data.sources.a.path=", "data.sources.a.path= is empty"),
        ("data.sources={a:{kind:text,path:''}}", "data.sources.a.path= is empty"),
        ("steps=many", "steps=many: expected a whole number"),
        ("steps=1e3", "steps=1e3: expected a whole number"),
        ("steps=true", "steps=true: expected a whole number"),
        ("steps=null", "steps=null: expected a whole number"),
        ("steps=1,2", "steps=1,2: expected a whole number"),
        ("compile=yes", "compile=yes: expected true or false"),
        ("grad_clip_norm=none", "grad_clip_norm=none: expected a number or null"),
        ("optim.betas=0.9,0.95", "optim.betas=0.9,0.95: expected a list of numbers such as [0.9,0.95]"),
        ("model.args=3", "model.args=3: expected a dictionary"),
        ("precision=null", "precision=null: expected text"),
        ("run.name=${now:%H}", "write the value"),
        ("optim=sdg", "unknown optim 'sdg': choose from sgd, adamw"),
        ("schedule=cosin", "unknown schedule 'cosin': choose from cosine, "),
        ("tracker=null", "unknown tracker 'null': choose from "),
        ("tracker=../optim/sgd", "unknown tracker '../optim/sgd'"),
        ("model.args.x=???", "mandatory value"),
    ],
)
def test_a_wrong_override_is_answered_in_one_line(override, words):
    with pytest.raises(ConfigError) as error:
        compose([override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_every_group_has_choices_and_every_file_is_one():
    for group in GROUPS:
        assert choices(group) == sorted(path.stem for path in (GROUPS_FOLDER / group).iterdir())


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in choices(group)])
def test_every_choice_composes_under_its_own_name(choice):
    group, name = choice.split("=")
    found = to_dict(compose([choice]))[group]
    assert found["name"] == name if group != "tracker" else found["names"] == [name] * (name != "none")
