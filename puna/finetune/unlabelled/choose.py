"""Which texts to ask a person about: those that the model is least sure of, and that are not alike.

Shapes: N texts, C classes, D model dimension, M texts labelled already.
"""

import importlib
from typing import Literal

import torch
from torch import Tensor

from puna.runtime.errors import InputError

Uncertainty = Literal["least_confidence", "margin", "entropy"]
Diversity = Literal["none", "k_centre", "k_means"]


def uncertainty(probabilities_NC: Tensor, by: Uncertainty) -> Tensor:
    """How unsure a model is of each text, [N], from 0 (Settles 2009, "Active learning literature survey", section 3.1).

    least_confidence   1 - p of the likeliest class
    margin             1 - (p of the likeliest - p of the second)
    entropy            - sum p log p, in nats
    """
    match by:
        case "least_confidence":
            return 1 - probabilities_NC.max(-1).values
        case "margin":
            best_N2 = probabilities_NC.topk(2).values
            return 1 - (best_N2[:, 0] - best_N2[:, 1])
        case "entropy":
            entropy_N: Tensor = torch.special.entr(probabilities_NC).sum(-1)
            return entropy_N


def k_centre(states_ND: Tensor, count: int, centres_MD: Tensor) -> list[int]:
    """Texts that leave none of the others far from a chosen or labelled one, in the order of choice (Sener and Savarese
    2018, arXiv:1708.00489, algorithm 1): each is the farthest from all before it.

    Args:
        centres_MD: states of texts that are labelled; where there are none the first text is the first chosen.
    """
    chosen = [] if len(centres_MD) else [0]
    centres_KD = centres_MD if len(centres_MD) else states_ND[:1]
    nearest_N = torch.cdist(states_ND, centres_KD).min(-1).values
    while len(chosen) < min(count, len(states_ND)):
        nearest_N[chosen] = -1.0
        chosen.append(int(nearest_N.argmax()))
        nearest_N = nearest_N.minimum(torch.cdist(states_ND, states_ND[chosen[-1:]])[:, 0])
    return chosen


def k_means(states_ND: Tensor, count: int, weights_N: Tensor, seed: int) -> list[int]:
    """The text nearest to each of `count` centres of clusters in which texts weigh as the model is unsure of them
    (Zhdanov 2019, arXiv:1901.05954).

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        cluster = importlib.import_module("sklearn.cluster")
    except ImportError as error:
        raise InputError("Choosing by k_means needs scikit-learn: pip install 'puna[tasks]'.") from error
    count = min(count, len(states_ND))
    # A weight of 0 would take a text out of the count.
    weights_N = weights_N.clamp(min=torch.finfo(weights_N.dtype).eps)
    clusters = cluster.KMeans(count, random_state=seed % 2**32, n_init=1).fit(
        states_ND.numpy(), None, weights_N.numpy()
    )
    distances_NK = torch.cdist(states_ND, torch.as_tensor(clusters.cluster_centers_, dtype=states_ND.dtype))
    chosen: list[int] = []
    for centre in range(count):
        distances_N = distances_NK[:, centre].clone()
        distances_N[chosen] = float("inf")
        chosen.append(int(distances_N.argmin()))
    return chosen


def choose(
    probabilities_NC: Tensor,
    states_ND: Tensor,
    count: int,
    *,
    by: Uncertainty,
    diversity: Diversity,
    candidates: int,
    labelled_MD: Tensor,
    seed: int,
) -> list[int]:
    """The texts to label next, the most useful first.

    Args:
        count: how many.
        by: what a model's being unsure is measured by.
        diversity: how texts that are alike are avoided, among the `candidates` * `count` that the model is least sure
            of.
        labelled_MD: states of the texts that are labelled; k_centre keeps away from them.
        seed: of the clusters.
    """
    unsure_N = uncertainty(probabilities_NC, by)
    order = unsure_N.argsort(descending=True, stable=True)
    if diversity == "none":
        return order[:count].tolist()
    pool = order[: candidates * count]
    if diversity == "k_centre":
        places = k_centre(states_ND[pool], count, labelled_MD)
    else:
        places = k_means(states_ND[pool], count, unsure_N[pool], seed)
    return pool[places].tolist()
