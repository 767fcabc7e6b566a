"""From a config to rows: what the launcher, the ranks and the tools call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.ramp import ramp_of, unit_rows
from stoker.conf.schema import Config, DataConfig
from stoker.conf.targets import import_target
from stoker.data.build import SPLITS
from stoker.data.cache import cache_root, open_cache, open_folder, write_tokenizer
from stoker.data.documents import documents_of
from stoker.data.indexed import IndexPlan
from stoker.data.keys import IndexedFingerprint, SourceKey, TaughtKey
from stoker.data.loader import IndexedLoader, RowSource
from stoker.data.mixed import MixedPlan, Weights
from stoker.data.mixture import WEIGHT_UNITS
from stoker.data.ramp import RampedRows
from stoker.data.sources import Spec, held_out_share, specs_of, validation_spec, wanted_weights
from stoker.data.splitting import POSITION, by_position, part_by_position
from stoker.data.tables import open_table
from stoker.data.taught import open_lessons
from stoker.data.token_files import TokenFiles
from stoker.data.tokenizer import Tokenizer
from stoker.data.tokenizer_files import load_kept, named_tokenizer
from stoker.data.tokens import Tokens
from stoker.parallel.layout import OF_ONE_MODEL
from stoker.parallel.mesh import Mesh

FORMAT = 2  # of the fingerprint; changes with the rows


@dataclass(frozen=True)
class Opened:
    """A source with its tokens."""

    spec: Spec
    content: str  # fingerprint of its texts, or of its token files
    tokenizer: Tokenizer | None  # None: tokens without a tokenizer
    tokens: Tokens
    is_chat: bool
    folder: Path | None  # of the cache that holds the tokens; None: they stay at their place
    encoder: str | None = None  # fingerprint of the encoder, beside the tokenizer
    left_out: int | None = 0  # documents without text; None: not counted
    by_position: bool = False  # are the last tokens kept for validation, rather than documents?

    @property
    def key(self) -> SourceKey:
        tokenizer = self.tokenizer.fingerprint if self.tokenizer else None
        kept_by = POSITION if self.by_position else None
        return SourceKey(self.content, tokenizer, self.encoder, self.spec.config.validation, kept_by)


def open_rows(config: Config, split: str) -> IndexPlan | MixedPlan:
    """The rows of `train`, shuffled in each epoch of a source, or of `validation`, once and in a fixed order.

    Raises ValueError when the documents cannot be read or make no row.
    """
    if config.data.mode == "streaming":
        raise ValueError("rows of data.mode=streaming cannot be looked up by number: those of data.mode=indexed can")
    specs, plans = specs_of(config.data), open_plans(config, split, shuffled=split == "train")
    rows = [plan.rows_per_epoch for plan in plans]
    for plan, count in zip(plans, rows, strict=True):
        if not count and (split == "train" or not sum(rows)):
            raise ValueError(no_sequence(config, plan, split))
    if not config.data.sources:
        return plans[0]
    if split == "train":
        wanted = wanted_weights(config.data, specs, rows)
    else:
        wanted = [Weights(1, tuple(count * WEIGHT_UNITS // sum(rows) for count in rows))]
    return MixedPlan(plans, wanted, unit_rows(config), plans[0].fingerprint)


def open_plans(
    config: Config, split: str, streamed: Sequence[int] | None = None, *, shuffled: bool = False
) -> list[IndexPlan]:
    """The rows of each source in the order of its documents, once; with `shuffled`, shuffled in each of its epochs.

    For data.mode=streaming, `streamed` gives the rows to read of each source; they are made of documents from all over
    it. Raises ValueError when the documents cannot be read.
    """
    keyed = open_keyed_plans(config, split, streamed, shuffled=shuffled)
    if config.objective.teacher is None:
        return [plan for plan, _ in keyed]
    lessons = open_lessons(Path(config.objective.teacher))
    return [
        dataclasses.replace(plan, teacher=lessons.rows(split, number, key, plan.rows_per_epoch))
        for number, (plan, key) in enumerate(keyed)
    ]


def open_keyed_plans(
    config: Config, split: str, streamed: Sequence[int] | None = None, *, shuffled: bool = False
) -> list[tuple[IndexPlan, TaughtKey]]:
    """`open_plans` without a teacher's predictions, and for each what those depend on beside the teacher."""
    assert split in SPLITS
    specs = specs_of(config.data)
    if config.data.mode == "streaming":
        assert streamed is not None
        opened = _read_ahead(config, specs, split, streamed)
    else:
        opened = [open_source(config, spec, split) for spec in specs]
    mask = config.data.document_mask
    if mask is None:
        mask = config.data.packing == "best_fit" or any(source.is_chat for source in opened)
    _refuse_divided_pairs(config, opened, mask)
    fingerprint = _fingerprint(config, opened, split, mask).values()
    packing, seq_len = config.data.packing, config.seq_len
    return [
        (
            _plan(config, source, split, mask, fingerprint, shuffled),
            TaughtKey(source.key, split, packing, mask, seq_len),
        )
        for source in opened
    ]


def open_stream(config: Config, mesh: Mesh) -> RowSource:
    """The rows that this rank trains on, under either mode and with `batch.ramp`. A collective.

    Raises ValueError for data that cannot be used.
    """
    rows = _open_stream(config, mesh)
    return RampedRows(rows, ramp_of(config), mesh.device.type == "cuda") if config.batch.ramp else rows


def _open_stream(config: Config, mesh: Mesh) -> RowSource:
    if config.data.mode == "streaming":
        from stoker.data.streaming.opening import open_streams  # most runs do not need its imports

        return open_streams(config, mesh, open_tokenizer(config.data))
    compare = None
    if mesh.layout.size(OF_ONE_MODEL) > 1:
        from stoker.data.streaming.exchange import Ranks

        compare = Ranks(mesh).compare
    return IndexedLoader(
        open_rows(config, "train"),
        unit_rows(config),
        mesh.dp_rank,
        mesh.layout.dp,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin=mesh.device.type == "cuda",
        compare=compare,
        change=config.run.change,
    )


def vocabulary(config: Config, kept: Path | None = None) -> int:
    """How many token ids a model of these data needs. Reads no text.

    `kept` as in `open_tokenizer`. Raises ValueError for tokens without a tokenizer and no `model.vocab_size`.
    """
    if config.data.tokenizer == "bpe":
        return config.data.bpe_vocab
    try:
        return open_tokenizer(config.data, kept).vocab_size
    except NoTokenizer as error:
        if config.model.vocab_size is None:
            raise ValueError(f"{error}, or at least model.vocab_size=N") from None
        return config.model.vocab_size


class NoTokenizer(ValueError):
    """The data are tokens of an unknown tokenizer."""


def open_tokenizer(config: DataConfig, kept: Path | None = None) -> Tokenizer:
    """The tokenizer of these data: the one in the folder `kept` if that exists, else the one that the config names.

    `bpe` is trained on the training documents if that has not been done. Raises ValueError for a path that holds none
    and NoTokenizer for token files without one.
    """
    if kept is not None and kept.is_dir():
        return load_kept(kept)
    if config.tokenizer == "bpe":
        return open_cache(config, documents_of(import_target(config.target)(config), config.target)).tokenizer
    if config.tokenizer is None:
        for spec in specs_of(config):
            folder = Path(spec.config.path or "")
            if (folder / "tokenizer").is_dir():
                return open_folder(folder).tokenizer
        raise NoTokenizer("these token files name no tokenizer: set data.tokenizer=PATH")
    found = named_tokenizer(config)
    assert found is not None
    return found


def keep_tokenizer(config: DataConfig, folder: Path) -> None:
    """Write the tokenizer to `folder`, whole or not at all, if that does not exist. Token files may have none."""
    if folder.is_dir():
        return
    try:
        tokenizer = open_tokenizer(config)
    except NoTokenizer:
        return
    write_tokenizer(tokenizer, folder)


def open_source(config: Config, spec: Spec, split: str) -> Opened:
    """The tokens of one source, made first from texts. Raises ValueError for data that cannot be read or used."""
    apart = validation_spec(spec)
    if split == "train" or apart is None:
        return _open_source(config, spec, split)
    # Read with the tokenizer of the training documents: bpe would be trained on these.
    return _open_source(config, apart, split, open_tokenizer(spec.config) if spec.config.tokenizer == "bpe" else None)


def _open_source(config: Config, spec: Spec, split: str, given: Tokenizer | None = None) -> Opened:
    apart = spec.config.validation_path is not None or spec.config.validation == 1  # all documents are of this split
    found = import_target(spec.config.target)(spec.config)
    if isinstance(found, TokenFiles):
        if found.cache is not None and spec.config.tokenizer is None:
            tokenizer: Tokenizer | None = found.cache.tokenizer
        else:
            tokenizer = None if spec.config.tokenizer is None else open_tokenizer(spec.config)
        cut = by_position(spec.config, found.documents, found.is_chat)
        if cut:
            tokens = part_by_position(found.tokens("all", 0.0), split, spec.config.validation)
        elif apart:
            tokens = found.tokens("all", 0.0)
        else:
            tokens = found.tokens(split, spec.config.validation)
        limits = [config.model.vocab_size, tokenizer.vocab_size if tokenizer else None]
        if known := [limit for limit in limits if limit is not None]:
            found.refuse_vocabulary(min(known))
        left_out = 0 if found.cache is None else found.cache.left_out
        return Opened(
            spec, found.content, tokenizer, tokens, found.is_chat, None, found.reading, left_out, by_position=cut
        )
    source = documents_of(found, spec.config.target)
    chat = source.encoder is not None
    texts = spec.config
    if texts.validation_by == POSITION:  # of all documents together
        texts = dataclasses.replace(texts, validation=0.0)
    cache = open_cache(texts, source, given)
    cut = by_position(spec.config, cache.documents, chat)
    tokens = part_by_position(cache.tokens("all"), split, spec.config.validation) if cut else cache.tokens(split)
    return Opened(spec, cache.content, cache.tokenizer, tokens, chat, cache.folder, cache.encoder, cache.left_out, cut)


def _read_ahead(config: Config, specs: list[Spec], split: str, rows: Sequence[int]) -> list[Opened]:
    """Documents of each source under data.mode=streaming, read now: enough for so many rows of it."""
    from stoker.data.streaming.opening import open_sampled

    tokenizer = open_tokenizer(config.data)
    opened = []
    for spec, count in zip(specs, rows, strict=True):
        content, tokens = open_sampled(config, spec, tokenizer, count, split)
        opened.append(Opened(spec, content, tokenizer, tokens, False, None))
    return opened


def _plan(
    config: Config, source: Opened, split: str, mask: bool, fingerprint: dict[str, Any], shuffled: bool
) -> IndexPlan:
    root, packing = cache_root(config.data), config.data.packing
    too_long = _too_long(config, source, split)
    return IndexPlan(
        name=source.spec.name,
        tokens=source.tokens,
        seq_len=config.seq_len,
        seed=config.run.seed if shuffled else None,
        epochs=source.spec.epochs if shuffled else 1,
        document_mask=mask,
        fingerprint=fingerprint,
        table=open_table(root, source.key, split, source.tokens, packing, config.seq_len),
        left_out=None if source.left_out is None else source.left_out + too_long * source.tokens.documents_together,
    )


def _refuse_divided_pairs(config: Config, opened: list[Opened], mask: bool) -> None:
    """Raises ValueError where documents that belong together would come apart, or see each other."""
    kinds: dict[str, str] = {}
    for source in opened:
        paired = source.tokens.documents_together > 1
        kind = "no pairs" if not paired else "pairs of answers" if source.tokens.weights is None else "rated answers"
        kinds.setdefault(kind, source.spec.name)
    if len(kinds) > 1:
        held = ", ".join(f"{name} has {kind}" for kind, name in sorted(kinds.items()))
        raise ValueError(f"data.sources: {held}: an objective takes one kind")
    if "no pairs" in kinds:
        return
    if config.data.packing == "concatenated":
        shape = "preference" if "pairs of answers" in kinds else "unpaired_preference"
        raise ValueError(f"data.packing=concatenated cuts the pairs of data.args.shape={shape}: best_fit keeps them")
    if not mask:
        raise ValueError(
            "data.document_mask=false lets one answer of a pair attend to the other: true keeps them apart"
        )
    for source in opened:
        if source.by_position:
            raise ValueError(
                f"{source.spec.name}: data.validation_by=position cuts pairs of answers: documents does not"
            )


def _too_long(config: Config, source: Opened, split: str) -> int:
    """How many groups of documents that belong together are longer than a row, and left out.

    Raises ValueError for the first, unless data.args.long_pairs=drop.
    """
    count = source.tokens.documents_together
    if count == 1:
        return 0
    lengths = source.tokens.lengths().reshape(-1, count).sum(1)
    long = lengths > config.seq_len
    if long.any() and source.spec.config.args.get("long_pairs", "error") != "drop":
        drop = "" if source.folder is None else ", data.args.long_pairs=drop leaves the long ones out"  # data=tokens
        raise ValueError(
            f"{source.spec.name}: {int(long.sum())} of {len(lengths)} {split} pairs of answers are longer than "
            f"seq_len={config.seq_len}, pair {int(long.argmax())} first; the longest has {int(lengths.max())} tokens: "
            f"seq_len={int(lengths.max())} holds all{drop}"
        )
    return int(long.sum())


def _fingerprint(config: Config, opened: list[Opened], split: str, mask: bool) -> IndexedFingerprint:
    tokenizers = {source.tokenizer.fingerprint if source.tokenizer else None for source in opened} - {None}
    if len(tokenizers) > 1:
        raise ValueError(f"the sources have different tokenizers: {', '.join(sorted(map(str, tokenizers)))}")
    return IndexedFingerprint(
        format=FORMAT,
        tokenizer=tokenizers.pop() if tokenizers else None,
        split=split,
        validation=held_out_share(config.data),
        packing=config.data.packing,
        document_mask=mask,
        seq_len=config.seq_len,
        seed=config.run.seed,
        sources=tuple((source.spec.name, source.key) for source in opened),
        mixed=bool(config.data.sources),
    )


def no_sequence(config: Config, plan: IndexPlan, split: str) -> str:
    """The message that a source is too small, with what works."""
    held = f"{len(plan.tokens.starts)} {split} documents of {len(plan.tokens.ids)} tokens"
    needed = f"one row of seq_len={plan.seq_len} takes {plan.seq_len + 1}"
    cure = "give more text"
    if split == "validation" and held_out_share(config.data):
        cure = f"raise data.validation={config.data.validation}, keep the last tokens (data.validation_by=position)"
    return f"{plan.name}: the data hold {held}, and {needed}: {cure} or lower seq_len"
