"""The repository keeps its own rules: repeated definitions are identical, stages stand alone, and dependencies are declared once."""

import ast
import json
import re
import sys
from collections import defaultdict

import pytest
from conftest import ROOT, STAGES

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings its ancestor
    import tomli as tomllib

PACKAGES = {"procgen": "procgen-mirror", "PIL": "pillow", "sklearn": "scikit-learn"}  # import name -> distribution, where they differ
OPTIONAL = {"wandb", "imageio", "gym_notices"}  # asked for by a flag, procgen's and gym's own dependencies


def metadata(path):
    """The PEP 723 block of a script, parsed."""
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", path.read_text())
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in block.splitlines(keepends=True)))


def name_and_specifier(requirement):
    """("torch", "==2.13.0") of "torch==2.13.0  # comment"."""
    name, specifier = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*([^#]*?)\s*(?:#.*)?", requirement.strip()).groups()
    return name.lower(), specifier


def imports(path):
    """Names of the modules that a script imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def definitions(path):
    """{name: source} of a script's classes, functions and constants."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            found |= {target.id: ast.get_source_segment(source, node) for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_repeated_definitions_are_identical():
    """A class, function or constant that several scripts define is the same in all of them, character for character (but Args and Agent)."""
    copies = defaultdict(dict)
    for stage in STAGES:
        for name, source in definitions(ROOT / f"{stage}.py").items():
            copies[name][stage] = source
    shared = {name: sources for name, sources in copies.items() if len(sources) > 1 and name not in ("Args", "Agent")}
    assert {"ImpalaCNN", "ResidualBlock", "IDM", "LatentPolicy", "Decoder", "compute_gae", "get_windows", "FORMAT_VERSION"} <= shared.keys()
    assert len(shared["ImpalaCNN"]) == 5 and len(shared["IDM"]) == 4
    different = {name: list(sources) for name, sources in shared.items() if len(set(sources.values())) > 1}
    assert not different


def test_stages_stand_alone():
    """No stage imports a file of the repository; the tools beside them import only stages."""
    local = {path.stem for path in ROOT.glob("*.py")} | {"tests"}
    for path in ROOT.glob("*.py"):
        found = {name.split(".")[0] for name in imports(path)} & local
        assert not found - (set() if path.stem in STAGES else set(STAGES)), path


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_inline_dependencies(path):
    """A script's inline metadata names every third-party import, also of the stages it imports, nothing else, each as requirements.txt has it."""
    block = metadata(path)
    declared = dict(map(name_and_specifier, block["dependencies"]))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = dict(name_and_specifier(line) for line in lines if line.strip() and not line.lstrip().startswith("#"))
    assert block["requires-python"] == ">=3.10,<3.13"
    assert declared and {k: required.get(k) for k in declared} == declared
    modules = imports(path).union(*(imports(ROOT / f"{stage}.py") for stage in imports(path) & set(STAGES))) - set(STAGES)
    third_party = {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) - OPTIONAL
    needed = {PACKAGES.get(m, m).lower() for m in third_party}
    needed |= {"tensorboard"} & {m.split(".")[-1] for m in modules}  # torch.utils.tensorboard
    needed |= {"gym"} if "procgen" in third_party else set()  # which procgen imports
    assert needed == set(declared)


def test_fdm_is_never_given_the_next_frame():
    """In lapo_pretrain.py the forward dynamics model is called on the first two frames of the windows, or goes on from its own predictions."""
    tree = ast.parse((ROOT / "lapo_pretrain.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fdm"]
    assert [ast.unparse(call.args[0]) for call in calls] == ["windows[:, :6]", "past"]
    past = [ast.unparse(n.value) for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "past"]
    assert past == ["windows[:1, :6].expand(1 + len(held), -1, -1, -1)", "torch.cat([past[:, 3:], now], dim=1)"]


def test_every_flag_is_explained():
    """Every field of every Args has a sentence under it, which tyro prints as the flag's help."""
    for path in ROOT.glob("*.py"):
        (args,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
        for field, following in zip(args.body, [*args.body[1:], None]):
            if isinstance(field, ast.AnnAssign):
                explained = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert explained and len(following.value.value) > 5, (path.name, field.target.id)


def test_pictures_are_small():
    """README's pictures stay under 5 MB together, so that cloning stays quick; README shows each of docs/."""
    pictures = [path for folder in ("docs", "benchmark/results") for path in (ROOT / folder).iterdir() if path.suffix in (".png", ".gif")]
    assert 0 < sum(path.stat().st_size for path in pictures) < 5e6
    readme = (ROOT / "README.md").read_text()
    assert all(f"](docs/{path.name})" in readme for path in (ROOT / "docs").iterdir())


def test_readme_numbers():
    """README's tables say what benchmark/results holds: the quickstart's scores and mutual information, and the table of experiments."""
    readme, folder = (ROOT / "README.md").read_text(), ROOT / "benchmark" / "results"
    found = json.loads((folder / "quickstart.json").read_text())
    names = {
        "random": "random",
        "bc_from_scratch": "behaviour cloning from scratch",
        "lapo_decoder": "**LAPO + decoder**",
        "demonstrator": "demonstrator",
    }
    for row in found["rows"]:
        score = f"{row['return_mean']:.2f} ± {row['return_stderr']:.2f} | {row['episodes']}"
        shares = f"{row['relative_return']:.2f} | {row['relative_to_demonstrator']:.2f}"
        assert f"| {names.get(row['method'], row['method'])} | {score} | {shares} |" in readme
    for method in ("lapo_decoder", "bc_from_scratch"):
        shares = [row["relative_to_demonstrator"] for row in found["curve"] if row["method"] == method]
        assert f"| {names[method]} | {' | '.join(f'{share:.2f}'.replace('-', '−') for share in shares)} |" in readme
    space = found["latent_space"]
    assert (
        "{:.2f} trained, {:.2f} untrained, {:.2f} trained".format(*(space[of]["nmi"] for of in ("trained", "untrained_idm", "shuffled_actions")))
        in readme
    )
    assert all(line in readme for line in (folder / "summary.md").read_text().splitlines()[2:])
