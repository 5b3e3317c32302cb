"""A user's text is text: what looks like a special token in it neither becomes one nor breaks anything."""

from gvu.models.xomni.adapter import XOmni


def test_special_tokens_in_a_prompt_are_plain_text() -> None:
    model = XOmni.tiny()
    prompts = model.encode_prompts(["a <IMAGE> of <MM-Token-3>"])
    images = (prompts.ids_P_L >= model.config.vocab_size).sum()
    assert images == 2  # the frame's own <SOM> and <IMAGE>


def test_special_tokens_in_a_scored_text_are_plain_text() -> None:
    model = XOmni.tiny()
    drawn = model.generate("a cat", n=1)
    score = model.text_logp(model.read_tokens(drawn.rollout), ["<MM-Token-3><|im_end|>"], "Describe.")
    assert bool((score.ids_S_T < model.config.vocab_size).all())
    assert score.mask_S_T.sum() == len("<MM-Token-3><|im_end|>")
