import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from dino_lab.core.evals import knn
from dino_lab.core.evals.knn import KNN


def features(number: int, classes: int, *, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points about a direction for each class."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(number) % classes
    return centers[labels] + noise * torch.randn(number, 16, generator=generator), labels


def top1(bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> float:
    return KNN().top1(*bank, *queries)[20]


def sklearns(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int, temperature: float
) -> float:
    def weight(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)  # cosine distance is 1 - similarity

    classifier = KNeighborsClassifier(k, metric="cosine", weights=weight, algorithm="brute")
    classifier.fit(bank.double().numpy(), bank_labels.numpy())
    return 100 * float(classifier.score(queries.double().numpy(), labels.numpy()))


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("noise", [1.5, 3.0])
def test_accuracy_is_sklearns(k: int, temperature: float, noise: float) -> None:
    bank, queries = features(300, 7, noise=noise, seed=0), features(200, 7, noise=noise, seed=1)
    ours = KNN(neighbors_number=k, temperature=temperature).top1(*bank, *queries)[k]
    assert ours == pytest.approx(sklearns(*bank, *queries, k=k, temperature=temperature), abs=1e-4)
    assert 20 < ours < 100


def test_separable_features_are_classified_perfectly() -> None:
    assert top1(features(200, 5, noise=0.01, seed=0), features(100, 5, noise=0.01, seed=1)) == 100


def test_noise_is_classified_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(2000, 16, generator=generator) for _ in range(2))
    labels = [torch.randint(0, 4, (2000,), generator=generator) for _ in range(2)]
    assert top1((bank, labels[0]), (queries, labels[1])) == pytest.approx(25, abs=4)


def test_the_length_of_a_feature_does_not_count() -> None:
    (bank, bank_labels), (queries, labels) = features(100, 5, noise=1.5, seed=0), features(50, 5, noise=1.5, seed=1)
    lengths = torch.rand(100, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    assert top1((bank * lengths, bank_labels), (queries, labels)) == top1((bank, bank_labels), (queries, labels))


def test_a_bank_smaller_than_k_votes_as_a_whole() -> None:
    bank, queries = features(6, 3, noise=0.01, seed=0), features(9, 3, noise=0.01, seed=1)
    assert top1(bank, queries) == 100


def test_a_class_that_no_neighbour_has_is_missed() -> None:
    bank, (queries, _) = features(20, 2, noise=0.1, seed=0), features(10, 2, noise=0.1, seed=1)
    assert top1(bank, (queries, torch.full((10,), 7))) == 0


def test_all_numbers_of_neighbours_come_of_one_search() -> None:
    bank, queries = features(300, 7, noise=2.0, seed=0), features(200, 7, noise=2.0, seed=1)
    together = KNN(neighbors_number=20, further_neighbors_numbers=(1, 100, 200)).top1(*bank, *queries)
    assert list(together) == [20, 1, 100, 200]
    for number, percent in together.items():
        alone = KNN(neighbors_number=number, further_neighbors_numbers=()).top1(*bank, *queries)
        assert alone == {number: percent}
    assert len(set(together.values())) > 1


@pytest.mark.parametrize(("of_queries", "of_bank"), [(7, 11), (200, 64), (64, 300), (1000, 1000)])
def test_blocks_of_any_size_find_the_same_neighbours(
    of_queries: int, of_bank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bank, _), (queries, _) = features(300, 7, noise=2.0, seed=0), features(200, 7, noise=2.0, seed=1)
    monkeypatch.setattr(knn, "_QUERIES", of_queries)
    monkeypatch.setattr(knn, "_BANK", of_bank)
    found = list(knn._nearest(bank, queries, 50))
    similarities, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    exact, where = (F.normalize(queries, dim=-1) @ F.normalize(bank, dim=-1).T).topk(50, dim=-1)
    torch.testing.assert_close(similarities, exact, atol=1e-6, rtol=1e-5)
    assert (places == where).float().mean() > 0.999  # but for ties in the last bit


def test_neighbours_are_those_of_faiss() -> None:
    (bank, _), (queries, _) = features(3000, 7, noise=2.0, seed=0), features(500, 7, noise=2.0, seed=1)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(F.normalize(bank, dim=-1).numpy())
    similarities, places = index.search(F.normalize(queries, dim=-1).numpy(), 20)
    found = list(knn._nearest(bank, queries, 20))
    ours, where = (torch.cat(parts) for parts in zip(*found, strict=True))
    torch.testing.assert_close(ours, torch.from_numpy(similarities), atol=1e-5, rtol=1e-5)
    assert (where == torch.from_numpy(places)).float().mean() > 0.999  # but for ties in the last bit
