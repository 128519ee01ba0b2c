"""What ``pip check`` does, without pip: which installed packages declare a requirement that is not met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import Distribution, distributions

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class Unmet:
    """A requirement that is declared and not met.

    Attributes:
        package: Who declares it.
        requirement: Such as ``tokenizers>=0.22``.
        found: The version that is installed; ``None`` if there is none.
    """

    package: str
    requirement: Requirement
    found: str | None

    @property
    def name(self) -> str:
        """Whom it is about."""
        return canonicalize_name(self.requirement.name)

    def __str__(self) -> str:
        declared = f"{self.requirement.name}{self.requirement.specifier}"
        return f"{self.package} needs {declared}; {'none' if self.found is None else self.found} is installed"


class Packages:
    """The packages of an environment, by their canonical names.

    Args:
        found: Their metadata; of two with the same name the first counts, as it does for ``import``.

    Example:
        >>> packages = Packages()
        >>> packages.version("i2v-lab") is not None
        True
        >>> packages.version("no-such-package") is None
        True
    """

    def __init__(self, found: Iterable[Distribution] | None = None) -> None:
        self._found: dict[str, Distribution] = {}
        for each in distributions() if found is None else found:
            # A folder that a broken installation left behind has no name: it is no package.
            name = each.metadata["Name"]
            if name:
                self._found.setdefault(canonicalize_name(name), each)

    def version(self, name: str) -> str | None:
        """The installed version; ``None`` if there is none."""
        each = self._found.get(canonicalize_name(name))
        return None if each is None else each.version

    @cached_property
    def _declared(self) -> Mapping[str, list[Requirement]]:
        return {name: list(_requirements(each)) for name, each in self._found.items()}

    def needed_by(self, *names: str) -> set[str]:
        """These packages and all that they need, directly or not; by canonical names, installed or not."""
        needed: set[str] = set()
        todo = [canonicalize_name(name) for name in names]
        while todo:
            name = todo.pop()
            if name not in needed:
                needed.add(name)
                todo += [canonicalize_name(each.name) for each in self._declared.get(name, [])]
        return needed

    @cached_property
    def unmet(self) -> list[Unmet]:
        """Every requirement that is not met, by the package that declares it."""
        found = []
        for package, requirements in sorted(self._declared.items()):
            for requirement in requirements:
                version = self.version(requirement.name)
                if version is None or not requirement.specifier.contains(version, prereleases=True):
                    found.append(Unmet(package, requirement, version))
        return found


def _requirements(package: Distribution) -> Iterable[Requirement]:
    """What a package needs here, without extras; one that cannot be read is passed over, as pip does."""
    for text in package.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def release(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version; ``None`` if it is not one.

    Example:
        >>> release("2.11.0+cu130")
        (2, 11)
    """
    try:
        parsed = Version(version)
    except InvalidVersion:
        return None
    return parsed.major, parsed.minor
