"""Evaluations of frozen features beside scikit-learn's and faiss's, in one run.

    python benchmarks/evals.py            # 50,000 x 10,000 x 384, 100 classes
    python benchmarks/evals.py --quick    # a tenth of the images
    python benchmarks/evals.py --cuda     # ours alone, on a GPU: those that are made there

Features are clusters with noise, so that there is something to learn and something to miss.
"""

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from dino_lab.core.evals.attention import Attention
from dino_lab.core.evals.knn import KNN
from dino_lab.core.evals.linear import LinearProbe
from dino_lab.core.evals.low_shot import LowShot
from dino_lab.core.evals.retrieval import mean_average_precision

CLASSES, DIMENSIONS = 100, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    asked = parser.parse_args()
    scale = 10 if asked.quick else 1
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    bank, labels = clusters(50_000 // scale, seed=0)
    queries, truth = clusters(10_000 // scale, seed=1)
    where = f"{threads} threads"
    if asked.cuda:
        bank, labels, queries, truth = (each.cuda() for each in (bank, labels, queries, truth))
        KNN().top1(bank, labels, queries, truth)  # whoever is first waits for the libraries
        where = torch.cuda.get_device_name()
    print(f"{len(bank):,} x {len(queries):,} x {DIMENSIONS}, {CLASSES} classes, {where}\n")
    print("| evaluation | seconds | % |\n|---|---|---|")
    shown("k-NN, k 10, 20, 100 and 200", lambda: KNN().top1(bank, labels, queries, truth)[20])
    alone = KNN(further_neighbors_numbers=())
    shown("k-NN, k 20 alone", lambda: alone.top1(bank, labels, queries, truth)[20])
    if not asked.cuda:
        shown("- faiss, exact, k 20", lambda: of_faiss(bank, labels, queries, truth))
        shown("- scikit-learn, k 20", lambda: of_sklearn(bank, labels, queries, truth))
    probe = LinearProbe()
    shown(
        f"linear probe, {len(probe.learning_rates)} learning rates, {probe.epochs} epochs",
        lambda: probe.top1(bank, labels, queries, truth, seed=0)[0],
    )
    shown("retrieval, mAP", lambda: mean_average_precision(queries, truth, bank, labels))
    if asked.cuda:
        return
    one = LogisticRegression(C=1.0, max_iter=100)
    shown("- scikit-learn, one penalty", lambda: 100 * one.fit(bank.numpy(), labels).score(queries.numpy(), truth))
    shown("low-shot, 1 and 10 %", lambda: LowShot().top1(bank, labels, queries, truth)[0.1])
    attention = torch.rand(len(queries), 6, 196).softmax(dim=-1)
    masks = torch.zeros(len(queries), 224, 224, dtype=torch.uint8)
    masks[:, 50:150, 60:170] = 1
    shown("attention, 6 heads, 14 x 14 patches, 224 px", lambda: Attention().jaccard(attention, masks)[0.6])


def clusters(number: int, *, seed: int) -> tuple[Tensor, Tensor]:
    centers = torch.randn(CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(number) % CLASSES
    noise = torch.randn(number, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    return centers[labels] + 6 * noise, labels


def of_faiss(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
    import faiss  # here, since machines with a GPU need not have it

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(F.normalize(bank, dim=-1).numpy())
    similarities, places = index.search(F.normalize(queries, dim=-1).numpy(), 20)
    votes = torch.zeros(len(queries), CLASSES)
    votes.scatter_add_(1, labels[torch.from_numpy(places)], (torch.from_numpy(similarities) / 0.07).exp())
    return 100 * float((votes.argmax(dim=-1) == truth).float().mean())


def of_sklearn(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    classifier = KNeighborsClassifier(20, metric="cosine", weights=weights, algorithm="brute", n_jobs=-1)
    return 100 * float(classifier.fit(bank.numpy(), labels).score(queries.numpy(), truth))


def shown(name: str, act: Callable[[], float]) -> None:
    started = time.perf_counter()
    percent = act()
    print(f"| {name} | {time.perf_counter() - started:.2f} | {percent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
