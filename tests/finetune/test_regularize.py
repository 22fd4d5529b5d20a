"""What is wrapped around a loss: against papers' equations by hand, against naive twins, and in whole trainings."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from puna.batches.mixture import whole_counts
from puna.batches.packing import IGNORE, PADDING, TokenBatch
from puna.finetune.neftune import with_noise
from puna.finetune.numbered import row_numbers, twice, with_numbers
from puna.finetune.regularize.adversary import sum_by_text, with_adversary
from puna.finetune.regularize.agreement import symmetric_divergence, token_divergence, with_agreement
from puna.finetune.regularize.config import AdversaryConfig
from puna.finetune.regularize.dropout import add_dropout, kept
from puna.finetune.regularize.ewc import diagonal_fisher, ewc_penalty
from puna.finetune.regularize.rates import layer_rates
from puna.finetune.tasks.classification import OpenClassification
from puna.finetune.tasks.spans import OpenSpans
from puna.finetune.tasks.tagging import OpenTagging
from puna.finetune.tasks.task import Example, ExampleBatch, collate
from puna.model.attend import DocumentAttend
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Linear, Transformer
from puna.peft.apply import attach
from puna.peft.lora import LoRAConfig
from puna.train.loss import LossSum, causal_lm_loss

VOCABULARY = 11


def tiny(num_layers: int = 2) -> Transformer:
    config = LlamaConfig(
        vocab_size=VOCABULARY, dim=16, num_layers=max(1, num_layers), num_heads=2, num_kv_heads=1, head_dim=8,
        hidden_dim=24, context_length=32,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, seed=0)
    del model.layers[num_layers:]
    return model.train()


def batch_of(lengths: list[list[int]], row_length: int = 8, first_row: int = 0) -> TokenBatch:
    """Random ids in texts of these lengths; in each text the first half carries no loss."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids_BT = torch.randint(VOCABULARY, (len(lengths), row_length), generator=generator)
    labels_BT, documents_BT = torch.full_like(ids_BT, IGNORE), torch.full_like(ids_BT, PADDING)
    positions_BT = torch.zeros_like(ids_BT)
    for row, texts in enumerate(lengths):
        start = 0
        for number, length in enumerate(texts):
            stop = start + length
            documents_BT[row, start:stop] = number
            positions_BT[row, start:stop] = torch.arange(length)
            labels_BT[row, start + length // 2 : stop - 1] = ids_BT[row, start + length // 2 + 1 : stop]
            start = stop
    batch = TokenBatch(ids_BT, labels_BT, positions_BT, documents_BT)
    return with_numbers(batch, torch.arange(first_row, first_row + len(lengths)))


texts = st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=2), min_size=1, max_size=3)


def gradients(model: Transformer, total: Tensor) -> dict[str, Tensor]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad(total, [model.get_parameter(name) for name in names], allow_unused=True)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        # float32 sums over other groupings of rows
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# Dropout


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0.05, 0.9), rows=st.lists(st.integers(-5, 5), min_size=2, max_size=4, unique=True))
def test_what_is_dropped_follows_from_the_row(rate: float, rows: list[int]) -> None:
    x_BTD = torch.ones(len(rows), 30, 40)
    together = kept(x_BTD, rows, rate, seed=3)
    for at, row in enumerate(rows):
        assert torch.equal(together[at], kept(x_BTD[:1], [row], rate, seed=3)[0])
    assert not torch.equal(together[0], together[1])
    torch.testing.assert_close(together.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
    share = (together[0] == 0).float().mean()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / 1200) ** 0.5  # five standard deviations


def test_dropout_is_where_it_should_be_and_micro_batches_do_not_matter() -> None:
    model = tiny()
    added: list[Tensor] = []
    loss = add_dropout(model, residual=0.5, embedding=0.25, seed=1)(causal_lm_loss)
    batch = batch_of([[8], [4, 4], [3]])
    model.layers[1].feed_forward.register_forward_hook(lambda module, inputs, x_BTD: added.append(x_BTD))
    whole = loss(model, batch)
    assert 0.4 < (added[0] == 0).float().mean() < 0.6
    parts = [loss(model, part) for part in batch.split(1)]
    assert_same(gradients(model, whole.total), gradients(model, torch.stack([part.total for part in parts]).sum()))
    assert loss(model, batch).total == whole.total
    other = loss(model, batch_of([[8], [4, 4], [3]], first_row=3))
    assert other.total != whole.total
    model.eval()
    assert loss(model, batch).total == causal_lm_loss(tiny().eval(), batch).total


def test_dropout_under_activation_checkpointing_drops_the_same() -> None:
    from puna.parallel.activations import checkpoint_activations
    from puna.parallel.config import ParallelConfig

    found = []
    for kind in ("none", "full"):
        model = tiny()
        checkpoint_activations(model, ParallelConfig(activation_checkpointing=kind))
        loss = add_dropout(model, residual=0.3, embedding=0.3, seed=1)(causal_lm_loss)
        found.append(gradients(model, loss(model, batch_of([[8], [4, 4]])).total))
    assert_same(*found)


# Adversaries


def test_fgm_and_pgd_on_a_linear_loss_by_hand() -> None:
    """Without layers and norm a loss can be linear in the embeddings: sum of <c, x>. Then r = epsilon u c / |c|, and
    the loss rises by epsilon u |c| for each text, u being the root of the embeddings' mean square."""
    model = tiny(num_layers=0)
    model.norm = nn.Identity()  # type: ignore[assignment]
    batch = batch_of([[3, 5], [8]])
    c_BTD = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(5))

    def linear(model: Transformer, batch: TokenBatch) -> LossSum:
        attend = DocumentAttend(batch.documents_BT)
        total = model(batch.ids_BT, batch.positions_BT, attend, lambda h_BTD, _: (c_BTD * h_BTD).sum())
        return LossSum(total, 2)

    x_BTD = model.embedding(batch.ids_BT).detach()
    rise = torch.zeros(())
    for row, start, stop in ((0, 0, 3), (0, 3, 8), (1, 0, 8)):
        unit = x_BTD[row, start:stop].square().mean().sqrt()
        rise += unit * c_BTD[row, start:stop].norm()
    clean = linear(model, batch).total
    for config in (AdversaryConfig(epsilon=0.7, weight=2.0), AdversaryConfig(0.7, steps=4, step_size=0.3, weight=2.0)):
        part = with_adversary(linear, config)(model, batch)
        torch.testing.assert_close(part.total, clean + 2 * (clean + 0.7 * rise), rtol=1e-5, atol=1e-5)
        assert part.count == 2
    few = with_adversary(linear, AdversaryConfig(0.7, steps=2, step_size=0.3, weight=1.0))(model, batch)
    torch.testing.assert_close(few.total, 2 * clean + 0.6 * rise, rtol=1e-5, atol=1e-5)


def naive_adversary(model: Transformer, batch: TokenBatch, config: AdversaryConfig) -> Tensor:
    """The readable twin: texts one by one, each as a batch of its own, with embeddings as inputs."""
    total = torch.zeros(())
    for row in range(len(batch.ids_BT)):
        for number in range(int(batch.documents_BT[row].max()) + 1):
            chosen = batch.documents_BT[row] == number
            ids_1T, labels_T = batch.ids_BT[row : row + 1, chosen], batch.labels_BT[row, chosen]

            def nats(r_1TD: Tensor, ids_1T: Tensor = ids_1T, labels_T: Tensor = labels_T) -> Tensor:
                hook = model.embedding.register_forward_hook(lambda module, inputs, x: x + r_1TD)
                logits = model(ids_1T)[0]
                hook.remove()
                return F.cross_entropy(logits, labels_T, ignore_index=IGNORE, reduction="sum")

            x_1TD = model.embedding(ids_1T).detach()
            unit = x_1TD.square().mean().sqrt()
            r = torch.zeros_like(x_1TD)
            total = total + nats(r)
            for _ in range(config.steps):
                r.requires_grad_()
                g = torch.autograd.grad(nats(r), r)[0]
                if not g.any():
                    break
                r = r.detach() + (config.epsilon if config.steps == 1 else config.step_size) * unit * g / g.norm()
                r = r * min(1.0, float(config.epsilon * unit / r.norm()))
            total = total + config.weight * nats(r.detach())
    return total


@settings(max_examples=15, deadline=None)
@given(lengths=texts, steps=st.integers(1, 3), epsilon=st.floats(0.1, 3.0))
def test_adversaries_equal_their_naive_twin(lengths: list[list[int]], steps: int, epsilon: float) -> None:
    model, batch = tiny(), batch_of(lengths)
    config = AdversaryConfig(epsilon=epsilon, steps=steps, step_size=0.4, weight=0.5)
    ours, theirs = with_adversary(causal_lm_loss, config)(model, batch).total, naive_adversary(model, batch, config)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert_same(gradients(model, ours), gradients(model, theirs))


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_changed_embeddings_under_adapters(method: str) -> None:
    from puna.peft.prefix import PrefixConfig
    from puna.peft.prompt import PromptConfig

    model = tiny()
    attach(model, {"lora": LoRAConfig(), "prompt": PromptConfig(), "prefix": PrefixConfig()}[method])

    def plain(model: Transformer, batch: TokenBatch) -> LossSum:
        logits_BTV = model(batch.ids_BT, batch.positions_BT, DocumentAttend(batch.documents_BT))
        total = F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")
        return LossSum(total, batch.num_targets)

    batch = batch_of([[8], [3, 4]])
    clean = plain(model, batch)
    part = with_adversary(plain, AdversaryConfig(epsilon=0.5))(model, batch)
    assert part.total > 2 * clean.total
    assert gradients(model, part.total)
    noisy = with_noise(plain, 5.0, seed=1)(model, batch)
    assert noisy.total != clean.total
    assert noisy.total == with_noise(plain, 5.0, seed=1)(model, batch).total


def test_sums_by_text() -> None:
    documents_BT = torch.tensor([[0, 0, 1, PADDING], [0, 1, 2, 2]])
    x_BT = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert sum_by_text(x_BT, documents_BT).tolist() == [[3, 3, 3, 4], [5, 6, 15, 15]]


# R-Drop


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_the_divergence_is_that_of_torch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p, log_q = torch.randn(2, 5, 7, generator=generator).mul(3).log_softmax(-1)
    kl = [F.kl_div(b, a, reduction="sum", log_target=True) for a, b in ((log_p, log_q), (log_q, log_p))]
    torch.testing.assert_close(symmetric_divergence(log_p, log_q), (kl[0] + kl[1]) / 2)


def test_rdrop_is_two_passes_and_their_divergence() -> None:
    model, batch = tiny(), batch_of([[8], [4, 4], [3]])
    loss = add_dropout(model, residual=0.2, embedding=0.1, seed=1)(causal_lm_loss)
    ours = with_agreement(loss, 3.0, token_divergence)(model, batch)

    both = twice(batch)
    assert row_numbers(both) == [0, 1, 2, -1, -2, -3]
    distributions, nats = [], []
    for part in both.split(3):
        loss(model, part)  # to draw for these rows
        logits_BTV = model(part.ids_BT, part.positions_BT, DocumentAttend(part.documents_BT))
        asked = part.labels_BT != IGNORE
        distributions.append(logits_BTV[asked].log_softmax(-1))
        nats.append(F.cross_entropy(logits_BTV[asked], part.labels_BT[asked], reduction="sum"))
    apart = symmetric_divergence(*distributions)
    theirs = nats[0] + nats[1] + 3.0 * apart
    assert apart > 0
    assert ours.count == 2 * batch.num_targets
    torch.testing.assert_close(ours.total, theirs, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model, ours.total), gradients(model, theirs))
    model.eval()
    assert with_agreement(loss, 3.0, token_divergence)(model, batch).total == causal_lm_loss(model, batch).total


def test_rdrop_without_a_target_costs_nothing() -> None:
    model, batch = tiny(), batch_of([[1]])
    part = with_agreement(causal_lm_loss, 3.0, token_divergence)(model, batch)
    assert (part.total.item(), part.count) == (0.0, 0)


def opened(kind: type[Any], **settings: Any) -> Any:
    """A task without data, for what follows from its settings alone."""
    task = object.__new__(kind)
    task.task = SimpleNamespace(**settings)
    task.labels = ("a", "b")
    return task


def examples_twice(labels: list[list[int]]) -> ExampleBatch:
    examples = [Example([1] * len(each), each, (0.0, 0.0)) for each in labels]
    return collate(examples * 2, pad_id=0)


def test_divergences_of_tasks_by_hand() -> None:
    logits_BTC = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2))
    batch = examples_twice([[IGNORE, 0, 1], [IGNORE, 1]])
    p, q = logits_BTC[:2].softmax(-1), logits_BTC[2:].softmax(-1)
    places = [(0, 1), (0, 2), (1, 1)]
    both_ways = sum((p[at] * (p[at] / q[at]).log() + q[at] * (q[at] / p[at]).log()).sum() / 2 for at in places)
    torch.testing.assert_close(opened(OpenTagging).divergence(logits_BTC, batch), both_ways)
    one = opened(OpenClassification, problem="one_class")
    torch.testing.assert_close(one.divergence(logits_BTC, batch), both_ways)

    number = opened(OpenClassification, problem="number").divergence(logits_BTC[..., :1], batch)
    torch.testing.assert_close(number, sum((logits_BTC[r, t, 0] - logits_BTC[r + 2, t, 0]) ** 2 for r, t in places))

    p, q = logits_BTC[:2].sigmoid(), logits_BTC[2:].sigmoid()
    bernoulli = sum(
        ((p[at] - q[at]) * (p[at] / q[at]).log() + (q[at] - p[at]) * ((1 - p[at]) / (1 - q[at])).log()).sum() / 2
        for at in places
    )
    many = opened(OpenClassification, problem="many_classes").divergence(logits_BTC, batch)
    torch.testing.assert_close(many, bernoulli / 2)

    ends = torch.zeros(())
    for row, length in ((0, 3), (1, 2)):
        for end in (0, 1):
            p_T, q_T = (logits_BTC[r, :length, end].softmax(-1) for r in (row, row + 2))
            ends += ((p_T - q_T) * (p_T / q_T).log()).sum() / 2
    spans = opened(OpenSpans).divergence(logits_BTC.requires_grad_(), batch)
    torch.testing.assert_close(spans, ends / 2)
    assert torch.autograd.grad(spans, logits_BTC)[0].isfinite().all()


# Elastic weight consolidation


class Listed:
    """Rows that are there already."""

    def __init__(self, batch: TokenBatch) -> None:
        self.parts = batch.split(1)

    def batch(self, rows: Any) -> TokenBatch:
        [row] = rows
        return self.parts[row]


def test_fisher_information_by_hand() -> None:
    """Of a softmax regression: the gradient by the output's weight is sum over tokens of (p - onehot) h^T."""
    model = tiny(num_layers=0)
    model.embedding.requires_grad_(False)
    batch = batch_of([[8], [4, 3], [3]])
    found = diagonal_fisher(model, Listed(batch), causal_lm_loss, 3)
    wanted = torch.zeros_like(model.output.weight)
    for part in batch.split(1):
        asked = part.labels_BT != IGNORE
        h_ND = model.norm(model.embedding(part.ids_BT[asked]))
        error_NV = model.output(h_ND).softmax(-1) - F.one_hot(part.labels_BT[asked], VOCABULARY)
        wanted += (error_NV.T @ h_ND).square()
    torch.testing.assert_close(found["output.weight"], wanted / batch.num_targets, rtol=1e-4, atol=1e-6)
    assert "embedding.weight" not in found
    assert model.training


def test_the_penalty_by_hand() -> None:
    model = tiny(num_layers=1)
    information = {"norm.weight": torch.arange(16.0)}
    penalty = ewc_penalty(model, information, strength=3.0)
    assert penalty(model) == 0
    with torch.no_grad():
        model.norm.weight += 2.0
        model.output.weight += 1.0
    value = penalty(model)
    assert value.item() == pytest.approx(3.0 / 2 * 4.0 * sum(range(16)))
    torch.testing.assert_close(torch.autograd.grad(value, model.norm.weight)[0], 3.0 * torch.arange(16.0) * 2.0)


def test_the_penalty_foresees_the_rise_of_the_loss() -> None:
    """Of a softmax regression whose labels come as often as the model says: at a small change of one number."""
    model = tiny(num_layers=0)
    model.embedding.requires_grad_(False)
    contexts = [1, 2, 3]
    with torch.no_grad():
        p_NV = model(torch.tensor(contexts)[:, None])[:, 0].softmax(-1)
    counts = [whole_counts(p_V.tolist(), 300) for p_V in p_NV]
    ids = torch.tensor(contexts).repeat_interleave(300)[:, None]
    labels = torch.cat([torch.arange(VOCABULARY).repeat_interleave(torch.tensor(each)) for each in counts])[:, None]
    batch = TokenBatch(ids, labels, torch.zeros_like(ids), torch.zeros_like(ids))
    penalty = ewc_penalty(model, diagonal_fisher(model, Listed(batch), causal_lm_loss, len(ids)), strength=1.0)
    with torch.no_grad():
        before = causal_lm_loss(model, batch).total / len(ids)
        rise = torch.zeros(())
        for change in (0.2, -0.2):
            model.output.weight[5, 3] += change
            rise += (causal_lm_loss(model, batch).total / len(ids) - before) / 2  # what is linear cancels
            foreseen = penalty(model)
            model.output.weight[5, 3] -= change
    # Counts are rounded to 1 / 300, and beyond the square the loss has a fourth power.
    assert rise.item() == pytest.approx(foreseen.item(), rel=0.1)


# Learning rates


@pytest.mark.parametrize("adapted", [False, True])
def test_rates_fall_from_the_head_to_the_embedding(adapted: bool) -> None:
    model = tiny()
    model.add_module("score", Linear(16, 3, bias=False))
    if adapted:
        attach(model, LoRAConfig(targets=("*.query",)))
        assert set(layer_rates(model, 0.5).values()) == {0.25, 0.5}
        return
    rates = layer_rates(model, 0.5)
    wanted = {
        "embedding.weight": 0.125,
        "layers.0.attention.query.weight": 0.25,
        "layers.1.feed_forward.up.weight": 0.5,
    }
    assert {name: rates[name] for name in wanted} == wanted
    assert not rates.keys() & {"norm.weight", "output.weight", "score.weight"}
