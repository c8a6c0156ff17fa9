"""One optimiser step, and the loss on the validation part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from prunelib.errors import InputError, NonFiniteError
from prunelib.recovery.parallel import ALONE, Processes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from prunelib.recovery.data import Batch, Items
    from prunelib.recovery.recipe import LoraRecipe


def hidden_states(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the decoder's last hidden states, ``[batch, length, hidden_size]``."""
    place = cast("torch.Tensor", model.get_input_embeddings().weight).device
    given = {} if mask is None else {"attention_mask": mask.to(place)}
    hidden: torch.Tensor = model.base_model(input_ids=ids.to(place), use_cache=False, **given)[0]
    return hidden


def _autocast(model: PreTrainedModel, device: torch.device) -> Any:
    """Compute in bf16 where frozen weights are; all that is trained is fp32, the head never is."""
    import torch

    frozen = cast("torch.Tensor", model.get_output_embeddings().weight).dtype
    return torch.autocast(device.type, torch.bfloat16, enabled=frozen == torch.bfloat16)


def check_head(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse a model whose logits are more than its output layer (soft caps, scales).

    Args:
        model: ready to be trained.
        device: of the model's input.

    Raises:
        InputError: it is one; names its type.
    """
    import torch

    inputs = cast("torch.Tensor", model.get_input_embeddings().weight)
    ids = torch.arange(min(8, len(inputs)), device=inputs.device)[None]
    model.eval()
    with torch.no_grad(), _autocast(model, device):
        logits = model(input_ids=ids, use_cache=False).logits
        head = model.get_output_embeddings()
        ours = head(hidden_states(model, ids).to(head.weight.device))
    # A NaN is not this check's business: the first loss will name it.
    if not torch.allclose(ours, logits.to(ours.device), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise InputError(
            f"recovery: a {model.config.model_type} model changes its logits after the output "
            "layer; this is not supported"
        )


def train_step(
    model: PreTrainedModel,
    trainable: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    batches: Sequence[Batch],
    recipe: LoraRecipe,
    device: torch.device,
    number: int,
    kept: str,
    processes: Processes = ALONE,
) -> float:
    """Do one optimiser step over ``batches``; return its mean loss in nats per target.

    Each process goes through its share of the batches; loss and gradients are those of all.

    Args:
        model: in training mode.
        trainable: what is trained, by name.
        optimiser: of these parameters.
        batches: micro-batches, token ids int64 [sequences, length] each.
        recipe: names the norm that gradients are clipped to.
        device: of the model's input.
        number: of the step, for messages.
        kept: what is still valid after a failure, for messages.
        processes: that share the batches.

    Raises:
        NonFiniteError: the loss or a gradient is NaN or infinite; names the parameter.
    """
    import torch

    from prunelib.recovery.loss import frozen_head_loss

    head = model.get_output_embeddings()
    targets = sum(batch.targets for batch in batches)
    total = 0.0
    optimiser.zero_grad(set_to_none=True)
    for batch in processes.share(batches):
        with _autocast(model, device):
            hidden, wanted = batch.predictions(hidden_states(model, batch.ids, batch.mask))
            loss = frozen_head_loss(hidden, head, wanted) / targets
        total += float(loss.detach())
        if not math.isfinite(total):
            break
        loss.backward()
    # All processes come here, whatever their losses, and then agree on what to do.
    (total,) = processes.total([total], device)
    if not math.isfinite(total):
        raise NonFiniteError(f"recovery: the loss is {total} at step {number}; {kept}")
    if processes.count > 1:
        for parameter in trainable.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        processes.add(p.grad for p in trainable.values() if p.grad is not None)
    norm = float(torch.nn.utils.clip_grad_norm_(trainable.values(), recipe.clip_norm))
    if not math.isfinite(norm):
        bad = next(
            (n for n, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()),
            "(the norm overflows)",
        )
        raise NonFiniteError(
            f"recovery: the gradient of {bad} is not finite at step {number}; {kept}"
        )
    optimiser.step()
    return total


def validation_loss(
    model: PreTrainedModel,
    data: Items,
    recipe: LoraRecipe,
    device: torch.device,
    processes: Processes,
) -> float:
    """Return the mean negative log-likelihood of the validation part, in nats per target."""
    import torch

    from prunelib.recovery.loss import head_loss

    head = model.get_output_embeddings()
    total, targets = 0.0, 0
    model.eval()
    with torch.no_grad(), _autocast(model, device):
        parts = torch.arange(len(data)).split(recipe.micro_batch)
        for batch in (b for part in processes.share(parts) for b in data.batches(part, len(part))):
            hidden, wanted = batch.predictions(hidden_states(model, batch.ids, batch.mask))
            total += head_loss(hidden, head, wanted)
            targets += batch.targets
    model.train()
    total, count = processes.total([total, targets], device)
    return total / count
