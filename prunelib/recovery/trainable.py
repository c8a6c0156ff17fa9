"""What of a model a recovery trains: LoRA adapters, and parameters themselves."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

from prunelib.errors import InputError
from prunelib.families.base import VIRTUAL
from prunelib.recovery.adapters import shared_parameters
from prunelib.recovery.recipe import LoraRecipe, linear_targets

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def own_parameters(model: PreTrainedModel, recipe: LoraRecipe) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained themselves, by their names in the plain model.

    That is what ``recipe.train`` names, and adapters and gains of layers that share weights.

    Raises:
        InputError: a pattern matches none, or the output layer, whose loss takes it as frozen.
    """
    found = shared_parameters(model)
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    named = dict(model.named_parameters())
    for pattern in recipe.train:
        names = fnmatch.filter(named, pattern)
        if not names:
            raise InputError(
                f"recovery recipe: train {pattern!r} matches no parameter of this "
                f"{model.config.model_type} model"
            )
        for name in names:
            if id(named[name]) in head:
                raise InputError(
                    f"recovery recipe: train {pattern!r} matches {name} of the output layer; "
                    "allowed: other parameters"
                )
            found[name] = named[name]
    return found


def with_adapters(model: PreTrainedModel, recipe: LoraRecipe) -> Any:
    """Return the peft model: base frozen, adapters in fp32 with B = 0, so that it is unchanged.

    Without targets it is the model itself, frozen; also where layers share weights, whose own
    adapters are trained, unless the recipe wants both.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from prunelib.checkpoint import family_of_config

    if not recipe.targets or (shared_parameters(model) and not recipe.kept_lora):
        return model.requires_grad_(False)
    layers = family_of_config(model.config.to_dict()).layers(model)
    linears = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    targets = linear_targets(recipe, model.config.to_dict())
    missing = [target for target in targets if target not in linears]
    if missing:
        raise InputError(
            f"recovery recipe: target {missing[0]!r} matches no linear layer of this "
            f"{model.config.model_type} model; allowed: {', '.join(sorted(linears))}"
        )
    if VIRTUAL in model.config.to_dict():
        # Some layers have modules of these names that are no linear layers.
        targets = tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets
        )
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
