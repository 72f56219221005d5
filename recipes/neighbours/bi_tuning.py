"""Two heads on the chosen blocks: a classifier, and a projector that draws images of one class together.

Zhong et al. 2020, "Bi-tuning of Pre-trained Representations" (arXiv 2011.06182), put both heads upon the backbone and
have a contrastive loss for each. Here the classifier keeps its cross-entropy, and the projector has the supervised
contrastive loss of Khosla et al. 2020 (arXiv 2004.11362, equation 2, a mean where that has a sum) within a batch:
simpler than theirs.

    python recipes/neighbours/bi_tuning.py
    python recipes/neighbours/bi_tuning.py --max-steps 2
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from surgical_peft import SurgicalCallback, SurgicalConfig, get_surgical_model, surgical_optimizer
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.tasks import load_task

RECIPES = Path(__file__).parents[1]
SIZE, TEMPERATURE, WEIGHT = 32, 0.1, 0.5


def contrastive(projections: Tensor, labels: Tensor) -> Tensor:
    """How unlike those of its class each example is, against all others; mean over those that are not alone."""
    unit = nn.functional.normalize(projections, dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    similar = (unit @ unit.T / TEMPERATURE).masked_fill(itself, float("-inf"))
    log_share = similar.log_softmax(dim=-1).masked_fill(itself, 0.0)
    same = (labels[:, None] == labels[None, :]) & ~itself
    count = same.sum(-1)
    each = -(log_share * same).sum(-1)[count > 0] / count[count > 0]
    return each.mean() if len(each) else projections.sum() * 0.0


class TwoHeads(Trainer):
    """Adds the projector's loss to the classifier's."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The loss of both heads."""
        outputs = model(**inputs, output_hidden_states=True)
        base = self.accelerator.unwrap_model(model).get_base_model()
        loss = outputs.loss + WEIGHT * contrastive(base.projector(outputs.hidden_states[-1][:, 0]), inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def tune(recipe: Recipe) -> tuple[nn.Module, float]:
    """Tune the blocks and the head of `recipe` and a projector; the accuracy on the validation split, too."""
    task, args = load_task(recipe, ("train", "validation")), recipe.arguments()
    model = task.load_model()
    model.projector = nn.Linear(model.config.hidden_size, SIZE)
    # It is saved with the adapter: whoever loads that gives the model such a module first.
    config = SurgicalConfig(blocks=[*recipe.blocks, "head"], modules_to_save=["projector"])
    model = get_surgical_model(model, config)
    trainer = TwoHeads(
        model=model,
        args=args,
        train_dataset=task.splits["train"],
        data_collator=task.collate,
        optimizer_cls_and_kwargs=surgical_optimizer(args, recipe.make_policy()),
        callbacks=[SurgicalCallback()],
    )
    trainer.train()
    return model, task.measure(model, task.splits["validation"])


def main(arguments: list[str] | None = None) -> tuple[nn.Module, float]:
    """Noisy images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-steps", type=int, default=-1)
    steps = parser.parse_args(arguments).max_steps
    recipe = load_recipe(RECIPES / "noise.yaml")
    model, accuracy = tune(
        replace(recipe, training={**recipe.training, "max_steps": steps, "output_dir": "runs/bi_tuning"})
    )
    print(f"validation: {accuracy:.1%}")
    return model, accuracy


if __name__ == "__main__":
    main()
