"""The look at the first two steps: planted mistakes are named, healthy recipes are let be, and nothing is left."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import veneer
from models import IDS, MODELS
from small import llama, scramble
from test_cli import SMALL, made  # noqa: F401
from veneer.cli.app import app
from veneer.training.trained import spread_positions
from veneer.training.watch import Watch

LINEAR = "all-linear"


def adapted(base: Any = None, name: str = "default", **options: Any) -> Any:
    config = veneer.LoraConfig(**{"r": 4, "target_modules": LINEAR, **options})
    return veneer.get_peft_model(llama() if base is None else base, config, name).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: Any, **more: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS, **more).loss
    return loss


def steps(
    model: Any, optimizer: Any, loss: Callable[[Any], torch.Tensor] = loss_of, count: int = 2, schedule: Any = None
) -> None:
    for _ in range(count):
        loss(model).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def hooks(model: nn.Module) -> int:
    """How many hooks there are in a model and on its parameters."""
    found = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return found + sum(len(p._backward_hooks or ()) for p in model.parameters())


# Mistakes. Each returns what was found, with `action="warn"`, so that a test sees all of it.


def no_gradient() -> Watch:
    base = llama()
    model = adapted(base)
    mlp = base.model.layers[1].mlp
    mlp.forward = lambda x: (mlp.up_proj(x), x)[1]
    return run(model)


def detached() -> Watch:
    base = llama()
    base.model.layers[0].register_forward_hook(lambda m, a, y: y.detach())
    return run(adapted(base))


def zeroed() -> Watch:
    base = llama()
    base.model.layers[1].mlp.register_forward_hook(lambda m, a, y: y * 0)
    return run(adapted(base))


def both_factors_zero() -> Watch:
    model = adapted()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.zero_()
    return run(model)


def optimizer_lacks_some() -> Watch:
    model = adapted()
    return run(model, torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_B" in n], lr=1e-2))


def attached_after() -> Watch:
    base = llama()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    return run(adapted(base), optimizer)


def attached_again() -> Watch:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    model.add_adapter("other", veneer.LoraConfig(r=4, target_modules=LINEAR))
    model.set_adapter("other")
    model.delete_adapter("default")
    return run(model, optimizer)


def one_of_two_stale() -> Watch:
    model = adapted(name="a")
    model.add_adapter("b", veneer.LoraConfig(r=4, target_modules=LINEAR))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    model.set_adapter("b")
    model.delete_adapter("a")
    return run(model, optimizer)


def rate_of_zero() -> Watch:
    model = adapted()
    return run(model, torch.optim.AdamW(trained(model), lr=0.0))


def zero_grad_first() -> Watch:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with veneer.watch(model, optimizer, action="warn") as watch:
        for _ in range(3):
            loss_of(model).backward()
            optimizer.zero_grad()
    return watch


def scaler_skips() -> Watch:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with veneer.watch(model, optimizer, action="warn") as watch:
        for _ in range(5):
            scaler.scale(loss_of(model) * 100).backward()
            scaler.step(optimizer)
            scaler.update(2.0**127)
            optimizer.zero_grad()
    return watch


def nan_in_the_forward() -> Watch:
    base = llama()
    model = adapted(base)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    return run(model)


def nan_in_the_adapter() -> Watch:
    model = adapted()
    with torch.no_grad():
        dict(model.named_parameters())["base_model.model.model.layers.0.self_attn.v_proj.lora_A:default"][0, 0] = (
            torch.inf
        )
    return run(model)


def overflow() -> Watch:
    base = llama(dtype=torch.float16)
    with torch.no_grad():
        base.model.layers[1].mlp.gate_proj.weight.mul_(3e4)
        base.model.layers[1].mlp.up_proj.weight.mul_(3e4)
    return run(adapted(base))


def nan_in_the_backward() -> Watch:
    base = llama()

    def root_of_zero(module: Any, args: Any, y: Any) -> Any:
        return y + (y - y.detach()).sqrt()  # 0, with an infinite gradient

    base.model.layers[0].mlp.register_forward_hook(root_of_zero)
    return run(adapted(base))


def loss_without_a_gradient() -> Watch:
    def loss(model: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=IDS).logits
        return logits.mean() + (logits - logits.detach()).sqrt().sum()

    return run(adapted(), loss=loss)


def half_precision() -> Watch:
    return run(adapted(llama(dtype=torch.bfloat16)).to(torch.bfloat16))


def state_in_half() -> Watch:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    steps(model, optimizer, count=1)
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
        state["exp_avg"] = state["exp_avg"].bfloat16()
    return run(model, torch_sgd_like(model, optimizer))


def torch_sgd_like(model: Any, other: Any) -> Any:
    """An optimizer that keeps a state in half precision."""

    class Half(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step()
            for p, state in other.state.items():
                self.state[p] = state

    return Half(trained(model), lr=1e-2)


def checkpoints_without_a_gradient() -> Watch:
    base = llama()
    model = adapted(base)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads()
    with pytest.raises(RuntimeError), veneer.watch(base, sgd(model), action="warn") as watch:  # torch's own complaint
        loss_of(base).backward()
    return watch


def base_is_trained() -> Watch:
    base = llama()
    model = adapted(base)
    base.lm_head.weight.requires_grad = True
    return run(model)


def base_moves() -> Watch:
    base = llama()
    loss_of(base.train()).backward()  # before it is frozen
    model = adapted(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return run(model, optimizer)


def statistics_move() -> Watch:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["3"])).train()
    x = torch.randn(4, 3, 8, 8)
    return run(model, loss=lambda m: nn.functional.cross_entropy(m(x), torch.tensor([0, 1, 2, 3])))


def other_is_active() -> Watch:
    model = adapted()
    model.add_adapter("b", veneer.LoraConfig(r=4, target_modules=LINEAR))
    model.set_requires_grad("default", False)
    with pytest.raises(RuntimeError), veneer.watch(model, sgd(model), action="warn") as watch:
        loss_of(model).backward()
    return watch


def one_more_is_trained() -> Watch:
    model = adapted()
    model.add_adapter("b", veneer.LoraConfig(r=4, target_modules=LINEAR))
    return run(model)


def loaded_frozen() -> Watch:
    model = adapted()
    model.set_requires_grad("default", False)
    with pytest.raises(RuntimeError), veneer.watch(model, action="warn") as watch:
        loss_of(model).backward()
    return watch


def merged() -> Watch:
    model = adapted()
    scramble(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError), veneer.watch(model, sgd(model), action="warn") as watch:
        loss_of(model).backward()
    return watch


def no_labels() -> Watch:
    def loss(model: Any) -> torch.Tensor:
        out: torch.Tensor = model(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=1).loss
        return out

    return run(adapted(), loss=loss)


def no_labels_and_nan() -> Watch:
    return run(adapted(), loss=lambda m: m(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss)


def no_loss() -> Watch:
    return run(adapted(), loss=lambda m: loss_of(m) * 0)


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(trained(model) or [nn.Parameter(torch.ones(1))], lr=0.1)


def run(model: Any, optimizer: Any = None, loss: Callable[[Any], torch.Tensor] = loss_of) -> Watch:
    """Two steps, watched."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2) if optimizer is None else optimizer
    with veneer.watch(model, optimizer, action="warn") as watch:
        steps(model, optimizer, loss)
    return watch


# what is done wrong -> (kind, whether training is pointless, what the message says)
MISTAKES: dict[Callable[[], Watch], tuple[str, bool, str]] = {
    no_gradient: ("no gradient", False, r"layers\.1\.mlp\.up_proj\.lora_A.*leave them out of target_modules"),
    detached: ("cut", True, r"14 of 28 trained.*layers\.0\.self_attn\.q_proj.*detaches.*look for detach"),
    zeroed: ("zero gradient", False, r"of 6 of 28.*layers\.1\.mlp\.gate_proj.*multiplied by 0"),
    both_factors_zero: ("loss", True, r"every gradient was 0 in both steps.*does not depend"),
    optimizer_lacks_some: ("optimizer", False, r"lacks 14 of 28 trained.*lora_A.*after the optimizer was built"),
    attached_after: ("optimizer", True, r"lacks 28 of 28.*build the optimizer after the last get_peft_model"),
    attached_again: ("optimizer", True, r"lacks 28 of 28 trained parameters, and holds 28 parameters that the model"),
    one_of_two_stale: ("stale", False, r"holds 28 parameters that the model does not have.*deleted or attached again"),
    rate_of_zero: ("still", True, r"no trained weight moved in 2 steps.*learning rate is 0 after the first"),
    zero_grad_first: ("still", True, r"AdamW made no step.*zero_grad\(\) comes between"),
    scaler_skips: ("still", False, r"NaN or Inf and AdamW made no step.*GradScaler.*init_scale"),
    nan_in_the_forward: ("not finite", True, r"loss is nan in step 1.*first at the output of model\.layers\.1\.mlp\.up_proj"),
    nan_in_the_adapter: ("not finite", True, r"output of model\.layers\.0\.self_attn\.v_proj.*lora_A:default.*broken"),
    overflow: ("not finite", True, r"output of model\.layers\.1\.mlp.*float16, whose largest number is 65504"),
    nan_in_the_backward: (
        "not finite", True,
        r"gradients are NaN or Inf in step 1.*first at model\.layers\.0\.mlp\.down_proj\S*, after model\.layers\.1",
    ),
    loss_without_a_gradient: ("not finite", True, r"comes into the model's output already"),
    half_precision: ("dtype", False, r"28 of 28 trained parameters are in bfloat16.*cast the model before get_peft_model"),
    state_in_half: ("dtype", False, r"optimizer's exp_avg\S* of model.*bfloat16 for a float32"),
    checkpoints_without_a_gradient: ("cut", True, r"28 of 28 trained.*checkpointing.*enable_input_require_grads"),
    base_is_trained: ("base", False, r"1 weights of the base model are trained.*lm_head.*modules_to_save"),
    base_moves: ("base", False, r"frozen weights of the base model moved in step 1: model\.embed_tokens.*requires_grad\]"),
    statistics_move: ("statistics", False, r"1\.running_mean.*\.eval\(\)"),
    other_is_active: ("idle", True, r"active: 'default'; trained: 'b'.*set_adapter\('b'\)"),
    one_more_is_trained: ("idle", False, r"adapters 'b' are trained and were not at work.*set_requires_grad\('b', False\)"),
    loaded_frozen: ("idle", True, r"trained: none.*is_trainable=True"),
    merged: ("idle", True, r"'default' are merged into the base weights.*unmerge_adapter"),
    no_labels: ("labels", True, r"all labels are -100.*max_length"),
    no_labels_and_nan: ("labels", True, r"all labels are -100: the loss is nan"),
    no_loss: ("loss", True, r"every gradient was 0 in both steps.*so was the loss|every gradient was 0 in both steps"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_planted_mistakes_are_named(mistake: Callable[[], Watch]) -> None:
    kind, fatal, text = MISTAKES[mistake]
    watch = mistake()
    found = [f for f in watch.findings if f.kind == kind]
    assert [f.fatal for f in found] == [fatal], watch.findings
    assert re.search(text, str(found[0])), str(found[0])
    assert len(watch.findings) == 1, watch.findings
    assert watch.closed


def test_what_is_pointless_raises_and_leaves_nothing() -> None:
    base = llama()
    base.model.layers[0].register_forward_hook(lambda m, a, y: y.detach())
    before = hooks(base)
    model = adapted(base)
    optimizer = sgd(model)
    with pytest.raises(veneer.WatchError, match="14 of 28") as caught, veneer.watch(model, optimizer):
        steps(model, optimizer)
    assert [f.kind for f in caught.value.findings] == ["cut"]
    assert hooks(model) == before and not optimizer._optimizer_step_pre_hooks
    steps(model, optimizer)  # it looks once


def test_disabled_adapters_are_named_where_torch_complains() -> None:
    model = adapted()
    with pytest.raises(veneer.WatchError, match="Adapters are disabled"), veneer.watch(model, sgd(model)):
        with model.disable_adapter():
            loss_of(model).backward()


def test_outputs_of_the_base_alone_are_let_be() -> None:
    """As a reference, in a loop that does not bother to turn gradients off."""
    model = adapted()

    def loss(model: Any) -> torch.Tensor:
        with model.disable_adapter():
            reference = model(input_ids=IDS).logits
        return (
            loss_of(model)
            + (model(input_ids=IDS).logits - reference).square().mean()
            + model(input_ids=IDS).logits.mean()
        )

    assert run(model, loss=loss).findings == []


# Healthy recipes: model, config, and how it is trained.


def soft(name: str, **options: Any) -> Any:
    return getattr(veneer, name)(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)


HEALTHY: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lora": ("llama", veneer.LoraConfig(target_modules=LINEAR), {}),
    "lora with dropout and warm-up": ("llama", veneer.LoraConfig(target_modules=LINEAR, lora_dropout=0.1), {"warmup": 5}),
    "lora with accumulation": ("llama", veneer.LoraConfig(target_modules=LINEAR), {"accumulation": 3}),
    "lora in bf16": ("llama", veneer.LoraConfig(target_modules=LINEAR), {"dtype": torch.bfloat16}),
    "lora under autocast": ("llama", veneer.LoraConfig(target_modules=LINEAR), {"autocast": True}),
    "lora with checkpoints": ("llama", veneer.LoraConfig(target_modules=LINEAR), {"checkpoints": False}),
    "lora with reentrant checkpoints": ("llama", veneer.LoraConfig(target_modules=LINEAR), {"checkpoints": True}),
    "lora with a saved head": ("llama", veneer.LoraConfig(modules_to_save=["lm_head"]), {}),
    "lora on gpt2 with biases": ("gpt2", veneer.LoraConfig(target_modules=LINEAR, bias="lora_only"), {}),
    "lora with token rows": ("llama", veneer.LoraConfig(trainable_token_indices=[1, 2]), {}),  # no such token is there
    "lora, sgd over all parameters": ("llama", veneer.LoraConfig(), {"optimizer": "all"}),
    "lora, a scaler": ("llama", veneer.LoraConfig(), {"scaler": True}),
    "lora on experts": ("mixtral", veneer.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"]), {}),
    "dora": ("llama", veneer.LoraConfig(use_dora=True, target_modules=LINEAR), {}),
    "pissa": ("llama", veneer.LoraConfig(init_lora_weights="pissa", target_modules=LINEAR), {}),
    "loha": ("llama", veneer.LoHaConfig(target_modules=["q_proj", "down_proj"]), {}),
    "ia3": ("llama", veneer.IA3Config(task_type="CAUSAL_LM"), {}),
    "norms": ("llama", veneer.LNTuningConfig(task_type="CAUSAL_LM"), {}),
    "bitfit": ("bert", veneer.BitFitConfig(task_type="SEQ_CLS"), {}),
    "vera": ("llama", veneer.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]), {"warmup": 3}),
    "oft": ("llama", veneer.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]), {}),
    "bottleneck": ("bert", veneer.BottleneckConfig(), {}),
    "compacter": ("bert", veneer.BottleneckConfig(kind="compacter", reduction_factor=2), {}),
    "llama-adapter": ("llama", veneer.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"), {}),
    "prompt tuning": ("llama", soft("PromptTuningConfig"), {}),
    "p-tuning": ("llama", soft("PromptEncoderConfig", encoder_hidden_size=16), {"checkpoints": False}),
    "prefix tuning": ("llama", soft("PrefixTuningConfig"), {}),
    "prefix tuning, projected": ("llama", soft("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=16), {}),
    "cpt": ("llama", veneer.CPTConfig(cpt_token_ids=[3, 4, 5, 6], cpt_tokens_type_mask=[1, 2, 3, 4]), {}),
    "cpt, as it comes": ("llama", veneer.CPTConfig(cpt_token_ids=[3, 4, 5]), {}),
    "token rows": ("llama_tied", veneer.TrainableTokensConfig(token_indices=[3, 10]), {}),
    "seq2seq": ("t5", veneer.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wo"]), {}),
    "classification": ("bert", veneer.LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier"]), {}),
    "pictures": ("vit", veneer.LoraConfig(target_modules=LINEAR, modules_to_save=["classifier"]), {}),
    "speech": ("whisper", veneer.LoraConfig(target_modules=["q_proj", "v_proj"]), {}),
    "two adapters by row": ("llama", veneer.LoraConfig(target_modules=LINEAR), {"rows": True}),
    "int8": ("llama", veneer.LoraConfig(target_modules=LINEAR), {"stored": {"load_in_8bit": True}}),
    "nf4": ("llama", veneer.LoraConfig(target_modules=LINEAR), {"stored": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}),
    "lbfgs": ("llama", veneer.LoraConfig(), {"optimizer": "lbfgs"}),
}  # fmt: skip


def healthy(name: str, folder: Path) -> tuple[Any, Any, Callable[[], None]]:
    """A model, its optimizer, and one step."""
    kind, config, how = HEALTHY[name]
    base: Any = MODELS[kind].make()
    if "stored" in how:
        base.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**how["stored"]))
        veneer.prepare_model_for_kbit_training(base)
    base = base.to(how["dtype"]) if "dtype" in how else base
    model: Any = veneer.get_peft_model(base, config).train()
    inputs: dict[str, Any] = MODELS[kind].inputs()
    if "checkpoints" in how:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how["checkpoints"]})
    if "rows" in how:
        model.add_adapter("b", veneer.LoraConfig(r=4, target_modules=LINEAR))
        inputs["adapter_names"] = ["default", "b"]
    choices = {
        "all": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "lbfgs": lambda: torch.optim.LBFGS(trained(model), lr=0.1, max_iter=2),
        "adamw": lambda: torch.optim.AdamW(trained(model), lr=1e-2),
    }
    optimizer = choices[how.get("optimizer", "adamw")]()
    warmup = how.get("warmup", 0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / warmup) if warmup else 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**125, enabled="scaler" in how)  # overflows once or twice

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(**inputs).loss
        loss.backward()
        return loss

    def step() -> None:
        if how.get("optimizer") == "lbfgs":
            optimizer.step(closure)
            return
        for _ in range(how.get("accumulation", 1)):
            with torch.autocast("cpu", torch.bfloat16) if "autocast" in how else nullcontext():
                loss = model(**inputs).loss
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()

    return model, optimizer, step


def ours(run: Callable[[], None]) -> set[str]:
    """What runs of the watchdog's code."""
    seen: set[str] = set()

    def profile(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.endswith(("veneer/training/watch.py", "veneer/training/replay.py")):
            seen.add(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_recipes_are_let_be(name: str, tmp_path: Path) -> None:
    model, optimizer, step = healthy(name, tmp_path)
    before = hooks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", veneer.WatchWarning)
        watch = veneer.watch(model, optimizer)
        first = ours(step)
        for _ in range(4 if "scaler" in HEALTHY[name][2] else 1):
            step()
        assert watch.findings == [] and watch.closed and watch.steps == 2
    assert "Watch.before" in first
    assert (
        hooks(model) <= before and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    )
    assert ours(step) == set()


@pytest.mark.parametrize("name", ["lora with dropout and warm-up", "nf4", "two adapters by row", "vera"])
def test_the_numbers_are_the_same_unwatched(name: str, tmp_path: Path) -> None:
    ends = []
    for watched in (True, False):
        torch.manual_seed(3)
        model, optimizer, step = healthy(name, tmp_path)
        with veneer.watch(model, optimizer) if watched else nullcontext():
            for _ in range(3):
                step()
        ends.append([p.detach().clone() for p in trained(model)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# In a Trainer, and in `veneer train`.


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(8)]
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2, **options}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **settings
    )
    return Trainer(model, arguments, train_dataset=rows, callbacks=[veneer.WatchCallback()])


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "bf16": True}, {"gradient_checkpointing": True}]
)
def test_a_trainer_is_watched(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(lora_dropout=0.1)
    own = trainer(model, tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", veneer.WatchWarning)
        own.train()
    (callback,) = [c for c in own.callback_handler.callbacks if isinstance(c, veneer.WatchCallback)]
    assert callback.watch.steps == 2 and callback.watch.findings == [] and hooks(model) <= 1  # transformers' own


def test_a_trainer_stops_where_it_is_pointless(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(veneer.WatchError, match="The learning rate is 0"):
        trainer(model, tmp_path, learning_rate=0.0).train()
    model.add_adapter("b", veneer.LoraConfig(target_modules=LINEAR))
    model.set_requires_grad("default", False)
    with pytest.raises(veneer.WatchError, match=r"set_adapter\('b'\)"):
        trainer(model, tmp_path).train()


def test_train_is_watched(
    made: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = ["--model", made / "causal", "--data", made / "pairs.jsonl", *SMALL, "--out", tmp_path, "--samples", "0"]
    given += ["--learning-rate", "0", "--target-modules", LINEAR]
    done = CliRunner().invoke(app, ["train", *map(str, given)])
    assert done.exit_code == 1 and "The learning rate is 0" in done.output and "--no-watch" in done.output
    assert "Traceback" not in done.output and not (tmp_path / "report.json").exists()
    done = CliRunner().invoke(app, ["train", *map(str, given), "--no-watch", "--overwrite"])
    assert done.exit_code == 0 and (tmp_path / "report.json").exists()


def test_forwards_without_gradients_between_are_let_be() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with veneer.watch(model, optimizer) as watch:
        for _ in range(2):
            with torch.inference_mode():
                loss_of(model)
            loss = loss_of(model)
            with torch.no_grad():
                loss_of(model.eval())
            model.train()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watch.findings == [] and watch.steps == 2


@pytest.mark.parametrize("size", [1, 2, 16, 17, 28311552, 2**33 + 1])
def test_entries_that_are_compared_are_there(size: int) -> None:
    where = spread_positions(size).tolist()
    assert where[0] == 0 and where[-1] == size - 1 and len(set(where)) == min(size, 16)


def test_an_action_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="must be 'raise' or 'warn'"):
        veneer.watch(adapted(), action="stop")


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_that_deepspeed_takes_away_are_let_be(accumulation: int) -> None:
    """ZeRO's stages 1 and 2 keep gradients and what is updated in flat tensors of their own."""
    model = adapted()
    own = [nn.Parameter(p.detach().clone()) for p in trained(model)]
    for p, flat in zip(trained(model), own, strict=True):
        p._hp_mapping = flat  # type: ignore[attr-defined]

        def take(p: nn.Parameter, flat: nn.Parameter = flat) -> None:
            flat.grad, p.grad = p.grad, None

        p.register_post_accumulate_grad_hook(take)
    optimizer = torch.optim.AdamW(own, lr=1e-2)
    with veneer.watch(model, optimizer) as watch:
        for _ in range(3):
            for _ in range(accumulation):
                loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watch.findings == [] and watch.steps == 2


@pytest.mark.parametrize("how", ["a module", "in place"])
def test_compiled_models(how: str) -> None:
    model = adapted(llama(layers=1))
    torch._dynamo.reset()
    if how == "in place":
        model.get_base_model().compile(backend="eager")
    called = model if how == "in place" else torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    graphs = []
    with veneer.watch(called, optimizer) as watch:
        for _ in range(4):
            steps(called, optimizer, count=1)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert watch.findings == [] and watch.steps == 2
    assert graphs[0] == graphs[-1]  # nothing is compiled anew when it goes
    with pytest.raises(veneer.WatchError, match="lacks 14 of 14"), veneer.watch(called, optimizer):
        model.add_adapter("b", veneer.LoraConfig(r=4, target_modules=LINEAR))
        model.set_adapter("b")
        model.delete_adapter("default")
        steps(called, optimizer)


def test_losses_from_a_part_of_the_output_are_seen() -> None:
    """As TRL's, which come from the logits while the model computes a loss of its own too."""
    base = llama()
    base.model.layers[0].register_forward_hook(lambda m, a, y: y.detach())
    model = adapted(base)
    optimizer = sgd(model)
    with pytest.raises(veneer.WatchError, match="14 of 28"), veneer.watch(model, optimizer):
        steps(model, optimizer, lambda m: m(input_ids=IDS, labels=IDS).logits.square().mean())
    model = adapted()
    optimizer = sgd(model)
    with veneer.watch(model, optimizer) as watch:
        steps(model, optimizer, lambda m: m(input_ids=IDS, labels=IDS).logits.square().mean())
    assert watch.steps == 2 and watch.findings == []


def test_other_hooks_of_the_optimizer_run_on() -> None:
    model = adapted()
    optimizer = sgd(model)
    calls = []
    with veneer.watch(model, optimizer):
        optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *a: calls.append("post"))
        steps(model, optimizer, count=3)
    assert calls == ["pre", "post"] * 3
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_batches_without_a_gradient_between_are_let_be(set_to_none: bool) -> None:
    """Rewards that are all alike give gradients of 0; others of the same step do not."""
    model = adapted()
    optimizer = sgd(model)
    with veneer.watch(model, optimizer) as watch:
        for _ in range(3):
            for weight in (0, 0, 0, 1):
                (loss_of(model) * weight).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert watch.findings == [] and watch.steps == 2
