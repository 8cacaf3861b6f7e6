"""README and docs/ are current, their numbers come from runs, their links lead somewhere."""

import ast
import importlib
import re
import subprocess
import textwrap

import pytest
import torch

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar import analysis, load_run, publish, studies
from tinycifar.costs import layer_costs, receptive_field
from tinycifar.paths import CHECKOUT, DEFAULT, RESULTS
from tinycifar.recipes import RECIPES
from tinycifar.run_directory import find_run
from tinycifar.studies import SEARCH_KEYS, load_study
from tinycifar.trials import PRUNERS, SAMPLERS
from tinycifar.weights import load_pretrained

README = CHECKOUT / "README.md"
PAGES = publish.pages()
LINKED = [*PAGES, CHECKOUT / "CHANGELOG.md"]

# Numbers in sentences that no run of ours holds.
QUOTED = {
    "3.11",  # of Python
    *("0.2023", "0.1994", "0.2010"),  # the std that others copy
    "5 %",  # the level of a test
}
NUMBER = re.compile(
    r"(?<![\d.])\d+\.\d+(?![\d.])|\d[\d,.]*(?:\s?(?:%|points?\b|times\b|MiB\b)|x\b)"
)


def name_of(page):
    return str(page.relative_to(CHECKOUT))


@pytest.fixture(scope="module")
def now():
    return publish.contents()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_current(page, now):
    assert page.read_text() == publish.filled(page.read_text(), now), "stale: run `make results`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_number_in_a_sentence_is_generated(page):
    found = set(NUMBER.findall(sentences(page.read_text())))
    assert not found - QUOTED, "mark them, <!--v name-->...<!--/v-->; see tinycifar.publish"


def sentences(text):
    """Without code, generated tables, generated numbers and the targets of links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--v .+?-->[^<]*<!--/v-->", "", text)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


def test_the_number_test_sees_numbers():
    text = "a `1.5` [b](c1.5.md) 2.12.1 <!--v x-->3.5<!--/v--> % but 90.1 and 7 % and 2 points."
    assert NUMBER.findall(sentences(text)) == ["90.1", "7 %", "2 points"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_begins_with_a_mark(page):
    """Such a line would end the paragraph, as Markdown has it."""
    assert not re.search(r"^\s*<!--v", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def blocks(page, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for its, code in fenced if its == language]


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_examples_import_what_there_is(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and "tensorboard" not in node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def test_the_examples_of_the_library_run(tmp_path, monkeypatch):
    """Fusing, exporting and features; those that train are the tests of training."""
    monkeypatch.chdir(tmp_path)
    page = CHECKOUT / "docs" / "library.md"
    code = [b for b in blocks(page, "python") if "export" in b or "create_feature_extractor" in b]
    assert len(code) == 2
    names = {"model": load_pretrained()}
    for block in code:
        exec(block, names)
    assert (tmp_path / "net.pt2").is_file()
    features = names["features"](torch.rand(1, 3, 32, 32))
    assert features["c3"].shape == (1, 48, 32, 32)


def test_the_studies_of_the_pages_are_some(tmp_path):
    searches = CHECKOUT / "docs" / "searches.md"
    study, search, other = blocks(README, "yaml") + blocks(searches, "yaml")[:1]
    loaded = []
    for block in (study, search, other):
        (tmp_path / "mine.yaml").write_text(block)
        loaded.append(load_study(tmp_path / "mine.yaml"))
    assert len(loaded[0].recipes) == 3 and len(loaded[0].seeds) == 3
    assert [study.search.trials for study in loaded[1:]] == [40, 40]
    assert len(search.splitlines()) <= 10


def test_the_study_in_the_docstring_is_one(tmp_path):
    block = re.search(r"(?m)^    about: .*?\n\n", studies.__doc__, re.DOTALL)[0]
    (tmp_path / "mine.yaml").write_text(textwrap.dedent(block))
    study = load_study(tmp_path / "mine.yaml")
    assert len(study.recipes) == 3 and study.search.trials == 40 and study.search.confirm == 3


def test_the_page_of_searches_names_what_there_is():
    page = (CHECKOUT / "docs" / "searches.md").read_text()
    assert all(f"`{name}`" in page for name in [*SAMPLERS, *PRUNERS, *SEARCH_KEYS])


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert max(len(re.sub(r"<!--.*?-->", "", line)) for line in lines) <= 180  # tables


def test_the_readme_describes_the_network_as_it_is():
    net, text = NetCIFAR10_Tiny(), README.read_text()
    costs = layer_costs(net)
    params, macs = sum(c.params for c in costs), sum(c.macs for c in costs)
    field = receptive_field(net)[-1].field
    said = f"{params:,} parameters, {macs:,} multiply-adds an image, a receptive field of {field}"
    assert said in text
    assert set(re.findall(r"\d\d,\d{3} parameters", text)) == {f"{params:,} parameters"}


def test_the_readme_describes_recipes_and_protocols_as_they_are():
    text = README.read_text()
    for name, recipe in RECIPES.items():
        assert re.search(rf"^\| `{name}` \| (?:up to )?{recipe.epochs} \|", text, re.MULTILINE)
    split = load_run("tuned").config["split"]
    assert f"| {split['train']:,}, stratified" in text
    assert f"the other {split['selection']:,} |" in text


def test_the_readmes_tree_is_the_repositorys():
    (tree,) = (b for b in blocks(README, "") if "tinycifar/" in b)
    for module in CHECKOUT.glob("tinycifar/*.py"):
        assert module.name in tree, module
    top = subprocess.run(
        ["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    folders = {line.split("/")[0] + "/" for line in top.stdout.splitlines() if "/" in line}
    assert all(folder in tree for folder in folders if not folder.startswith("."))
    named = re.findall(r"^(\S+\.\w+|\S+/|Makefile) ", tree, re.MULTILINE)
    assert all((CHECKOUT / name).exists() for name in named)


def test_every_make_target_is_documented():
    targets = re.search(r"\.PHONY: (.*)", (CHECKOUT / "Makefile").read_text())[1].split()
    page = (CHECKOUT / "docs" / "command-line.md").read_text()
    assert all(f"`make {target}" in page for target in targets if target != "help")


def test_the_default_weights_are_the_best_seed_by_validation():
    runs = [run for run in analysis.find_runs(RESULTS) if run.recipe["name"] == DEFAULT]
    best = min(runs, key=lambda run: run.metrics["val_loss"])
    assert len(runs) >= 3 and best.folder == find_run(DEFAULT)


def test_every_published_study_is_shown():
    page = (CHECKOUT / "docs" / "findings.md").read_text()
    names = {folder.name for folder in publish.STUDIES.iterdir() if folder.is_dir()}
    assert all(f"<!-- {name} -->" in page for name in names - {"reference"})
