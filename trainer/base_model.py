"""The files of an imported model other than its weights, kept in the run directory for a later export.

A run needs `model.init_from` and the folder of its tokenizer only at its first start; both may be removed after that.
`RUN/base_model` holds config.json and generation_config.json unchanged, the tokenizer's files under `tokenizer/`
(chat templates and special tokens among them), and in `base.json` facts that an export needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config, DataConfig
from stoker.data import open_tokenizer
from stoker.data.hub_tokenizer import HubTokenizer
from stoker.data.opening import NoTokenizer
from stoker.data.tokenizer_files import load_tokenizer
from stoker.models.hugging_face import DTYPES, OWN_MODEL
from stoker.models.hugging_face_config import CONFIG, read_json
from stoker.models.hugging_face_weights import open_weights, weight_files
from stoker.trainer.pretrained import init_folder, is_run

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer"
_FACTS = "base.json"
# All files that a tokenizer of transformers may have, except code (*.py).
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "*.tiktoken",
)
_OF_FILES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True)
class BaseFacts:
    dtype: str | None  # of the model's weights, a key of DTYPES; None: there is no model, only a tokenizer
    same_tokenizer: bool  # the run's token ids are those of the base model


@dataclass(frozen=True)
class _Base:
    """A model to keep files of: a folder of Hugging Face's, or what a run kept of one."""

    folder: Path
    tokenizer: Path  # the folder of its tokenizer's files, which may have none
    ids: Path  # a folder from which its tokenizer is loaded
    facts: BaseFacts


def keep_base(config: Config, run: RunDirectory) -> None:
    """Copy what `model.init_from` and the tokenizer's folder hold into `RUN/base_model`, if it is not there.

    The tokenizer is that of `data.tokenizer` where this is a folder, which `RUN/tokenizer` was made from too; else the
    base model's, if its ids are those of the run. Whole or not at all. Nothing is kept where the run started with
    neither, or where both were removed.
    """
    target = run.base_model
    if target.is_dir():
        return
    base = _base_of(config)
    same = base is not None and base.facts.same_tokenizer and _same_tokenizer(config.data, base.ids)
    source = _tokenizer_folder(config.data) or (base.tokenizer if base is not None and same else None)
    files = files_of_tokenizer(source) if source is not None else []
    if base is None and not files:
        return

    def fill(folder: Path) -> None:
        for name in (CONFIG, GENERATION):
            if base is not None and (base.folder / name).is_file():
                shutil.copyfile(base.folder / name, folder / name)
        for file in files:
            assert source is not None
            place = folder / TOKENIZER / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        facts = BaseFacts(base.facts.dtype if base is not None else None, same)
        (folder / _FACTS).write_text(json.dumps(asdict(facts)))

    _copied(target, fill)


def keep_weights(config: Config, run: RunDirectory) -> None:
    """Keep the weights of `model.init_from` in `RUN/base_weights`, if they are not there: whole or not at all.

    By hard links, which take no room, where both are on one file system; else by copies.
    """
    target, source = run.base_weights, init_folder(config)
    if target.is_dir():
        return

    def fill(folder: Path) -> None:
        for file in weight_files(source):
            try:
                os.link(file.resolve(), folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)

    _copied(target, fill)


def _base_of(config: Config) -> _Base | None:
    """None without `model.init_from`, and for a model that is of no family or of a run that kept nothing."""
    if config.model.init_from is None:
        return None
    folder = init_folder(config)
    if is_run(folder):
        run = RunDirectory(folder)
        facts = base_facts(run)
        if facts is None:
            return None
        files = run.base_model / TOKENIZER
        return _Base(run.base_model, files, run.tokenizer if run.tokenizer.is_dir() else files, facts)
    if not (folder / CONFIG).is_file() or read_json(folder / CONFIG).get("model_type") == OWN_MODEL:
        return None
    return _Base(folder, folder, folder, BaseFacts(_dtype(folder), True))


def base_facts(run: RunDirectory) -> BaseFacts | None:
    """None where nothing was kept."""
    if not (run.base_model / _FACTS).is_file():
        return None
    values = read_json(run.base_model / _FACTS)
    return BaseFacts(values["dtype"], values["same_tokenizer"])


def kept_tokenizer_files(run: RunDirectory) -> dict[str, bytes]:
    """The tokenizer's files, unchanged, by their paths within the folder of a model."""
    folder = run.base_model / TOKENIZER
    return {str(file.relative_to(folder)): file.read_bytes() for file in files_of_tokenizer(folder)}


def _tokenizer_folder(data: DataConfig) -> Path | None:
    """The folder of `data.tokenizer`, if transformers can load a tokenizer from it as it is."""
    if data.tokenizer in (None, "byte", "bpe"):
        return None
    folder = Path(str(data.tokenizer))
    return folder if (folder / "tokenizer_config.json").is_file() else None


def _copied(target: Path, fill: Callable[[Path], object]) -> None:
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a start that was killed
    unfinished.mkdir()
    fill(unfinished)
    unfinished.rename(target)


def files_of_tokenizer(folder: Path) -> list[Path]:
    """The files of a tokenizer of transformers in the folder of a model, or of the tokenizer alone."""
    return sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})


def _same_tokenizer(data: DataConfig, base: Path) -> bool:
    """Whether token ids mean the same in the run and in the base model. True without a tokenizer."""
    try:
        ours = open_tokenizer(data)
    except NoTokenizer:
        return True
    if not files_of_tokenizer(base):
        return False
    try:
        if load_tokenizer(base, data.end_of_document).fingerprint == ours.fingerprint:
            return True
        # One that a run kept ends documents as it did there, and may do so in another way here.
        kept = (base / "tokenizer_config.json").is_file()
        return kept and HubTokenizer(base, data.end_of_document).fingerprint == ours.fingerprint
    except ValueError:  # the base model's tokenizer cannot be read: it is not the run's
        return False


def _dtype(base: Path) -> str:
    """The dtype in config.json, else the dtype of most numbers in the files."""
    values = read_json(base / CONFIG)
    named = values.get("dtype") or values.get("torch_dtype")
    for dtype, theirs in DTYPES.items():
        if named == theirs:
            return dtype
    with open_weights(base) as tensors:
        found = Counter(tensor.dtype for tensor in tensors.values())
    return _OF_FILES.get(found.most_common(1)[0][0], "fp32")
