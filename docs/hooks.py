"""What mkdocs builds beside the pages of this folder: the project's own Markdown files, and one page a method."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OWN = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def pages() -> dict[str, str]:
    """Path -> Markdown of every method's page and of their index."""
    from veneer.methods.registry import METHODS
    from veneer.recipes.describe_method import describe_method

    known = sorted(METHODS.items())
    made = {f"methods/{name.lower()}.md": page(name, cls) for name, cls in known}
    lines = ["# Methods", "", "| name | config | what it does |", "|---|---|---|"]
    lines += [f"| [{n.lower()}]({n.lower()}.md) | `{c.__name__}` | {cell(describe_method(c).summary)} |" for n, c in known]
    return {"methods/index.md": "\n".join([*lines, ""]), **made}


def page(name: str, cls: Any) -> str:
    """The page of one method, from its file."""
    from veneer.recipes.describe_method import describe_method
    from veneer.recipes.run import HELP

    found = describe_method(cls)
    key = name.lower()
    lines = [f"# {found.title}", "", found.summary, ""]
    if found.equation:
        lines += ["```", found.equation, "```", ""]
    if found.paper:
        lines += [linked(found.paper), ""]
    if found.text:
        lines += [found.text, ""]
    own = {k: v for k, v in found.training.items() if k not in HELP}
    arguments = "".join(f", {k}={v!r}" for k, v in own.items())
    lines += [
        f"- Written to `adapter_config.json` as `peft_type: {name}`.",
        f"- Acts on: {found.adapts}",
        f"- {'Merges into the base weights.' if found.merges else 'Does not merge into the base weights.'}",
        "",
        "## Use",
        "",
        "```python",
        f"from veneer import {cls.__name__}, get_peft_model",
        "",
        f'model = get_peft_model(model, {cls.__name__}(task_type="CAUSAL_LM"{arguments}))',
        "```",
        "",
        "```",
        f"veneer train --model smollm2-135m --data ui-en-es --method {key} --steps 75",
        "```",
        "",
        "`veneer train` uses, unless told otherwise:",
        "",
        "| | |",
        "|---|---|",
        *(f"| `{k}` | `{v}` |" for k, v in found.training.items()),
        "",
        "## Fields",
        "",
        f"Of `veneer.{cls.__name__}`; those of every config (`task_type`, `revision`, ...) are left out.",
        "",
        "| name | type | default | meaning |",
        "|---|---|---|---|",
        *(f"| `{n}` | {code(t)} | {code(d)} | {cell(m)} |" for n, t, d, m in found.fields),
        "",
        "## References",
        "",
        *(f"- {linked(r)}" for r in found.references),
        "",
    ]
    return "\n".join(lines)


def linked(text: str) -> str:
    return re.sub(r"arxiv\.org/abs/[\d.]*\d", lambda m: f"[{m[0]}](https://{m[0]})", text)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"  # a bar in backticks would end the cell


def order(path: Path) -> tuple[bool, str]:
    return path.name != "README.md", path.name


def own(name: str) -> str:
    """One of the project's files, its links turned to where the site has what they point to."""
    text = (ROOT / name).read_text("utf-8").replace("](docs/decisions/)", "](decisions/README.md)")
    text = text.replace("](docs/", "](")
    for at, source in OWN.items():
        text = text.replace(f"]({source})", f"]({at})")
    text = text.replace("](bench/results/README.md)", "](figures/README.md)")
    return text.replace("](bench/results)", "](figures/README.md)").replace("](bench/results/", "](figures/")


def on_files(files: Any, config: Any) -> Any:
    """Add the files; called by mkdocs."""
    from mkdocs.structure.files import File

    made = {**pages(), **{at: own(name) for at, name in OWN.items()}}
    for at, text in made.items():
        files.append(File.generated(config, at, content=text))
    for path in sorted((ROOT / "bench/results").glob("*.*")):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Links of this folder's pages to figures, turned to where the site has them; called by mkdocs."""
    return text.replace("](../bench/results/", "](figures/")


def on_config(config: Any) -> Any:
    """List methods, decisions and figures in the navigation; called by mkdocs."""
    lists = {
        "Methods": list(pages()),
        "Decisions": [f"decisions/{p.name}" for p in sorted((ROOT / "docs/decisions").glob("*.md"), key=order)],
        "Figures": [f"figures/{p.name}" for p in sorted((ROOT / "bench/results").glob("*.md"))],
    }
    config.nav = [{k: lists.get(k, v) for k, v in entry.items()} for entry in config.nav]
    return config
