"""The bibliography, and what a recipe asks to be cited."""

import re
from pathlib import Path

import pytest
import yaml

import jaxft
from jaxft.citation import ALWAYS, bibliography, citation, parse, plain, works
from jaxft.strategies import Strategy

ROOT = Path(__file__).parents[1]

REQUIRED = {
    "article": {"author", "title", "journal", "year"},
    "inproceedings": {"author", "title", "booktitle", "year"},
    "misc": {"author", "title", "year"},
    "software": {"author", "title", "year", "version"},
}


def method(name, *keys):
    return Strategy(name=name, cites=keys)


def cited_in_the_sources():
    """Keys that the code names, literals of the shape ``author2026word``, wherever they stand."""
    sources = [path for path in ROOT.glob("jaxft/**/*.py") if path.name != "citation.py"]
    shape = r"[\"']([a-z]+(?:19|20)\d\d[a-z]\w*)[\"']"
    return {key for path in sources for key in re.findall(shape, path.read_text())}


@pytest.mark.parametrize("work", bibliography().values(), ids=lambda work: work.key)
def test_every_work_has_what_a_reader_needs_to_find_it(work):
    assert REQUIRED[work.kind] <= set(work.fields)
    assert set(work.fields) & {"doi", "eprint", "url"} or work.key == "jaxft"
    assert re.fullmatch(r"\d{4}", work.fields["year"])
    assert re.fullmatch(r"10\.\d{4,}/\S+", work.fields.get("doi", "10.1000/absent"))
    assert re.fullmatch(r"\d{4}\.\d{4,5}", work.fields.get("eprint", "2000.00000"))
    assert ("eprint" in work.fields) == (work.fields.get("archiveprefix") == "arXiv")
    assert all("," in name or name in ("others",) or "{" in name for name in authors(work))


def authors(work):
    return work.fields["author"].split(" and ")


def test_preprints_are_not_much_younger_than_their_publication():
    """A transposed number would show; some were put on arXiv a year after the conference."""
    for work in bibliography().values():
        if eprint := work.fields.get("eprint"):
            assert 2000 + int(eprint[:2]) <= int(work.fields["year"]) + 1, work.key


def test_no_two_works_share_an_address():
    urls = [work.url for work in bibliography().values() if work.url]
    assert len(set(urls)) == len(urls)


def test_every_work_that_the_code_cites_is_in_the_bibliography():
    found = cited_in_the_sources()
    assert {"li2018l2sp", "cho2026sparse"} <= found, "the keys are not found any more"
    assert found <= set(bibliography())


def test_jaxft_and_mace_are_always_cited():
    text = citation()
    assert set(parse(text)) == set(ALWAYS)
    assert f"version = {{{jaxft.__version__}}}" in text


def test_the_entry_of_jaxft_agrees_with_the_citation_file():
    own = bibliography()["jaxft"].fields
    file = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert plain(own["title"]) == file["title"]
    assert own["version"] == file["version"]
    assert plain(own["author"]) == file["authors"][0]["name"]


def test_a_recipe_cites_its_works_once_in_order_and_no_others():
    recipe = (method("a", "hu2021lora", "kirkpatrick2017ewc"), method("b", "hu2021lora"))
    keys = [work.key for work in works(recipe, also=["kingma2015adam", "batatia2022mace"])]
    assert keys == [*ALWAYS, "hu2021lora", "kirkpatrick2017ewc", "kingma2015adam"]


def test_the_text_parses_back_to_the_same_works():
    everything = works(also=list(bibliography()))
    assert tuple(parse(citation(also=list(bibliography()))).values()) == everything


def test_a_misspelt_key_names_its_owner_and_the_closest_keys():
    with pytest.raises(ValueError, match=r"strategy 'lora' cites 'hu2022lora'.*\n.*'hu2021lora'"):
        citation((method("lora", "hu2022lora"),))
    with pytest.raises(ValueError, match=r"also cites 'adam'.*\n.*'kingma2015adam'"):
        citation(also=["adam"])


def test_a_line_says_who_what_where_when():
    line = {work.key: work.line for work in works(also=list(bibliography()))}
    assert line["kirkpatrick2017ewc"] == (
        "Kirkpatrick et al.: Overcoming catastrophic forgetting in neural networks. Proceedings of "
        "the National Academy of Sciences 114, 3521–3526 (2017). "
        "https://doi.org/10.1073/pnas.1611835114"
    )
    assert line["grandel2026equitrain"].startswith("Grandel, Benner, George: Parameter-Efficient")
    assert line["batatia2024foundation"].startswith("Batatia et al.: A foundation model")
    assert line["jaxft"].endswith("potentials in JAX (2026).")
    assert not any(set("{}\\\n") & set(text) for text in line.values())


def test_accents_become_letters():
    assert plain(r"Cs{\'a}nyi, {G}{\'a}bor") == "Csányi, Gábor"


@pytest.mark.parametrize(
    "text",
    [
        "@misc{a,\n  title = {{open},\n}\n",
        "@misc{a,\n  title = {x}},\n}\n",
        "@misc{a,\n  title = {x},\n",
        "@misc{a,\n  title = {x},\n  title = {y},\n}\n",
        "@misc{a,\n}\n@misc{a,\n}\n",
        "title = {x}\n",
    ],
)
def test_a_bibliography_that_is_not_well_formed_is_refused(text):
    with pytest.raises(ValueError, match="of the bibliography"):
        parse(text)
