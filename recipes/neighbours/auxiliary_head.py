"""An auxiliary task: a second head tells by how much an image is turned, and trains the chosen blocks with the first.

Boonlia et al. 2022, "Improving Self-supervised Learning for Out-of-distribution Task via Auxiliary Classifier" (arXiv
2209.02881), train a head for classes and one for rotations together. Their third head and its bi-level optimisation
are left out.

    python recipes/neighbours/auxiliary_head.py
    python recipes/neighbours/auxiliary_head.py --max-steps 2
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
WEIGHT = 0.5  # of the auxiliary loss


class TwoHeads(Trainer):
    """Adds to the loss that of telling rotations by 0, 90, 180 and 270 degrees."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The loss of both heads."""
        outputs = model(**inputs)
        base = self.accelerator.unwrap_model(model).get_base_model()
        turned, turns = rotate(inputs["pixel_values"])
        features = base.vit(pixel_values=turned).last_hidden_state[:, 0]
        loss = outputs.loss + WEIGHT * nn.functional.cross_entropy(base.rotation(features), turns)
        return (loss, outputs) if return_outputs else loss


def rotate(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each image of a batch turned by some quarters of a full turn, and how many."""
    turns = torch.randint(4, (len(images),), device=images.device)
    turned = [image.rot90(int(count), dims=(-2, -1)) for image, count in zip(images, turns, strict=True)]
    return torch.stack(turned), turns


def tune(recipe: Recipe) -> tuple[nn.Module, float]:
    """Tune the blocks of `recipe` and a new head for rotations; the accuracy on the validation split, too."""
    task, args = load_task(recipe, ("train", "validation")), recipe.arguments()
    model = task.load_model()
    model.rotation = nn.Linear(model.config.hidden_size, 4)
    # It is saved with the adapter: whoever loads that gives the model such a module first.
    model = get_surgical_model(model, SurgicalConfig(blocks=recipe.blocks, modules_to_save=["rotation"]))
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
        replace(recipe, training={**recipe.training, "max_steps": steps, "output_dir": "runs/auxiliary_head"})
    )
    print(f"validation: {accuracy:.1%}")
    return model, accuracy


if __name__ == "__main__":
    main()
