"""The documents to train on: a list whose texts are read when they are tokenised."""

from pathlib import Path

from stoker.conf.schema import DataConfig
from stoker.data.documents import Document


def open_source(config: DataConfig) -> list[Document]:
    """Every text file in `texts/`. `config` is the section `data` of the settings, with arguments in `config.args`."""
    files = sorted(Path(__file__).with_name("texts").glob("**/*.txt"))
    if not files:
        raise ValueError("there is no text in texts/: put some files there")
    return [Document(file.name, file.read_text) for file in files]
