"""Values that a device has computed are fetched once, and judged in the order in which they were asked about."""

from __future__ import annotations

import pytest
import torch

from lightx2v.weights.device_checks import DeviceChecks


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on another device."""

    is_cpu = False  # type: ignore[assignment]


def elsewhere(*values: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=dtype).as_subclass(Elsewhere) for value in values]


def test_values_in_host_memory_are_judged_at_once() -> None:
    seen: list[list[float]] = []
    checks = DeviceChecks()
    checks.ask([torch.tensor(1.5), torch.tensor(2.0)], seen.append)
    assert seen == [[1.5, 2.0]]
    checks.finish()
    assert len(seen) == 1


def test_values_on_a_device_are_fetched_together_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: fetched.append(len(tensor)) or tolist(tensor))
    seen: list[list[float]] = []
    checks = DeviceChecks()
    for values in (elsewhere(1.0, 2.0), elsewhere(3, dtype=torch.int32), elsewhere(float("inf"))):
        checks.ask(values, seen.append)
    assert not seen
    checks.finish()
    assert seen == [[1.0, 2.0], [3.0], [float("inf")]] and set(fetched) == {4}
    checks.finish()
    assert len(seen) == 3


def test_what_is_asked_later_is_judged_later() -> None:
    seen: list[list[float]] = []
    checks = DeviceChecks()
    checks.ask(elsewhere(1.0), seen.append)
    checks.ask([torch.tensor(2.0)], seen.append)
    checks.ask((), seen.append)
    assert not seen
    checks.finish()
    assert seen == [[1.0], [2.0], []]


def test_the_first_error_is_raised_and_the_others_are_forgotten() -> None:
    def refuse(values: list[float]) -> None:
        raise ValueError(values)

    checks = DeviceChecks()
    for value in (1.0, 2.0):
        checks.ask(elsewhere(value), refuse)
    with pytest.raises(ValueError, match=r"\[1.0\]"):
        checks.finish()
    checks.finish()
