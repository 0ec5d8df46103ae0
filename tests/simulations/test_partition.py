"""Partitions of real records, and virtual clients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.data import load_source
from models.catalog import TASKS
from models.shape import Shape
from privacy.errors import DataError, PlanError
from simulations.partition import Split, SplitPopulation, VirtualPopulation, label_table, split


def some_targets(count: int, classes: int = 4) -> torch.Tensor:
    return torch.arange(count) % classes


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([Split.IID, Split.DIRICHLET, Split.QUANTITY]),
    count=st.integers(1, 120),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 1e4]),
)
def test_every_record_goes_to_exactly_one_client_and_no_client_is_empty(kind, count, share, seed, alpha):
    clients = max(1, round(share * count))
    parts = split(kind, some_targets(count), None, clients=clients, seed=seed, alpha=alpha)
    assert len(parts) == clients
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(count))
    assert min(map(len, parts)) >= 1
    if kind is Split.IID:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", [Split.IID, Split.DIRICHLET, Split.QUANTITY])
def test_a_partition_is_fixed_by_its_seed(kind):
    def deal(seed):
        return split(kind, some_targets(200), None, clients=5, seed=seed, alpha=0.5)

    assert all(map(torch.equal, deal(3), deal(3)))
    assert not all(len(a) == len(b) and torch.equal(a, b) for a, b in zip(deal(3), deal(4), strict=True))


def skew(kind: Split, alpha: float) -> float:
    """The largest share of any one class in a client's records, averaged over clients."""
    targets = some_targets(2000)
    table = label_table(split(kind, targets, None, clients=10, seed=1, alpha=alpha), targets, 4)
    return sum(max(row) / sum(row) for row in table) / len(table)


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    assert skew(Split.DIRICHLET, 0.05) > 0.7
    assert skew(Split.DIRICHLET, 1e5) < 0.3
    assert skew(Split.IID, 0.05) < 0.4


def test_a_small_alpha_skews_sizes_and_a_large_one_does_not():
    def sizes(alpha):
        return [len(part) for part in split(Split.QUANTITY, some_targets(2000), None, clients=10, seed=1, alpha=alpha)]

    assert max(sizes(0.1)) > 5 * 200
    assert max(sizes(1e5)) < 1.1 * 200


def test_natural_clients_are_the_keys():
    keys = torch.tensor([2, 0, 2, 1, 0])
    parts = split(Split.NATURAL, some_targets(5), keys, clients=3, seed=0, alpha=0.5)
    assert [part.tolist() for part in parts] == [[1, 4], [3], [0, 2]]


def test_a_natural_partition_with_another_number_of_clients_says_which_to_set():
    keys = torch.tensor([2, 0, 2, 1, 0])
    with pytest.raises(PlanError, match="got 10; set clients=3"):
        split(Split.NATURAL, some_targets(5), keys, clients=10, seed=0, alpha=0.5)


def test_a_natural_partition_needs_keys():
    with pytest.raises(DataError, match="natural key"):
        split(Split.NATURAL, some_targets(5), None, clients=5, seed=0, alpha=0.5)


@pytest.mark.parametrize("kind", [Split.IID, Split.DIRICHLET, Split.QUANTITY])
def test_more_clients_than_records_names_the_empty_client(kind):
    with pytest.raises(DataError, match="client 7 would be empty"):
        split(kind, some_targets(7), None, clients=8, seed=0, alpha=0.5)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"clients": 0}, "clients >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"alpha": 0.0}, "alpha > 0"),
        ({"alpha": float("nan")}, "alpha > 0"),
    ],
)
def test_a_partition_refuses_numbers_out_of_range(changes, what):
    arguments = {"clients": 3, "seed": 0, "alpha": 0.5} | changes
    with pytest.raises(PlanError, match=what):
        split(Split.DIRICHLET, some_targets(20), None, **arguments)


def test_the_label_table_counts_every_record():
    targets = some_targets(103)
    parts = split(Split.DIRICHLET, targets, None, clients=6, seed=5, alpha=0.3)
    table = label_table(parts, targets, 4)
    assert [sum(row) for row in table] == [len(part) for part in parts]
    assert [sum(column) for column in zip(*table, strict=True)] == torch.bincount(targets).tolist()


def test_a_split_population_hands_out_the_records_of_its_parts():
    source = load_source(TASKS["digits"])
    parts = split(Split.IID, source.train.targets, source.keys, clients=10, seed=0, alpha=0.5)
    population = SplitPopulation(source, parts)
    assert (population.clients, population.shape) == (10, source.shape)
    assert torch.equal(population.records_of(3).inputs, source.train.inputs[parts[3]])
    assert sum(len(population.records_of(client)) for client in range(10)) == 1437


def test_virtual_clients_are_always_the_same_and_never_each_other():
    population = VirtualPopulation(
        task=TASKS["digits"], shape=Shape(inputs=(1, 8, 8), classes=10), clients=100_000, records=20, seed=3
    )
    first, again, other = (population.records_of(client) for client in (99_999, 99_999, 5))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    assert len(first) == 20
    assert bool(first.valid.all())


@pytest.mark.parametrize("changes", [{"clients": 0}, {"records": 0}, {"seed": -1}])
def test_a_virtual_population_refuses_numbers_out_of_range(changes):
    with pytest.raises(PlanError, match=next(iter(changes))):
        VirtualPopulation(
            task=TASKS["digits"],
            shape=Shape(inputs=(2,), classes=2),
            **({"clients": 5, "records": 5, "seed": 0} | changes),
        )
