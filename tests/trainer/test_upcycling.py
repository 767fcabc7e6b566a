"""Experts that begin as the MLPs of a model without: the same outputs, and the same bits on every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from stoker.checkpoint import read_tensors
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.models.decoder import build
from stoker.models.hugging_face_families import family_of
from stoker.parallel.layout import Layout
from stoker.parallel.model import whole_model
from tests import world
from tests.extent import some
from tests.launch.runs import overrides, write_text
from tests.models.families import VOCABULARY, write_family
from tests.parallel.reference import assemble, normwise
from tests.trainer.test_pretrained import asked, begun
from tests.trainer.test_python_api import trained

HALVES = ("model.num_experts=8", "model.num_experts_per_tok=4", "model.moe_intermediate_size=24")
SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "copies": ("llama", ("model.num_experts=6",)),
    "halves": ("qwen3", HALVES),
    "sigmoid": ("tied qwen2", ("model.num_experts=4", "model.router=sigmoid", "model.router_bias=true")),
    "thirds after a dense layer": (
        "smollm3",
        (
            "model.num_experts=6",
            "model.num_experts_per_tok=3",
            "model.moe_intermediate_size=16",
            "model.first_dense_layers=1",
        ),
    ),
}
LAYOUTS = [
    (Layout(dp_shard=2, zero=3, ep=2), ()),
    (Layout(tp=2), ("parallel.expert_tp=true",)),
    (Layout(pp=2), ()),
    (Layout(dp_shard=2, tp=2, zero=1, ep=2), ("parallel.expert_tp=true",)),
    (Layout(dp_shard=4, zero=3, ep=4), ()),
]


def words(layout: Layout) -> list[str]:
    of = {"tp": layout.tp, "pp": layout.pp, "zero": layout.zero, "ep": layout.ep}
    return [*(f"parallel.{key}={value}" for key, value in of.items()), "batch.micro_size=2"]


def logits(config: Config, values: dict[str, Tensor], tokens: Tensor) -> Tensor:
    model = build(config.model, whole_model(config.model.num_hidden_layers))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


@pytest.mark.parametrize("shape", [pytest.param(n, marks=[] if n == "halves" else pytest.mark.long) for n in SHAPES])
def test_the_first_logits_are_those_of_the_model_without_experts(shape: str, tmp_path: Path) -> None:
    case, more = SHAPES[shape]
    reference = write_family(tmp_path, case)
    config = asked(tmp_path, *more)
    tokens = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = reference(tokens).logits.flatten(0, 1)
    begins = assemble(world.run(begun, 1, config))
    assert normwise(logits(config, begins, tokens), wanted) < 1e-5
    noisy = replace(config, model=replace(config.model, upcycle_noise=0.5))
    other = logits(noisy, assemble(world.run(begun, 1, noisy)), tokens)
    assert 1e-4 < normwise(other, wanted) < 1.0


def test_every_layout_begins_with_the_same_bits(tmp_path: Path) -> None:
    write_family(tmp_path, "qwen3")
    noise = (*HALVES, "model.upcycle_noise=0.1")
    alone = assemble(world.run(begun, 1, asked(tmp_path, *noise)))
    for layout, more in some(LAYOUTS, 3):
        found = assemble(world.run(begun, layout.world, asked(tmp_path, *noise, *words(layout), *more)))
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(found[name], value), f"{layout}: {name}"


def test_what_is_added_is_a_share_of_usual_initial_values(tmp_path: Path) -> None:
    write_family(tmp_path, "qwen3")
    plain, noisy = (
        assemble(world.run(begun, 1, asked(tmp_path, *HALVES, *more))) for more in ((), ("model.upcycle_noise=0.1",))
    )
    for name, value in plain.items():
        added = noisy[name] - value
        if ".experts." not in name:
            assert not added.any(), name
            continue
        deviation = 0.1 * 0.2 / (6**0.5 if "down" in name else 1.0)  # of three layers
        assert float(added.std()) == pytest.approx(deviation, rel=0.05), name
        assert torch.equal(value[0], value[2]) and not torch.equal(value[0], value[1]), "halves in turn"
        assert not torch.equal(noisy[name][0], noisy[name][2])
    for name in (name for name in plain if name.endswith("router.weight")):
        assert torch.equal(plain[name][0::2], plain[name][1::2]) and not torch.equal(plain[name][0], plain[name][2])


@pytest.mark.long
def test_a_run_is_continued_with_experts_and_exported(tmp_path: Path) -> None:
    text, cache = tmp_path / "text", f"data.cache={tmp_path / 'cache'}"
    write_text(text)
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    words = overrides(dense, text, "steps=1", "batch.micro_size=8", cache)
    assert world.run(trained, 1, words, fresh=True) == [("completed", 1)]
    more = [f"model.init_from={dense}", "model.num_experts=4"]
    words = overrides(sparse, text, "steps=1", "batch.micro_size=8", "optim.lr=1e-9", cache, *more)
    words = [word for word in words if not word.startswith("model.") or word in more]
    assert world.run(trained, 1, words, fresh=True) == [("completed", 1)]
    after, before = (dict(read_tensors(run / "checkpoints" / "step-00000001")) for run in (sparse, dense))
    down = before["layers.1.mlp.down.weight"]
    for expert in after["layers.1.mlp.experts.down_proj"]:
        torch.testing.assert_close(expert, down, rtol=0, atol=1e-6)
    assert main(["export", str(sparse), str(tmp_path / "out")]) == 0
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "MixtralForCausalLM"


def test_an_imported_model_with_experts_has_another_family(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    config = asked(tmp_path, "model.num_experts=4")
    assert config.model.family is None and family_of(config.model) == "mixtral"
    values = build.changed_config_json(tmp_path, config.model, "fp32", True, 64)
    assert values is not None and (values["num_local_experts"], values["model_type"]) == (4, "mixtral")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.num_shared_experts=1"], "model.num_shared_experts=1 has no MLP to begin as: 0 works"),
        (["model.norm_topk_prob=false"], "have to add up to one: true works"),
        (["model.moe_intermediate_size=20"], "does not divide the 48 channels .* model.moe_intermediate_size=16 does"),
        (["model.moe_intermediate_size=16"], "model.num_experts=4 is no multiple of 3, .*: model.num_experts=6 is"),
        (["model.moe_intermediate_size=12"], "model.num_experts_per_tok=2 is no multiple of 4.*per_tok=4 is"),
        (["adapter=lora"], "adapter=none trains the experts"),
    ],
)
def test_what_cannot_begin_so_is_refused_before_any_rank(more: list[str], message: str, tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    with pytest.raises(ConfigError, match=rf"this model has no experts, and model.num_experts=4: .*{message}"):
        asked(tmp_path, "model.num_experts=4", *more)


def test_noise_for_experts_that_are_no_copies_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match=r"are no copies of MLPs: model.upcycle_noise=0.0 works"):
        asked(tmp_path, "model.upcycle_noise=0.1")


def test_only_other_tensors_are_taken_where_experts_are_left_out(tmp_path: Path) -> None:
    reference = write_family(tmp_path, "llama").state_dict()
    more = ["model.num_experts=4", "model.num_shared_experts=1", "model.init_only=[layers.*.attention.*]"]
    found = assemble(world.run(begun, 1, asked(tmp_path, *more)))
    name = "layers.1.attention.q.weight"
    assert torch.equal(found[name], reference["model.layers.1.self_attn.q_proj.weight"])
