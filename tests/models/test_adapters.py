"""What an adapter's config makes of a model: its targets, ranks and trained parameters, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from stoker.conf.schema import AdapterConfig, Config, ModelConfig
from stoker.models.adapters import apply, plan_of
from stoker.models.family import build_on_meta
from stoker.models.peft_folder import shared_ends
from stoker.parallel.model import Constant, Normal, Part, whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.tensor.layers import ColumnLinear
from stoker.parallel.tensor.low_rank import LowRank, takes_adapters
from stoker.trainer.parallelize import part_builder

MODEL = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


def config_of(model: ModelConfig = MODEL, freeze: tuple[str, ...] = (), **adapter: object) -> Config:
    config = Config(model=replace(model, freeze=list(freeze)))
    if adapter:
        config.adapter = AdapterConfig("lora", **adapter)  # type: ignore[arg-type]
    return config


def ranks_of(**adapter: object) -> dict[str, int]:
    plan = plan_of(build_on_meta(MODEL, whole_model(3)), config_of(**adapter))
    assert plan is not None
    return dict(plan.ranks)


def trained_of(config: Config, part: Part | None = None) -> set[str]:
    model = part_builder(config)(part or whole_model(3))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


PROJECTIONS = [f"attention.{n}" for n in "qkvo"] + [f"mlp.{n}" for n in ("gate", "up", "down")]


def test_all_linear_is_every_projection_of_every_block() -> None:
    assert ranks_of(rank=4) == {f"layers.{n}.{module}": 4 for n in range(3) for module in PROJECTIONS}


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["attention.q", "self_attn.v_proj"], ["layers.*.attention.[qv]"], ["*.q_proj", "v"]],
)
def test_targets_go_by_our_names_theirs_ends_and_patterns(targets: list[str]) -> None:
    assert ranks_of(rank=4, target_modules=targets) == {f"layers.{n}.attention.{m}": 4 for n in range(3) for m in "qv"}


def test_layers_and_ranks_can_be_chosen() -> None:
    found = ranks_of(rank=4, target_modules=["q", "up"], layers_to_transform=[0, 2], rank_pattern={"layers.2.*": 9})
    assert found == {"layers.0.attention.q": 4, "layers.0.mlp.up": 4, "layers.2.attention.q": 9, "layers.2.mlp.up": 9}


def test_only_adapters_and_modules_trained_whole_are_trained() -> None:
    config = config_of(target_modules=["o"], modules_to_save=["lm_head", "layers.1.mlp_norm"])
    adapters = {f"layers.{n}.attention.o.lora.{matrix}" for n in range(3) for matrix in "AB"}
    assert trained_of(config) == adapters | {"head.weight", "layers.1.mlp_norm.weight"}


def test_a_tied_matrix_is_trained_in_every_stage_that_holds_it() -> None:
    config = config_of(replace(MODEL, tie_word_embeddings=True), target_modules=["o"], modules_to_save=["head"])
    first, last = Part(range(1), embedding=True, head=False), Part(range(2, 3), embedding=False, head=True)
    assert all("embedding.weight" in trained_of(config, part) for part in (whole_model(3), first, last))


def test_freezing_leaves_the_rest_to_be_trained() -> None:
    every = trained_of(config_of())
    frozen = {name for name in every if name == "embedding.weight" or name.startswith("layers.0.") or ".q." in name}
    assert trained_of(config_of(freeze=("embedding", "layers.0", "*.q.weight"))) == every - frozen


def test_an_adapter_begins_as_nothing_and_its_first_matrix_as_peft_s() -> None:
    entries = whole_registry(part_builder(config_of(rank=4))(whole_model(3))).entries
    assert entries["layers.0.mlp.down.lora.B"].initial == Constant(0.0)
    assert entries["layers.0.mlp.down.lora.A"].initial == Normal((1 / 48 / 3) ** 0.5)
    assert not entries["layers.0.mlp.down.weight"].trainable and entries["layers.0.mlp.down.lora.A"].trainable


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_a_layer_adds_the_scaled_product(rslora: bool, scale: float) -> None:
    layer = nn.ModuleDict({"0": ColumnLinear(6, 5)})
    model = Holder(layer)
    config = config_of(rank=4, alpha=8.0, rslora=rslora)
    apply(model, plan_of(model, config), config)
    adapted = model.layers["0"]
    assert isinstance(adapted.lora, LowRank)
    for parameter in adapted.lora.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 6)
    weight = adapted.weight + scale * adapted.lora.B @ adapted.lora.A
    assert torch.allclose(adapted(x), x @ weight.T + adapted.bias, atol=1e-5)


class Holder(nn.Module):
    """A model of a user's: blocks, and what is in them."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def blocks(self) -> dict[str, nn.Module]:
        return dict(self.layers.items())


class ComputesOtherwise(ColumnLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class IsCutOtherwise(nn.Linear):
    def cut(self, axis: object) -> list:
        return []


def test_a_layer_that_would_leave_the_adapter_out_takes_none() -> None:
    assert takes_adapters(nn.Linear(2, 2)) and takes_adapters(ColumnLinear(2, 2))
    assert not takes_adapters(ComputesOtherwise(2, 2)) and not takes_adapters(IsCutOtherwise(2, 2))
    model = Holder(nn.ModuleDict({"0": ComputesOtherwise(2, 2), "1": nn.Linear(2, 2)}))
    plan = plan_of(model, config_of())
    assert plan is None
    config = config_of(rank=1)
    found = plan_of(model, config)
    assert found is not None and dict(found.ranks) == {"layers.1": 1} and found.left_out == ("layers.0",)
    config.adapter.target_modules = ["layers.*"]
    with pytest.raises(ValueError, match=r"layers\.0 is ComputesOtherwise, which takes no adapter"):
        plan_of(model, config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (config_of(target_modules=["wq"]), "adapter.target_modules: wq fits none"),
        (config_of(rank_pattern={"wq": 3}), "adapter.rank_pattern: wq fits none"),
        (config_of(modules_to_save=["lm"]), "adapter.modules_to_save: lm fits none"),
        (config_of(layers_to_transform=[3]), "has no layer 3; it has 0 to 2"),
        (config_of(target_modules=["q"], modules_to_save=["attention"]), "layers.0.attention.q in it has an adapter"),
        (config_of(freeze=("wte",)), "model.freeze: wte fits none"),
        (config_of(freeze=("*",)), "leaves nothing to train"),
    ],
)
def test_names_that_do_not_fit_are_refused(config: Config, said: str) -> None:
    with pytest.raises(ValueError) as error:
        part_builder(config)
    assert said in str(error.value)


def test_modules_are_named_by_ends_that_fit_no_other() -> None:
    known = ["a.q", "a.k", "b.q", "b.k", "b.q.x"]
    assert shared_ends(["a.q", "b.q"], known) == ["q"]
    assert shared_ends(["a.q", "a.k", "b.k"], known) == ["a.q", "k"]
