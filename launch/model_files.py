"""All files of an exported model except its weights.

A model imported by `model.init_from` is exported with its original files: values that training changed are updated,
everything else stays. A run without `model.init_from` gets new files.
"""

from __future__ import annotations

import json
from typing import Any

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config, to_dict
from stoker.data import open_tokenizer
from stoker.data.hugging_face import tokenizer_files
from stoker.data.opening import NoTokenizer
from stoker.data.tokenizer import Tokenizer
from stoker.models import hugging_face_config as theirs
from stoker.models.family import family_of
from stoker.models.hugging_face import DTYPES, OWN_MODEL
from stoker.trainer.base_model import GENERATION, BaseFacts, base_facts, kept_tokenizer_files

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_files(run: RunDirectory, config: Config, dtype: str) -> dict[str, bytes]:
    """Contents by path within the model's folder; `config.model.vocab_size` is known, `dtype` a key of DTYPES.

    Raises ValueError for a shape that no family of Hugging Face's has.
    """
    tokenizer = _tokenizer(run, config)
    facts = base_facts(run)
    end = None if tokenizer is None else tokenizer.end_of_document
    family, context = family_of(config.model), _context(config)
    if facts is not None and facts.dtype is not None:
        changed = family.changed_config_json(run.base_model, config.model, dtype, dtype == facts.dtype, config.seq_len)
        made = None if changed is None else _changed_files(run, changed, facts, end)
    else:
        new = family.config_json(config.model, dtype, context, end)
        generation = {"do_sample": True} if end is None else {"eos_token_id": end, "do_sample": True}
        made = None if new is None else {theirs.CONFIG: _json(new), GENERATION: _json(generation)}
    files = made if made is not None else {theirs.CONFIG: _json(_own_config(config, dtype))}
    came_with = kept_tokenizer_files(run)
    if came_with or tokenizer is None:
        return files | came_with
    return files | tokenizer_files(tokenizer, context)


def export_dtype(run: RunDirectory) -> str:
    """The default dtype of a run's exported weights: that of the imported model, else fp32."""
    facts = base_facts(run)
    return "fp32" if facts is None or facts.dtype is None else facts.dtype


def _tokenizer(run: RunDirectory, config: Config) -> Tokenizer | None:
    try:
        return open_tokenizer(config.data, run.tokenizer)
    except NoTokenizer:
        return None


def _context(config: Config) -> int:
    return family_of(config.model).context(config.model, config.seq_len)


def _changed_files(run: RunDirectory, values: dict[str, Any], facts: BaseFacts, end: int | None) -> dict[str, bytes]:
    """The imported config.json as `values`, and generation_config.json, both with the token ids of the run."""
    path = run.base_model / theirs.CONFIG
    before = theirs.read_json(path)
    values = _with_special_ids(values, facts.same_tokenizer, end)
    files = {theirs.CONFIG: path.read_bytes() if values == before else _json(values)}
    path = run.base_model / GENERATION
    if path.is_file():
        before = theirs.read_json(path)
        values = _with_special_ids(before, facts.same_tokenizer, end)
        files[GENERATION] = path.read_bytes() if values == before else _json(values)
    return files


def _with_special_ids(values: dict[str, Any], same_tokenizer: bool, end: int | None) -> dict[str, Any]:
    """`values` with token ids of the run's tokenizer: `end`, the id that closed its documents, ends a text as well."""
    if end is None:
        return values
    if not same_tokenizer:
        kept = {key: None if key in _SPECIAL else value for key, value in values.items()}
        return kept | {"eos_token_id": end}
    ends = values.get("eos_token_id")
    known = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return values if end in known else values | {"eos_token_id": [*known, end] if known else end}


def _own_config(config: Config, dtype: str) -> dict[str, Any]:
    """The config to build the model again: `model.init_from` of another run reads it."""
    return {
        "model_type": OWN_MODEL,
        "model": {**to_dict(config)["model"], "init_from": None, "init_only": []},
        "seq_len": config.seq_len,
        "dtype": DTYPES[dtype],
    }


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
