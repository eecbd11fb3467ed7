"""The learning rate of a run that was given none: what is usual for its stage.

stage         of all weights  where it is from
pretrain      6e-4            GPT-3's at 125M parameters (Brown et al. 2020, arXiv 2005.14165, table 2.1)
sft           2e-5            Llama 2 Chat's (Touvron et al. 2023, arXiv 2307.09288, section 3.1)
reward_model  1e-5            InstructGPT's 9e-6 (Ouyang et al. 2022, arXiv 2203.02155, C.2), rounded
dpo           1e-6            Rafailov et al. 2023, arXiv 2305.18290, appendix B
grpo          1e-6            DeepSeekMath's (Shao et al. 2024, arXiv 2402.03300, section 4.2)

LoRA wants about ten times as much as training all weights, whatever the task (Schulman et al. 2025, "LoRA Without
Regret", thinkingmachines.ai/blog/lora). Muon's rate of matrices keeps the proportion that it has to AdamW's rate in
pretraining: the elements of an orthogonalised update of a matrix 1,000 wide are about 0.03, those of AdamW's 1.
"""

PRETRAIN = 6.0e-4
MATRICES = 0.02  # Muon's in pretraining (Jordan et al. 2024, kellerjordan.github.io/posts/muon)
RATES = {"pretrain": PRETRAIN, "sft": 2.0e-5, "reward_model": 1.0e-5, "dpo": 1.0e-6, "grpo": 1.0e-6}
LORA = 10


def default_rate(stage: str, lora_rank: int) -> float:
    """`optim.lr` of a stage, by its name."""
    adapters = lora_rank > 0 and stage != "pretrain"
    return float(f"{RATES[stage] * (LORA if adapters else 1):.6g}")


def default_matrix_rate(stage: str) -> float:
    """`optim.matrix_lr`, of matrices under Muon, which LoRA excludes."""
    return float(f"{MATRICES / PRETRAIN * RATES[stage]:.2g}")
