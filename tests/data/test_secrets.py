from __future__ import annotations

import pytest
import requests

from stoker.conf.secrets import conceal, mask, reveal, secrets_in
from stoker.data.remote.retries import Patience, Refused, Transient
from stoker.data.remote.web import Web


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2@host/a", "https://me:***@host/a"),
        ("s3://AKIA1:s3cret@bucket/a", "s3://AKIA1:***@bucket/a"),
        ("https://h/a?sv=1&sig=abc%3D&se=2", "https://h/a?sv=1&sig=***&se=2"),
        (
            "https://h/a?X-Amz-Credential=AKIA&X-Amz-Signature=0af3",
            "https://h/a?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        ("https://h/a?AWSAccessKeyId=AKIA&Expires=1", "https://h/a?AWSAccessKeyId=***&Expires=1"),
        (
            "pipe:curl -H 'Authorization: Bearer abc' https://h/a",
            "pipe:curl -H 'Authorization: Bearer ***' https://h/a",
        ),
        ("pipe:curl -u me:hunter2 https://h/a", "pipe:curl -u me:*** https://h/a"),
        ("pipe:tool --password hunter2 x --token=abc", "pipe:tool --password hunter2 x --token=***"),
        ("export HF_TOKEN=hf_abc; module load cuda", "export HF_TOKEN=***; module load cuda"),
    ],
)
def test_credentials_are_masked(text: str, shown: str) -> None:
    assert mask(text) == shown
    assert list(secrets_in({"a": {"b": [text]}})) == [("a.b", shown)]


@pytest.mark.parametrize(
    "text",
    [
        "https://h/a?$STOKER_SECRET_SAS",
        "https://me@h/a",
        "https://h/tokens/a-{000..099}.tar?version=3",
        'pipe:curl -H "Authorization: Bearer $TOKEN" https://h/a',
        "export HF_TOKEN=$(cat ~/.token)",
        "data.tokenizer=byte",
        "user@host:path",
        "a:b@c",
    ],
)
def test_what_is_no_credential_is_left(text: str) -> None:
    assert mask(text) == text and not list(secrets_in({"a": text}))


def test_a_key_that_names_a_credential_makes_its_value_one() -> None:
    assert list(secrets_in({"args": {"api_key": "abcd", "tokens": "abcd", "token": "$NAME"}})) == [
        ("args.api_key", "***")
    ]


def test_an_address_is_revealed_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://h/a?$STOKER_SECRET_SAS"
    with pytest.raises(ValueError, match=r"names \$STOKER_SECRET_SAS, and this process's environment has no such"):
        reveal(address)
    monkeypatch.setenv("STOKER_SECRET_SAS", "sig=abc")
    assert reveal(address) == "https://h/a?sig=abc"
    assert conceal("no answer from https://h/a?sig=abc", address) == "no answer from https://h/a?$STOKER_SECRET_SAS"


def test_what_a_library_says_of_a_revealed_address_is_concealed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def get(session: requests.Session, url: str, **_: object) -> None:
        asked.append(url)
        raise requests.ConnectionError(f"no route to {url}")

    monkeypatch.setattr(requests.Session, "get", get)
    monkeypatch.setenv("STOKER_SECRET_SAS", "sig=abc")
    with pytest.raises(Transient) as error:
        Web(Patience()).head("https://h/a?$STOKER_SECRET_SAS")
    assert asked == ["https://h/a?sig=abc"]
    assert str(error.value).endswith("no route to https://h/a?$STOKER_SECRET_SAS")
    assert error.value.__cause__ is None and error.value.__suppress_context__
    monkeypatch.delenv("STOKER_SECRET_SAS")
    with pytest.raises(Refused, match=r"\$STOKER_SECRET_SAS, and this process's environment has no such variable"):
        Web(Patience()).head("https://h/a?$STOKER_SECRET_SAS")
