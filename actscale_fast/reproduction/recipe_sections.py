"""The part of a report about systems without training examples: what the model says under them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import pictures, recipes
from .blocks import Block, Cell, Column, Section, Table, Text
from .laboratory import Laboratory

_RECIPES = {
    "act-add": f"ActAdd: {recipes.ADDED} − {recipes.SUBTRACTED}",
    "mean-centring": f"Mean-centring: texts {recipes.TOPIC}",
    "instruction": f"Instruction steering: {recipes.INSTRUCTION.strip('.').lower()}",
}


def recipe_sections(lab: Laboratory) -> Iterable[Section]:
    """One section per recipe, under a heading."""
    words = (
        "Greedy continuations at several strengths. Perplexity is that of the continuation under the frozen model, as "
        "the median over prompts; strength 0 is the frozen model."
    )
    yield Section("Systems without training examples", [Text(words)])
    for name, title in _RECIPES.items():
        yield _recipe(lab, name, title, lab.results["recipes"][name])
    yield _latent(lab.results["recipes"]["latent"])


def _recipe(lab: Laboratory, name: str, title: str, recipe: dict[str, Any]) -> Section:
    """A recipe's continuations of two prompts at several strengths."""
    if "impossible" in recipe:
        return Section(title, [Text(f"Not possible here: {recipe['impossible']}")], level=3)
    heading = f"{title} (layer {recipe['layer']}, coefficient {recipe['coefficient']:.3g})"
    rows: list[list[Cell]] = []
    for number in range(min(2, len(recipe["prompts"]))):
        prompt = _plain(recipe.get("shown", recipe["prompts"])[number])
        for row in recipe["rows"]:
            rows.append([prompt, row["strength"], _plain(row["texts"][number]), row["perplexity"], row.get("share")])
    columns = [
        Column("prompt"), Column("strength", "{:g}"), Column("continuation"),
        Column("perplexity, all prompts", "{:.1f}"), Column(recipe.get("measured", "share"), "{:.0%}"),
    ]  # fmt: skip
    if all(row[-1] is None for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    blocks: list[Block] = [Table(name, columns, rows)]
    picture = pictures.recipe(lab, name)
    blocks += [] if picture is None else [picture]
    if "table" in recipe:
        tried = ", ".join(f"{layer}: {score:.2f}" for layer, score, _ in recipe["table"])
        blocks.append(Text(f"Score of each candidate layer on validation questions: {tried}."))
    return Section(heading, blocks, level=3)


def _latent(found: dict[str, Any]) -> Section:
    if "impossible" in found:
        return Section("Latent steering vectors", [Text(f"Not possible here: {found['impossible']}")], level=3)
    exact = sum(row["exact"] for row in found["rows"])
    rows: list[list[Cell]] = [
        [row["sentence"], _plain(row["said"]), "✓" if row["exact"] else "✗"] for row in found["rows"]
    ]
    words = f"{exact} of {len(rows)} sentences are reproduced word by word under their vector."
    table = Table("latent", [Column("sentence"), Column("said"), Column("exact")], rows)
    return Section(f"Latent steering vectors (layer {found['layer']})", [Text(words), table], level=3)


def _plain(text: str) -> str:
    return " ".join(text.split())
