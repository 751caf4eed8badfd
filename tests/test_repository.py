"""The repository keeps its own rules: repeated definitions, imports, requirements, links, pictures."""

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
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")])


def read(path):
    return path.read_text(), ast.parse(path.read_text())


def definitions(path):
    """{name: source} of a script's classes, functions and constants."""
    (source, tree), found = read(path), {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
            found[node.name] = decorators + ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= {name: ast.get_source_segment(source, node) for name in names}
    return found


def imports(path):
    """Names of the packages that a script imports anywhere in it."""
    names = set()
    for node in ast.walk(read(path)[1]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_repeated_definitions_are_identical():
    """What several stages define is the same in all of them, character for character (but Args)."""
    copies = defaultdict(dict)
    for stage in STAGES:
        for name, source in definitions(ROOT / f"{stage}.py").items():
            copies[name][stage] = source
    shared = {name: found for name, found in copies.items() if len(found) > 1 and name != "Args"}
    assert {"IDM", "LatentPolicy", "Decoder", "Agent", "compute_gae", "get_windows"} <= shared.keys()
    everywhere = ("Run", "write_whole", "ImpalaCNN", "ResidualBlock", "FORMAT_VERSION")
    assert all(len(shared[name]) == 6 for name in everywhere)
    assert [name for name, found in shared.items() if len(set(found.values())) > 1] == []
    assert len(shared["Run"]["lapo_bc"].splitlines()) <= 90


def test_one_class_name_has_one_definition():
    """In stages and tools, but for Args; and tools import what stages define, they do not repeat it."""
    copies, of_stages = defaultdict(set), set()
    for path in SCRIPTS:
        source, tree = read(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name != "Args":
                copies[node.name].add(ast.get_source_segment(source, node))
    assert [name for name, found in copies.items() if len(found) > 1] == []
    for stage in STAGES:
        of_stages |= set(definitions(ROOT / f"{stage}.py").values())
    tools = [path for path in SCRIPTS if path.stem not in STAGES]
    assert [path.name for path in tools if of_stages & set(definitions(path).values())] == []


def test_stages_stand_alone():
    """Of the repository's files stages import worlds.py alone; tools import them, and each other one way."""
    local = {path.stem for path in SCRIPTS} | {"tests", "benchmark"}
    found = {path.stem: imports(path) & local for path in SCRIPTS}
    players = {"ppo_procgen", "collect_expert_data", "lapo_decode", "lapo_finetune_ppo"}
    assert all(found[stage] == ({"worlds"} if stage in players else set()) for stage in STAGES)
    assert not found["worlds"]
    tools = {name: found[name] - set(STAGES) for name in found}
    assert [name for name in tools for other in tools[name] if name in tools[other]] == []


def test_requirements():
    """Every third-party import is in requirements.txt, and nothing there is never used."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w.-]+", line)[0].lower() for line in lines if line.strip() and line[0] != "#"}
    found = set().union(*(imports(path) for path in [*SCRIPTS, *ROOT.glob("tests/*.py")]))
    local = {path.stem for path in [*SCRIPTS, *ROOT.glob("tests/*.py")]}
    needed = {PACKAGES.get(name, name) for name in found - set(sys.stdlib_module_names) - OWN - local}
    assert needed <= required
    assert required - needed == {"pytest-xdist", "ruff", "gym"}  # tools, and what procgen imports


def test_the_future_reaches_the_fdm_through_the_latent_only():
    """lapo_pretrain.py calls the forward dynamics model once, on the first two frames of the windows."""
    calls = [node for node in ast.walk(read(ROOT / "lapo_pretrain.py")[1]) if isinstance(node, ast.Call)]
    given = [ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "fdm"]
    assert given == ["windows[:, :6]"]


@pytest.mark.parametrize(
    "path", sorted({*ROOT.glob("*.py")} - {ROOT / "worlds.py"}), ids=lambda path: path.stem
)
def test_every_flag_is_explained(path):
    """Every field of Args has its help, one line, beside or under it; the head says the rest."""
    source, tree = read(path)
    (args,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    lines = source.splitlines()[args.lineno : args.end_lineno] + ["    # end"]
    for line, following in zip(lines, lines[1:]):
        if re.match(r"    \w+: ", line):
            assert re.search(r"  # \S.{5,}", line) or re.fullmatch(r'    """.{6,}"""', following), line
    head = ast.get_docstring(tree)
    assert f"python {path.name}" in head and (path.stem not in STAGES or len(head.splitlines()) <= 20)


def test_line_links_and_anchors():
    """Relative links of all pages lead somewhere: to files, lines (#L) and headings that exist."""
    pages, broken = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmark/**/*.md")], []
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"", text):
            target, _, anchor = "".join(link).partition("#")
            if re.match(r"\w+:", target):
                continue
            path = (page.parent / target).resolve() if target else page
            if not path.exists():
                broken.append((page.name, link))
            elif lines := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
                last = int(lines[2] or lines[1])
                if not 1 <= int(lines[1]) <= last <= len(path.read_text().splitlines()):
                    broken.append((page.name, link))
            elif anchor:
                headings = re.findall(r"(?m)^#+ (.*)$", path.read_text())
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                if anchor not in slugs:
                    broken.append((page.name, link))
    assert pages and broken == []


def test_tables_are_plots():
    """README's and docs/results.md's tables of the six games are those that benchmark/plot.py made."""
    tables = (ROOT / "benchmark" / "results" / "tables.md").read_text().split("\n\n")[2:9:2]
    pages = [(ROOT / name).read_text() for name in ("README.md", *["docs/results.md"] * 3)]
    assert [
        table for table, page in zip(tables, pages) if not table.startswith("|") or table not in page
    ] == []
