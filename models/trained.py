"""The part of a network that training changes: all of it, or what is not frozen."""

from torch import Tensor, nn


def trained_names(model: nn.Module) -> set[str]:
    """Names in the state dict; without the frozen parameters where some, but not all, are frozen."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    names = model.state_dict().keys()
    return set(names) - frozen if len(frozen) < sum(1 for _ in model.parameters()) else set(names)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """That part of the state dict; ``load_trained`` takes it back."""
    names = trained_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The rest of the state dict; {} where all of it is trained."""
    names = trained_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in names}


def load_trained(model: nn.Module, state: dict[str, Tensor], names: set[str] | None = None) -> None:
    """Copy ``trained(model)`` of another run into ``model``.

    Args:
        names: What belongs to it, where that cannot be seen from the model, as of an average.

    Raises:
        RuntimeError: Names or shapes differ from the model's.
    """
    names = trained_names(model) if names is None else names
    if odd := names ^ state.keys():
        raise RuntimeError(f"weights of another network: {', '.join(sorted(odd)[:3])}")
    model.load_state_dict(state, strict=False)
