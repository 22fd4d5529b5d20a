"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796).

Around the parameters theta* that earlier data led to, its loss rises by about (theta - theta*)^T F (theta - theta*)
/ 2 for each unit, F being its Fisher information. EWC keeps the diagonal, and adds that to the loss on new data
(equation 3).

F is estimated from the labels of the data ("empirical"), not from labels that the model would draw; Kunstner et al.
2019 (arXiv:1905.12558) show how the two differ where the model does not fit the data.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puna.batches.packing import Rows
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path
from puna.runtime.progress import progress
from puna.train.loss import Loss

FISHER_FILE = "fisher.safetensors"
"""float32 tensors by the names of parameters, and in the metadata `model`, the content hash of the model directory
whose parameters are theta*."""


def diagonal_fisher(model: Transformer, rows: Rows, loss: Loss, num_rows: int) -> dict[str, Tensor]:
    """The Fisher information of each trained parameter, per unit of the loss: the sum over rows of the square of the
    row's gradient, over the number of units.

    A row is one observation; the information of independent ones adds up, so this is that of a mean unit.

    Args:
        model: its trained parameters are theta*; it computes in evaluation mode.
        rows: the data.
        loss: a negative log-likelihood.
        num_rows: how many of its first rows.

    Raises:
        InputError: no row has a target.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    squares = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    units = 0
    was_training = model.training
    model.eval()
    with progress("Estimating Fisher information", total=num_rows) as advance:
        for row in range(num_rows):
            part = loss(model, rows.batch([row]).to(model.norm.weight.device))
            gradients = torch.autograd.grad(part.total, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    squares[name] += gradient.square()
            units += part.count
            advance()
    model.train(was_training)
    if not units:
        raise InputError("No row that Fisher information should be estimated on has a target.")
    return {name: square / units for name, square in squares.items()}


def ewc_penalty(
    model: Transformer, information: Mapping[str, Tensor], strength: float
) -> Callable[[Transformer], Tensor]:
    """strength / 2 * sum of F (theta - theta*)^2, with the model's parameters as they are now for theta*.

    For `puna.train.loss.with_penalty`.

    Args:
        information: F by the names of parameters; those that it does not name are free.
    """
    start = {name: model.get_parameter(name).detach().clone() for name in information}

    def penalty(model: Transformer) -> Tensor:
        parts = []
        for name, value in information.items():
            parameter = model.get_parameter(name)
            device = parameter.device
            parts.append((value.to(device) * (parameter - start[name].to(device)).square()).sum())
        return strength / 2 * torch.stack(parts).sum()

    return penalty


def save_fisher(path: Path, information: Mapping[str, Tensor], model_hash: str) -> None:
    """Write Fisher information; whole or not at all.

    Args:
        model_hash: content hash of the model directory that holds theta*.
    """
    tensors = {name: value.to("cpu", torch.float32).contiguous() for name, value in information.items()}
    with atomic_path(path) as fresh:
        save_file(tensors, fresh, metadata={"model": model_hash})


def load_fisher(path: Path, model: Transformer, model_hash: str) -> dict[str, Tensor]:
    """Read Fisher information of a model's trained parameters; what it has of other parameters (a head) is left out.

    Raises:
        InputError: no such file; it belongs to another model; or it has nothing of a parameter that is trained.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist. An earlier training writes it, with regularization.fisher_rows.")
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}).") from error
    if facts.get("model") != model_hash:
        raise InputError(
            f"{path} was estimated at other parameters than those of the model that this training starts from. Start "
            "from the model beside it, or estimate anew with earlier.train."
        )
    trunk = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith("output.")
    }
    missing = [name for name, value in trunk.items() if name not in stored or stored[name].shape != value.shape]
    if missing:
        raise InputError(
            f"{path} has nothing of {missing[0]}, which is trained. It was estimated where other parameters were, with "
            "another peft; estimate anew with earlier.train."
        )
    device = model.norm.weight.device
    return {name: value.to(device) for name, value in stored.items() if name in dict(model.named_parameters())}
