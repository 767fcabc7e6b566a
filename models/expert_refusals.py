"""Shapes of models with experts that cannot be, with the nearest that work."""

from __future__ import annotations

from collections.abc import Sequence

from stoker.conf.limits import OF_MICRO_BATCHES
from stoker.conf.schema import ModelConfig
from stoker.models.refusals import REFUSALS
from stoker.parallel.start import Start
from stoker.parallel.suggestions import around, divisors, either

# Keys of ModelConfig that only models with experts read.
OF_EXPERTS = (
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_shared_experts",
    "first_dense_layers",
    "router",
    "router_bias",
    "router_bias_rate",
    "router_aux_loss_coef",
    "router_aux_loss_over",
    "router_z_loss_coef",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
)


def changed_settings(model: ModelConfig, keys: Sequence[str]) -> str:
    """Those of `keys` that are not at their defaults, with their values; empty if all are."""
    default = ModelConfig()
    changed = [key for key in keys if getattr(model, key) != getattr(default, key)]
    return ", ".join(f"model.{key}={getattr(model, key)}" for key in changed)


@REFUSALS.entry("settings of no experts", "keys of experts with model.num_experts=0", "they would have no effect")
def _settings_of_no_experts(start: Start) -> str | None:
    model = start.config.model
    shown = "" if model.num_experts else changed_settings(model, OF_EXPERTS)
    return f"{shown} with model.num_experts=0: model.num_experts=8 has experts" if shown else None


@REFUSALS.entry(
    "noise of no copies",
    "model.upcycle_noise without model.init_from or with model.num_experts=0",
    "no expert begins as a copy",
)
def _noise_of_no_copies(start: Start) -> str | None:
    model = start.config.model
    if not model.upcycle_noise or (model.init_from is not None and model.num_experts):
        return None
    lacks = "model.num_experts=0" if model.init_from is not None else "model.init_from=null"
    return f"model.upcycle_noise={model.upcycle_noise} with {lacks}: model.upcycle_noise=0.0 works"


@REFUSALS.entry(
    "experts of a token", "model.num_experts_per_tok above model.num_experts", "a token uses an expert once"
)
def _experts_of_a_token(start: Start) -> str | None:
    experts, used = start.config.model.num_experts, start.config.model.num_experts_per_tok
    if experts < 1 or used <= experts:
        return None
    return (
        f"model.num_experts_per_tok={used} is more than model.num_experts={experts}: "
        f"model.num_experts_per_tok={experts} works"
    )


@REFUSALS.entry(
    "groups of experts",
    "model.n_group that does not divide model.num_experts into groups of two at least, model.topk_group above it, or "
    "model.num_experts_per_tok above the experts of model.topk_group groups",
    "a group counts by the highest two scores in it, and a token uses experts of some groups only",
)
def _groups_of_experts(start: Start) -> str | None:
    model = start.config.model
    experts, groups, chosen = model.num_experts, model.n_group, model.topk_group
    if min(experts, groups, chosen) < 1:
        return None
    if groups > 1 and (experts % groups or experts // groups < 2):
        fitting = [number for number in divisors(experts) if experts // number >= 2 or number == 1]
        return (
            f"model.n_group={groups} does not divide model.num_experts={experts} into groups of two at least: "
            f"model.n_group={either(around(groups, fitting))} does"
        )
    if chosen > groups:
        return f"model.topk_group={chosen} is more than model.n_group={groups}: model.topk_group={groups} works"
    size, used = experts // groups, model.num_experts_per_tok
    if used <= chosen * size or used > experts:
        return None
    return (
        f"model.num_experts_per_tok={used} is more than the {chosen * size} experts of model.topk_group={chosen} of "
        f"model.n_group={groups} groups: model.topk_group={-(-used // size)} works"
    )


@REFUSALS.entry(
    "layers with experts", "model.first_dense_layers that leaves no layer for experts", "they would not be there"
)
def _layers_with_experts(start: Start) -> str | None:
    model = start.config.model
    if model.num_experts < 1 or not 1 <= model.num_hidden_layers <= model.first_dense_layers:
        return None
    return (
        f"model.first_dense_layers={model.first_dense_layers} leaves none of the {model.num_hidden_layers} layers for "
        f"experts: model.first_dense_layers={model.num_hidden_layers - 1} works"
    )


@REFUSALS.entry(
    "balance of micro-batches",
    "model.router_aux_loss_over=micro_batch",
    "the mean of a product over a micro-batch depends on how the batch is divided: the same batch has a loss of 1.040 "
    "in one piece, and of 1.069 and 1.102 over two and four ranks",
)
def _balance_of_micro_batches(start: Start) -> str | None:
    model = start.config.model
    if model.router_aux_loss_over not in OF_MICRO_BATCHES or model.num_experts == 0:
        return None
    return (
        f"model.router_aux_loss_over={model.router_aux_loss_over}: the same batch has another loss in other "
        "micro-batches and on other layouts (measured: 1.040 in one piece, 1.069 over two ranks, 1.102 over four): "
        "model.router_aux_loss_over=sequence works"
    )


@REFUSALS.entry(
    "losses of routers",
    "model.router_aux_loss_coef or model.router_z_loss_coef with another objective than the next token",
    "they are sums over tokens, and the loss is divided by the number of pairs or documents",
)
def _losses_of_routers(start: Start) -> str | None:
    model, objective = start.config.model, start.config.objective
    names = [key for key in ("router_aux_loss_coef", "router_z_loss_coef") if getattr(model, key) > 0]
    if not names or model.num_experts == 0 or (objective.name == "next_token" and objective.target is None):
        return None
    zeros = " ".join(f"model.{key}=0.0" for key in names)
    what = objective.name if objective.target is None else objective.target
    return f"model.{names[0]}={getattr(model, names[0])} with the objective {what}: {zeros} works"


@REFUSALS.entry(
    "float8 experts",
    "precision=fp8 with model.num_experts",
    "the products of experts would stay in bf16, which are most of the model's",
)
def _float8_experts(start: Start) -> str | None:
    experts = start.config.model.num_experts
    if experts < 1 or start.config.precision != "fp8":
        return None
    return f"precision=fp8 with model.num_experts={experts}, which compute in bf16: precision=bf16 works"
