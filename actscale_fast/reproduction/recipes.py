"""The systems without training examples: what a model says under them at several strengths, and how fluently."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .. import extraction
from ..architectures.layout import layout
from ..frozen.perplexity import perplexity
from ..interventions import Intervention
from ..patching.patch import patch
from .laboratory import Laboratory

#: What the three recipes steer by, as the report and its pictures name it: the pair of ActAdd, the topic, the request.
ADDED, SUBTRACTED = "Love", "Hate"
TOPIC = "about the sea"
INSTRUCTION = "Answer with a poem."

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
#: The prompts that are continued.
_OPENINGS = ("I think that", "Yesterday the weather", "My friend told me", "The best thing about")

_SEA = (
    "The waves broke over the deck while the sailors pulled in the nets.",
    "A lighthouse stood on the rocks, and gulls cried above the harbour.",
    "At low tide the children looked for shells along the beach.",
    "The captain steered the ship through the storm and out to the open ocean.",
    "Whales passed the island every spring on their way through deep water.",
    "Salt wind filled the sails, and the coast sank below the horizon.",
    "Fishermen mended their boats by the shore before the next tide.",
    "The diver swam along the coral reef among fish of every colour.",
)
_SEA_WORD = re.compile(
    r"\b(seas?|oceans?|ships?|sail(s|or|ors|ed|ing)?|waves?|beach(es)?|shores?|boats?|tides?|fish(es)?|islands?|coasts?)\b",
    re.IGNORECASE,
)
_ORDINARY = (
    "The committee meets on the first Tuesday of each month to discuss the budget.",
    "She sold her bicycle and bought a desk for the new office.",
    "He repaired the roof with a borrowed ladder and finished before dark.",
    "The report lists the costs of the new bridge and the time that it will take.",
    "Most birds of the forest leave for the south when the days grow short.",
    "A good soup needs onions, carrots, pepper and a great deal of patience.",
    "The train was late again, so she read the newspaper on the platform.",
    "Computers store numbers as rows of switches that are either on or off.",
)
_QUESTIONS = (
    "How do birds fly?", "Tell me about the moon.", "What do cats eat?", "Describe a forest.", "What is bread made of?",
    "Why do leaves fall?", "What does a doctor do?", "Tell me about winter.", "Describe a dog.", "What is music?",
    "Tell me about a river.", "Describe a garden.",
)  # fmt: skip
_N_LEARNED, _N_VALIDATED = 8, 2
#: Factor on the direction, in units of what the instruction adds (the median over the candidate layers).
_INSTRUCTED = 1.5

SENTENCES = (
    "The old man walked slowly along the quiet river.",
    "She painted the kitchen door a bright shade of green.",
    "Our train leaves the city early on Monday morning.",
    "He forgot his umbrella at the small corner shop.",
    "The children built a tall tower out of wooden blocks.",
    "A grey cat slept on the warm stone wall.",
    "They planted three apple trees behind the new school.",
    "The teacher wrote a long letter to her brother.",
    "We heard strange music from the house next door.",
    "My sister collects old maps of distant islands and coasts.",
)


def steered_texts(lab: Laboratory, intervention: Intervention, prompts: Sequence[str] = _OPENINGS) -> dict[str, Any]:
    """Continuations at each strength, and their perplexity under the frozen model."""
    rows = []
    for strength in STRENGTHS:
        with patch(lab.model, intervention, strength=strength):
            texts = extraction.continuations(
                lab.model, lab.tokenizer, prompts, max_new_tokens=lab.size.max_new_tokens, batch_size=len(prompts)
            )
        said = [row for row, text in enumerate(texts) if text.strip()]
        median = None  # all continuations are empty
        if said:
            given = [texts[row] for row in said], [prompts[row] for row in said]
            median = float(perplexity(lab.model, lab.tokenizer, *given).median())
        rows.append({"strength": strength, "texts": texts, "perplexity": median})
    return {"prompts": list(prompts), "rows": rows}


def attempted(recipe: Callable[[Laboratory], dict[str, Any]], lab: Laboratory) -> dict[str, Any]:
    """The result of a recipe, or why it is impossible with this model and tokenizer."""
    try:
        return recipe(lab)
    except (ValueError, RuntimeError) as error:
        return {"impossible": str(error)}


def act_add(lab: Laboratory) -> dict[str, Any]:
    """Love − Hate, added to the first tokens of the prompt."""
    layer = _layer(lab, 0.2)
    vector = extraction.act_add(lab.model, lab.tokenizer, ADDED, SUBTRACTED, layer=layer, coefficient=5.0)
    prompts = ("I hate you because", "My neighbour is the kind of person who", "When I think about them I feel")
    return {"layer": layer, "coefficient": 5.0} | steered_texts(lab, vector, prompts)


def mean_centring(lab: Laboratory) -> dict[str, Any]:
    """Steer towards texts about the sea."""
    layer = _layer(lab, 1 / 3)
    vector = extraction.mean_centring(
        lab.model, lab.tokenizer, _SEA, _ORDINARY, layers=[layer], coefficient=2.0, skip=1, progress=False
    )
    found: dict[str, Any] = {"layer": layer, "coefficient": 2.0, "measured": TOPIC}
    found |= steered_texts(lab, vector)
    for row in found["rows"]:
        row["share"] = _share(row["texts"], lambda text: _SEA_WORD.search(text) is not None)
    return found


def instruction(lab: Laboratory) -> dict[str, Any]:
    """Steer towards answering with a poem, without the instruction."""
    questions = [_asked(lab, question) for question in _QUESTIONS]
    told = [_asked(lab, f"{question} {INSTRUCTION}") for question in _QUESTIONS[:_N_LEARNED]]
    vectors = extraction.instruction_vectors(lab.model, lab.tokenizer, told, questions[:_N_LEARNED], progress=False)
    candidates = sorted({_layer(lab, share) for share in (0.4, 0.53, 0.67)})
    coefficient = _INSTRUCTED * float(vectors.vectors[candidates].norm(dim=-1).median())
    choice = vectors.choose_layer(
        lab.model, lab.tokenizer, questions[_N_LEARNED : _N_LEARNED + _N_VALIDATED], _in_lines, mode="add",
        coefficient=coefficient, layers=candidates, max_new_tokens=lab.size.max_new_tokens, progress=False,
    )  # fmt: skip
    table = [[row.layer, row.score, row.perplexity] for row in choice.table]
    shown = _N_LEARNED + _N_VALIDATED
    found: dict[str, Any] = {"layer": choice.layer, "coefficient": coefficient, "table": table}
    found |= steered_texts(lab, choice.intervention, questions[shown:])
    found |= {"shown": list(_QUESTIONS[shown:]), "measured": "in short lines"}
    for row in found["rows"]:
        row["share"] = sum(map(_in_lines, row["texts"])) / len(row["texts"])
    return found


def latent(lab: Laboratory) -> dict[str, Any]:
    """One vector per sentence, and what greedy decoding gives under it."""
    layer = _layer(lab, 0.5)
    sentences = list(SENTENCES[: lab.size.n_sentences])
    result = extraction.latent_vectors(lab.model, lab.tokenizer, sentences, layer=layer, progress=False)
    rows = [
        {"sentence": sentence, "said": extraction.decode_latent(lab.model, lab.tokenizer, vector), "exact": exact}
        for sentence, vector, exact in zip(sentences, result.vectors, result.exact, strict=True)
    ]
    return {"layer": layer, "rows": rows}


def _layer(lab: Laboratory, share: float) -> int:
    return max(round(layout(lab.model).n_layers * share), 1)


def _asked(lab: Laboratory, question: str) -> str:
    """A question in the model's chat template, or as Q and A."""
    if not lab.tokenizer.chat_template:
        return f"Q: {question}\nA:"
    messages = [{"role": "user", "content": question}]
    return str(lab.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _in_lines(text: str) -> float:
    """1 if a text is broken into lines like verse, with at least one break per twelve words."""
    return float(text.strip().count("\n") >= max(len(text.split()) // 12, 1))


def _share(texts: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, texts)) / len(texts)
