"""What mutated files are made of and read by: see `tests.fuzzing`."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from stoker.conf.compose import compose
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import DataConfig
from stoker.data import keep_tokenizer
from stoker.data.chat import CHATML, chat_prompt, open_source
from stoker.data.manifest import parts_of
from stoker.data.tokenizer_files import load_kept, load_tokenizer
from stoker.launch.cli import main
from stoker.launch.model_files import export_dtype, model_files
from stoker.models.hugging_face_weights import open_weights
from stoker.parallel.mesh import stop_mesh
from stoker.parallel.shards import Chunk
from stoker.trainer.base_model import keep_base
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.pretrained import adopt_shape
from stoker.trainer.report.metrics import steps
from stoker.trainer.report.summary import History
from tests.data.chat_styles import template
from tests.data.counted import conversations, write_lines
from tests.data.hub_folders import hub_folder
from tests.data.tiktokens import tiktoken_file
from tests.fuzzing import Subject
from tests.models.families import write_family
from tests.test_golden_runs import DATA, GOLDEN


def _golden(place: Path, name: str) -> None:
    """A run directory of this name, with its data in it."""
    shutil.copytree(GOLDEN / name, place)
    data = GOLDEN / DATA[name]
    (shutil.copytree if data.is_dir() else shutil.copyfile)(data, place / data.name)
    config = RunDirectory(place).config
    text = config.read_text().replace(f"/golden/{data.name}", str(place / data.name))
    config.write_text(
        text.replace("  cache: null\n", f"  cache: {place / 'cache'}\n").replace("workers: 1", "workers: 0")
    )


def _make_run(place: Path) -> None:
    _golden(place, "indexed")
    (place / "attempts" / "1" / "rank-0.stamp").write_text(f"6 update {time.time():.3f} 4194000 host 1\n")
    (place / "attempts" / "1" / "rank-0.log").write_text("a line\n" * 20)


def _read_run(place: Path) -> None:
    for words in (["status"], ["logs", "--lines", "0"], ["checkpoint", "ls"], ["checkpoint", "verify"]):
        assert main([*words[:1], *(words[1:] if words[0] == "checkpoint" else []), str(place), *(
            words[1:] if words[0] == "logs" else [])]) in (0, 1, 2)  # fmt: skip
    History(steps(place / "metrics.jsonl"))
    load_kept(place / "tokenizer")


def _command(name: str, *words: str, golden: str = "indexed", share: int = 4) -> Subject:
    """A command on a run directory RUN."""

    def read(place: Path) -> None:
        shutil.rmtree(place / "exported", ignore_errors=True)
        try:
            if status := main([word.replace("RUN", str(place)) for word in words]):
                raise ValueError(f"status {status}")
        finally:
            stop_mesh()
            shutil.rmtree(place / "exported", ignore_errors=True)

    return Subject(name, lambda place: _golden(place, golden), read, share)


TEXTS = [{"id": number, "text": f"text of document {number}"} for number in range(20)]
LINES = "".join(json.dumps(value) + "\n" for value in TEXTS).encode()


def _texts(name: str, content: Callable[[], bytes]) -> Subject:
    """Documents of one file, in both modes."""

    def make(place: Path) -> None:
        place.mkdir()
        (place / name).write_bytes(content())

    def read(place: Path) -> None:
        from tests.data.test_formats import indexed, streamed

        indexed(place / name)
        streamed(place / name, max_decompressed_gib=0.05)

    return Subject(f"texts-{name}", make, read)


def _table(kind: str) -> bytes:
    table, file = pa.Table.from_pylist(TEXTS), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=6)
    else:
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=6)
    return file.getvalue()


def _make_tar(place: Path) -> None:
    place.mkdir()
    with tarfile.open(place / "a.tar", "w") as archive:
        for number in range(8):
            entry = tarfile.TarInfo(f"{number:04}.txt")
            entry.size = 20
            archive.addfile(entry, io.BytesIO(b"text of document 12\n"))


def _read_tar(place: Path) -> None:
    from stoker.conf.targets import import_target
    from stoker.data.remote import refuse
    from stoker.data.streaming.sources import open_store

    splits = "stoker.data.streaming.webdataset:open_webdataset"
    config = DataConfig(splits=splits, name="tar", urls=str(place / "a.tar"), cache=str(place / "cache"))
    found, store = import_target(splits)(config), open_store(config)
    for split in range(len(found)):
        list(found.read(split, store, refuse))


def _make_ids(place: Path) -> None:
    (place / "ids").mkdir(parents=True)
    np.save(place / "ids" / "a.npy", np.arange(200, dtype=np.uint16))


def _read_ids(place: Path) -> None:
    from stoker.data.token_files import open_source

    shutil.rmtree(place / "cache", ignore_errors=True)
    target, path, cache = "stoker.data.token_files:open_source", str(place / "ids"), str(place / "cache")
    found = open_source(DataConfig(target=target, path=path, cache=cache)).whole
    assert found is None or len(found.ids) >= 0


def _make_tokenizer(place: Path) -> None:
    shutil.copytree(GOLDEN / "indexed" / "tokenizer", place)


def _make_hub(place: Path, name: str = "") -> None:
    """A tokenizer as transformers keeps it, with a chat template in a file of its own and one in its config."""
    files = {"chat_template.jinja": template("qwen-2.5", marked=True)} if name else {}
    hub_folder(place / name, CHATML, files)


def _use(path: Path, pattern: str | None = None) -> None:
    tokenizer = load_tokenizer(path, None if pattern is None else "<|end|>", pattern)
    tokenizer.decode([*tokenizer.encode("what is the colour of the sea"), 3, tokenizer.vocab_size - 1])


def _make_tiktoken(place: Path) -> None:
    place.mkdir()
    tiktoken_file(place / "a.tiktoken", 300)


def _make_chat(place: Path) -> None:
    _make_hub(place, "hub")
    write_lines(place / "talks" / "a.jsonl", conversations(5))


def _read_chat(place: Path) -> None:
    args = {"render_seconds": 1.0, "render_megabytes": 8.0}
    config = DataConfig(
        target="stoker.data.chat:open_source", path=str(place / "talks"), tokenizer=str(place / "hub"), args=args
    )
    source, tokenizer = open_source(config), load_tokenizer(place / "hub")
    for part in parts_of(source.documents):
        for name, text, _ in part.texts():
            source.encoder.encode(tokenizer, name, text)
    chat_prompt(config, tokenizer, "what is the colour of the sea")


def _make_hub_model(place: Path) -> None:
    """A model of transformers with its tokenizer and settings of generation, its weights in several files."""
    hub_folder(place, CHATML)
    model = write_family(place, "llama", vocab_size=480, eos_token_id=[1, 2])
    (place / "model.safetensors").unlink()
    model.save_pretrained(place, max_shard_size="40KB")


def _read_hub_model(place: Path) -> None:
    """As an import at the start of a run, and an export at its end."""
    words = [f"model.init_from={place}", f"data.tokenizer={place}", "seq_len=32"]
    config = with_vocabulary(adopt_shape(compose(words), words))
    with open_weights(place) as tensors:
        for tensor in tensors.values():
            tensor.read(Chunk((0,) * len(tensor.shape), tensor.shape))
    run = RunDirectory(place / "cache" / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    run.path.mkdir(parents=True)
    keep_tokenizer(config.data, run.tokenizer)
    keep_base(config, run)
    model_files(run, config, export_dtype(run))


def _make_model(place: Path) -> None:
    place.mkdir()
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3)}, place / "a.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _read_model(place: Path) -> None:
    with open_weights(place) as tensors:
        for tensor in tensors.values():
            tensor.read(Chunk((0,) * len(tensor.shape), tensor.shape))


SUBJECTS = [
    Subject("run", _make_run, _read_run),
    _command("run-generate", "generate", "RUN", "--prompt", "document", "--tokens", "2", "--greedy"),
    _command("run-peek", "data", "peek", "RUN", "--step", "5", "--rows", "1"),
    _command("streamed-run-peek", "data", "peek", "RUN", "--step", "7", "--rows", "1", golden="streaming"),
    _command("run-export", "export", "RUN", "RUN/exported"),
    _command("run-replay", "replay", "RUN", "--step", "5", share=1),
    _texts("a.jsonl", lambda: LINES),
    _texts("a.jsonl.gz", lambda: gzip.compress(LINES)),
    _texts("a.csv", lambda: b"id,text\n" + b"".join(b"%d,text of document %d\n" % (n, n) for n in range(20))),
    _texts("a.parquet", lambda: _table("parquet")),
    _texts("a.arrow", lambda: _table("arrow")),
    _texts("s.arrow", lambda: _table("stream")),
    Subject("tar", _make_tar, _read_tar),
    Subject("ids", _make_ids, _read_ids),
    Subject("tokenizer", _make_tokenizer, load_kept),
    Subject("tokenizer-json", _make_tokenizer, lambda place: _use(place / "tokenizer.json")),
    Subject("tokenizer-hub", lambda place: _make_hub(place), _use),
    Subject("tokenizer-tiktoken", _make_tiktoken, lambda place: _use(place / "a.tiktoken", r"\w+|\W+")),
    Subject("chat", _make_chat, _read_chat),
    Subject("model", _make_model, _read_model),
    Subject("model-hub", _make_hub_model, _read_hub_model, share=1),
]
