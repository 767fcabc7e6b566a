"""From a config to rows: what the launcher, the ranks and the tools call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema import Config, DataConfig
from data.cache import SPLITS, TokenCache, open_cache
from data.index import IndexPlan
from data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer


def prepare(config: Config) -> None:
    """Tokenise the data of `config` if that has not been done, and prove that they make rows.

    Called once per machine before its ranks call `open_rows`. Raises ValueError for data that cannot be used.
    """
    open_rows(config, "train")
    if config.eval.rows:
        open_rows(config, "validation")


def open_rows(config: Config, split: str) -> IndexPlan:
    """The rows of `train`, shuffled anew in each of `data.epochs`, or of `validation`, once and in a fixed order.

    Raises ValueError when the documents cannot be read or make no row, and when `eval.rows` asks for more validation
    rows than there are.
    """
    assert split in SPLITS
    cache = open_cache(config.data)
    training = split == "train"
    plan = IndexPlan(
        name=config.data.name,
        tokens=cache.tokens(split),
        seq_len=config.seq_len,
        seed=config.run.seed if training else None,
        epochs=config.data.epochs if training else 1,
        document_mask=config.data.document_mask,
        fingerprint=_fingerprint(config, cache, split),
    )
    if not plan.rows_per_epoch:
        raise ValueError(_no_row(config, plan, split))
    if not training and config.eval.rows > plan.rows_per_epoch:
        raise ValueError(
            f"eval.rows={config.eval.rows}, but the {len(plan.tokens.starts)} validation documents make "
            f"{plan.rows_per_epoch} rows of {plan.seq_len} tokens: lower eval.rows or raise data.validation"
        )
    return plan


def vocabulary(config: Config) -> int:
    """How many token ids a model of these data needs. Reads no data."""
    return config.data.bpe_vocab if config.data.tokenizer == "bpe" else ByteTokenizer.vocab_size


def open_tokenizer(config: DataConfig, kept: Path | None = None) -> Tokenizer:
    """The tokenizer of these data. `bpe` is read from the file `kept` if it is there, and else from the cache, trained
    on the training documents when nobody has done so yet."""
    if config.tokenizer != "bpe":
        return ByteTokenizer()
    if kept is not None and kept.exists():
        return BpeTokenizer(kept.read_text(encoding="utf-8"), config.bpe_vocab)
    return open_cache(config).tokenizer


def keep_tokenizer(config: DataConfig, path: Path) -> None:
    """Write a trained tokenizer to `path`, whole or not at all; the byte tokenizer needs no file."""
    tokenizer = open_tokenizer(config, path)
    if isinstance(tokenizer, BpeTokenizer) and not path.exists():
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(tokenizer.json, encoding="utf-8")
        temporary.replace(path)


def _fingerprint(config: Config, cache: TokenCache, split: str) -> dict[str, Any]:
    return {
        "content": cache.content,
        "tokenizer": cache.tokenizer.fingerprint,
        "split": split,
        "validation": config.data.validation,
        "packing": "concatenated",
        "document_mask": config.data.document_mask,
        "seq_len": config.seq_len,
        "seed": config.run.seed,
    }


def _no_row(config: Config, plan: IndexPlan, split: str) -> str:
    held = f"{len(plan.tokens.starts)} {split} documents of {len(plan.tokens.ids)} tokens"
    needed = f"one row of seq_len={plan.seq_len} takes {plan.seq_len + 1}"
    cure = "give more text" if split == "train" else f"raise data.validation={config.data.validation}"
    return f"the data hold {held}, and {needed}: {cure} or lower seq_len"
