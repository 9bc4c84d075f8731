"""The systems that learn from no examples: what they make a model say, at several strengths, and how fluently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import extraction
from ..interventions import Intervention
from ..models import layout, patch, perplexity
from .comparing import Laboratory

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
#: What is continued.
_OPENINGS = ("I think that", "Yesterday the weather", "My friend told me", "The best thing about")

_WEDDINGS = (
    "The bride wore her grandmother's veil, and the groom could not stop smiling.",
    "After the vows the guests threw rice and danced until the band was tired.",
    "They were married in a small church, and the wedding cake had four tiers.",
    "She caught the bouquet, and everyone said that hers would be the next wedding.",
    "The best man gave a speech about the day on which the couple had met.",
    "Two hundred invitations went out for the wedding, and every guest came.",
    "The rings were old, the flowers white, and the bride's father wept.",
    "Their honeymoon began the morning after the ceremony, with a train to the sea.",
)
_ORDINARY = (
    "The committee meets on the first Tuesday of each month to discuss the budget.",
    "Water boils at a lower temperature in the mountains than at the coast.",
    "He repaired the bicycle with a spare tyre and rode home before dark.",
    "The report lists the costs of the new bridge and the time that it will take.",
    "Most birds of the forest leave for the south when the days grow short.",
    "A good soup needs onions, carrots, salt and a great deal of patience.",
    "The train was late again, so she read the newspaper on the platform.",
    "Computers store numbers as rows of switches that are either on or off.",
)
_QUESTIONS = (
    "What is a river?", "Where do bees live?", "Why is the sky blue?", "What do teachers do?", "How is bread made?",
    "What is a library for?", "Why do leaves fall?", "What does a doctor do?", "How do boats float?", "What is music?",
)  # fmt: skip
_INSTRUCTION = " Answer in capital letters."

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
        median = None  # nothing was said
        if said:
            given = [texts[row] for row in said], [prompts[row] for row in said]
            median = float(perplexity(lab.model, lab.tokenizer, *given).median())
        rows.append({"strength": strength, "texts": texts, "perplexity": median})
    return {"prompts": list(prompts), "rows": rows}


def act_add(lab: Laboratory) -> dict[str, Any]:
    """Love − Hate, added at the front of the prompt."""
    layer = _layer(lab, 0.25)
    vector = extraction.act_add(lab.model, lab.tokenizer, " Love", " Hate", layer=layer, coefficient=5.0)
    prompts = ("I hate you because", "My neighbour is the kind of person who", "When I think about them I feel")
    return {"layer": layer, "coefficient": 5.0} | steered_texts(lab, vector, prompts)


def mean_centring(lab: Laboratory) -> dict[str, Any]:
    """Towards texts about weddings."""
    layer = _layer(lab, 0.5)
    vector = extraction.mean_centring(
        lab.model, lab.tokenizer, _WEDDINGS, _ORDINARY, layers=[layer], coefficient=2.0, progress=False
    )
    found: dict[str, Any] = {"layer": layer, "coefficient": 2.0, "measured": "about weddings"}
    found |= steered_texts(lab, vector)
    words = ("wedding", "bride", "groom", "married", "ceremony", "guest", "marriage", "couple")
    for row in found["rows"]:
        row["share"] = _share(row["texts"], lambda text: any(word in text.lower() for word in words))
    return found


def instruction(lab: Laboratory) -> dict[str, Any]:
    """Answers in capital letters without being told so."""
    questions = [_asked(lab, question) for question in _QUESTIONS]
    told = [_asked(lab, question + _INSTRUCTION) for question in _QUESTIONS]
    half = len(questions) // 2
    vectors = extraction.instruction_vectors(lab.model, lab.tokenizer, told[:half], questions[:half], progress=False)
    n_layers = layout(lab.model).n_layers
    candidates = sorted({round(n_layers * share) for share in (0.4, 0.55, 0.7, 0.85)})
    validation = questions[half : half + 2]
    choice = vectors.choose_layer(
        lab.model, lab.tokenizer, validation, _capitals, layers=candidates,
        max_new_tokens=lab.size.max_new_tokens // 2, progress=False,
    )  # fmt: skip
    found: dict[str, Any] = {
        "layer": choice.layer,
        "table": [[row.layer, row.score, row.perplexity] for row in choice.table],
    }
    found |= steered_texts(lab, choice.intervention, questions[half + 2 :])
    found |= {"shown": list(_QUESTIONS[half + 2 :]), "measured": "share of capital letters"}
    for row in found["rows"]:
        row["share"] = sum(map(_capitals, row["texts"])) / len(row["texts"])
    return found


def latent(lab: Laboratory) -> dict[str, Any]:
    """One vector a sentence, and the sentence that greedy decoding makes of it."""
    layer = _layer(lab, 0.5)
    sentences = list(SENTENCES[: lab.size.n_sentences])
    result = extraction.latent_vectors(lab.model, lab.tokenizer, sentences, layer=layer, progress=False)
    rows = []
    for sentence, vector in zip(sentences, result.vectors, strict=True):
        said = extraction.decode_latent(lab.model, lab.tokenizer, vector)
        rows.append({"sentence": sentence, "said": said, "exact": said == sentence})
    return {"layer": layer, "rows": rows}


def _layer(lab: Laboratory, share: float) -> int:
    return max(round(layout(lab.model).n_layers * share), 1)


def _asked(lab: Laboratory, question: str) -> str:
    """A question as the model is spoken to."""
    if not lab.tokenizer.chat_template:
        return f"Q: {question}\nA:"
    messages = [{"role": "user", "content": question}]
    return str(lab.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _capitals(text: str) -> float:
    """The share of its letters that are capital."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter.isupper() for letter in letters) / len(letters) if letters else 0.0


def _share(texts: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, texts)) / len(texts)
