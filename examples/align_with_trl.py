"""Align a pruned child with trl: supervised fine-tuning on a few dialogues, then DPO on pairs of answers.

The child is a plain checkpoint, so trl takes it as it takes any other; the chat template is the parent's. The data is
a small set that this script makes: questions about sums, with a right and a wrong answer. Needs `pip install
"nestling[align]"`.

    python examples/align_with_trl.py runs/demo/model --out runs/aligned [--steps 20]
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the child")
    parser.add_argument("--out", default="runs/aligned")
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    chosen = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(chosen.model)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    gpu = torch.cuda.is_available()
    common = {"max_steps": chosen.steps, "per_device_train_batch_size": 2, "report_to": "none", "logging_steps": 5}
    common |= {"use_cpu": not gpu, "bf16": gpu, "save_strategy": "no", "max_length": 128}

    sft = SFTConfig(f"{chosen.out}/sft", learning_rate=2e-5, **common)
    SFTTrainer(model, sft, train_dataset=dialogues(), processing_class=tokenizer).train()

    dpo = DPOConfig(f"{chosen.out}/dpo", learning_rate=5e-6, **common)
    DPOTrainer(model, args=dpo, train_dataset=preferences(), processing_class=tokenizer).train()

    model.save_pretrained(chosen.out)
    tokenizer.save_pretrained(chosen.out)
    print(f"aligned model: {chosen.out}")


def sums() -> list[tuple[str, str, str]]:
    """A question, the right answer and a wrong one."""
    numbers = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    asked = [(f"{a} plus {b}", a + b) for a, b in numbers]
    return [(f"What is {sum_}?", f"{sum_} is {value}.", f"{sum_} is {value + 1}.") for sum_, value in asked]


def dialogues() -> Dataset:
    return Dataset.from_list([{"messages": [said("user", ask), said("assistant", good)]} for ask, good, _ in sums()])


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [said("user", ask)], "chosen": [said("assistant", good)], "rejected": [said("assistant", bad)]}
            for ask, good, bad in sums()
        ]
    )


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


if __name__ == "__main__":
    main()
