"""Conformance suite: what every adapter must do, checked on its `tiny()` model, on the CPU in fp32.

A package that adds a model runs all of it with

    from gvu.testing import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
    def test_conformance(check):
        check(MyModel.tiny)

Each check takes the factory (seed -> model), makes its own models and raises AssertionError where the adapter fails.
Logs compared are in nats. Shape suffixes: S samples, A actions, T text tokens.
"""

from collections.abc import Callable

from gvu.testing import drawing, reading, saving, training
from gvu.testing.common import Tiny

__all__ = ["CHECKS", "Tiny"]

CHECKS: tuple[Callable[[Tiny], None], ...] = (
    drawing.replay_equals_rollout,
    drawing.replay_equals_rollout_guided,
    drawing.padding_changes_nothing,
    drawing.groups_are_samples,
    drawing.codes_fit_the_codebook,
    drawing.seeds_are_the_only_chance,
    drawing.decode_is_per_sample,
    drawing.long_prompts_are_refused,
    reading.text_logp_is_token_by_token,
    reading.text_logp_ignores_the_batch,
    reading.tokens_read_as_pixels,
    reading.pixels_are_read_per_image,
    reading.unknown_paths_are_refused,
    reading.answers_ignore_the_batch,
    training.gradients_reach_lora_only,
    training.lora_scopes_differ,
    training.batches_change_nothing,
    training.teachers_are_what_they_say,
    training.ema_is_the_average,
    training.folding_in_is_temporary,
    saving.adapter_loads_with_peft,
    saving.second_adapter_is_refused,
    saving.merging_keeps_the_function,
    saving.checkpoints_come_back,
)
"""Every check, in the order of the interface."""
