"""Filters of small convolutional networks removed by the scores of the gradient flow: a part of
:mod:`~minihyperflows.studies.gradient_flow_claims`.

The scores and temperatures are those of the code of Lubana & Dick 2021. All layers share one
ranking, and the best twentieth of each stays. Filters really go, so after each round the network is
smaller. The networks are narrow, and their first convolution has stride 2 (ResNet-20: 4), which
makes a step four times as cheap (16 times).

A global ranking decides two things: how wide each layer gets, and which filters it keeps. Two
controls take them apart. They follow the run of the score, round by round:

    widths     random filters, in each layer as many as the score has left
    uniform    random filters, in each layer the same fraction, at most as many multiplications
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from minihyperflows.data.datasets import Dataset
from minihyperflows.errors import UserError
from minihyperflows.nn import Module, models
from minihyperflows.nn.models.resnets import BasicBlock, ResNet
from minihyperflows.nn.models.vgg import VGG, VGG13
from minihyperflows.related.channels import channel_groups, sizes
from minihyperflows.related.dhp.cost import layer_costs, macs, widths_at
from minihyperflows.related.filters import safeguard, widths
from minihyperflows.related.rounds import Round, Scores, Train, prune_filters, prune_to_widths
from minihyperflows.studies.gradient_flow_runs import (
    DIVERGED,
    DTYPE,
    Build,
    Plan,
    Ranking,
    Row,
    Task,
    prune_and_train,
)

RANKINGS = {
    "random": Ranking("random"),
    "magnitude": Ranking("magnitude"),
    "loss": Ranking("loss_preservation", 5),
    "biased-loss": Ranking("biased_loss_preservation", 5),
    "grasp-200": Ranking("grasp", 200),
    "preserve-1": Ranking("gradient_norm_preservation", 1),
    "grasp-1": Ranking("grasp", 1),
    "preserve-200": Ranking("gradient_norm_preservation", 200),
}
SCORES = ("random", "magnitude", "loss", "biased-loss", "grasp-200", "preserve-1")
PLANS = {
    name: Plan(
        images=2560,
        test_images=5000,
        epochs=8,
        batch_size=32,
        lr=0.02,
        window=2,
        tail=2,
        scored=256,
        probed=1000,
    )
    for name in ("cifar10", "shapes32")
}
TIMES = (4,)  # 320 steps, nearly as many as an epoch of all of CIFAR-10 in batches of 128
KEPT = (0.25,)
WIDTHS, UNIFORM = "widths", "uniform"
CONTROLS = (WIDTHS, UNIFORM)

Widths = Mapping[str, int]

# -- the networks --------------------------------------------------------------------------------


def vgg13(data: Dataset, rng: np.random.Generator) -> Module:
    """VGG-13 at a quarter of its width."""
    return VGG(VGG13, len(data.classes), 0.25, rng, DTYPE, stem_stride=2)


def resnet20(data: Dataset, rng: np.random.Generator) -> Module:
    """ResNet-20, of basic blocks; its first stride is 4."""
    stages = ((3, 16), (3, 32), (3, 64))
    return ResNet(BasicBlock, stages, len(data.classes), 1.0, rng, DTYPE, stem_stride=4)


def mobilenet(data: Dataset, rng: np.random.Generator) -> Module:
    """MobileNet-V1 at a quarter of its width, with the first stride of Howard et al. 2017."""
    net = models.mobilenet_v1(len(data.classes), 0.25, rng=rng, dtype=DTYPE)
    net.features[0][0].stride = 2  # type: ignore[index]
    return net


NETWORKS: dict[str, Build] = {"vgg13": vgg13, "resnet20": resnet20, "mobilenet": mobilenet}

# -- the runs ------------------------------------------------------------------------------------


def require_possible(task: Task, kept: float, name: str) -> None:
    """Raise UserError if more channels must stay than the fraction ``kept``."""
    groups = channel_groups(task.network(0), task.data.train_x.shape[1:])
    total, least = (sum(sizes.values()) for sizes in (widths(groups), safeguard(groups)))
    if round(kept * total) < least:
        stays = f"{least} of {total} channels stay in any case"
        raise UserError(f"--kept {kept:g} is too little for {name}: {stays}")


def run(
    task: Task,
    score: str,
    start: int,
    rounds: int,
    kept: float,
    seed: int,
    controls: Sequence[str] = CONTROLS,
) -> Iterator[Row]:
    """Prune all but the fraction ``kept`` of the channels, and train: the results, with "control"
    empty, and after them those of the controls."""
    image = task.data.train_x.shape[1:]
    whole = task.network(seed)
    groups = channel_groups(whole, image)
    scores = task.scores(RANKINGS[score], "filter", seed)

    def by_score(net: Module, train: Train) -> Iterator[Round]:
        return prune_filters(net, image, 1 - kept, rounds, train, scores, least=safeguard(groups))

    done, effects = prune_and_train(task, seed, start, rounds, by_score)
    yield {"control": ""} | size(done, whole, image) | effects
    if len(done) < rounds:  # it has diverged, and there is nothing to follow
        yield from ({"control": control} | DIVERGED for control in controls)
        return
    course = [{name: int(mask.sum()) for name, mask in r.keep.items()} for r in done]
    for control in controls:
        goal = course if control == WIDTHS else uniform(whole, image, course)
        draws = task.scores(Ranking("random"), "filter", seed)

        def at_random(
            net: Module, train: Train, goal: Sequence[Widths] = goal, draws: Scores = draws
        ) -> Iterator[Round]:
            return prune_to_widths(net, image, goal, train, draws)

        done, effects = prune_and_train(task, seed, start, len(goal), at_random)
        yield {"control": control} | size(done, whole, image) | effects


def uniform(
    whole: Module, image: tuple[int, ...], course: Sequence[Widths]
) -> list[dict[str, int]]:
    """Widths that are the same fraction of each group of ``whole``, for the multiplications of
    each of the widths in ``course``."""
    groups = channel_groups(whole, image)
    costs = layer_costs(whole, image, groups)
    full = sizes(groups)
    found = []
    for kept in course:
        ratio = macs(costs, full | dict(kept)) / macs(costs, full)
        chosen = widths_at(ratio, costs, groups, floors=safeguard(groups))
        found.append({name: chosen[name] for name in kept})
    return found


def size(done: Sequence[Round], whole: Module, image: tuple[int, ...]) -> Row:
    """How wide and how costly the last round's network is, against the one that it comes from.

    ``widths`` has a number for each group of channels, in their order, with spaces between. Without
    a round there is nothing to say.
    """
    if not done:
        return {}
    net = done[-1].net
    now, full = (channel_groups(n, image) for n in (net, whole))
    work = [
        macs(layer_costs(n, image, groups), sizes(groups))
        for n, groups in ((net, now), (whole, full))
    ]
    return {
        "remaining": sum(widths(now).values()),
        "total": sum(widths(full).values()),
        "widths": " ".join(map(str, widths(now).values())),
        "full_widths": " ".join(map(str, widths(full).values())),
        "macs": work[0],
        "macs_fraction": work[0] / work[1],
        "parameters": sum(p.size for p in net.parameters()),
    }
