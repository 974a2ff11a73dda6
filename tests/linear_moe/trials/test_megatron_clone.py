"""Two dozen commands of Megatron-LM's users, of different kinds, shrunk and run: MOM_MEGATRON_LM names a clone.

    MOM_MEGATRON_LM=path/to/Megatron-LM python -m pytest tests/linear_moe/trials

All commands: python tools/try_megatron_commands.py path/to/Megatron-LM --output DIR.
"""

import os
from pathlib import Path

from linear_moe.commands import try_megatron_commands
from linear_moe.trials.runs import MOM, RESUMED, SOFTMAX, SOFTMAX_RESUMED
from linear_moe.trials.table import Rows
from linear_moe.trials.verdict import FAILS, REFUSED, TRAINS

CLONE = os.environ.get("MOM_MEGATRON_LM")

TRAIN = (
    "tests/gpt/gpt3_mcore_te_tp1_pp1_dist_optimizer_fim_dataset",
    "tests/gpt/gpt3_mcore_te_tp1_pp1_resume_torch_dist_uniform_full_recompute",
    "tests/gpt/gpt3_mcore_te_tp1_pp2_cp4_a2a_p2p_nondeterministic",
    "tests/gpt/gpt3_mcore_te_tp1_pp4_vp1_dist_optimizer_overlap_grad_reduce_param_gather_overlap_optimizer",
    "tests/gpt/gpt3_mcore_te_tp1_pp4_vp1_resume_torch_decoupled_lr",
    "tests/gpt/gpt3_mcore_te_tp1_pp4_vp1_uneven_pipeline",
    "tests/gpt/gpt3_mcore_te_tp1_pp4_vp2_account_for_embedding_loss_in_pipeline_split",
    "tests/gpt/gpt3_mcore_te_tp2_pp1_gdn",
    "tests/gpt/gpt3_mcore_te_tp2_pp2_cp2_etp4_calculate_per_token_loss_dp_last",
    "tests/gpt/gpt3_mcore_te_tp2_pp2_dsa",
    "tests/gpt/gpt3_mcore_te_tp2_pp2_mla",
    "tests/gpt/gpt3_mcore_te_tp4_pp1_resume_torch_dist_qk_layernorm_test_mode",
    "tests/gpt/gpt3_mcore_tp1_pp2_fp16",
    "tests/gpt/gpt3_weekly_mcore_tp2_pp2_current_scaling_native_fp8_tp_pp_sp_tp_overlap",
    "tests/mixtral/mixtral_8x7b_tp1pp4ep8vpp8_release",
    "tests/moe/gpt3_mcore_te_tp2_pp1_te_a2a_ovlp_8experts_etp1_ep4",
    "tests/moe/gpt3_mcore_tp2_cp2_pp2_ep2_te_4experts2parallel_dp_last",
    "tests/moe/gpt3_moe_mcore_te_tp4_ep2_etp2_pp2_resume_torch_dist_dist_optimizer",
    "examples/gpt3/train_gpt3_175b_distributed",
    "examples/llama/train_llama3_8b_h100_fp8",
    "examples/mixtral/train_mixtral_8x7b_distributed",
    "public/swiss_ai_llama3_70b",
    "public/krafton_nanomoe_adam",
    "public/llm_jp_moe_18b",
)
DIFFERENT_WITH_SOFTMAX = TRAIN[:1]
"""Megatron's data set of fill-in-the-middle draws from a generator that starts anew where a run is resumed."""
REFUSED_WITH = {
    "tests/hybrid/hybrid_mr_mcore_te_tp1_pp1_cp1_dgx_a100_1N8G": "write R for each layer",
}

if CLONE:

    def test_the_word_is_enough(tmp_path):
        given = [*TRAIN, *REFUSED_WITH]
        words = [CLONE, "--output", str(tmp_path), "--exactly", *given, "--jobs", "2"]
        assert try_megatron_commands.main(words) == 0
        rows = Rows(Path(tmp_path) / "commands.csv")
        behind = {name: rows.reason(name, MOM) for name in TRAIN if rows.result(name, MOM) != TRAINS}
        assert behind == {}
        different = {name: rows.reason(name, RESUMED) for name in TRAIN if rows.result(name, RESUMED) != TRAINS}
        assert set(different) <= set(DIFFERENT_WITH_SOFTMAX), different
        assert {rows.result(name, SOFTMAX_RESUMED) for name in different} <= {FAILS}
        for name, line in REFUSED_WITH.items():
            assert (rows.result(name, MOM), rows.result(name, SOFTMAX)) == (REFUSED, REFUSED)
            assert line in rows.reason(name, MOM)
