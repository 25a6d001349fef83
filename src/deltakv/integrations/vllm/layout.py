"""What each layer of a served model does at a decode step, by its index and by vLLM's name for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deltakv.integrations.vllm.settings import Settings
from deltakv.plan import LayerPlan, Role


@dataclass(frozen=True)
class Layout:
    """Roles by layer index.

    roles: of the planned layers, by their index in the whole model. sources: for each REUSE layer the SELECT layer
    whose pick it attends to; WINDOW layers have none.
    """

    settings: Settings
    plan: LayerPlan
    roles: Mapping[int, Role]
    sources: Mapping[int, int]

    @classmethod
    def of(cls, settings: Settings, plan: LayerPlan, planned: Iterable[int]) -> Layout:
        """planned: the indices of the planned layers in the model, ascending, one for each role of the plan."""
        roles = dict(zip(planned, plan.roles, strict=True))
        sources: dict[int, int] = {}
        last = -1
        for index, role in roles.items():
            if role is Role.SELECT:
                last = index
            elif role is Role.REUSE:
                sources[index] = last
        return cls(settings, plan, roles, sources)

    def named(self, names: Mapping[int, str]) -> NamedLayout:
        """The same for the layers that this process holds. names: vLLM's name of each planned one, by index."""
        return NamedLayout(
            self.settings,
            {name: self.roles[index] for index, name in names.items()},
            {name: names[self.sources[index]] for index, name in names.items() if index in self.sources},
        )


@dataclass(frozen=True)
class NamedLayout:
    """Roles by vLLM's layer name, of the layers in this process. sources: see `Layout`."""

    settings: Settings
    roles: Mapping[str, Role]
    sources: Mapping[str, str]

    def first(self) -> str:
        """The first planned layer in this process."""
        return next(iter(self.roles))
