"""Print what Stoker needs beside torch, with the torch that is installed as the only one that satisfies it."""

import tomllib
from importlib.metadata import version

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [*project["dependencies"], *project["optional-dependencies"]["s3"]]
print("\n".join([f"torch=={version('torch')}", *(each for each in wanted if not each.startswith("torch>"))]))
