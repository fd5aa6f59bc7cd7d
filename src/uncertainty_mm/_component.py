"""Base classes of all components, with read-only settings and with state that only the component changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# In parts of which a fraction is kept in `meaning`, because integers are not rounded by casts.
UNIT = 10**12


class FixedSettings:
    """Settings are checked once by the constructor and read-only afterwards, so `loss.reduction = "maen"` raises."""

    _settings: tuple[str, ...] = ()

    def _set(self, **settings: object) -> None:
        """Stores checked settings, which are read-only afterwards."""
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_settings", (*self._settings, *settings))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settings:
            raise AttributeError(
                f"`{name}` is a setting of {type(self).__name__}, given to its constructor, and cannot be changed"
            )
        super().__setattr__(name, value)


class Component(FixedSettings, nn.Module):
    """A module with fixed settings, and with state that is saved and moved like buffers but is not in `buffers()`.

    State (a queue, a history, a fitted scale) is in `state_dict()`, follows `.to()`, `to_empty()`, `deepcopy` and
    pickling, and is loaded completely or not at all: with `strict=False`, state stays unchanged if a part is absent. It
    is not in `buffers()`, because tools take buffers for statistics: weight averaging would average class numbers and
    counts, and `DistributedDataParallel` would replace the state of every rank by that of rank 0.
    """

    _states: tuple[str, ...] = ()
    _meaning: tuple[int, ...] = ()
    meaning: Tensor
    _is_replica = False  # True in the copies that `DataParallel` makes for one forward pass

    def _keep(self, **states: Tensor) -> None:
        """Registers state by name, with its current values."""
        for name, value in states.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_states", (*self._states, *states))

    def _keep_meaning(self, *numbers: int) -> None:
        """Registers `meaning`: settings on which the other state depends; state of other settings is not loaded."""
        self._set(_meaning=numbers)
        self._keep(meaning=torch.empty(len(numbers), dtype=torch.int64))

    def _reset_meaning(self) -> None:
        for index, number in enumerate(self._meaning):
            self.meaning[index].fill_(number)

    def _in_words(self, meaning: tuple[int, ...]) -> str:
        """What `meaning` says, in words."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The settings that were given a value, for `repr`."""
        settings = {n: getattr(self, n) for n in self._settings if not n.startswith("_")}
        return ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, value in settings.items()
            if value not in (None, "")
        )

    def _check_remembers(self) -> None:
        """Raises in a copy made by `DataParallel`, which sees only a part of the batch."""
        if self._is_replica:
            raise RuntimeError(
                f"This {type(self).__name__} is a copy that `DataParallel` makes for one forward pass, and cannot "
                "remember its part of the batch: call it outside of `DataParallel`, or use `DistributedDataParallel`"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Component:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._states:
            object.__setattr__(self, name, fn(getattr(self, name)))
        return self

    def reset_parameters(self) -> None:
        """Gives all parameters and all state their initial values, as when the component was made."""
        for part in self.modules():
            reset = getattr(part, "reset_parameters", None)
            if part is not self and callable(reset):
                reset()

    def _refusal(self, prefix: str, given: Mapping[str, Tensor]) -> str | None:
        """Why a state of the right shapes cannot be loaded: it is of other settings."""
        key = f"{prefix}meaning"
        if not self._meaning or key not in given or given[key].is_meta:
            return None
        theirs = tuple(given[key].tolist())
        if theirs == self._meaning:
            return None
        return f"Expected `{key}` to be {self._in_words(self._meaning)}, but got {self._in_words(theirs)}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._states:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + name: getattr(self, name) for name in self._states}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # torch does not know the state, and so reports its keys as unexpected
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
        given = {key: state_dict[key] for key in own if key in state_dict}
        problems = [
            problem
            for key in given
            if (problem := _mismatch(key, given[key], own[key])) is not None
        ]
        if not problems and (why := self._refusal(prefix, given)) is not None:
            problems = [why]
        absent = [key for key in own if key not in given]
        missing_keys += absent if strict else []
        error_msgs += problems
        if problems or (absent and strict):
            return  # state is loaded completely or not at all
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        with torch.no_grad():
            for name in self._states:
                value, current = given.get(prefix + name), getattr(self, name)
                if value is None:
                    continue
                if assign or current.is_meta:
                    dtype = value.dtype if value.is_floating_point() else current.dtype
                    object.__setattr__(self, name, value.detach().to(dtype, copy=True))
                else:
                    current.copy_(value)


class FittedComponent(Component):
    """A component whose state keeps its dtype, because rounding to half precision would invalidate a fit."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Component:
        def moved(state: Tensor) -> Tensor:
            result = fn(state)
            return result if result.dtype == state.dtype else state.to(result.device)

        return super()._apply(moved, recurse)


def _mismatch(key: str, value: object, own: Tensor) -> str | None:
    """The reason why a value cannot be loaded as state, if any; integers that became floating may have changed."""
    if not isinstance(value, Tensor) or value.shape != own.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return f"Expected `{key}` to have shape {tuple(own.shape)}, but got {got}"
    if value.is_floating_point() != own.is_floating_point():
        kind = "a floating" if own.is_floating_point() else "an integer"
        return f"Expected `{key}` to have {kind} dtype, but got {value.dtype}"
    return None


def states(module: nn.Module) -> dict[str, Tensor]:
    """All state of a module and its submodules, by the names in `state_dict()`."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(each, name)
        for prefix, each in module.named_modules()
        if isinstance(each, Component)
        for name in each._states
    }
