"""Hugging Face's Trainer with FlashMuon in its DeepSpeed config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashns_dist.testing.pool import RankPool
from tests.integrations.deepspeed_training import deepspeed_ready

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.hidden = nn.Linear(12, 20, bias=False)
        self.norm = nn.LayerNorm(20, bias=False)
        self.head = nn.Linear(20, 3, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(torch.relu(self.hidden(self.embed(tokens).mean(1)))))
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def dataset() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 17, (64, 5), generator=generator)
    return [{"tokens": row, "labels": row.sum() % 3} for row in tokens]


def train_with_trainer(folder: str) -> list[dict[str, Any]]:
    from transformers import Trainer, TrainingArguments

    # Read by accelerate; the pool's process group exists already.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29571")
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    found = []
    with deepspeed_ready():
        for stage in (1, 3):
            settings = {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": stage},
                "optimizer": {
                    "type": "FlashMuon",
                    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "aux_lr": 0.01},
                },
            }
            arguments = TrainingArguments(
                output_dir=f"{folder}/{stage}",
                deepspeed=settings,
                learning_rate=0.02,
                lr_scheduler_type="linear",
                warmup_steps=0,
                max_steps=6,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            torch.manual_seed(0)
            trainer = Trainer(model=Classifier(), args=arguments, train_dataset=dataset())
            trainer.train()
            optimizer = trainer.model_wrapped.basic_optimizer
            found.append(
                {
                    "kind": type(optimizer).__name__,
                    "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
                    "ratios": [group["lr_ratio"] for group in optimizer.param_groups],
                    "lrs": [float(group["lr"]) for group in optimizer.param_groups],
                    "matrices": [
                        item.name
                        for partition in optimizer._partitions
                        for item in partition.slices
                        if partition.group_index == 0
                    ],
                }
            )
            trainer.model_wrapped.destroy()
            trainer.accelerator.free_memory()
            type(trainer.accelerator.state)._reset_state(reset_partial_state=True)
    return found


def test_trainer_trains_with_flash_muon_in_its_config(ranks: RankPool, tmp_path: Path) -> None:
    one, three = ranks.run(2, train_with_trainer, str(tmp_path))[0]
    for result in (one, three):
        assert result["kind"] == "FlashNS"
        assert result["matrices"] == ["hidden.weight"]
        assert result["ratios"] == [1.0, 0.5]
        assert result["lrs"][0] == result["lrs"][1] < 0.02
    assert one["losses"] == pytest.approx(three["losses"], abs=2e-4)
    assert one["losses"][-1] != one["losses"][0]
