"""A trial over several processes: real ones, over gloo on loopback. What they make is what one process makes."""

import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from dino_lab.core import distributed, records
from dino_lab.core.data import batches
from dino_lab.core.data.batches import Batches
from dino_lab.core.evaluation import PICTURES
from dino_lab.core.methods.dino import DINOMethod
from dino_lab.core.methods.losses import InfoNCE
from dino_lab.core.methods.operations import sinkhorn
from dino_lab.core.networks.spanning import spanning
from dino_lab.core.records import Record
from dino_lab.core.trainer import CHECKPOINT, DATA, Diverged, train
from dino_lab.core.trial import Trial

CPU = torch.device("cpu")


class Team:
    """Processes in one group, which call whatever function they are told."""

    def __init__(self, workers: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        # Forked from a process that has imported what takes seconds, and has done nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["timm", "dino_lab.core.trainer"])
        self.pipes, self.processes = [], []
        for rank in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, workers, address))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def results(self) -> list[Any]:
        """Of each rank, what it returned, or the exception that it raised."""
        return [pipe.recv() for pipe in self.pipes]

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self.start(function, *arguments)
        results = self.results()
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        """Lets the processes leave."""
        for pipe in self.pipes:
            pipe.close()


def group_of_one_machine(rank: int, workers: int, address: str) -> AbstractContextManager[None]:
    return distributed.group(rank=rank, workers=workers, address=address, device=CPU, timeout_seconds=60)


def _serve(pipe: Any, rank: int, workers: int, address: str) -> None:
    torch.set_num_threads(1)
    with group_of_one_machine(rank, workers, address):
        while True:
            try:
                function, arguments = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(function(*arguments))
            except Exception as error:
                pipe.send(error)


@pytest.fixture(scope="module")
def two() -> Iterator[Team]:
    team = Team(2)
    yield team
    team.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Team]:
    team = Team(3)
    yield team
    team.close()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


SHORT = {
    "epochs": 2,
    "batch_size": 12,  # three steps an epoch
    "data.train_images": 36,
    "data.test_images": 24,
    "backbone.drop_path_rate": 0.3,
    # AdamW makes steps of full length of gradients that are 0 but for rounding.
    "optimizer.kind": "sgd",
    "optimizer.lr": 0.01,
    "optimizer.lr_scaling": "none",
    "optimizer.warmup_epochs": 0.5,
    "runtime.log_period_steps": 1,
    "runtime.checkpoint_period_steps": 1,
}


@pytest.fixture
def short(smoke: Trial, data_dir: Path) -> Trial:
    return smoke.but(SHORT | {"runtime.data_dir": str(data_dir)})


def made(trial: Trial, workdir: Path, resume_from: Path | None = None) -> list[Record]:
    """By one process or by a rank, in a folder of its own."""
    folder = workdir / str(distributed.rank())
    folder.mkdir(parents=True, exist_ok=True)
    return list(train(trial, workdir=folder, resume_from=resume_from))


def shown(made: list[Record]) -> list[tuple[Any, ...]]:
    """Records without what differs from run to run."""
    return [(each.step, each.epoch, each.verdict, each.onset_step, each.left, values(each)) for each in made]


def values(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.values.items() if name not in records.TIMINGS}


def assert_alike(ours: list[Record], theirs: list[Record], *, rel: float = 2e-5) -> None:
    """Scores to the last bit, the rest up to rounding."""
    assert [each[:-1] for each in shown(ours)] == [each[:-1] for each in shown(theirs)]
    for our, their in zip(ours, theirs, strict=True):
        assert values(our) == pytest.approx(values(their), rel=rel, abs=1e-6), our.step
        scores = {name for name in our.values if "knn" in name}
        assert {name: our.values[name] for name in scores} == {name: their.values[name] for name in scores}


def method_of(workdir: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(workdir / "0" / CHECKPOINT, weights_only=True)["method"]
    return state


# ------------------------------------------------------------------------------------------------- whole trials

BN = {"method.head.batch_norm": True}
SWAV = {"method.kind": "swav", "method.queue_size": 8, "method.queue_start_epochs": 0.0}
MAE = {"method.kind": "mae", "method.decoder_dim": 16, "method.decoder_depth": 1, "method.decoder_num_heads": 2}
RESNET = {"backbone.name": "resnet10t", "crops.global_crops_size": 32, "crops.local_crops_size": 16, "epochs": 1}


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        (2, {}),
        (2, {"optimizer.kind": "adamw"}),
        (3, {"accumulation_steps": 2, **BN}),
        (2, {"method.operation.kind": "softmax_batch"}),
        (3, {"method.operation.kind": "sinkhorn", "accumulation_steps": 2}),
        (2, {"method.loss.kind": "mse", "method.teacher.kind": "previous_epoch"}),
        (2, {"method.loss.kind": "info_nce"}),
        (2, {"method.kind": "byol"}),
        (3, {"method.kind": "moco", "method.queue_size": 32, "accumulation_steps": 2}),
        (3, SWAV),
        (2, {**SWAV, "accumulation_steps": 3}),
        (2, {"method.kind": "supervised"}),
        (2, MAE),
        (3, {"method.kind": "masked", "accumulation_steps": 2}),
        (2, {"method.kind": "masked", "method.blocks": True}),
        (2, RESNET),
    ],
    ids=str,
)
def test_several_workers_make_the_records_and_weights_of_one(
    workers: int, changes: dict[str, Any], short: Trial, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    trial = short.but(changes)
    team: Team = request.getfixturevalue({2: "two", 3: "three"}[workers])
    team.start(made, trial, tmp_path / "several")
    one = made(trial, tmp_path / "one")
    several, *others = team.results()
    assert others == [[]] * (workers - 1)
    assert [record.step for record in several] == list(range(len(one)))
    assert_alike(several, one)
    if trial.optimizer.kind == "sgd":
        ours, theirs = method_of(tmp_path / "several"), method_of(tmp_path / "one")
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_distillation_by_several_workers_is_that_of_one(short: Trial, two: Team, tmp_path: Path) -> None:
    made(short.but({"method.kind": "supervised", "epochs": 1}), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher" / "0" / CHECKPOINT)
    trial = short.but({"method.kind": "distillation", "method.checkpoint": teacher})
    two.start(made, trial, tmp_path / "several")
    one = made(trial, tmp_path / "one")
    assert_alike(two.results()[0], one)


def test_bf16_is_as_near_as_its_rounding(short: Trial, two: Team, tmp_path: Path) -> None:
    trial = short.but({"precision": "bf16", **BN})
    two.start(made, trial, tmp_path / "several")
    one = made(trial, tmp_path / "one")
    for ours, theirs in zip(two.results()[0][1:], one[1:], strict=True):
        assert ours.values[records.LOSS] == pytest.approx(theirs.values[records.LOSS], rel=2e-2)


def test_the_same_number_of_workers_gives_the_same_bits(short: Trial, three: Team, tmp_path: Path) -> None:
    trial = short.but(BN)
    first, second = (three(made, trial, tmp_path / name)[0] for name in "ab")
    assert shown(first) == shown(second)
    torch.testing.assert_close(method_of(tmp_path / "a"), method_of(tmp_path / "b"), rtol=0, atol=0)


def loaded(trial: Trial, data_dir: Path, loader_workers: int) -> list[Tensor]:
    """The first two batches of a rank's share."""
    images = trial.data.build("train", data_dir)
    own = Batches(images, batch_size=12, seed=0, crops=trial.crops, device=CPU, parts=trial.accumulation_steps)
    return [part for batch in own.load(range(2), loader_workers=loader_workers) for part in batch]


def test_processes_that_make_crops_ahead_make_those_of_their_rank(short: Trial, data_dir: Path, two: Team) -> None:
    trial = short.but({"accumulation_steps": 2})
    whole = loaded(trial, data_dir, 0)
    for rank, (here, ahead) in enumerate(zip(*(two(loaded, trial, data_dir, each) for each in (0, 1)), strict=True)):
        assert all(map(torch.equal, here, ahead))
        # Of each half of the batch a half.
        ours = [part.unflatten(-1 if part.ndim == 1 else 1, (2, 2, 3)) for part in whole]
        ours = [part[:, rank].flatten() if part.ndim == 3 else part[:, :, rank].flatten(1, 2) for part in ours]
        assert all(map(torch.equal, here, ours))


def test_all_evaluations_are_shared_among_workers(short: Trial, three: Team, tmp_path: Path) -> None:
    """Of 36 and 24 images: 6 and 4 parts, of which ranks have unequally many; of eight that are drawn one has none."""
    asked = ["knn", "factors", "linear", "retrieval", "attention", "pictures"]
    trial = short.but({"epochs": 1, "evals.at_end": asked, "evals.linear.epochs": 2})
    three.start(made_in_small_parts, trial, tmp_path / "several")
    one = made_in_small_parts(trial, tmp_path / "one")
    several = three.results()[0]
    # The same weights, and the same images together: the same bits.
    assert shown(several)[0] == shown(one)[0]
    assert_alike(several, one)
    pictures = [(tmp_path / run / "0" / PICTURES / "attention-0.png").read_bytes() for run in ("several", "one")]
    assert pictures[0] == pictures[1]


def made_in_small_parts(trial: Trial, workdir: Path) -> list[Record]:
    batches._WHOLE_IMAGES, usual = 6, batches._WHOLE_IMAGES
    try:
        return made(trial, workdir)
    finally:
        batches._WHOLE_IMAGES = usual


def test_the_first_alone_writes_files(short: Trial, two: Team, tmp_path: Path) -> None:
    two(made, short.but({"evals.at_end": ["knn", "pictures"]}), tmp_path)
    assert {path.name for path in (tmp_path / "0").iterdir()} == {CHECKPOINT, DATA, PICTURES}
    assert list((tmp_path / "1").iterdir()) == []


def copied(trial: Trial, workdir: Path, step: int) -> None:
    """Keeps the checkpoint of this step of a trial that goes on."""
    folder = workdir / str(distributed.rank())
    folder.mkdir(parents=True)
    for record in train(trial, workdir=folder):
        if record.step == step + 1:  # the checkpoint of a step is written once its record has been taken
            shutil.copy(folder / CHECKPOINT, workdir / "kept.pt")


def test_a_checkpoint_goes_on_with_any_number_of_workers(short: Trial, two: Team, three: Team, tmp_path: Path) -> None:
    trial = short.but({"method.kind": "moco", "method.queue_size": 32, "method.head.batch_norm": True})
    whole = made(trial, tmp_path / "whole")
    copied(trial, tmp_path / "of_one", 2)
    two(copied, trial, tmp_path / "of_two", 2)
    rests = {
        "one, two": two(made, trial, tmp_path / "a", tmp_path / "of_one" / "kept.pt")[0],
        "two, one": made(trial, tmp_path / "b", tmp_path / "of_two" / "kept.pt"),
        "two, three": three(made, trial, tmp_path / "c", tmp_path / "of_two" / "kept.pt")[0],
    }
    for rest in rests.values():
        assert_alike(rest, whole[3:])
    again = two(made, trial, tmp_path / "d", tmp_path / "of_two" / "kept.pt")[0]
    assert shown(again) == shown(two(made, trial, tmp_path / "e")[0][3:])


# --------------------------------------------------------------------------------------------------------- ends


def test_a_collapse_ends_all_workers_together(short: Trial, two: Team, tmp_path: Path) -> None:
    at_once = {
        "collapse.uniform_entropy": 1.0,
        "collapse.one_prototype_entropy": 0.999,
        "collapse.low_kl": 1e6,
        "collapse.unmoved": 1e-6,
        "collapse.certain_steps": 0,
        "collapse.certain_fraction": 0.0,
        "collapse.policy": "stop",
        "collapse.after_steps": 2,
    }
    several, others = two(made, short.but(at_once), tmp_path / "several")
    assert others == []
    assert [record.step for record in several] == [0, 1, 2, 3, 4][: len(several)]
    assert several[-1].verdict == "one_prototype"
    assert_alike(several, made(short.but(at_once), tmp_path / "one"))


def diverging(trial: Trial, workdir: Path, at: int) -> tuple[list[Record], int | None]:
    """Rank 1's images, and no others, have a loss that is not a number; records, and the step of `Diverged`."""
    loss = DINOMethod.loss

    def of_some(self: DINOMethod, batch: Any, now: Any) -> Any:
        outcome = loss(self, batch, now)
        bad = distributed.rank() == 1 and now.step + 1 == at
        return replace(outcome, loss=outcome.loss * float("nan")) if bad else outcome

    workdir = workdir / str(distributed.rank())
    workdir.mkdir()
    taken: list[Record] = []
    DINOMethod.loss = of_some  # type: ignore[method-assign]
    try:
        taken.extend(train(trial, workdir=workdir))
    except Diverged as end:
        return taken, end.step
    finally:
        DINOMethod.loss = loss  # type: ignore[method-assign]
    return taken, None


def test_a_loss_that_is_not_finite_on_one_ends_all_as_diverged(short: Trial, three: Team, tmp_path: Path) -> None:
    (first, step), *others = three(diverging, short, tmp_path, 4)
    assert step == 4
    assert others == [([], 4)] * 2
    assert [(record.step, record.verdict) for record in first][-2:] == [(3, "none"), (4, "diverged")]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_raise_at_once(victim: int, short: Trial, tmp_path: Path) -> None:
    team = Team(2)
    team.start(made, short.but({"epochs": 1000, "evals.every_epochs": 1000}), tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "0" / CHECKPOINT).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed = time.monotonic()
    os.kill(team.processes[victim].pid, signal.SIGKILL)
    error = team.pipes[1 - victim].recv()
    assert isinstance(error, RuntimeError)
    assert time.monotonic() - killed < 5
    team.close()
    team.processes[1 - victim].join(timeout=20)
    assert team.processes[1 - victim].exitcode == 0


# ------------------------------------------------------------------------------------------------ what is exchanged


def exchanged() -> dict[str, Any]:
    """What ranks know of each other."""
    rank = distributed.rank()
    own = torch.arange(6.0).view(2, 3) + 10 * rank
    return {
        "rank": (rank, distributed.workers()),
        "mean": distributed.mean(own),
        "means": distributed.means([own, own.sum()]),
        "gather": distributed.gather(own, dim=1),
        "in_turn": distributed.in_turn(list("abcde")[rank::3]),
        "of_first": distributed.of_first(f"rank {rank}"),
    }


def test_means_gathered_tensors_and_items_are_those_of_all_ranks(three: Team) -> None:
    tensors = [torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(3)]
    mean = tensors[0] + 10
    for rank, found in enumerate(three(exchanged)):
        assert found["rank"] == (rank, 3)
        torch.testing.assert_close(found["mean"], mean)
        torch.testing.assert_close(found["means"], [mean, mean.sum()])
        assert torch.equal(found["gather"], torch.cat(tensors, dim=1))
        assert found["in_turn"] == list("abcde")
        assert found["of_first"] == "rank 0"


def listening() -> set[str]:
    return {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN}


def test_a_group_at_a_loopback_address_listens_nowhere_else(two: Team) -> None:
    assert two(listening)[0] == {"127.0.0.1"}


def of_share(function: Callable[..., Any], whole: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """A function of this rank's share of the images, dimension 1, and the gradient by them of its weighted sum."""
    share = whole.chunk(distributed.workers(), dim=1)[distributed.rank()].clone().requires_grad_()
    result = function(share, *arguments)
    if result.requires_grad:
        weights = torch.arange(1.0, 1 + whole.numel()).view_as(whole)
        mine = weights.chunk(distributed.workers(), dim=1)[distributed.rank()]
        (result * mine if result.ndim else result).sum().backward()
    return result.detach(), share.grad


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    return norm(x.flatten(0, 1)).view_as(x)


def normalised_and_remembered(whole: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    norm = spanning(
        nn.Sequential(nn.BatchNorm1d(whole.shape[2]) if whole.ndim == 3 else nn.BatchNorm2d(whole.shape[2]))
    )
    with torch.no_grad():
        norm[0].weight.add_(torch.arange(whole.shape[2]))
    result, gradient = of_share(normalised, whole, norm)
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return result, gradient, {**norm.state_dict(), **{f"gradient of {name}": each for name, each in gradients.items()}}


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 6, 4, 3, 3)], ids=["features", "pixels"])
def test_batch_normalisation_is_that_of_the_whole_batch_with_its_gradients(shape: tuple[int, ...], three: Team) -> None:
    whole = 1 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result, gradient, state = normalised_and_remembered(whole)
    results, gradients, states = zip(*three(normalised_and_remembered, whole), strict=True)
    torch.testing.assert_close(torch.cat(results, dim=1), result, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(gradients, dim=1), gradient, rtol=1e-4, atol=1e-3)
    for name, value in state.items():
        own = [each[name] for each in states]
        ours = torch.stack(own).sum(dim=0) if name.startswith("gradient") else own[0]
        torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-3, msg=name)


def test_in_one_process_batch_normalisation_is_torchs_to_the_bit() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for norm in (nn.BatchNorm1d(5), spanning(nn.Sequential(nn.BatchNorm1d(5)))[0]):
        ours = x.clone().requires_grad_()
        result = norm(ours)
        (result * x.square()).sum().backward()
        in_use = norm.eval()(x)
        found.append([result, ours.grad, in_use, *norm.state_dict().values(), norm.weight.grad])
        assert list(norm.state_dict()) == list(nn.BatchNorm1d(5).state_dict())
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_evens_the_images_of_all_ranks(iterations: int, three: Team) -> None:
    logits = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(0))
    results = three(sinkhorn_of_share, logits, iterations)
    torch.testing.assert_close(torch.cat(results, dim=1), sinkhorn(logits, 0.1, iterations=iterations))


def sinkhorn_of_share(logits: Tensor, iterations: int) -> Tensor:
    return sinkhorn(logits.chunk(distributed.workers(), dim=1)[distributed.rank()], 0.1, iterations=iterations)


def info_nce_of_share(outputs: Tensor, targets: Tensor) -> Tensor:
    share = targets.chunk(distributed.workers(), dim=1)[distributed.rank()]
    return InfoNCE().between(share, outputs)


def test_info_nce_tells_an_image_from_those_of_all_ranks(three: Team) -> None:
    generator = torch.Generator().manual_seed(0)
    targets, outputs = (torch.randn(crops, 9, 7, generator=generator) for crops in (2, 4))
    whole, gradient = of_share(info_nce_of_share, outputs, targets)
    results, gradients = zip(*three(of_share, info_nce_of_share, outputs, targets), strict=True)
    torch.testing.assert_close(torch.stack(results).mean(), whole)
    torch.testing.assert_close(torch.cat(gradients, dim=1) / 3, gradient)


def drawn(crops: int, images: int) -> tuple[Tensor, Tensor]:
    share = images // distributed.workers()
    with distributed.draws(7, images=share):
        first = distributed.own(torch.rand(crops * images, 2)).unflatten(0, (crops, -1))
        dropping = spanning(nn.Sequential(DropPath(0.4))).train()
        return first, dropping(torch.ones(crops * share, 3, 4)).unflatten(0, (crops, -1))


def test_an_image_gets_the_draws_that_it_gets_from_one_process(three: Team) -> None:
    ours = zip(*three(drawn, 4, 6), strict=True)
    for of_ranks, whole in zip(ours, drawn(4, 6), strict=True):
        assert torch.equal(torch.cat(of_ranks, dim=1), whole)


def test_in_one_process_drop_path_is_timms_to_the_bit() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for layer in (DropPath(0.4), spanning(nn.Sequential(DropPath(0.4)))):
        with distributed.draws(7, images=20):
            results.append(layer.train()(x))
        assert torch.equal(layer.eval()(x), x)
    assert torch.equal(*results)
    assert (results[0] == 0).any()
