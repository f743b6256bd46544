"""Training sequences in RULER's formats: needles, variable tracking, common and frequent words.

The wording is lm-eval's, imported from its RULER tasks; contexts, words, numbers, names are drawn here
and share nothing with the evaluation's: words are pieces of the tokenizer's vocabulary, without every
word that RULER draws from. A context is followed by as many questions as it can answer, each with its
answer and the end-of-text token, and only the answers are targets.
"""

from __future__ import annotations

import importlib
import io
import itertools
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "Example", "Source", "draw"]

_QUESTIONS = 24  # about one context, at most
_HOPS = 4  # of a chain of variables
_COMMON = 10  # words asked for by CWE
_FREQUENT = 3  # words asked for by FWE


class Target(NamedTuple):
    """What the token at `position` has to predict: any of `tokens` is right."""

    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A sequence and its targets, in order; a target's position precedes the token it predicts."""

    token_ids: list[int]
    targets: list[Target]


@cache
def _ruler() -> dict[str, ModuleType]:
    """lm-eval's RULER modules, which hold the wording."""
    # They fetch sentence-splitting data when imported, and say so; it is not needed here.
    with patch("nltk.download"), redirect_stdout(io.StringIO()):
        return {
            name: importlib.import_module(f"lm_eval.tasks.ruler.{name}")
            for name in ("prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils")
        }


class Source:
    """Where contexts come from: a tokenizer, its words, and sentences of prose.

    Args:
        tokenizer: of the model to train; byte-level BPE.
        prose: sentences for the haystacks of needles; not the evaluation's essays.
        seed: of every draw.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prose: Sequence[str], seed: int | str
    ) -> None:
        self.tokenizer = tokenizer
        self.prose = prose
        self.random = random.Random(seed)
        vocabulary = sorted(tokenizer.get_vocab())
        taken = {word.lower() for word in _ruler()["cwe_utils"].WORDS}
        self._words = [
            token[1:]
            for token in vocabulary
            if re.fullmatch("Ġ[a-z]{3,}", token) and token[1:] not in taken
        ]
        self._suffixes = [token for token in vocabulary if re.fullmatch("[a-z]{2,5}", token)]
        self._taken = taken

    def tokens(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def word(self, suffixed: float = 0.35) -> str:
        """A word, or something that looks like one: one to three tokens, none of RULER's.

        Args:
            suffixed: share of words with a second piece. By default as many tokens as RULER's words.
        """
        while True:
            word = self.random.choice(self._words)
            if self.random.random() < suffixed:
                word += self.random.choice(self._suffixes)
            if word not in self._taken:
                return word

    def distinct(self, count: int, draw: Callable[[], str]) -> list[str]:
        """`count` different draws, in the order drawn."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[draw()] = None
        return list(found)

    def letters(self, alphabet: str, count: int) -> str:
        """A random string."""
        return "".join(self.random.choices(alphabet, k=count))


@dataclass
class _Question:
    text: str  # from the end of the context to where the answer begins
    words: list[str]  # the answer's, each with a space before it
    lead: Callable[[int], str] = lambda i: ""  # what precedes word i
    any_order: bool = False

    def answer(self) -> str:
        return "".join(self.lead(i) + word for i, word in enumerate(self.words))


def draw(source: Source, task: str, length: int) -> Example:
    """One sequence of at most `length` tokens.

    Args:
        source: words, prose and generator.
        task: one of `TASKS`.
        length: tokens, at least 512.

    Raises:
        ValueError: `task` or `length` is not allowed.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if length < 512:
        raise ValueError(f"length must be at least 512 tokens, got {length}")
    room = length
    while True:
        context, questions = TASKS[task](source, room)
        example = _assemble(source, context, questions)
        excess = len(example.token_ids) - length
        if excess <= 0:
            return example
        room -= excess + 8  # the estimate of what a haystack holds was too high


def _assemble(source: Source, context: str, questions: Sequence[_Question]) -> Example:
    end = source.tokenizer.eos_token_id
    assert isinstance(end, int)
    ids: list[int] = []
    targets: list[Target] = []
    for i, question in enumerate(questions):
        ids += source.tokens(context + question.text if i == 0 else question.text)
        words = [source.tokens(word) for word in question.words]
        for j, word in enumerate(words):
            for token in source.tokens(question.lead(j)):
                targets.append(Target(len(ids) - 1, (token,)))
                ids.append(token)
            for k, token in enumerate(word):
                allowed = {token}
                if question.any_order:  # up to here, a word still to come is as right
                    allowed |= {w[k] for w in words[j + 1 :] if w[:k] == word[:k] and len(w) > k}
                targets.append(Target(len(ids) - 1, tuple(sorted(allowed))))
                ids.append(token)
        targets.append(Target(len(ids) - 1, (end,)))
        ids.append(end)
    return Example(ids, targets)


def _fill(source: Source, room: int, unit: Callable[[], str]) -> list[str]:
    """Haystack units worth `room` tokens."""
    units: list[str] = []
    while room > 0:
        batch = [unit() for _ in range(64)]
        counted = source.tokenizer([" " + text for text in batch], add_special_tokens=False)
        for text, ids in zip(batch, counted.input_ids, strict=True):
            room -= len(ids) + 1
            if room <= 0:
                break
            units.append(text)
    return units


def _scatter(source: Source, units: list[str], pieces: Sequence[str]) -> list[str]:
    """`units` with `pieces` put between them at random, in their order."""
    return _insert(units, pieces, [source.random.randrange(len(units) + 1) for _ in pieces])


def _insert(units: list[str], pieces: Sequence[str], places: Sequence[int]) -> list[str]:
    """`units` with `pieces`, in their order, before the units at `places`."""
    mixed: list[str] = []
    start = 0
    for place, piece in zip(sorted(places), pieces, strict=True):
        mixed += [*units[start:place], piece]
        start = place
    return mixed + units[start:]


# The four kinds of context. Each takes about `room` tokens, its questions included.


class _Variant(NamedTuple):
    """One of RULER's needle tasks, in the terms of lm-eval's generator."""

    haystack: str
    keys: int = 1  # beside those of a haystack of needles
    values: int = 1  # of a key
    queries: int = 1  # keys in a question
    uuid_keys: bool = False
    uuid_values: bool = False


# Parts of the mixture: those that take longest to learn have most, the one with 34 tokens a key least.
_VARIANTS = {
    _Variant("repeat"): 2,  # single_1
    _Variant("essay"): 2,  # single_2
    _Variant("essay", uuid_values=True): 3,  # single_3
    _Variant("essay", keys=4): 2,  # multikey_1
    _Variant("needle"): 3,  # multikey_2
    _Variant("needle", uuid_keys=True, uuid_values=True): 1,  # multikey_3
    _Variant("essay", values=4): 3,  # multivalue
    _Variant("essay", keys=4, queries=4): 3,  # multiquery
}
_RULERS_OWN = 0.125  # share of contexts with no more needles and questions than RULER's
_MOST_NEEDLES = 40  # hidden in a context: an essay has 40 depths


def _needles(source: Source, room: int) -> tuple[str, list[_Question]]:
    """Facts hidden in a repeated sentence, in prose, or among other such facts."""
    rng = source.random
    ruler = _ruler()["prepare_niah"]
    (variant,) = rng.choices([*_VARIANTS], [*_VARIANTS.values()])
    asked = variant.values * variant.queries
    plural = "uuids" if variant.uuid_values else "numbers"

    def identifier() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def value() -> str:
        return identifier() if variant.uuid_values else str(rng.randrange(1_000_000, 10_000_000))

    def needle(key: str, value: str) -> str:
        return str(ruler.NEEDLE.format(type_needle_v=plural, key=key, value=value))

    # Tokens of a question, its answer and its needles, about.
    cost = 50 + asked * (90 if variant.uuid_values else 50) + 100 * variant.uuid_keys
    questions = min(_QUESTIONS, _MOST_NEEDLES // asked, room // 2 // cost)
    if questions < 1 or rng.random() < _RULERS_OWN:
        questions = 1
    count = max(variant.keys, questions * variant.queries)
    among = room // 20 if variant.haystack == "needle" else 0  # other needles, more than fit
    keys = iter(identifier, "") if variant.uuid_keys else _keys(source, count + among)
    names = list(itertools.islice(keys, count))
    # Values are asked for in the order of the context, keys in the question's.
    facts = [(name, value()) for name in names for _ in range(variant.values)]
    rng.shuffle(facts)
    rng.shuffle(names)
    before, after = _needle_wording(plural, asked)
    asks = []
    for i in range(questions):
        query = names[i * variant.queries : (i + 1) * variant.queries]
        answer = [number for name in query for owner, number in facts if owner == name]
        asks.append(
            _Question(
                after.format(query=_listed(query)),
                [f" {number}" for number in answer],
                lead=lambda i: "," if i else "",
            )
        )
    needles = [needle(*fact) for fact in facts]
    texts = [before, *needles, *(ask.text + ask.answer() for ask in asks)]
    room -= sum(len(source.tokens(text)) + 1 for text in texts)
    if variant.haystack == "essay":
        sentences = _sentences(source)
        hay = _fill(source, room, lambda: next(sentences))
        return before + _essay(hay, needles, rng.sample(ruler.DEPTHS, len(needles))), asks
    noise = str(ruler.get_haystack("repeat"))
    repeated = variant.haystack == "repeat"
    hay = _fill(source, room, lambda: noise if repeated else needle(next(keys), value()))
    return before + "\n".join(_scatter(source, hay, needles)), asks


def _keys(source: Source, count: int) -> Iterator[str]:
    """Different keys of two words, at least `count`, many of which share one of their words.

    RULER's are made of 912 adjectives and 6,782 nouns: of the 1,375 needles of 32k tokens four in five
    have a word that another has, and only both words tell them apart. Here the pools have 16 to 8,192
    words, so that anything from a third to all of as many keys share one.
    """
    rng = source.random
    first, second = (round(2 ** rng.uniform(4, 13)) for _ in range(2))
    second = max(second, 2 * count // first + 1)

    def noun() -> str:  # one in 66 of RULER's has a hyphen
        word = source.word(0)
        return f"{word}-{source.word(0)}" if rng.random() < 0.015 else word

    # As many tokens as RULER's adjectives, and as its nouns after a hyphen.
    firsts = source.distinct(first, lambda: source.word(0.4))
    seconds = source.distinct(second, noun)
    drawn: set[str] = set()
    while True:
        key = f"{rng.choice(firsts)}-{rng.choice(seconds)}"
        if key not in drawn:
            drawn.add(key)
            yield key


def _essay(sentences: list[str], needles: Sequence[str], depths: Sequence[int]) -> str:
    """Prose with needles at depths in percent, joined as RULER does: a space at an end with a needle."""
    texts = _insert(sentences, needles, [len(sentences) * depth // 100 for depth in depths])
    start, end = ("" if depth in depths else None for depth in (0, 100))
    return " ".join(text for text in (start, *texts, end) if text is not None)


def _needle_wording(plural: str, values: int) -> tuple[str, str]:
    """RULER's words before the context, and from its end to the answer, with a {query}."""
    noun, verb = (plural, "are") if values > 1 else (plural[:-1], "is")
    template = str(_ruler()["niah_utils"].TEMPLATE).replace("{type_needle_v}", noun)
    if values == 1:
        for several, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template = template.replace(several, one)
    before, after = template.split("{context}")
    return (
        before,
        f"{after} The special magic {noun} for {{query}} mentioned in the provided text {verb}",
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def _sentences(source: Source) -> Iterator[str]:
    """Prose from a random place on, again and again."""
    start = source.random.randrange(len(source.prose))
    return itertools.cycle([*source.prose[start:], *source.prose[:start]])


def _variables(source: Source, room: int) -> tuple[str, list[_Question]]:
    """Chains of assignments hidden in a repeated sentence; a solved short one may come first."""
    rng = source.random
    if rng.random() < 0.7:
        context, (example,) = _chains(source, 400, 1, letters=3)
        solved = f"{context}{example.text} {example.answer()}\n\n\n\n"  # two spaces, as in RULER
        room -= len(source.tokens(solved))
    else:
        solved = ""
    context, questions = _chains(source, room, rng.choice((1, 1, 2, 4)), letters=5)
    return solved + context, questions


def _chains(source: Source, room: int, chains: int, letters: int) -> tuple[str, list[_Question]]:
    rng = source.random
    noise = str(_ruler()["prepare_niah"].get_haystack("repeat")) + "\n"
    names = source.distinct(
        chains * (_HOPS + 1), lambda: source.letters(string.ascii_uppercase, letters)
    )
    values = source.distinct(chains, lambda: str(rng.randrange(10_000, 99_999)))
    texts = _fill(source, room - chains * 120, lambda: noise)
    questions = []
    wording = _ruler()["vt_utils"].CONFIG["variable_tracking"]
    before, after = (wording["template"] + wording["answer_prefix"].rstrip()).split("{context}")
    for i, value in enumerate(values):
        chain = names[i * (_HOPS + 1) : (i + 1) * (_HOPS + 1)]
        links = [f"VAR {chain[0]} = {value}"]
        links += [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(chain)]
        texts = _scatter(source, texts, links)
        questions.append(
            _Question(after.format(query=value, num_v=len(chain)), [f" {name}" for name in chain])
        )
    return before + " ".join(texts).replace(". \n", ".\n"), questions


def _common_words(source: Source, room: int) -> tuple[str, list[_Question]]:
    """A numbered list in which ten words come up ten times as often as the others."""
    rng = source.random
    rare = 3 if room > 12_000 else rng.choice((1, 2, 3))
    head = source.distinct(_COMMON, source.word)
    cost = sum(_entry_tokens(source, head))
    often = max(2, min(10 * rare, room // 2 // cost))
    entries = head * often
    room -= 150 + often * cost
    used = set(head)
    while room > 0:
        words = [word for word in source.distinct(64, source.word) if word not in used]
        used.update(words)
        for word, cost in zip(words, _entry_tokens(source, words), strict=True):
            room -= rare * cost
            if room > 0:
                entries += [word] * rare
    rng.shuffle(entries)
    wording = _ruler()["cwe_utils"].CONFIG
    before, question = wording["template"].split("{context}")
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
    return before + listed, [
        _Question(
            f"{question}\n\n{wording['answer_prefix'].strip()}",
            [f" {word}" for word in head],
            lead=lambda i: f" {i + 1}.",
            any_order=True,
        )
    ]


def _entry_tokens(source: Source, words: Sequence[str]) -> list[int]:
    """Tokens of the entries of a long list: a space, a number of about four digits, a full stop."""
    counted = source.tokenizer([f" {word}" for word in words], add_special_tokens=False)
    return [len(ids) + 6 for ids in counted.input_ids]


def _frequent_words(source: Source, room: int) -> tuple[str, list[_Question]]:
    """Coded words whose frequencies fall as a power of their rank; dots rank first."""
    rng = source.random
    alpha = rng.uniform(1.8, 2.4)
    vocabulary = source.distinct(
        max(room // 50, 8), lambda: source.letters(string.ascii_lowercase, 6)
    )
    weights = [rank**-alpha for rank in range(2, len(vocabulary) + 2)]
    share = 1 / (1 + sum(weights))
    costs = [len(ids) for ids in source.tokenizer([f" {w}" for w in vocabulary]).input_ids]
    per_word = share * (1 + sum(w * cost for w, cost in zip(weights, costs, strict=True)))
    count = (room - 150) / per_word
    texts = ["..."] * int(count * share)
    for word, weight in zip(vocabulary, weights, strict=True):
        texts += [word] * int(count * share * weight)
    rng.shuffle(texts)
    wording = _ruler()["fwe_utils"].CONFIG
    before, question = wording["template"].split("{context}")
    return before + " ".join(texts), [
        _Question(
            f"{question} {wording['answer_prefix'].strip()}",
            [f" {word}" for word in vocabulary[:_FREQUENT]],
        )
    ]


# By name: what a training mixture is made of.
TASKS: dict[str, Callable[[Source, int], tuple[str, list[_Question]]]] = {
    "needles": _needles,
    "variables": _variables,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
