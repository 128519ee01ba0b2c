"""Requirements of installed packages that are not met, as ``pip check`` reports them.

``pip check`` itself is not used: virtual environments of uv have no pip, it takes about a second, and it does not say
whether a package is among the requirements of i2v-lab.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import Distribution, distributions

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from i2v_lab.installed import named

PROJECT = "i2v-lab"
EXTRAS = ("ltx", "ltx-video", "diffusers", "jupyter", "scale", "quantization")


@dataclass(frozen=True)
class Unmet:
    """A requirement that is not met.

    Attributes:
        package: The package that declares it.
        requirement: Such as ``tokenizers>=0.22``.
        found: The installed version; ``None`` if there is none.
    """

    package: str
    requirement: Requirement
    found: str | None

    @property
    def name(self) -> str:
        """Canonical name of the required package."""
        return canonicalize_name(self.requirement.name)

    def __str__(self) -> str:
        declared = f"{self.requirement.name}{self.requirement.specifier}"
        return f"{self.package} needs {declared}; {'none' if self.found is None else self.found} is installed"


class Packages:
    """The packages of an environment, by canonical name.

    Args:
        found: Their metadata, by default of this environment; of two with the same name the first counts.

    Example:
        >>> packages = Packages()
        >>> packages.version("i2v-lab") is not None
        True
        >>> packages.version("no-such-package") is None
        True
    """

    def __init__(self, found: Iterable[Distribution] | None = None) -> None:
        self._found: dict[str, Distribution] = {}
        for name, each in named(distributions() if found is None else found):
            self._found.setdefault(name, each)

    def version(self, name: str) -> str | None:
        """Return the installed version; ``None`` if there is none."""
        each = self._found.get(canonicalize_name(name))
        return None if each is None else each.version

    @cached_property
    def _declared(self) -> Mapping[str, list[Requirement]]:
        return {name: list(self._requirements(each)) for name, each in self._found.items()}

    def _requirements(self, package: Distribution) -> Iterable[Requirement]:
        """Yield the requirements of a package here, without extras; of this package also what it has of its extras."""
        for requirement in _valid_requirements(package):
            extras = [""]
            if package.metadata["Name"] == PROJECT and canonicalize_name(requirement.name) in self._found:
                extras += EXTRAS
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                yield requirement

    def declared_range(self, package: str, required: str) -> str:
        """Return the range of versions that a package declares for another, as in ``>=4.57,<6``; empty if none."""
        declared = self._declared.get(canonicalize_name(package), [])
        ranges = [each.specifier for each in declared if canonicalize_name(each.name) == canonicalize_name(required)]
        return str(ranges[0]) if ranges else ""

    def needed_by(self, *names: str) -> set[str]:
        """Return the canonical names of these packages and their direct and indirect requirements, installed or not."""
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
        """Requirements that are not met, in the order of the packages that declare them."""
        found = []
        for package, requirements in sorted(self._declared.items()):
            for requirement in requirements:
                version = self.version(requirement.name)
                if version is None or not requirement.specifier.contains(version, prereleases=True):
                    found.append(Unmet(package, requirement, version))
        return found


def _valid_requirements(package: Distribution) -> Iterable[Requirement]:
    """Yield the requirements of a package, those of its extras too; an invalid one is skipped, as by pip."""
    for text in package.requires or []:
        try:
            yield Requirement(text)
        except InvalidRequirement:
            continue


def release(version: str) -> tuple[int, int] | None:
    """Return the major and minor number of a version; ``None`` if it is invalid.

    Example:
        >>> release("2.11.0+cu130")
        (2, 11)
    """
    try:
        parsed = Version(version)
    except InvalidVersion:
        return None
    return parsed.major, parsed.minor
