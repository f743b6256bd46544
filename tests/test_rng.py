"""The counter RNG: Philox 4x32-10 to the bit, and uniforms that share nothing they should not."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tolerance import assert_uncorrelated, assert_uniform

from santa_hf.rng import MAX_LAYERS, Stream, philox4x32, uniform

WORD = 0xFFFFFFFF

# Counter, key, result: the philox4x32 10 lines of Random123's kat_vectors (zeros, ones, pi).
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 as Salmon et al. write it, in Python's exact integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & WORD, (left >> 32) ^ c3 ^ k1, left & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform_in_integers(
    seed: int, layer: int, head: int, position: int, index: int, stream: int
) -> float:
    """The key and counter contract of `santa_hf.rng`, one scalar at a time."""
    counter = (index & WORD, position & WORD, head, layer | stream << 24)
    high, low, _, _ = philox_in_integers(counter, (seed & WORD, seed >> 32))
    return float((high << 21) | (low >> 11)) / 2.0**53


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def at(
    *,
    seed: int | torch.Tensor = 0,
    layer: int = 0,
    head: int = 0,
    position: int | torch.Tensor = 0,
    index: int | torch.Tensor = 0,
    stream: Stream = Stream.SAMPLE,
) -> torch.Tensor:
    """`uniform` at one point, with any coordinate replaced."""
    as_tensor = torch.as_tensor
    return uniform(seed, layer, as_tensor(head), as_tensor(position), as_tensor(index), stream)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["0", "1", "pi"])
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert philox_in_integers(counter, key) == expected
    got = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(word.item() for word in got) == expected
    assert all(word.dtype == torch.int64 for word in got)


def test_philox_equals_python_integers_on_random_words() -> None:
    words = random.Random(1)
    cases = [[words.getrandbits(32) for _ in range(6)] for _ in range(500)]
    columns = torch.tensor(cases, dtype=torch.int64).unbind(1)
    got = torch.stack(philox4x32(columns[:4], columns[4:]), 1).tolist()
    assert got == [list(philox_in_integers(tuple(c[:4]), tuple(c[4:]))) for c in cases]


def test_uniform_equals_python_integers_on_random_coordinates() -> None:
    draw = random.Random(2)
    for _ in range(200):
        seed, layer = draw.getrandbits(63), draw.randrange(MAX_LAYERS)
        head, position, index = draw.randrange(2**31), draw.getrandbits(40), draw.getrandbits(32)
        stream = draw.choice(list(Stream))
        got = uniform(seed, layer, tensor(head), tensor(position), tensor(index), stream)
        assert got.tolist() == [uniform_in_integers(seed, layer, head, position, index, stream)]


def test_uniform_has_53_bits_and_stays_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.tensor([WORD])
    monkeypatch.setattr("santa_hf.rng.philox4x32", lambda *_: (ones, ones, ones, ones))
    assert at().item() == 1.0 - 2.0**-53
    monkeypatch.setattr("santa_hf.rng.philox4x32", lambda *_: (ones * 0,) * 4)
    assert at().item() == 0.0
    # The lowest bit kept is bit 11 of the second word.
    monkeypatch.setattr("santa_hf.rng.philox4x32", lambda *_: (ones * 0, ones * 0 + (1 << 11)) * 2)
    assert at().item() == 2.0**-53


def test_uniform_uses_every_bit() -> None:
    mantissa = (at(index=torch.arange(4096)) * 2.0**53).long()
    share = torch.stack([(mantissa >> bit & 1).double().mean() for bit in range(53)])
    # A fair bit over 4096 draws has standard deviation 1/128; 53 bits, six deviations.
    assert (share - 0.5).abs().max() < 6 / 128


SHAPES = [
    {"index": (7,)},
    {"head": (1, 2, 3, 1), "position": (4, 1, 1, 1), "index": (7,)},
    {"seed": (4, 1, 1, 1), "head": (1, 2, 3, 1), "position": (4, 1, 1, 1), "index": (4, 2, 3, 7)},
    {"seed": (5,)},
    {"seed": (4, 1), "index": (7,)},
    {"seed": (3, 1, 1), "position": (2, 1), "index": (7,)},
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_broadcasting(shapes: dict[str, tuple[int, ...]]) -> None:
    words = torch.Generator().manual_seed(3)
    values = {
        name: torch.randint(2**31, shapes.get(name, ()), generator=words)
        for name in ("seed", "head", "position", "index")
    }
    got = uniform(
        values["seed"],
        9,
        values["head"],
        values["position"],
        values["index"],
        Stream.TILE,
    )
    wide = torch.broadcast_tensors(*values.values())
    assert got.shape == wide[0].shape
    assert got.dtype == torch.float64
    expected = [
        uniform_in_integers(s, 9, h, p, i, Stream.TILE)
        for s, h, p, i in zip(*(w.flatten().tolist() for w in wide), strict=True)
    ]
    assert got.flatten().tolist() == expected


def test_pure() -> None:
    before = torch.get_rng_state()
    index = torch.arange(100)
    first = at(index=index)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(at(index=index), first)
    assert torch.equal(index, torch.arange(100))
    torch.set_rng_state(before)
    at(index=index)
    assert torch.equal(torch.get_rng_state(), before)
    # A part of a range is the same numbers as the part of the whole.
    assert torch.equal(at(index=index[40:60]), first[40:60])


def test_seed_tensor_equals_scalar_seeds() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x0123456789ABCDEF]
    together = at(seed=tensor(*seeds)[:, None], index=torch.arange(16))
    alone = torch.stack([at(seed=seed, index=torch.arange(16)) for seed in seeds])
    assert torch.equal(together, alone)


def test_layer_out_of_range_is_refused() -> None:
    assert at(layer=MAX_LAYERS - 1).item() != at(layer=0).item()
    for layer in (-1, MAX_LAYERS):
        with pytest.raises(ValueError, match=r"layer must be in \[0, 16777216\)"):
            at(layer=layer)


def test_both_words_of_the_seed_and_high_positions_matter() -> None:
    index = torch.arange(64)
    seeds = [0, 1, 1 << 31, 1 << 32, 1 << 62, (1 << 32) | 1]
    positions = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1]
    rows = [at(seed=seed, index=index) for seed in seeds]
    rows += [at(position=position, index=index) for position in positions[1:]]
    values = torch.stack(rows)
    assert values.unique().numel() == values.numel()
    assert values.min() >= 0
    assert values.max() < 1


def test_the_last_visible_index_of_an_empty_row_is_a_valid_position() -> None:
    assert 0 <= at(position=-1).item() < 1


# One coordinate varied over neighbours and over distant values, the sample index along each series.
VARIED: dict[str, Callable[[int], dict]] = {
    "layer": lambda i: {"layer": i},
    "head": lambda i: {"head": i},
    "position": lambda i: {"position": i},
    "high position": lambda i: {"position": 2**31 - 8 + i},
    "stream": lambda i: {"stream": list(Stream)[i % len(Stream)], "layer": i // len(Stream)},
    "seed": lambda i: {"seed": i},
    "high seed word": lambda i: {"seed": i << 32},
    "one bit of the seed": lambda i: {"seed": 1 << i},
}
# The index along the series is a sample or a tile, or the position of successive decode steps.
ALONG = {
    "samples": lambda: {"index": torch.arange(16384)},
    "steps": lambda: {"position": torch.arange(16384)},
}


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("varied", VARIED)
def test_series_are_uniform_and_independent(varied: str, along: str) -> None:
    series = torch.stack([at(**{**VARIED[varied](i), **ALONG[along]()}) for i in range(16)])
    if "position" in varied and along == "steps":  # overlapping windows of the same series
        series = torch.stack([at(position=torch.arange(16384) + 20000 * i) for i in range(16)])
    assert_uncorrelated(series)
    # Neighbouring draws: the same series shifted by one, which a lattice would couple.
    assert_uncorrelated(torch.cat((series[:, :-1], series[:, 1:])))
    # Monotone and even dependence alike: |u - 1/2| of one against the other.
    assert_uncorrelated((2 * series - 1).abs())
    for row in series[:4]:
        assert_uniform(row)


def test_samples_and_tiles_are_independent_as_pairs() -> None:
    """Two dimensions at a time: 16 x 16 cells of (u_i, u_{i + lag}) are equally full."""
    values = at(index=torch.arange(1 << 16))
    for lag in (1, 2, 3, 64, 128):
        pairs = torch.stack((values[:-lag], values[lag:]))
        # Disjoint pairs only, or cells of overlapping pairs are not independent.
        pairs = pairs[:, (torch.arange(pairs.shape[1]) // lag) % 2 == 0]
        cell = (pairs * 16).long()
        # Through a uniform of its own cell: (cell + fraction) / 256 is uniform if cells are.
        assert_uniform((cell[0] * 16 + cell[1] + (pairs[0] * 16) % 1) / 256)


def test_no_two_uses_coincide() -> None:
    """4 layers x 4 heads x 4 positions x 5 streams x 32 indices: 10240 distinct uniforms."""
    grid = [
        at(layer=layer, head=head, position=position, stream=stream, index=torch.arange(32))
        for layer in range(4)
        for head in range(4)
        for position in range(4)
        for stream in Stream
    ]
    values = torch.cat(grid)
    assert values.unique().numel() == values.numel()
