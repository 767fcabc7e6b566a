"""The table of docs/models.md: `python -m tests.models.transformers_table`, from the classes that the tests train."""

from __future__ import annotations

from collections.abc import Iterator

from stoker.conf.values import ConfigError
from stoker.models.hugging_face_families import FAMILIES
from stoker.models.transformers_family.anatomy import parsed_config
from stoker.models.transformers_family.plans import OWN_PLANS
from stoker.parallel.layout import Layout
from stoker.trainer.import_check import architecture
from stoker.trainer.validate import validate
from tests.models import transformers_classes as classes

HEAD = ("`model_type`", "class", "ZeRO 0-3", "tensor parallel", "pipeline", "documents apart", "decoder")


def table_markdown() -> str:
    """The rows, one for each class."""
    rows = [row(kind) for kind in sorted(classes.CLASSES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ("---",) * len(HEAD), *rows)) + "\n"


def row(kind: str) -> tuple[str, ...]:
    plan = "yes, by a plan of Stoker's" if kind in OWN_PLANS else "yes"
    return (
        f"`{kind}`",
        architecture(parsed_config(classes.values_of(kind))),
        _said(kind, classes.LAYOUTS["dp 2 ZeRO 3"], "yes"),
        _said(kind, classes.LAYOUTS["tp 2"], plan),
        _said(kind, classes.LAYOUTS["pp 2"], "yes"),
        _said(kind, classes.LAYOUTS["dp 2 ZeRO 3"], "yes", mask=True),
        "yes" if kind in FAMILIES else "",
    )


def _said(kind: str, layout: Layout, accepted: str, mask: bool = False) -> str:
    reasons = list(_reasons(kind, layout, mask))
    return f"no: {reasons[0]}" if reasons else accepted


def _reasons(kind: str, layout: Layout, mask: bool) -> Iterator[str]:
    try:
        validate(classes.config_of(kind, layout, document_mask=mask), 2, 0)
    except ConfigError as error:
        message = str(error)
        for words, short in SHORT.items():
            if words in message:
                yield short
                return
        yield message


SHORT = {"there is no tensor-parallel plan": "no plan", "documents see each other": "a convolution runs on"}

if __name__ == "__main__":
    print(table_markdown(), end="")
