"""Seeds: what is drawn depends on the seed and the place alone, and differs between places."""

import itertools

import torch

from diffusers_adm.data.seeding import derive_seed, seed_step


def test_seeds_are_stable_and_in_range():
    # A change would silently break the resume of every run started before it. The digest is what coreutils print for
    # `printf "(0, 'training step', 0, 0)" | b2sum -l 64`; the seed is its little-endian value without the lowest bit.
    digest = bytes.fromhex("12a5245edb9dd348")
    assert derive_seed(0, "training step", 0, 0) == int.from_bytes(digest, "little") // 2
    assert all(0 <= derive_seed(seed, "a", 1) < 2**63 for seed in (-5, 0, 2**70))


def test_no_two_places_share_a_seed():
    places = itertools.product((0, 1, 2**32), ("a", "b"), range(20), range(20))
    seeds = [derive_seed(seed, stream, x, y) for seed, stream, x, y in places]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(1, "a", 0) != derive_seed(1, "a", 0, 0) != derive_seed(1, "a")


def test_neighbouring_seeds_are_unrelated():
    # A sum such as seed + step would make neighbours differ in few bits; of a hash's 63, half differ on average.
    flipped = [bin(derive_seed(0, "a", n) ^ derive_seed(0, "a", n + 1)).count("1") for n in range(1000)]
    assert abs(sum(flipped) / 1000 - 31.5) < 0.7  # standard deviation of the mean: sqrt(63) / 2 / sqrt(1000) = 0.13


def test_a_step_draws_the_same_whatever_came_before():
    seed_step(7, process_index=1, micro_step=3)
    expected = torch.randn(4), torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed(123)
    torch.randn(1000)
    seed_step(7, process_index=1, micro_step=3)
    assert torch.equal(torch.randn(4), expected[0])
    assert torch.equal(torch.nn.functional.dropout(torch.ones(50)), expected[1])
    for other in ((8, 1, 3), (7, 0, 3), (7, 1, 4), (7, 3, 1)):
        seed_step(*other)
        assert not torch.equal(torch.randn(4), expected[0])
