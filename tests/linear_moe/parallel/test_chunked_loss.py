"""The loss in chunks of tokens: the losses and gradients of one step over all tokens, on one process and on several."""

import pytest
from conftest import ARGUMENTS, PACKED, ROUTED, STEPS
from test_layouts import assert_same
from training import CP2, SP, TP2, gradients_of_first_step, launch, parameters

from linear_moe.entry import chunked_loss

CHUNK = 10
LAYOUTS = {"one": (1, []), "TP2": (2, TP2), "TP2+SP": (2, [*TP2, *SP]), "CP2": (2, CP2)}


def limit_logits():
    """A rank fails where more logits than a chunk's exist at once."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    compute = LanguageModule.compute_language_model_loss

    def limited(model, labels, logits):
        assert logits.shape[0] * logits.shape[1] <= CHUNK, logits.shape
        return compute(model, labels, logits)

    LanguageModule.compute_language_model_loss = limited


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", [ROUTED, PACKED])
def test_chunks_compute_what_all_tokens_compute(trained, documents, tmp_path, layout, model):
    expected, expected_folder = trained("1", model)
    ranks, arguments = LAYOUTS[layout]
    data = ["--data-path", documents, "--train-iters", STEPS, "--mom-loss-chunk", CHUNK]
    losses = launch(ranks, [*ARGUMENTS[model], *data, *arguments], tmp_path, save_at=(1,), prepare=limit_logits)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same(gradients_of_first_step(tmp_path), gradients_of_first_step(expected_folder))
    assert_same(parameters(tmp_path, STEPS), parameters(expected_folder, STEPS))


def test_the_hook_of_a_caller_stays():
    """A model that is given an output_processor of its own keeps it, and a model without labels computes logits."""

    class Config:
        mom_loss_chunk = 4

    class Model:
        config = Config()

    def postprocess(model, labels=None, output_processor=None):
        return output_processor

    own = object()
    assert chunked_loss._compute_in_chunks(postprocess, Model(), labels=1, output_processor=own) is own
    assert chunked_loss._compute_in_chunks(postprocess, Model(), labels=None) is None
    assert chunked_loss._compute_in_chunks(postprocess, Model(), labels=1) is chunked_loss.loss_in_chunks
