"""Existing tokenizers: found at a path, loaded, and kept beside the data made with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stoker.conf.hub_names import download_advice
from stoker.conf.records import parse_json
from stoker.conf.schema import DataConfig
from stoker.data.hub_tokenizer import USUAL_ENDS, HubTokenizer
from stoker.data.tiktoken_files import TiktokenTokenizer
from stoker.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer


def load_tokenizer(path: Path, end_of_document: str | None = None, tiktoken_pattern: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: a folder as transformers keeps it, or a file: tokenizer.json, .model or .tiktoken.

    `end_of_document`: the token that closes a document; default: the tokenizer's `eos_token`, or the
    usual names. `tiktoken_pattern` as in `TiktokenTokenizer`. Raises ValueError, naming the path, for anything else.
    """
    try:
        if path.is_dir():
            return load_kept(path) if (path / "stoker.json").exists() else _load_folder(path, end_of_document)
        if path.suffix == ".tiktoken":
            return TiktokenTokenizer(path.read_bytes(), end_of_document, tiktoken_pattern)
        if path.suffix == ".model":
            return HubTokenizer.of_files({"tokenizer.model": path.read_bytes()}, end_of_document)
        return _from_json(path.read_text(encoding="utf-8"), end_of_document)
    except FileNotFoundError:
        problem = f"data.tokenizer={path}: does not exist; use byte, bpe or the path of a tokenizer"
        raise ValueError(f"{problem}{download_advice(path, 'model')}") from None
    except OSError as error:
        raise ValueError(f"cannot read data.tokenizer={path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"data.tokenizer={path}: {error}") from error


def named_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that the config names; None for one that is trained on the data first.

    Raises ValueError for a path that holds none.
    """
    if config.tokenizer == "bpe":
        return None
    if config.tokenizer in ("byte", None):
        return ByteTokenizer()
    return load_tokenizer(Path(config.tokenizer).expanduser(), config.end_of_document, config.tiktoken_pattern)


def load_kept(folder: Path) -> Tokenizer:
    """The tokenizer whose `files()` lie in `folder`. Raises OSError or ValueError when they do not."""
    try:
        return _of_facts(folder, parse_json((folder / "stoker.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{folder} holds no tokenizer of a run: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'stoker.json'} does not describe a tokenizer: {error!r}") from error


def _of_facts(folder: Path, facts: dict[str, Any]) -> Tokenizer:
    if facts["kind"] == "byte":
        return ByteTokenizer()
    if facts["kind"] == "hub":
        return HubTokenizer(folder, facts["end_of_document"])
    if facts["kind"] == "tiktoken":
        content, end, pattern = (folder / "tokens.tiktoken").read_bytes(), facts["end_of_document"], facts["pattern"]
        return TiktokenTokenizer(content, end, pattern, facts.get("specials") or _one_special(content, end))
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return JsonTokenizer(text, facts["end_of_document"], facts["vocab_size"])


def _one_special(content: bytes, end: str) -> dict[str, int]:
    """The special token of a folder that was kept before special tokens were kept by name."""
    count = sum(1 for line in content.splitlines() if line.strip())
    return {end: 100257 if count == 100256 else count}


def _load_folder(folder: Path, end_of_document: str | None) -> HubTokenizer:
    if not any(folder.glob("*.json")) and not any(folder.glob("*.model")):
        raise ValueError("the folder has no tokenizer.json, tokenizer_config.json or .model")
    return HubTokenizer(folder, end_of_document)


def _from_json(text: str, end: str | None) -> JsonTokenizer:
    if end is None:
        added = {entry.get("content") for entry in _parsed(text).get("added_tokens") or []}
        end = next((name for name in USUAL_ENDS if name in added), USUAL_ENDS[0])
    return JsonTokenizer(text, end)


def _parsed(text: str) -> dict[str, Any]:
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values
