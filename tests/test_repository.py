"""The repository keeps its own rules: how stages read, repeated definitions, requirements, links, tables."""

import ast
import re
import sys
from collections import defaultdict

import pytest
from conftest import ROOT, STAGES

# import name: distribution
PACKAGES = {
    "procgen": "procgen-mirror",
    "procgen_gym": "procgen-gym",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}
OWN = {"gym_notices", "scipy"}  # come with gym and scikit-learn
TOOLS = sorted({*ROOT.glob("tools/*.py")} - {ROOT / "tools" / "__init__.py"})
READ = [*(ROOT / f"{stage}.py" for stage in (*STAGES, "vpt")), *TOOLS]
SCRIPTS = sorted([*ROOT.glob("*.py"), *TOOLS, *ROOT.glob("benchmark/*.py")])


def nodes(path, kind=ast.AST):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]


def definitions(path):
    """{name: source} of a script's classes, functions and constants."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
            found[node.name] = decorators + text
        elif isinstance(node, ast.Assign):
            found |= {target.id: text for target in node.targets if isinstance(target, ast.Name)}
    return found


def imports(path):
    """Names of the modules that a script imports anywhere in it."""
    names = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes(path, ast.ImportFrom)}


@pytest.mark.parametrize("path", READ, ids=lambda path: path.stem)
def test_lines_are_not_packed(path):
    """At most 12 syntax-tree nodes a line of code, CleanRL has 11.5; a docstring is no code."""
    code, docs, count = set(), set(), len(nodes(path))
    for node in nodes(path, ast.stmt | ast.expr):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs |= {*range(node.lineno, node.end_lineno + 1)}
        else:
            code.add(node.lineno)
    density = count / len(code - docs)
    assert density <= 12


def test_the_loop_comes_early():
    """It begins before 62% of a stage; all six together have at most 29,060 nodes."""
    paths = [ROOT / f"{stage}.py" for stage in STAGES]
    for path in paths:
        (main,) = [node for node in nodes(path, ast.FunctionDef) if node.name == "main"]
        loops = [node for node in ast.walk(main) if isinstance(node, ast.For | ast.While)]
        calls = [node for node in ast.walk(main) if isinstance(node, ast.Call)]
        calls = [node for node in calls if ast.unparse(node.func) == "collect"]  # has collecting's loop
        at = max(calls or loops, key=lambda node: node.end_lineno - node.lineno).lineno
        assert at < 0.62 * len(path.read_text().splitlines()), path.name
    total = sum(len(nodes(path)) for path in paths)
    assert total <= 29_060


def test_repeated_definitions_are_identical():
    """What several stages define is the same in all of them, character for character."""
    copies = defaultdict(dict)
    for stage in (*STAGES, "vpt"):
        for name, source in definitions(ROOT / f"{stage}.py").items():
            copies[name][stage] = source
    own = {"Args", "main", "start", "PLACES", "evaluate", "scheduled_rate", "open_folder", "finish"}
    shared = {name: found for name, found in copies.items() if len(found) > 1 and name not in own}
    assert {"IDM", "LatentPolicy", "Decoder", "Agent", "compute_gae", "get_windows"} <= shared.keys()
    assert {name: list(found) for name, found in shared.items() if len(set(found.values())) > 1} == {}


def test_stages_stand_alone():
    """Of the repository's files stages import tools/worlds.py alone, where they play."""
    local = {path.stem for path in SCRIPTS} | {"tests", "benchmark", "tools"}
    players = {"ppo_procgen", "collect_expert_data", "lapo_decode", "lapo_finetune_ppo"}
    for stage in STAGES:
        found = {name for name in imports(ROOT / f"{stage}.py") if name.split(".")[0] in local}
        assert found == ({"tools.worlds"} if stage in players else set()), stage
    names = set().union(*(imports(path) for path in [ROOT / "tools" / "worlds.py"]))
    assert not {name.split(".")[0] for name in names} & local


def test_requirements():
    """Every third-party import is in requirements.txt, and nothing there is never used."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w.-]+", line)[0].lower() for line in lines if line.strip() and line[0] != "#"}
    paths = [*SCRIPTS, *ROOT.glob("tests/*.py")]
    found = {name.split(".")[0] for path in paths for name in imports(path)}
    local = {path.stem for path in paths} | {"tools"}
    needed = {PACKAGES.get(name, name) for name in found - set(sys.stdlib_module_names) - OWN - local}
    assert needed <= required
    # tools, worlds that a test makes, and what procgen imports
    assert required - needed == {"pytest-xdist", "ruff", "minigrid", "ale-py", "gym"}


@pytest.mark.parametrize("path", READ, ids=lambda path: path.stem)
def test_every_flag_is_explained(path):
    """Every field of Args has its help, one line, beside or under it; the head says how to run it."""
    source = path.read_text()
    found = [node for node in nodes(path, ast.ClassDef) if node.name == "Args"]
    assert found or path.stem in ("worlds", "loading", "reading_videos")  # no scripts
    for args in found:
        lines = source.splitlines()[args.lineno : args.end_lineno] + ["    # end"]
        for line, following in zip(lines, lines[1:]):
            if re.match(r"    \w+: ", line):
                beside = re.search(r"  # \S.{5,}", line)
                assert beside or re.fullmatch(r'    """.{6,}"""', following), line
        head = ast.get_docstring(ast.parse(source))
        assert f"python -m tools.{path.stem}" in head or f"python {path.name}" in head
        assert path in TOOLS or len(head.splitlines()) <= 20


def test_links():
    """Relative links of all pages lead to files and headings that exist, none to the number of a line."""
    pages, broken = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmark/**/*.md")], []
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"", text):
            target, _, anchor = "".join(link).partition("#")
            if re.match(r"\w+:", target):
                continue
            path = (page.parent / target).resolve() if target else page
            slugs = []
            if path.exists() and anchor:
                headings = re.findall(r"(?m)^#+ (.*)$", path.read_text())
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            if not path.exists() or anchor and anchor not in slugs or re.match(r"L\d", anchor):
                broken.append((page.name, link))
    assert pages and broken == []


def test_tables_are_plots():
    """README's and docs/results.md's tables of the six games are those that benchmark/plot.py made."""
    text = (ROOT / "benchmark" / "results" / "tables.md").read_text()
    means, _, online, pseudo_labels = text.split("\n\n")[2:9:2]
    assert means.startswith("|") and means in (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "results.md").read_text()
    for table in (online, pseudo_labels):
        assert table.startswith("|") and table in page
