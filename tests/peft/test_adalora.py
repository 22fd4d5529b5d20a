"""AdaLoRA's budget and its orthogonality beside the `peft` library."""

import pytest
import torch

from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.peft.adalora import AdaLoRAConfig, RankAllocator, orthogonality
from puna.peft.apply import attach
from puna.peft.files import save_adapter, stored_parameters
from puna.runtime.errors import InputError
from puna.weights.load import save_model

TINY = LlamaConfig(
    vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, context_length=64
)  # fmt: skip
CONFIG = AdaLoRAConfig(
    initial_rank=5,
    target_rank=2,
    alpha=3,
    full_steps=2,
    final_steps=3,
    allocation_interval=2,
    sensitivity_decay=0.8,
    uncertainty_decay=0.7,
    targets=("layers.*.attention.*", "layers.*.feed_forward.up"),
)
STEPS = 14
IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def make():
    model = Transformer(TINY)
    initialize(model, seed=0)
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_training_gives_up_the_ranks_that_peft_gives_up(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = make()
    save_model(model, tmp_path / "base")
    attach(model, CONFIG, seed=1)
    save_adapter(model, CONFIG, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    config = peft.AdaLoraConfig(
        init_r=5, target_r=2, lora_alpha=3, tinit=2, tfinal=3, deltaT=2, beta1=0.8, beta2=0.7, orth_reg_weight=0.5,
        total_step=STEPS, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config)
    own = stored_parameters(model, CONFIG)
    other = {
        name.replace(".default", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad and "ranknum" not in name
    }
    assert own.keys() == other.keys()
    for key, parameter in other.items():
        parameter.data.copy_(own[key].detach())
    allocator = RankAllocator(model, CONFIG, STEPS)
    optimizers = [torch.optim.SGD(parameters, lr=0.5) for parameters in (own.values(), other.values())]

    ranks = []
    for step in range(STEPS + 1):
        logits = model(IDS)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss = loss + CONFIG.orthogonality * orthogonality(model)
        expected = theirs(IDS, labels=IDS).loss
        # float32 training of two implementations drifts apart by rounding.
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        loss.backward()
        expected.backward()
        for optimizer in optimizers:
            optimizer.step()
        allocator.update(step)
        theirs.base_model.update_and_allocate(step)
        ranks.append(sum(int((p != 0).sum()) for key, p in own.items() if key.endswith("lora_E")))
        for key in own:
            if key.endswith("lora_E"):
                assert torch.equal(own[key] == 0, other[key] == 0), (step, key)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert ranks[2] == allocator.full_budget == 50
    assert ranks[-1] == allocator.target_budget == 20
    # Between two allocations, the optimiser moves those that were given up; in the last steps they stay.
    allocated = ranks[4:11:2] + ranks[11:]
    assert allocated == [allocator.budget(step) for step in (4, 6, 8, 10, *range(11, STEPS + 1))]


def test_the_budget_falls_by_a_cubic_curve():
    allocator = RankAllocator(Transformer(TINY), CONFIG, STEPS)
    allocator.full_budget, allocator.target_budget = 1000, 100
    assert [allocator.budget(step) for step in (0, 2, 3, 7, 11, 14)] == [1000, 1000, 732, 179, 100, 100]


def test_no_steps_to_give_up_ranks_in():
    with pytest.raises(InputError, match="leave none of the 5 steps"):
        RankAllocator(make(), CONFIG, 5)
