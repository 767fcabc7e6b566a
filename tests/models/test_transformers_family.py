"""Models of transformers on every layout, against transformers' own training of one document at a time."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stoker.conf.values import ConfigError
from stoker.models.family import build_on_meta, family_of
from stoker.models.hugging_face_weights import open_weights
from stoker.parallel.buffers import fill_buffers
from stoker.parallel.layout import Layout
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.sharding import materialise
from stoker.parallel.shards import whole
from stoker.trainer.validate import validate
from tests import world
from tests.extent import some
from tests.models import transformers_classes as classes
from tests.models.transformers_classes import CLASSES, LAYOUTS, LENGTH, SHARING
from tests.models.transformers_table import row, table_markdown

SHARDED = LAYOUTS["dp 2 ZeRO 3"]
# One for each kind of attention, norm, embedding, head, experts and plan
SOME = [
    "gpt2", "gpt_neox", "qwen3", "gemma2", "phi3", "olmo2", "granite", "cohere", "mixtral", "deepseek_v2", "gpt_oss",
    "apertus",
]  # fmt: skip
OTHERS = [kind for kind in CLASSES if kind not in SOME]


def refusal(kind: str, layout: Layout, mask: bool = True, **changes: Any) -> str | None:
    """Why `kind` is not trained on this layout, by the checks before a start."""
    try:
        validate(classes.config_of(kind, layout, document_mask=mask, **changes), layout.world, 0)
    except ConfigError as error:
        return str(error)
    return None


def assert_the_same_training(kinds: list[str], folder: Path, layouts: dict[str, Layout] = LAYOUTS) -> None:
    masked = {kind: not (refusal(kind, SHARDED, mask=True) or "").startswith("documents see") for kind in kinds}
    expected = dict(ChainMap(*world.run(classes.write_references, 2, folder, masked, timeout=240.0)))
    problems = []
    for name, layout in layouts.items():
        ranks = layout.world
        for mask in (True, False):
            trained = [kind for kind in kinds if masked[kind] == mask and refusal(kind, layout, mask) is None]
            found = world.run(classes.train, ranks, folder, trained, layout, mask, timeout=240.0) if trained else []
            for kind in trained:
                run = classes.gathered(found, kind)
                assert not isinstance(run, str), f"{kind}, {name}: {run}"
                for what, difference in classes.differences(run, expected[kind]).items():
                    if not difference <= (1e-4 if what == "parameters" else 1e-5):
                        problems.append(f"{kind}, {name}: {what} differs by {difference:.1e}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_of_transformers_trains_alike_on_a_layout(name: str, tmp_path: Path) -> None:
    """Each of the dozen on one of the layouts, and each layout with several."""
    assert_the_same_training(SOME[list(LAYOUTS).index(name) :: len(LAYOUTS)], tmp_path, {name: LAYOUTS[name]})


@pytest.mark.long
@pytest.mark.full
def test_a_model_of_transformers_trains_alike_on_every_layout(tmp_path: Path) -> None:
    assert_the_same_training(SOME, tmp_path)


TEN = ["gemma3_text", "gpt2", "mixtral", "phi3", "cohere2", "llama", "qwen2", "olmo2", "granite", "gpt_neox"]


@pytest.mark.long
@pytest.mark.parametrize("start", some(range(0, len(TEN), 5), 2))
def test_replicas_of_tensor_parallel_ranks_train_a_model_of_transformers_alike(start: int, tmp_path: Path) -> None:
    layout = Layout(dp_shard=2, tp=2, zero=3)
    kinds = TEN[start : start + 5]
    assert [refusal(kind, layout) for kind in kinds] == [None] * len(kinds)
    assert_the_same_training(kinds, tmp_path, {"dp 2 x tp 2": layout})


@pytest.mark.long
@pytest.mark.parametrize("start", some(range(0, len(CLASSES), 6), 9))
def test_ranks_that_share_sequences_train_a_model_of_transformers_alike(start: int, tmp_path: Path) -> None:
    assert_the_same_training([*SOME, *OTHERS][start : start + 6], tmp_path, SHARING)


EXPERTS = ["mixtral", "qwen3_moe", "deepseek_v2", "olmoe", "qwen2_moe", "deepseek_v3"]


@pytest.mark.parametrize("kinds", [EXPERTS[:1], pytest.param(EXPERTS[1:], marks=pytest.mark.long)], ids=len)
def test_ranks_that_share_experts_train_a_model_of_transformers_alike(kinds: list[str], tmp_path: Path) -> None:
    layouts = {"ep 2": Layout(dp_shard=2, zero=3, ep=2), "ep 2, ZeRO 0": Layout(dp_replicate=2, ep=2)}
    assert_the_same_training(kinds, tmp_path, layouts if len(kinds) == 1 else {"ep 2": layouts["ep 2"]})


def test_experts_that_compute_otherwise_are_not_shared(tmp_path: Path) -> None:
    world.run(classes.write_references, 2, tmp_path, {"gpt_oss": True})
    found = world.run(classes.train, 2, tmp_path, ["gpt_oss"], Layout(dp_shard=2, zero=3, ep=2))
    assert "has no experts to share over 2 ranks" in str(classes.gathered(found, "gpt_oss"))


def test_context_parallelism_is_refused_where_tokens_meet_in_other_layers_and_by_heads() -> None:
    assert "takes no positions" in str(refusal("bloom", Layout(cp=2))) or "tokens meet" in str(
        refusal("bloom", Layout(cp=2))
    )
    assert "parallel.context=gather works" in str(refusal("llama", Layout(cp=2), context="ulysses"))
    assert refusal("llama", Layout(cp=2)) is None


@pytest.mark.long
@pytest.mark.parametrize("start", some(range(0, len(OTHERS), 8), 6))
def test_every_other_class_trains_alike_on_every_layout(start: int, tmp_path: Path) -> None:
    assert_the_same_training(OTHERS[start : start + 8], tmp_path)


def loaded(kind: str) -> Any:
    """The model of Stoker with the reference's weights, and the reference."""
    theirs = classes.reference_model(kind)
    model = build_on_meta(classes.config_of(kind, Layout()).model, whole_model(3))
    registry = whole_registry(model)
    materialise(model, torch.device("cpu"))
    fill_buffers(model, registry)
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            value.copy_(weights[name])
    return model.eval(), theirs.eval()


@pytest.mark.parametrize("kind", SOME)
def test_documents_do_not_see_each_other(kind: str) -> None:
    model, _ = loaded(kind)
    assert_apart(model, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", OTHERS)
def test_documents_of_every_other_class_do_not_see_each_other(kind: str) -> None:
    if refusal(kind, SHARDED, mask=True):
        pytest.skip("refused with document_mask")
    model, _ = loaded(kind)
    assert_apart(model, kind)


def assert_apart(model: Any, kind: str) -> None:
    documents = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(7), torch.arange(4)])[None]
    tokens = torch.arange(1, LENGTH + 1)[None]
    changed = tokens.clone()
    changed[0, 6] = 50

    def logits(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens, positions, documents)

    # Experts multiply the tokens that chose them together: one token more changes how their sums are rounded.
    moved = (logits(tokens) - logits(changed)).abs().amax(-1) > 1e-5
    assert not moved[:6].any() and not moved[12:].any(), f"{kind}: {moved.int().tolist()}"
    assert moved[6:8].all()


@pytest.mark.parametrize("kind", SOME)
def test_logits_of_a_cache_are_those_of_the_whole_sequence(kind: str) -> None:
    from stoker.models.cache import Cache

    model, theirs = loaded(kind)
    tokens = torch.arange(1, 11)[None]
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits[0, -1]
        cache = Cache(32)
        model.next_logits(tokens[:, :7], cache)
        for at in range(7, 10):
            found = model.next_logits(tokens[:, at : at + 1], cache)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "qwen2", "deepseek_v2", "ernie4_5"])
def test_what_comes_from_a_folder_goes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    theirs = classes.reference_model(kind)
    theirs.save_pretrained(tmp_path)
    config = classes.config_of(kind, Layout()).model
    family = family_of(config)
    model = build_on_meta(config, whole_model(3))
    names = [entry.name for entry in whole_registry(model).entries.values() if entry.saved]
    reference = theirs.state_dict()
    with open_weights(tmp_path) as found:
        stored = family.stored(config, found, names)
        assert set(stored) == set(names)
        values = {name: tensor.read(whole(tensor.shape)) for name, tensor in stored.items()}
        for name in names:
            assert torch.equal(values[name], reference[name]), name
        written: dict[str, Tensor] = {}
        for group in family.exported(config, {name: tuple(value.shape) for name, value in values.items()}):
            made = group.convert([values[name] for name in group.names])
            assert {name: tuple(value.shape) for name, value in made.items()} == group.files
            written |= made
        assert set(written) == set(found)
        for name, tensor in found.items():
            assert torch.equal(written[name], tensor.read(whole(tensor.shape))), name


def test_a_model_without_a_plan_is_refused_above_tp_1_by_name() -> None:
    assert "no tensor-parallel plan for model_type=bloom" in str(refusal("bloom", Layout(tp=2)))
    assert refusal("bloom", SHARDED) is None


def test_sequence_parallelism_is_refused_and_the_advice_works() -> None:
    message = refusal("llama", Layout(tp=2), sequence_parallel=True)
    assert message is not None and "parallel.sequence_parallel=false works" in message
    assert refusal("llama", Layout(tp=2), sequence_parallel=False) is None


def test_layers_that_mix_tokens_otherwise_are_refused_with_documents() -> None:
    message = refusal("lfm2", SHARDED)
    assert message is not None and "documents see each other" in message and "data.document_mask=false" in message
    assert refusal("lfm2", SHARDED, mask=False) is None


def test_dropout_is_refused_and_the_advice_works() -> None:
    config = classes.config_of("gpt2", SHARDED)
    config.model.config |= {"resid_pdrop": 0.1}
    with pytest.raises(ConfigError, match=r"resid_pdrop=0.1: .*model.args=\{resid_pdrop: 0.0\}"):
        validate(config, 2, 0)
    config.model.args = {"resid_pdrop": 0.0}
    validate(config, 2, 0)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("rope", "changes", "works"),
    [
        (LONGROPE, {}, ["seq_len=12", "data.document_mask=false"]),
        (LONGROPE, {"parallel.cp": 2, "data.document_mask": False}, ["seq_len=12", "parallel.cp=1"]),
    ],
)
def test_rotary_factors_that_go_by_a_batch_are_refused_and_the_advice_works(
    rope: dict[str, Any], changes: dict[str, Any], works: list[str]
) -> None:
    from stoker.conf.overrides import parse

    config = classes.config_of("phi3", Layout())
    given = {"rope_theta": 100.0, "partial_rotary_factor": 1.0}
    config.model.config |= {"rope_parameters": given | rope, "original_max_position_embeddings": 12}

    def change(key: str, value: Any) -> None:
        section, _, name = key.rpartition(".")
        setattr(getattr(config, section) if section else config, name, value)

    for key, value in changes.items():
        change(key, value)
    ranks = config.parallel.cp
    for word in works:
        with pytest.raises(ConfigError, match=rf"rope_type={rope['rope_type']}: above 12 positions .*{word}"):
            validate(config, ranks, 0)
    for word in works:
        override = parse(word)
        section, _, name = override.key.rpartition(".")
        before = getattr(getattr(config, section) if section else config, name)
        change(override.key, override.value)
        validate(config, config.parallel.cp, 0)
        change(override.key, before)


def test_code_that_a_config_names_is_refused() -> None:
    config = classes.config_of("llama", Layout())
    config.model.config |= {"auto_map": {"AutoModelForCausalLM": "theirs.Model"}}
    with pytest.raises(ConfigError, match="auto_map"):
        validate(config, 1, 0)


def test_a_model_that_is_no_causal_one_is_refused() -> None:
    config = classes.config_of("llama", Layout())
    config.model.config = {"model_type": "vit"}
    with pytest.raises(ConfigError, match="model_type='vit' has no causal language model"):
        validate(config, 1, 0)


def test_initial_values_are_those_of_transformers() -> None:
    from stoker.parallel.model import Constant, Normal

    model = build_on_meta(classes.config_of("gemma2", Layout()).model, whole_model(3))
    assert model.initial("model.norm.weight") == Constant(0.0)  # it is added to one
    assert model.initial("model.layers.0.mlp.up_proj.weight") == Normal(0.02)


DOC = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_page_shows_what_is_accepted() -> None:
    page = DOC.read_text()
    assert all(f"| {' | '.join(row(kind))} |" in page for kind in ("gpt2", "lfm2", "bloom"))


@pytest.mark.long
def test_the_page_shows_every_class() -> None:
    assert DOC.read_text().endswith(table_markdown()), "print it by: python -m tests.models.transformers_table"
