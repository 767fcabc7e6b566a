"""The pages of the documentation site, for mkdocs: README, docs/, and what is printed from the code.

    python docs/site.py build/pages

Links between pages are kept. A link to a file of the repository that is no page becomes its name as code, because the
site has no such file. The name of a file behind the opening of a block becomes its title.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"\A```(\w+) (\S+)$", re.MULTILINE)  # a block that is the file of this name
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
       "SECURITY.md": "reporting.md"}  # fmt: skip


def pages() -> dict[Path, str]:
    """The source of each page, and its name on the site."""
    found = {ROOT / name: page for name, page in TOP.items()}
    return found | {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}


def rewritten(source: Path, text: str, names: dict[Path, str]) -> str:
    """`text` of the page `source` with links that hold on the site. Code blocks are left alone."""

    def link(match: re.Match[str]) -> str:
        image, shown, target = match.groups()
        place, hash_, anchor = target.partition("#")
        if "://" in target or not place:
            return match[0]
        page = names.get((source.parent / place).resolve())
        if page is None:
            return shown if image or shown.startswith("`") else f"`{place.removeprefix('../')}`"
        return f"{image}[{shown}]({page}{hash_}{anchor})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(FENCE.sub(r'```\1 title="\2"', p) if p.startswith("```") else LINK.sub(link, p) for p in parts)


def main(folder: str) -> int:
    from stoker.launch.reference import main as reference

    target, names = Path(folder), pages()
    target.mkdir(parents=True, exist_ok=True)
    for source, name in names.items():
        (target / name).write_text(rewritten(source, source.read_text(), names))
    return reference(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
