"""What cannot be trained exactly in transformers' own modules, with the reason of each."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch

from stoker.conf.schema import ModelConfig
from stoker.models.transformers_family.anatomy import Anatomy, anatomy, causal_model, parsed_config
from stoker.models.transformers_family.model import TransformersModel
from stoker.models.transformers_family.tensors import plan_of, prepare, unknown_styles
from stoker.models.transformers_family.values import values_of
from stoker.parallel.model import whole_model
from stoker.parallel.start import Refusals, Start

REFUSALS = Refusals()


def _found(start: Start) -> tuple[dict[str, Any], Anatomy] | None:
    """Values and anatomy of the model, None where `_buildable` refuses it."""
    try:
        values = values_of(start.config.model)
        return values, anatomy(values)
    except ValueError:
        return None


@REFUSALS.entry(
    "a model that is no causal language model of transformers",
    "model.config whose model_type transformers builds no causal language model for, or one without a body, an "
    "embedding and a linear head, or whose logits depend on each other",
    "Stoker computes embedding, head and loss itself, and the vocabulary may be divided",
)
def _buildable(start: Start) -> str | None:
    model = start.config.model
    try:
        _built(json.dumps(values_of(model), sort_keys=True), model.loss_chunk)
    except ValueError as error:
        return f"model.config: {error}"
    return None


@functools.lru_cache(maxsize=64)
def _built(text: str, chunk: int | None) -> None:
    values = json.loads(text)
    with torch.device("meta"):
        TransformersModel(ModelConfig(loss_chunk=chunk), whole_model(anatomy(values).count), values)


@REFUSALS.entry(
    "shape beside model.config",
    "model.vocab_size or model.num_hidden_layers that differ from those of model.config",
    "model.config describes the model; model.args={key: value} changes a value of it",
)
def _other_shape(start: Start) -> str | None:
    found, model = _found(start), start.config.model
    if found is None:
        return None
    text = parsed_config(found[0]).get_text_config()
    different = [
        f"model.{key}={given} (model.config has {getattr(text, key)})"
        for key, given in (("vocab_size", model.vocab_size), ("num_hidden_layers", model.num_hidden_layers))
        if given is not None and given != getattr(text, key)
    ]
    return f"{', '.join(different)}: leave them to model.config" if different else None


@REFUSALS.entry(
    "dropout",
    "model.config with dropout, jitter of a router or an auxiliary loss above 0",
    "random numbers of a layer would depend on where it runs, and auxiliary losses on how rows are split",
)
def _random(start: Start) -> str | None:
    found = _found(start)
    if found is None:
        return None
    set_ = _random_keys(found[0])
    if not set_:
        return None
    zeros = ", ".join(f"{key}: {_none_of(value)}" for key, value in set_.items())
    shown = ", ".join(f"{key}={value}" for key, value in set_.items())
    return f"model.config: {shown}: not computed alike on all layouts; 'model.args={{{zeros}}}' trains without"


def _random_keys(values: dict[str, Any]) -> dict[str, Any]:
    text = parsed_config(values).get_text_config().to_dict()
    words = ("dropout", "pdrop", "jitter", "layerdrop", "drop_path")
    unused = ("classifier", "summary", "classification")
    return {
        key: value
        for key, value in text.items()
        if (
            any(word in key for word in words)
            and not any(word in key for word in unused)
            and isinstance(value, (int, float))
            and value > 0
        )
        or (key == "output_router_logits" and value is True)
    }


def _none_of(value: Any) -> Any:
    return "false" if value is True else 0.0


@REFUSALS.entry(
    "initial values of a model of transformers",
    "a model of transformers without model.init_from that has a parameter of another initial distribution than a "
    "normal one of mean 0 or a constant",
    "initial values are a function of seed and name on every layout; only these are drawn so",
)
def _initial(start: Start) -> str | None:
    found, model = _found(start), start.config.model
    if found is None or (model.init_from is not None and not model.init_only):
        return None
    without = [f"{name} ({why})" for name, why in found[1].initial.items() if isinstance(why, str)]
    if not without:
        return None
    return f"no initial values for {without[0]}: model.init_from=FOLDER begins with those of a trained model"


@REFUSALS.entry(
    "documents of a model of transformers",
    "data.document_mask=true (the default for chats and best-fit packing) with layers that mix tokens by something "
    "else than attention",
    "a convolution or a state runs on from one document into the next",
)
def _documents(start: Start) -> str | None:
    found = _found(start)
    if found is None or not is_masked(start) or not found[1].mixers or _attends_by_masks(found[0]):
        return None
    return f"documents see each other in {found[1].mixers}: data.document_mask=false trains whole rows"


def is_masked(start: Start) -> bool:
    """Whether attention stays inside documents, as far as the settings tell."""
    data = start.config.data
    return data.document_mask if data.document_mask is not None else data.packing == "best_fit"


def _attends_by_masks(values: dict[str, Any]) -> bool:
    """Classes with attention code of their own, which takes Stoker's mask."""
    return values.get("model_type") in ("bloom", "mpt", "falcon")


@REFUSALS.entry(
    "table of positions",
    "seq_len above the number of positions that a learned table of a model of transformers has",
    "later positions have no values",
)
def _positions(start: Start) -> str | None:
    found = _found(start)
    if found is None:
        return None
    with torch.device("meta"):
        causal = causal_model(found[0])
    tables = [causal.get_submodule(name) for name in found[1].before if name != found[1].embedding]
    sizes = [table.num_embeddings for table in tables if isinstance(table, torch.nn.Embedding)]
    most = min(sizes, default=None)
    config = parsed_config(found[0]).get_text_config()
    if most is not None:
        most = min(most, getattr(config, "max_position_embeddings", None) or most)
    if most is None or start.config.seq_len <= most:
        return None
    return f"seq_len={start.config.seq_len}: the model has {most} positions; seq_len={most} works"


@REFUSALS.entry(
    "tensor parallelism of a model of transformers",
    "parallel.tp above 1 with a model for which neither transformers nor Stoker has a tensor-parallel plan, with a "
    "plan of unsupported styles, with parallel.tp that does not divide its heads or channels, or with "
    "parallel.sequence_parallel=true",
    "transformers' modules hold all tokens between regions; without a plan nobody knows what may be divided",
)
def _tensor_parallel(start: Start) -> str | None:
    found, parallel = _found(start), start.config.parallel
    if found is None or parallel.tp <= 1:
        return None
    kind = found[0].get("model_type")
    plan = plan_of(parsed_config(found[0]))
    if not plan:
        return f"parallel.tp={parallel.tp}: there is no tensor-parallel plan for model_type={kind}: parallel.tp=1 works"
    unknown = unknown_styles(plan)
    if unknown:
        return (
            f"parallel.tp={parallel.tp}: the plan of model_type={kind} has the style {unknown[0]}: parallel.tp=1 works"
        )
    if parallel.sequence_parallel:
        return (
            f"parallel.sequence_parallel=true with parallel.tp={parallel.tp}: models of transformers hold all tokens "
            "between regions: parallel.sequence_parallel=false works"
        )
    problem = _with_causal(found[0], lambda causal: prepare(causal, found[1].base))
    if problem:
        return f"parallel.tp={parallel.tp}: {problem}; parallel.tp=1 works"
    config = parsed_config(found[0]).get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if isinstance(heads, int) and isinstance(kv_heads, int):
        shared = kv_heads % parallel.tp and parallel.tp % kv_heads
        if heads % parallel.tp or shared:
            return (
                f"parallel.tp={parallel.tp} does not go with {heads} heads and {kv_heads} key and value heads of "
                "model.config: parallel.tp=1 works"
            )
    return None


@REFUSALS.entry(
    "context parallelism of a model of transformers",
    "parallel.cp above 1 with layers that mix tokens by something else than the registered attention, with a body that "
    "takes no positions, or with parallel.context=ulysses",
    "tokens of a sequence are on several ranks, and meet in that attention only, which gathers keys and values",
)
def _context_parallel(start: Start) -> str | None:
    found, parallel = _found(start), start.config.parallel
    if found is None or parallel.cp <= 1:
        return None
    if found[1].mixers:
        return f"parallel.cp={parallel.cp}: tokens meet in {found[1].mixers}: parallel.cp=1 works"
    if not found[1].positions:
        return f"parallel.cp={parallel.cp}: the model takes no positions of tokens: parallel.cp=1 works"
    if parallel.context != "gather":
        return (
            f"parallel.context={parallel.context} with a model of transformers: parallel.context=gather works, or "
            "parallel.cp=1"
        )
    return None


def _with_causal(values: dict[str, Any], use: Callable[[Any], Any]) -> str:
    with torch.device("meta"):
        causal = causal_model(values)
    try:
        use(causal)
    except ValueError as error:
        return str(error)
    return ""


@REFUSALS.entry(
    "pipeline of a model of transformers",
    "parallel.pp above 1 with layers that need more of each other than one activation for each token, or with more "
    "stages than layers",
    "a stage sends the next one its activations and nothing else",
)
def _pipeline(start: Start) -> str | None:
    found, parallel = _found(start), start.config.parallel
    if found is None or parallel.pp * parallel.stages_per_rank <= 1:
        return None
    if found[1].indivisible:
        return f"parallel.pp={parallel.pp}: {found[1].indivisible}; parallel.pp=1 works"
    if parallel.pp * parallel.stages_per_rank > found[1].count:
        return (
            f"parallel.pp={parallel.pp} x parallel.stages_per_rank={parallel.stages_per_rank} are more stages than the "
            f"{found[1].count} layers of model.config: at most {found[1].count} stages work"
        )
    return None
