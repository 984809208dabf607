"""Print the requirements of pyproject.toml, with the extras named as arguments: there is no package to install."""

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:                              # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = [requirement for extra in sys.argv[1:] for requirement in project["optional-dependencies"][extra]]
print("\n".join(project["dependencies"] + extras))
