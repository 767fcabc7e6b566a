"""`stoker data prepare`, `pack` and `tokenizer`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from stoker.conf.compose import compose
from stoker.conf.rundir import resolve
from stoker.conf.schema import Config
from stoker.conf.targets import import_target
from stoker.conf.values import ConfigError
from stoker.data.cache import write_tokenizer
from stoker.data.documents import documents_of
from stoker.data.keys import is_validation
from stoker.data.manifest import parts_of
from stoker.data.opening import open_source
from stoker.data.sources import specs_of
from stoker.data.token_files import TokenFiles
from stoker.data.tokenizer import JsonTokenizer
from stoker.launch.train import say
from stoker.trainer.validate import validate


def prepare(options: argparse.Namespace) -> int:
    """Tokenise the data of the config, and print their place; with `--out` write them there as token files."""
    config = composed(options.overrides)
    out = Path(options.out).expanduser() if options.out else None
    if out is not None and out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out} holds something already: name a folder that is new or empty")
    specs = specs_of(config.data)
    for spec in specs:
        opened = open_source(config, spec, "train")
        counted = f"{len(opened.tokens.starts):,} documents, {len(opened.tokens.ids):,} tokens to train on"
        if opened.folder is None:
            say(f"{spec.name}: {counted}; these are token files already")
            continue
        place = opened.folder
        if out is not None:
            place = out if len(specs) == 1 else out / spec.name
            _copy(opened.folder, place)
        say(f"{spec.name}: {counted}, in {place}")
    if out is not None:
        say(f"train on it with data=tokens data.path={out}" if len(specs) == 1 else f"one folder for each under {out}")
    return 0


def pack(options: argparse.Namespace) -> int:
    """Write the training documents as webdataset shards: tar files, a text each member, and an index beside each."""
    from webdataset import TarWriter  # it imports torch, which no other command of this module needs

    from stoker.data.streaming.tar_index import build_index
    from stoker.data.streaming.webdataset import write_index

    out = Path(options.out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something already: name a folder that is new or empty")
    if options.megabytes <= 0:
        raise ConfigError(f"--megabytes {options.megabytes}: a shard holds something")
    texts = enumerate(_training_texts(composed(options.overrides)))
    out.mkdir(parents=True, exist_ok=True)
    shards = documents = 0
    entry = next(texts, None)
    if entry is None:
        raise ConfigError("the data hold no training documents")
    while entry is not None:
        path = out / f"shard-{shards:06}.tar"
        with open(path.with_suffix(".unfinished"), "wb") as file, TarWriter(file, encoder=False, mtime=0) as archive:
            while entry is not None and file.tell() < options.megabytes * 1e6:
                documents, (suffix, text) = entry
                archive.write({"__key__": f"{documents:09}", suffix: text.encode()})
                entry = next(texts, None)
        path.with_suffix(".unfinished").rename(path)
        with open(path, "rb") as written:
            write_index(Path(f"{path}.index"), build_index(written), path.stat().st_size)
        shards += 1
    say(f"{documents + 1:,} documents in {shards} shards: {out}/shard-{{000000..{shards - 1:06}}}.tar")
    return 0


def tokenizer(options: argparse.Namespace) -> int:
    """Train a byte-level BPE on the training documents of every source and write it to a folder."""
    out = Path(options.out).expanduser()
    if out.exists():
        raise ConfigError(f"{out} exists already: name a folder that is new")
    if options.vocab < 257:
        raise ConfigError(f"--vocab {options.vocab}: 256 bytes and the end of a document come first")
    config = composed(options.overrides)
    texts = (text for _, text in _training_texts(config))
    trained = JsonTokenizer.train(texts, options.vocab)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tokenizer(trained, out)
    say(f"{trained.vocab_size:,} tokens; use it with data.tokenizer={out}")
    return 0


def composed(overrides: Sequence[str]) -> Config:
    """The config of `overrides`, as far as data are concerned: on one rank, ignoring its number of ranks."""
    config = resolve(compose(overrides), datetime.now())
    validate(dataclasses.replace(config, parallel=Config().parallel), 1, 0)
    return config


def _training_texts(config: Config) -> Iterator[tuple[str, str]]:
    """The suffix that fits it, and the text, of every document to train on, source after source."""
    for spec in specs_of(dataclasses.replace(config.data, tokenizer="byte")):
        found = import_target(spec.config.target)(spec.config)
        if isinstance(found, TokenFiles):
            raise ConfigError(f"{spec.name}: these are tokens, not texts")
        source = documents_of(found, spec.config.target)
        suffix = "txt" if source.encoder is None else "json"
        for part in parts_of(source.documents):
            for _, text, digest in part.texts():
                if not is_validation(digest, spec.config.validation):
                    yield suffix, text


def _copy(source: Path, target: Path) -> None:
    """A folder of token files elsewhere: links where the file system can, so that it costs nothing."""

    def link(begin: str, end: str) -> None:
        try:
            os.link(begin, end)
        except OSError:
            shutil.copyfile(begin, end)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
