"""Prints the lowest declared version of each dependency of an extra, one a line.

For `pip install --constraint`: what pyproject.toml names, with `>=` made `==`. It needs
Python 3.11 and nothing installed.
"""

import pathlib
import re
import sys
import tomllib


def lowest(project: dict, extra: str) -> dict[str, str]:
    """Names and versions, those of the extras that this one names included."""
    found = {}
    for requirement in project["optional-dependencies"].get(extra, []):
        inner = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
        if inner:
            for name in inner[1].split(","):
                found |= lowest(project, name.strip())
        else:
            name, version = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement).groups()
            found[name] = version
    return found


def main() -> None:
    """Those of the library itself and of one extra."""
    path = pathlib.Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"]
    project["optional-dependencies"][""] = project["dependencies"]
    versions = lowest(project, "") | lowest(project, sys.argv[1])
    # jax takes any jaxlib that is not older than the least it needs.
    for name, version in {**versions, "jaxlib": versions["jax"]}.items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
