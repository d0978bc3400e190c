"""The page of latents: what is refused, and what a browser makes of the rest."""

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from jaxsae.app import features_page

PROSE = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.
The river Seine flows through Paris, the capital of France, and reaches the sea at Le Havre; the Thames flows through
London. In 1859 a committee of the Royal Society measured the temperature of the water each morning.

\tdef area(radius):\n\t\treturn 3.14159 * radius ** 2   # of a circle\n
She didn't know whether the parliament had voted on the budget, nor why the minister's letter of 12 March 2024 came late."""
HEBREW = "בראשית ברא אלהים את השמים ואת הארץ, בשנת 2024 אמר משה: New York היא עיר גדולה."
ARABIC = "ولد في القاهرة عام 1911 وكتب رواياته باللغة العربية."
CHINESE = "长江是亚洲第一长河,发源于青藏高原。它流经上海,注入东海。"
EDGES, RATIO_EDGES = np.geomspace(0.01, 100, 41), 2.0 ** np.linspace(-4, 6, 81)
ROWS = 1_000_000


def tokens_of(text: str) -> list[str]:
    """Pieces of a text, as a tokenizer cuts it: words with the space before them, long ones in two, digits one by one."""
    return [
        piece
        for found in re.findall(r" ?[^\W\d]+|\d|\s|[^\w\s]", text)
        for piece in ([found] if len(found) < 8 else [found[:5], found[5:]])
    ]


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def an_example(rng, tokens, scale, place, width=24) -> dict[str, Any]:
    """A window on tokens, around one where a latent is active, like on others of the same first letters."""
    first = max(0, place - width // 2)
    shown = tokens[first : place + width // 2]
    likeness = np.array([token.strip()[:2] == tokens[place].strip()[:2] for token in shown])
    values = scale * likeness * rng.uniform(0.2, 0.8, len(shown))
    values[place - first] = scale
    refined = values * rng.lognormal(0.15, 0.15, len(shown)) * (rng.random(len(shown)) < 0.95)
    return {
        "row": int(rng.integers(ROWS)),
        **{"value": rounded(values)[place - first], "refined": rounded(refined)[place - first]},
        **{"context": int(rng.integers(4000)), "position": place, "document": int(rng.integers(900)), "first": first},
        "tokens": shown,
        "values": [None if first + n == 0 else value for n, value in enumerate(rounded(values))],
        "refined_values": [None if first + n == 0 else value for n, value in enumerate(rounded(refined))],
        "pixels": None,
    }


def a_patch(rng, scale, patch) -> dict[str, Any]:
    pixels = 127 + 120 * np.sin(
        np.linspace(0, rng.uniform(3, 20), patch["height"])[:, None] + np.arange(patch["width"])
    )
    pixels = pixels[..., None] * rng.uniform(0.3, 1, patch["channels"])
    nothing = dict.fromkeys(("context", "position", "document", "first", "tokens", "values", "refined_values"))
    values = {"value": round(scale, 3), "refined": round(1.2 * scale, 3)}
    return {"row": int(rng.integers(ROWS)), **values, **nothing, "pixels": pixels.astype(int).ravel().tolist()}


def a_latent(
    rng, index: int, tokens: list[str], others: int, *, patch=None, top=5, bands=2, width=24
) -> dict[str, Any]:
    active = rng.lognormal(rng.normal(0, 1), 0.7, size := int(rng.lognormal(5, 1)))
    ratios = rng.lognormal(rng.normal(0.15, 0.1), 0.2, size) * (rng.random(size) < 0.97)
    refined, count = active * ratios, 10 * size

    def histogram(values, edges):
        return (10 * np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]).tolist()

    word = tokens[int(rng.integers(1, len(tokens)))]
    places = [n for n, token in enumerate(tokens) if token == word]

    def examples(scales):
        if patch:
            return [a_patch(rng, scale, patch) for scale in scales]
        return [an_example(rng, tokens, scale, int(rng.choice(places)), width) for scale in scales]

    def logits(sign):
        return [{"id": n, "token": str(rng.choice(tokens)), "logit": sign * round(3 - 0.2 * n, 3)} for n in range(8)]

    def some(names):
        return [
            {"index": int(j), **{name: round(rng.uniform(), 3) for name in names}} for j in rng.integers(0, others, 5)
        ]

    quantiles = np.quantile(active, np.linspace(1, 0, bands + 1))
    return {
        **{"index": index, "count": count, "density": count / ROWS},
        **{"mean": active.mean(), "mean_refined": refined.mean(), "max": active.max(), "max_refined": refined.max()},
        "shrinkage": refined.sum() / active.sum(),
        **{"values": histogram(active, EDGES), "refined_values": histogram(refined, EDGES)},
        "ratios": histogram(ratios, RATIO_EDGES),
        "top": examples(np.sort(active)[::-1][:top]),
        "bands": [
            {"low": low, "high": high, "examples": examples(rng.uniform(low, high, 3))}
            for high, low in itertools.pairwise(quantiles)
        ],
        **{"coactive": some(("given", "lift")), "nearest": some(("cosine",))},
        **{"promotes": None if patch else logits(1), "suppresses": None if patch else logits(-1)},
        "loss_effect": None if patch else round(rng.normal(0.01, 0.02), 5),
        "atom": a_patch(rng, 1.0, patch)["pixels"] if patch else None,
    }


def a_dead_latent(index: int) -> dict[str, Any]:
    nothing = dict.fromkeys(("mean", "mean_refined", "max", "max_refined", "shrinkage", "promotes", "suppresses"))
    empty = {"values": [0] * 40, "refined_values": [0] * 40, "ratios": [0] * 80, "top": [], "bands": []}
    more = {"coactive": [], "nearest": [], "loss_effect": None, "atom": None}
    return {"index": index, "count": 0, "density": 0.0, **nothing, **empty, **more}


def features(latents: list[dict[str, Any]], *, patch=None, rows_are=None, **more) -> dict[str, Any]:
    return {
        **{"format": "jaxsae-features", "version": 1},
        "sae": {"path": "run/sae", "activation": "topk", "latents": max(64, len(latents)), "width": 576},
        "origin": {} if patch else {"model": "smollm2", "layer": 12, "site": "resid_post", "context": 128},
        "data": {"path": "acts", "rows": ROWS, "nonfinite": 0, "contexts": 7812, "context": 128},
        **{"rows_are": rows_are or ("patches" if patch else "tokens"), "patch": patch},
        "model": None if patch else "smollm2",
        "ablation": None if patch else "mean increase of the next-token loss without this latent, where it is active.",
        **{"edges": EDGES.tolist(), "ratio_edges": RATIO_EDGES.tolist(), "latents": latents},
    } | more


def some_features(seed=0, number=50, text=PROSE, patch=None, **more):
    rng, tokens = np.random.default_rng(seed), tokens_of(text)
    latents = [a_latent(rng, n, tokens, number, patch=patch, **more) for n in range(number)]
    if not patch:
        latents[7] = a_dead_latent(7)
    return features(latents, patch=patch)


def write(folder, found):
    folder.mkdir(exist_ok=True)
    (folder / "features.json").write_text(json.dumps(found))
    features_page.write(folder)
    return folder / "report.html"
