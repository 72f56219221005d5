"""Batches whose rows go through different adapters: as if each row had been asked alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.tuner.mixed_batches import run_by_rows
from tests.support.toys import TOYS, Toy

NAMES = ["a", "__base__", "b", "a"]


def two_adapters(toy: Toy, **kwargs: object) -> PeftModel:
    """Adapter `a` on the first block, `b` on the first and the last."""
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[toy.first], **kwargs), adapter_name="a")
    model.add_adapter("b", SurgicalConfig(blocks=[toy.first, toy.last], **kwargs))
    for number, name in enumerate("ab", start=1):
        model.set_adapter(name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.set_adapter("a")
    return model.eval()


def row_by_row(model: PeftModel, batch: dict[str, Tensor], names: list[str]) -> Tensor:
    """The reference: every example alone, through the adapter of its name."""
    rows = []
    for index, name in enumerate(names):
        row = {key: value[index : index + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(**row).logits)
        else:
            model.set_adapter(name)
            rows.append(model(**row).logits)
    model.set_adapter("a")
    return torch.cat(rows)


def inputs(toy: Toy) -> dict[str, Tensor]:
    batch = {key: value for key, value in toy.batch().items() if key != "labels"}
    if toy.name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    if toy.name in ("bert", "llama", "t5"):
        mask = torch.ones_like(batch["input_ids"])
        mask[1, -2:] = 0
        batch["attention_mask"] = mask
    return batch


@torch.no_grad()
def test_each_row_goes_through_its_own_adapter(toy: Toy) -> None:
    model = two_adapters(toy)
    batch = inputs(toy)
    mixed = model(**batch, adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, row_by_row(model, batch, NAMES), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**batch).logits, model(**batch, adapter_names=["a"] * 4).logits)


@torch.no_grad()
def test_disabled_layers_run_the_base_for_every_row_and_after(toy: Toy) -> None:
    model = two_adapters(toy)
    batch = inputs(toy)
    with model.disable_adapter():
        base = model(**batch).logits
    model.base_model.disable_adapter_layers()  # PeftModel does not know of it, and asks for the rows still
    torch.testing.assert_close(model(**batch, adapter_names=NAMES).logits, base, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**batch).logits, base)


@torch.no_grad()
def test_what_the_adapters_share_runs_once(vit: Toy) -> None:
    model = two_adapters(vit)
    calls: dict[str, list[int]] = {}
    rows: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "ViTLayer":
            module.register_forward_hook(
                lambda _, args, __, name=name: calls.setdefault(name.rpartition("layers.")[2], []).append(len(args[0]))
            )
            module.mlp.register_forward_hook(
                lambda _, args, __, name=name: rows.setdefault(name.rpartition("layers.")[2], []).append(len(args[0]))
            )
    model(**inputs(vit), adapter_names=NAMES)
    assert [calls[str(index)] for index in range(12)] == [[4]] * 12  # hooks see the batch once, and whole
    assert [rows[str(index)] for index in range(1, 11)] == [[4]] * 10
    assert rows["0"] == [2, 1, 1] and rows["11"] == [3, 1]


@torch.no_grad()
def test_with_lora_beside(vit: Toy) -> None:
    model = two_adapters(
        vit, lora=LoraConfig(r=2, target_modules=r".*layers\.[5-7]\..*q_proj", init_lora_weights=False)
    )
    batch = inputs(vit)
    torch.testing.assert_close(
        model(**batch, adapter_names=NAMES).logits, row_by_row(model, batch, NAMES), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generates_for_each_row_and_beam(name: str, beams: int) -> None:
    model = two_adapters(TOYS[name])
    prompt = TOYS[name].batch()["input_ids"]
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=prompt, adapter_names=["a", "b", "b", "a"], **settings)
    assert model.config.use_cache and model.generation_config.use_cache
    for index, adapter in enumerate("abba"):
        model.set_adapter(adapter)
        alone = model.generate(input_ids=prompt[index : index + 1], **settings)[0]
        assert torch.equal(mixed[index, : len(alone)], alone)


def test_what_cannot_be_mixed_is_said(vit: Toy) -> None:
    model, batch = two_adapters(vit), inputs(vit)
    with pytest.raises(SurgicalError, match=r"nobody.*a, b, and '__base__'"):
        model(**batch, adapter_names=["a", "nobody", "b", "a"])
    with pytest.raises(SurgicalError, match="but got 3 and 4 respectively"):
        model(**batch, adapter_names=["a", "b", "a"])
    with pytest.raises(SurgicalError, match=r"model.eval\(\) first"):
        model.train()(**batch, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(SurgicalError, match="`unmerge_adapter` first"):
        model(**batch, adapter_names=NAMES)
    llama = two_adapters(TOYS["llama"])
    with pytest.raises(SurgicalError, match="use_cache=False"):
        llama(**inputs(TOYS["llama"]), adapter_names=NAMES, use_cache=True)
    assert llama.config.use_cache
    for wrapped in (model, llama):
        assert not any("forward" in vars(module) for module in wrapped.modules())


def test_rows_that_are_not_examples_are_refused() -> None:
    with pytest.raises(SurgicalError, match=r"adapter_names has 3 names.*\(4, 3\)"):
        run_by_rows(["a", "b", "a"], lambda name, x: x, torch.zeros(4, 3))

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model = get_peft_model(Attends(), SurgicalConfig(target_modules=["attention"]), adapter_name="a").eval()
    with pytest.raises(SurgicalError, match="batch_first=True"):
        model(torch.zeros(2, 2, 4), adapter_names=["a", "__base__"])
    assert "forward" not in vars(model.base_model.model.attention)


class Windows(nn.Module):
    """Sees each example as two rows, and answers with one row for all besides."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, *, per_example: Tensor, for_all: Tensor) -> dict[str, Tensor | float]:
        return {"rows": x * self.factor + for_all, "bias": torch.full((1, 3), self.factor), "rest": per_example.sum()}


def test_windows_stay_with_their_example() -> None:
    modules = {"one": Windows(1.0), "two": Windows(10.0)}
    x = torch.arange(12.0).reshape(6, 2)

    def run(name: str, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor | float]:
        return modules[name](*args, **kwargs)

    out = run_by_rows(["two", "one", "two"], run, x, per_example=torch.ones(6, 1), for_all=torch.ones(1, 2))
    factors = torch.tensor([10.0, 10, 1, 1, 10, 10])[:, None]
    assert torch.equal(out["rows"], x * factors + 1)
    assert torch.equal(out["bias"], factors.expand(6, 3))
